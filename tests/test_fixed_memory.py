"""A fixed memory: a decoded token is one graph whose tensors keep their addresses, so that a GPU can replay it."""

import pytest
import torch
from transformers import CompileConfig

from memlm import MemoryCache
from memlm_kernels.testing import Watch
from tests.conftest import MEMORIES, build

# As in tests/test_compile.py.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated"
)

# Its state keeps every token, and has no room; that of chunk_sparse keeps its last chunks.
GROWING = ("msa",)
SETTINGS = {"chunk_sparse": {"max_chunks": 9}}
# Without a place in a chunk that the host knows, these take the way of packed rows, which rounds otherwise; attention
# reads all places of its room under a mask.
ROUNDED = ("attention", "bmojo", "chunk_sparse", "lact", "titans_mac", "titans_tnt", "two_rate")
FIXED = [
    pytest.param(name, marks=[] if name == "titans_mag" else pytest.mark.slow)
    for name in MEMORIES
    if name not in GROWING
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ids_of(length):
    return torch.randint(250, (2, length), generator=torch.Generator().manual_seed(0))


def begun(model, ids):
    """An ordinary and a fixed memory that have read the same."""
    memories = MemoryCache(), MemoryCache(fixed=True, max_length=70)
    with torch.no_grad():
        for memory in memories:
            model(ids, past_key_values=memory)
    return memories


def addresses(memory):
    return [x.data_ptr() for x in memory._tensors()]


@pytest.mark.parametrize("name", FIXED)
def test_a_token_is_one_graph_of_fixed_tensors(name):
    """Over ends of chunks: no number in the graph changes, no second graph is made, and no tensor moves."""
    model, ids, graphs = build(name, torch.float32, **SETTINGS.get(name, {})), ids_of(40), []
    expected, fixed = begun(model, ids[:, :20])
    before = addresses(fixed)

    def keep(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(model, backend=keep, fullgraph=True, dynamic=False)
    tolerance = {"rtol": 0.0, "atol": 1e-5} if name in ROUNDED else {"rtol": 0.0, "atol": 0.0}
    with torch.no_grad():
        for t in range(20, 40):
            token = ids[:, t : t + 1]
            with torch.compiler.set_stance("default" if t == 20 else "fail_on_recompile"):
                a = model(token, past_key_values=expected, output_metrics=False).logits
                b = step(token, past_key_values=fixed, output_metrics=False).logits
            torch.testing.assert_close(b, a, **tolerance, msg=str(t))
    (graph,) = graphs
    inputs = [x.meta for x in graph.graph.nodes if x.op == "placeholder"]
    assert all(isinstance(x["example_value"], torch.Tensor) for x in inputs)
    # A CUDA graph copies only the token into its own memory.
    assert sum("_dynamo_static_input_type" not in x["tensor_dict"] for x in inputs) == 1
    assert addresses(fixed) == before
    assert (fixed.seen, fixed.position.tolist()) == (40, [40, 40])


@pytest.mark.parametrize("name", FIXED)
def test_a_token_asks_the_device_nothing(name):
    model, ids = build(name, torch.float32, **SETTINGS.get(name, {})), ids_of(40)
    _, fixed = begun(model, ids[:, :20])
    with torch.no_grad(), Watch() as watch:
        for t in range(20, 40):
            model(ids[:, t : t + 1], past_key_values=fixed, output_metrics=False)
    assert watch.asked == []


@pytest.mark.parametrize("name", ["gated_delta_net"])
def test_generate_with_compiled_steps(name):
    model, ids = build(name, torch.float32), ids_of(20)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(ids, **settings)
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    compiled._compile_all_devices = True
    settings |= {"cache_implementation": "static", "compile_config": compiled, "return_dict_in_generate": True}
    out = model.generate(ids, **settings)
    assert torch.equal(out.sequences, eager)
    assert hasattr(model, "_compiled_call") and out.past_key_values.fixed
    # A prompt with padding, and a memory of one's own.
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    memory = MemoryCache(fixed=True)
    padded = model.generate(ids, attention_mask=mask, past_key_values=memory, max_new_tokens=4, do_sample=False)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(padded, expected)


def test_rows_of_a_fixed_memory():
    """Rows move and begin anew in place; a fork is an ordinary memory of its own."""
    model, ids = build("titans_mag", torch.float32), ids_of(30)
    expected, fixed = begun(model, ids[:, :20])
    before, fork = addresses(fixed), fixed.fork()
    fixed.reorder_cache(torch.tensor([1, 0]))
    expected.reorder_cache(torch.tensor([1, 0]))
    fixed.reset([1])
    expected.reset([1])
    with torch.no_grad():
        for t in range(20, 24):
            a, b = (model(ids[:, t : t + 1], past_key_values=x).logits for x in (expected, fixed))
            assert torch.equal(a, b)
    assert addresses(fixed) == before
    assert not fork.fixed and fork.seen == 20 and not {*addresses(fork)} & {*before}


def test_a_fixed_memory_that_grows_is_refused():
    model = build("msa", torch.float32)
    with pytest.raises(ValueError, match="kind 'msa' keeps every token; leave fixed=True out"):
        model(ids_of(4), past_key_values=MemoryCache(fixed=True, max_length=9))
    model = build("chunk_sparse", torch.float32)
    with pytest.raises(ValueError, match="kind 'chunk_sparse' keeps every token; leave fixed=True out"):
        model(ids_of(4), past_key_values=MemoryCache(fixed=True, max_length=9))
    model = build("attention", torch.float32)
    with pytest.raises(ValueError, match="kind 'attention' keeps every token; give max_length"):
        model(ids_of(4), past_key_values=MemoryCache(fixed=True))
    full = MemoryCache(fixed=True, max_length=5)
    with pytest.raises(ValueError, match="a fixed memory reads without gradients"):
        model(ids_of(4), past_key_values=full)
    with torch.no_grad(), pytest.raises(RuntimeError, match="more than max_length=5 tokens"):
        for length in (4, 1, 1):
            model(ids_of(length), past_key_values=full)
    with pytest.raises(ValueError, match="cache_implementation='quantized'"):
        model.generate(ids_of(4), cache_implementation="quantized", max_new_tokens=2)
