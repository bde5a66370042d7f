"""Triton's kernels against the references, in Triton's interpreter where there is no GPU."""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from memlm_kernels import linear_attention, neural_memory
from memlm_kernels.testing import assert_close, grads_of
from tests.kernels.test_linear_recurrences import OPS, inputs, run

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Of outputs and of gradients. bf16 is for GPUs alone: the interpreter's products of it are garbage.
TOLERANCES = {
    torch.float32: (1e-5, 1e-4) if GPU else (1e-6, 2e-6),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (1e-2, 2e-2),
}
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU")]
)
SEGMENTS = [[0, 0, 10, 10, 70], [0, 4, 5, 40, 75]]


@pytest.fixture(autouse=True)
def poisoned():
    """What is not written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    # On a GPU the references have products and sums without an order.
    torch.use_deterministic_algorithms(True, warn_only=GPU)
    yield
    torch.use_deterministic_algorithms(before)


def compare(function, tensors, dtype):
    """function(tensors, backend) -> outputs; the first three tensors are q, k, v."""
    tensors = [x.to(DEVICE, dtype if i < 3 else torch.float32) for i, x in enumerate(tensors)]
    outputs = {"reference": [], "triton": []}

    def together(backend):
        def call(*x):
            outputs[backend] = function(x, backend)
            return torch.cat([y.double().flatten() for y in outputs[backend] if y.requires_grad])

        return call

    expected = grads_of(together("reference"), [x.double() for x in tensors])
    gradients = zip(expected, grads_of(together("triton"), tensors), strict=True)
    for_outputs, for_gradients = TOLERANCES[dtype]
    for i, (e, g) in enumerate(zip(*outputs.values(), strict=True)):
        assert_close(f"output {i}", e, g, for_outputs)
    for i, (e, g) in enumerate(gradients):
        assert_close(f"gradient {i}", e, g, for_gradients)


def recurrence(op, cu_seqlens=None):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    return lambda x, backend: run(op, x[:-1], cu_seqlens=cu, state=x[-1], backend=backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("length", "keys", "values"), [(1, 60, 100), (63, 100, 5), (75, 6, 20), pytest.param(260, 17, 40, id="64_a_chunk")]
)
def test_recurrence_of_any_size(op, length, keys, values):
    tensors = [x[:1] for x in inputs(op, length, heads=1, keys=keys, values=values)]
    state = torch.randn(1, 1, 1, keys, values, dtype=torch.float64)
    compare(recurrence(op), [*tensors, state], torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_recurrence_over_segments(op):
    state = torch.randn(2, 4, 1, 6, 5, dtype=torch.float64)
    compare(recurrence(op, SEGMENTS), [*(x[:2] for x in inputs(op, heads=1)), state], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
@pytest.mark.parametrize("op", OPS)
def test_recurrence_in_16_bits(op, dtype):
    tensors = [x[:1] for x in inputs(op, heads=1, keys=20, values=20)]
    # Queries of unit length, for sums of any size to be compared.
    tensors[0] = F.normalize(tensors[0], dim=-1)
    compare(recurrence(op), [*tensors, torch.randn(1, 1, 1, 20, 20, dtype=torch.float64)], dtype)


@pytest.mark.parametrize("op", ["linear_scalar", "linear_channel", "delta_decay"])
def test_strong_decay_neither_overflows_nor_loses_digits(op):
    tensors = [x[:1] for x in inputs(op, heads=1)]
    tensors[-1] = tensors[-1] * 40
    compare(recurrence(op), [*tensors, torch.randn(1, 1, 1, 6, 5, dtype=torch.float64)], torch.float32)


def test_keys_that_are_all_alike_do_not_blow_up_the_inverse():
    q, k, v, beta = (x[:1] for x in inputs("delta", 300, heads=1))
    k, beta = k[:, :1].expand_as(k), torch.ones_like(beta)
    compare(recurrence("delta"), [q, k, v, beta, torch.zeros(1, 1, 1, 6, 5)], torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("op", OPS)
def test_a_few_tokens_without_gradients(op):
    tensors = [x[:2, :11].float().to(DEVICE) for x in inputs(op, 11, heads=1, keys=20)]
    cu = torch.tensor([[0, 0, 1], [0, 10, 11]], device=DEVICE)
    for cu_seqlens, segments in ((None, 1), (cu, 2)):
        options = {"cu_seqlens": cu_seqlens, "state": torch.randn(2, segments, 1, 20, 5, device=DEVICE)}
        outputs = (run(op, tensors, **options, backend=backend) for backend in ("reference", "triton"))
        for expected, got in zip(*outputs, strict=True):
            assert_close("o or state", expected, got, 1e-6)


# length, keys, values, chunk_size; documents: positions of two, the first going on; without momentum.
MEMORIES = {
    "one_token": (1, 20, 20, 16, {}),
    "more_chunks_than_a_span": (70, 6, 5, 1, {}),
    "odd": (63, 60, 100, 64, {}),
    "long_chunks": (150, 6, 5, 128, {}),
    "no_momentum": (75, 20, 40, 16, {"momentum": False}),
    "documents": (75, 6, 5, 16, {"documents": True}),
}


def memory_inputs(length, keys, values, rows=1):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v = (F.normalize(rand(rows, length, 1, n), dim=-1) for n in (keys, keys, values))
    lr, momentum, decay = (torch.sigmoid(rand(rows, length, 1) - c) for c in (1.0, 0.5, 2.0))
    weights = [0.3 * rand(1, keys, values) for _ in range(4)]
    return [q, k, v, lr, momentum, decay, *weights]


def memory(chunk_size, momentum=True, documents=False):
    places = {}
    if documents:
        row = torch.cat([torch.arange(5, 35), torch.arange(45)])
        places = {"positions": row[None].to(DEVICE), "lengths": torch.tensor([70], device=DEVICE), "max_documents": 2}

    def call(x, backend):
        q, k, v, lr, eta, alpha, start, *state = x
        before = None
        if documents:
            # The first document has come to its sixth token.
            kept = [(w[None],) for w in state]
            before = neural_memory(
                q[:, :5],
                k[:, :5],
                v[:, :5],
                lr[:, :5],
                eta[:, :5],
                alpha[:, :5],
                weights=[start],
                chunk_size=chunk_size,
            ).state._replace(weights=kept[0], momentum=kept[1], anchor=kept[2])
        out = neural_memory(
            q,
            k,
            v,
            lr,
            eta if momentum else None,
            alpha,
            weights=[start],
            chunk_size=chunk_size,
            state=before,
            backend=backend,
            **places,
        )
        return out.o, *out.state.weights, *out.state.momentum, *out.state.anchor, out.surprise

    return call


@pytest.mark.parametrize("name", MEMORIES)
def test_linear_memory(name):
    length, keys, values, chunk_size, options = MEMORIES[name]
    compare(memory(chunk_size, **options), memory_inputs(length, keys, values), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_linear_memory_in_16_bits(dtype):
    compare(memory(16), memory_inputs(75, 20, 40), dtype)


def test_decoding_continues_the_memory():
    q, k, v, *gates, start = memory_inputs(40, 20, 20)[:7]
    tokens = [x.float().to(DEVICE) for x in (q, k, v, *gates)]
    settings = dict(weights=[start.float().to(DEVICE)], chunk_size=16)
    expected = neural_memory(*tokens, **settings, backend="reference")
    parts, state = [], None
    with torch.no_grad():
        for here in (slice(30), *(slice(t, t + 1) for t in range(30, 40))):
            o, state, _ = neural_memory(*(x[:, here] for x in tokens), **settings, state=state, backend="triton")
            parts.append(o)
    assert_close("o", expected.o, torch.cat(parts, 1), 1e-6)
    assert_close("memory", expected.state.weights[0], state.weights[0], 1e-6)


@pytest.mark.parametrize("op", OPS)
def test_ops_keep_the_rules_of_torch(op):
    """Schema, fake tensors, registration of gradients; and a compiled call is one graph."""
    import memlm_kernels.delta_rule.triton
    import memlm_kernels.linear_attention.triton  # noqa: F401

    tensors = [x[:1].float().to(DEVICE).requires_grad_() for x in inputs(op, 5, heads=1)]
    torch_op = torch.ops.memlm.delta_rule if op.startswith("delta") else torch.ops.memlm.linear_attention
    gates = tensors[3:] if op.startswith("delta") else tensors[3:] or [None]
    gates += [None] * (op == "delta")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch_op, (*tensors[:3], *gates, None, None), test_utils=tests)
    compiled = torch.compile(lambda *x: run(op, x, backend="triton")[0], fullgraph=True, backend="aot_eager")
    assert_close("o", run(op, tensors, backend="reference")[0], compiled(*tensors), 1e-6)


def test_the_memory_keeps_the_rules_of_torch():
    import memlm_kernels.neural_memory.triton  # noqa: F401

    shapes = [(3, 2, 4, 6), (3, 2, 4, 6), (3, 2, 4, 5), (3, 2, 4, 4), *[(3, 2, 4)] * 3, (3, 2)]
    tensors = [torch.rand(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    state = [torch.rand(2, 6, 5, device=DEVICE, requires_grad=True) for _ in "WS"]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*tensors, None, None, *state, None, None, 1, True)
    torch.library.opcheck(torch.ops.memlm.neural_memory, arguments, test_utils=tests)
    inputs = on_device(x for x in memory_inputs(20, 6, 5)[:7])
    compiled = torch.compile(lambda *x: memory(4)(x, "triton")[0], fullgraph=True, backend="aot_eager")
    assert_close("o", memory(4)(inputs, "reference")[0], compiled(*inputs), 1e-6)


def test_floating_point_work_is_counted():
    q, k, v = (torch.randn(1, 64, 1, 16, device=DEVICE, requires_grad=True) for _ in "qkv")
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, k, v, backend="triton")[0].sum().backward()
    # Two reads of a state forward, four backward, and as many products inside the chunk.
    assert counter.get_total_flops() == 6 * 2 * 64 * (16 * 16 + 64 * 16)


def on_device(tensors, dtype=torch.float32):
    return [x.to(DEVICE, dtype) for x in tensors]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run("delta", on_device(inputs("delta", 5, keys=300)), backend="triton"), "K=300.* reference"),
        (
            lambda: run("linear", on_device(inputs("linear", 5), torch.float64), backend="triton"),
            "float64; use one of",
        ),
        (
            lambda: run("linear_channel", on_device(inputs("linear_channel", 5, keys=300)), backend="triton"),
            "at most 256 channels, not K=300",
        ),
        (lambda: memory(67)(on_device(memory_inputs(5, 6, 5)), "triton"), "chunk_size up to 32 .* not 67"),
        (lambda: memory(24)(on_device(memory_inputs(5, 100, 5)), "triton"), "up to 16 or one that 16 divides, not 24"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(call, message):
    with pytest.raises(ValueError, match=f"backend='triton' cannot run here: .*{message}"):
        call()


def test_kernels_keep_to_what_every_target_has():
    from memlm_kernels.chunk_sparse_attention import choice_kernels
    from memlm_kernels.chunk_sparse_attention import kernels as of_chunks
    from memlm_kernels.delta_rule import kernels as of_delta_rule
    from memlm_kernels.launch import Kernel
    from memlm_kernels.linear_attention import channel_kernels, step
    from memlm_kernels.linear_attention import kernels as of_linear_attention
    from memlm_kernels.neural_memory import kernels as of_neural_memory
    from memlm_kernels.prefix_window_attention import kernels as of_attention

    recurrences = (of_linear_attention, channel_kernels, step, of_delta_rule, of_neural_memory)
    modules = (*recurrences, of_attention, of_chunks, choice_kernels)
    found = [x for module in modules for x in vars(module).values() if isinstance(x, Kernel)]
    assert len(found) == 29
    for kernel in found:
        for target, choices in kernel.tiles.items():
            for tiles in choices:
                assert tiles["num_stages"] <= 2 and tiles["num_warps"] * (64 if target == "hip" else 32) <= 1024
    for module in modules:
        source = Path(module.__file__).read_text()
        assert not re.search(r"inline_asm|tensor_descriptor|block_ptr|tf32x3|atomic", source)
        # A masked load without it reads anything.
        loads = re.findall(r"tl\.load\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", source)
        assert loads and all("other=" in load for load in loads if "mask=" in load)


def test_the_interpreter_is_only_for_those_who_ask():
    q = torch.randn(1, 4, 1, 16)
    linear_attention(q, q, q, backend="triton" if DEVICE == "cpu" else "auto")
    from memlm_kernels.backend import with_triton

    assert with_triton(q, None)[0][0] == "reference"
