"""torch.compile: one graph for a training step and for a call with a memory, and the results of eager code."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import memlm
from memlm import MemoryCache
from memlm_kernels import set_backend
from tests.conftest import MEMORIES, ROOT, build

# Dynamo reads the .grad of each input of a graph and makes objects of autograd functions, and hides the warnings of
# torch; as errors they come before it can hide them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated"
)

# The op of a deep memory with a window, or with Muon, has no kernels.
WITHOUT_KERNELS = ("omeganet",)


def quick(names, among=MEMORIES):
    """All memories; only the named ones run by default."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in among]


def ids_of(length, rows=2):
    return torch.randint(250, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def same_gradients(model):
    """A training step in one graph: its loss and all gradients are those of eager code."""

    def gradients(step):
        model.zero_grad()
        loss = step(ids_of(20), labels=ids_of(20), use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    eager, compiled = gradients(model), gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert eager.keys() == compiled.keys()
    for name, x in eager.items():
        torch.testing.assert_close(compiled[name], x, rtol=1e-5, atol=1e-7, msg=name)


def same_tokens(model, ids, caches, warm, end, **options):
    """Tokens after the first 20 in eager and in compiled code; from ``warm`` on no new graph is made."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
        for t in range(20, end):
            with torch.compiler.set_stance("default" if t < warm else "fail_on_recompile"):
                a, b = (
                    call(ids[:, t : t + 1], past_key_values=cache, **options).logits
                    for call, cache in zip((model, compiled), caches, strict=True)
                )
            assert torch.equal(a, b), t


@pytest.mark.parametrize(
    ("kernels", "memory"),
    [
        *(pytest.param("reference", *x.values, marks=x.marks) for x in quick(["attention", "titans_lmm"])),
        *(
            pytest.param("triton", *x.values, marks=x.marks)
            for x in quick([], [name for name in MEMORIES if name not in WITHOUT_KERNELS])
        ),
    ],
)
def test_a_training_step_is_one_graph(kernels, memory):
    """With and without kernels; the loss and all gradients are those of eager code."""
    model = build(memory, torch.float32).train()
    if kernels == "reference" and memory != "attention":
        # Tracing takes as long for each layer; attention has two, which share what ``rows`` makes once.
        model.config.num_hidden_layers, model.model.layers = 1, model.model.layers[:1]
    with set_backend(kernels):
        same_gradients(model)


@pytest.mark.parametrize("memory", quick(["attention"]))
def test_a_memory_that_compiled_code_begins(memory):
    model, ids = build(memory, torch.float32), ids_of(20)
    expected, got = MemoryCache(), MemoryCache()
    with torch.no_grad():
        a = model(ids, past_key_values=expected).logits
        b = torch.compile(model, backend="eager", fullgraph=True)(ids, past_key_values=got).logits
        assert torch.equal(a, b)
        a, b = (model(ids[:, :3], past_key_values=x).logits for x in (expected, got))
    assert torch.equal(a, b) and (got.start, got.seen, got.signature) == (23, 23, expected.signature)


@pytest.mark.parametrize("memory", quick(["attention"]))
def test_tokens_need_no_new_graph(memory):
    """Graphs exist after the first chunks, of TNT after its first two shards; then no token needs another one."""
    seen = {"attention": (23, 55), "gated_delta_net": (23, 55), "titans_tnt": (128, 192)}
    warm, end = seen.get(memory, (68, 100))
    model, ids = build(memory, torch.float32), ids_of(end)
    same_tokens(model, ids, [MemoryCache(), MemoryCache()], warm, end, output_metrics=False)


@pytest.mark.parametrize("memory", quick(["attention"]))
def test_generate_with_a_compiled_model(memory):
    model, ids = build(memory, torch.float32), ids_of(20)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(ids, **settings)
    model.compile(backend="eager", fullgraph=True)
    assert torch.equal(model.generate(ids, **settings), eager)


def test_saving_a_memory_that_compiled_code_began(tmp_path):
    model, ids = build("attention", torch.float32), ids_of(20)
    memory = MemoryCache()
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(ids, past_key_values=memory)
    memory.save(tmp_path)
    with torch.no_grad():
        a, b = (model(ids, past_key_values=x).logits for x in (memory, MemoryCache.load(tmp_path)))
        assert torch.equal(a, b)
        model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="changed since this memory began"):
        memory.save(tmp_path)


def with_memory(memory):
    """A small Llama with a memory of configs/memory attached, its gates open."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, num_hidden_layers=2, **sizes))
    settings = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "memory" / f"{memory}.yaml"))
    memlm.attach(model, settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("memory", quick([], ["titans_lmm", "gated_delta_net", "mom", "lact"]))
def test_training_with_an_attached_memory_is_one_graph(memory):
    same_gradients(with_memory(memory).train())


@pytest.mark.parametrize("memory", quick(["gated_delta_net"], ["titans_lmm", "gated_delta_net"]))
def test_tokens_of_an_attached_memory_need_no_new_graph(memory):
    model, ids = with_memory(memory), ids_of(100)
    warm = 22 if memory == "gated_delta_net" else 68
    same_tokens(model, ids, [DynamicCache(config=model.config) for _ in "ab"], warm, warm + 12)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False, output_metrics=False).logits


def exported(memory, dynamic_shapes):
    model = Logits(build(memory, torch.float32))
    with torch.no_grad():
        return model, torch.export.export(model, (ids_of(24),), dynamic_shapes=dynamic_shapes).module()


LENGTH = {"ids": {1: torch.export.Dim("length", min=2, max=4096)}}


@pytest.mark.parametrize("memory", quick(["attention"], ["attention", "msa"]))
def test_exported_code_serves_every_length(memory):
    model, code = exported(memory, LENGTH)
    with torch.no_grad():
        for length in (2, 61, 300):
            assert torch.equal(code(ids_of(length)), model(ids_of(length))), length


LOOPS = [name for name in MEMORIES if name not in ("attention", "msa")]


@pytest.mark.parametrize(
    "memory", quick(["titans_lmm", "titans_tnt", "gated_delta_net", "lact", "chunk_sparse"], LOOPS)
)
def test_export_of_every_length_is_refused_where_a_loop_follows_it(memory):
    with pytest.raises(ValueError, match="needs a fixed number of tokens") as error:
        exported(memory, LENGTH)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("memory", quick([]))
def test_export_of_a_fixed_length(memory):
    model, code = exported(memory, None)
    with torch.no_grad():
        assert torch.equal(code(ids_of(24)), model(ids_of(24)))
