"""Triton's kernels against the references, in Triton's interpreter where there is no GPU."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from memlm_kernels import SegmentedMemoryState, delta_rule, linear_attention, neural_memory, segmented_neural_memory
from memlm_kernels.testing import assert_close, grads_of
from tests.kernels.test_linear_recurrences import OPS, inputs, run

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Tolerances of outputs and of gradients. bf16 runs on GPUs only: its products are wrong in the interpreter.
TOLERANCES = {
    torch.float32: (1e-5, 1e-4) if GPU else (1e-6, 2e-6),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (1e-2, 2e-2),
}
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU")]
)
SEGMENTS = [[0, 0, 10, 10, 45], [0, 4, 5, 20, 50]]


@pytest.fixture(autouse=True)
def poisoned():
    """Fill unwritten memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    # On a GPU the references' products and sums have no fixed order.
    torch.use_deterministic_algorithms(True, warn_only=GPU)
    yield
    torch.use_deterministic_algorithms(before)
    if GPU and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            # After a kernel's fault, no later call of this process works: xdist starts another process for the other
            # tests.
            os._exit(1)


def compare(function, tensors, dtype, tolerances=None, wider=()):
    """function(tensors, backend) -> outputs; the first three tensors are q, k, v; tolerances: None for the type's;
    wider: factors of some gradients' tolerances.
    """
    tensors = [x.to(DEVICE, dtype if i < 3 else torch.float32) for i, x in enumerate(tensors)]
    outputs = {"reference": [], "triton": []}

    def together(backend):
        def call(*x):
            outputs[backend] = function(x, backend)
            return torch.cat([y.double().flatten() for y in outputs[backend] if y.requires_grad])

        return call

    expected = grads_of(together("reference"), [x.double() for x in tensors])
    gradients = zip(expected, grads_of(together("triton"), tensors), strict=True)
    for_outputs, for_gradients = tolerances or TOLERANCES[dtype]
    for i, (e, g) in enumerate(zip(*outputs.values(), strict=True)):
        assert_close(f"output {i}", e, g, for_outputs)
    for i, (e, g) in enumerate(gradients):
        assert_close(f"gradient {i}", e, g, for_gradients * dict(wider).get(i, 1.0))


def recurrence(op, cu_seqlens=None):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    return lambda x, backend: run(op, x[:-1], cu_seqlens=cu, state=x[-1], backend=backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("length", "keys", "values"), [(1, 60, 100), (23, 100, 5), (75, 6, 20), pytest.param(260, 17, 40, id="64_a_chunk")]
)
def test_recurrence_of_any_size(op, length, keys, values):
    tensors = [x[:1] for x in inputs(op, length, heads=1, keys=keys, values=values)]
    state = torch.randn(1, 1, 1, keys, values, dtype=torch.float64)
    compare(recurrence(op), [*tensors, state], torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_recurrence_over_segments(op):
    state = torch.randn(2, 4, 1, 6, 5, dtype=torch.float64)
    compare(recurrence(op, SEGMENTS), [*(x[:2] for x in inputs(op, 50, heads=1)), state], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
@pytest.mark.parametrize("op", OPS)
def test_recurrence_in_16_bits(op, dtype):
    tensors = [x[:1] for x in inputs(op, heads=1, keys=20, values=20)]
    # Queries of unit length, so that sums of any size can be compared.
    tensors[0] = F.normalize(tensors[0], dim=-1)
    compare(recurrence(op), [*tensors, torch.randn(1, 1, 1, 20, 20, dtype=torch.float64)], dtype)


@pytest.mark.parametrize("op", ["linear_scalar", "linear_channel", "delta_decay", "delta_channel"])
def test_strong_decay_neither_overflows_nor_loses_digits(op):
    tensors = [x[:1] for x in inputs(op, heads=1)]
    tensors[-1] = tensors[-1] * 40
    compare(recurrence(op), [*tensors, torch.randn(1, 1, 1, 6, 5, dtype=torch.float64)], torch.float32)


def test_keys_that_are_all_alike_do_not_blow_up_the_inverse():
    """Products k.k of K channels round to 1 + e, |e| <= K 2^-24; the errors e depend on the BLAS.

    With a matrix E of these errors in I + L of a chunk of C tokens, x = (I + L)^-1 v has the error (I + L)^-1 E x. A
    read sums x over the chunk, so its error is E x: sqrt(C) K 2^-24 |x|, where x is v minus the v before, sqrt(2) as
    large.
    """
    q, k, v, beta = (x[:1] for x in inputs("delta", 300, heads=1))
    k, beta = k[:, :1].expand_as(k), torch.ones_like(beta)
    more = (2 * 64) ** 0.5 * k.shape[-1] * 2**-24
    tolerances = [x + more for x in TOLERANCES[torch.float32]]
    compare(recurrence("delta"), [q, k, v, beta, torch.zeros(1, 1, 1, 6, 5)], torch.float32, tolerances)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("op", OPS)
def test_a_few_tokens_without_gradients(op, dtype):
    tensors = [x[:2, :11].to(DEVICE, dtype) for x in inputs(op, 11, heads=1, keys=20)]
    cu = torch.tensor([[0, 0, 1], [0, 10, 11]], device=DEVICE)
    for cu_seqlens, segments in ((None, 1), (cu, 2)):
        state = torch.randn(2, segments, 1, 20, 5, device=DEVICE)
        exact = run(op, [x.double() for x in tensors], cu_seqlens=cu_seqlens, state=state.double())
        outputs = run(op, tensors, cu_seqlens=cu_seqlens, state=state, backend="triton")
        for expected, got in zip(exact, outputs, strict=True):
            assert_close("o or state", expected, got, TOLERANCES[dtype][0])


# length, keys, values, chunk_size; documents: positions of two, the first continues; without momentum.
MEMORIES = {
    "one_token": (1, 20, 20, 16, {}),
    "more_chunks_than_a_span": (70, 6, 5, 1, {}),
    "odd": (63, 60, 100, 64, {}),
    "short_chunks": (70, 17, 5, 4, {}),
    "chunks_that_do_not_divide_a_block": (260, 6, 5, 20, {}),
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


def places_of(documents):
    """A row of 75 tokens: two documents, the first continues from its sixth token, and padding."""
    return {"cu_seqlens": torch.tensor([[0, 30, 70]], device=DEVICE)} if documents else {}


def memory(chunk_size, momentum=True, documents=False):
    places = places_of(documents)

    def call(x, backend):
        q, k, v, lr, eta, alpha, start, *state = x
        before = None
        if documents:
            # The first document continues at its sixth token.
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


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("layers", [1, 2])
def test_decoding_continues_the_memory(layers, dtype, momentum, monkeypatch):
    """Three rows: one continues past the end of a chunk, one starts a document in between, one ends early."""
    from memlm_kernels.launch import Kernel

    launched, run = [], Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda kernel, *x, **y: launched.append(kernel) or run(kernel, *x, **y))
    values = 40 if layers == 1 else 20
    inputs = on_device(deep_inputs(20, 20, values if layers == 1 else 33, values, rows=3))
    inputs[:3] = on_device(inputs[:3], dtype)
    # The second row has two documents, the third one padding.
    ends = [[20, 20], [17, 20], [18, 18]]

    def run_on(x, here, state=None, **settings):
        norm = tuple(x[-2:]) if layers == 2 else None
        q, k, v, lr, eta, alpha = (token[:, here] for token in x[:6])
        # A row's first document is the one that goes on.
        left = [[min(end, here.stop) - here.start for end in row if end >= here.start] for row in ends]
        cu_seqlens = torch.tensor([[0, *row, *[max([0, *row])] * (2 - len(row))] for row in left])
        places = {"cu_seqlens": cu_seqlens.to(DEVICE), "state": state}
        weights, eta = x[6 : 6 + layers], eta if momentum else None
        return neural_memory(q, k, v, lr, eta, alpha, weights=weights, norm=norm, chunk_size=16, **places, **settings)

    expected = run_on([x.double() for x in inputs], slice(0, 20), backend="reference")
    parts, state = [], None
    with torch.no_grad():
        for here in (slice(0, 14), *(slice(t, t + 1) for t in range(14, 20))):
            launched.clear()
            o, state, surprise = run_on(inputs, here, state=state, backend="triton")
            parts.append((o, surprise))
            assert o.dtype == dtype
    assert [kernel.function.__name__ for kernel in launched] == ["memory_step" if layers == 1 else "deep_step"]
    for name, got in zip(("o", "surprise"), zip(*parts, strict=True), strict=True):
        assert_close(name, getattr(expected, name), torch.cat(got, 1), TOLERANCES[dtype][0])
    for kept in ("weights", "momentum", "anchor"):
        for e, s in zip(getattr(expected.state, kept), getattr(state, kept), strict=True):
            assert_close(kept, e, s, TOLERANCES[dtype][0])


# length, keys, hidden, values, chunk_size; activation; with a norm, documents, without momentum.
DEEP = {
    "one_token": (1, 20, 30, 20, 16, {"norm": True}),
    "chunks_of_a_token": (5, 6, 20, 6, 1, {"activation": "silu", "norm": True}),
    "odd": (63, 20, 70, 33, 16, {}),
    "long_chunks": (90, 6, 5, 4, 64, {"activation": "silu"}),
    "no_momentum": (35, 6, 12, 6, 16, {"momentum": False, "norm": True}),
    "documents": (75, 6, 12, 6, 32, {"documents": True, "norm": True}),
    "wide": (33, 100, 150, 128, 16, {}),
    "wide_documents": (75, 70, 130, 70, 32, {"documents": True, "norm": True}),
}


def deep_inputs(length, keys, hidden, values, rows=1):
    """Inputs, with W, with M, S and anchor of the first document (two layers each), and gain and bias."""
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    layers = [0.3 * rand(1, *shape) for _ in range(4) for shape in ((keys, hidden), (hidden, values))]
    return [*memory_inputs(length, keys, values, rows)[:6], *layers, 1 + 0.3 * rand(1, values), 0.3 * rand(1, values)]


def deep(chunk_size, activation="gelu", norm=False, momentum=True, documents=False):
    places = places_of(documents)

    def call(x, backend):
        q, k, v, lr, eta, alpha, *state, gain, bias = x
        settings = {"weights": state[:2], "chunk_size": chunk_size, "activation": activation}
        settings |= {"norm": (gain, bias) if norm else None}
        eta, before = (eta if momentum else None), None
        if documents:
            before = neural_memory(*(x[:, :5] for x in (q, k, v, lr, eta, alpha)), **settings).state
            kept = [tuple(w[None] for w in state[i : i + 2]) for i in (2, 4, 6)]
            before = before._replace(weights=kept[0], momentum=kept[1], anchor=kept[2])
        out = neural_memory(q, k, v, lr, eta, alpha, **settings, state=before, backend=backend, **places)
        return out.o, *out.state.weights, *out.state.momentum, *out.state.anchor, out.surprise

    return call


@pytest.mark.parametrize("name", DEEP)
def test_memory_of_two_layers(name, monkeypatch):
    from memlm_kernels.neural_memory import deep as op

    monkeypatch.setattr(op, "SPAN", 2)
    *sizes, chunk_size, options = DEEP[name]
    # The decay's gradient sums 130 x 70 products that cancel. Over eight seeds and two orders of a CPU's sums, its
    # error is 0.4e-6 to 2.1e-6, the reference's 0.5e-6 to 1.7e-6.
    wider = {5: 2.0} if name == "wide_documents" else {}
    compare(deep(chunk_size, **options), deep_inputs(*sizes), torch.float32, wider=wider)


@pytest.mark.parametrize(("length", "cuts"), [(1, "segments"), (16, "whole"), (45, "segments")])
@pytest.mark.parametrize("op", ["delta", "delta_decay", "delta_channel"])
def test_the_residual_of_a_delta_rule(op, cuts, length):
    """By the kernels of chunks, and without gradients by those of a few tokens."""
    tensors = [x[:2] for x in inputs(op, length, heads=1)]
    cu = None if cuts == "whole" else torch.tensor([[0, 0, 40, 40], [4, 5, 20, 45]]).clamp(max=length)
    state = torch.randn(2, 1 if cu is None else 3, 1, 6, 5, dtype=torch.float64)
    expected = delta_rule(*tensors, with_residual=True, cu_seqlens=cu, state=state)
    given, options = on_device([*tensors, state], torch.float32), {"with_residual": True, "backend": "triton"}
    options |= {"cu_seqlens": None if cu is None else cu.to(DEVICE), "state": given.pop()}
    for asks in (True, False):
        with torch.set_grad_enabled(asks):
            got = delta_rule(*(x.clone().requires_grad_(asks) for x in given), **options)
        assert not got.residual.requires_grad
        for name, x, y in zip(("o", "state", "residual"), expected, got, strict=True):
            assert_close(name, x, y, TOLERANCES[torch.float32][0])


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_memory_of_two_layers_in_16_bits(dtype):
    compare(deep(16, norm=True), deep_inputs(40, 20, 40, 20), dtype)


@pytest.mark.parametrize("sizes", [(20, 30, 20), (80, 140, 80)])
def test_calls_of_a_memory_of_two_layers(sizes):
    """Two and seven calls equal one."""
    *tokens, W_1, W_2 = on_device(deep_inputs(37, *sizes)[:8])

    def run_in(ends):
        state, parts = None, []
        for begin, end in itertools.pairwise((0, *ends, 37)):
            given = {"weights": (W_1, W_2), "chunk_size": 16, "state": state, "backend": "triton"}
            o, state, surprise = neural_memory(*(x[:, begin:end] for x in tokens), **given)
            parts.append((o, surprise))
        return *(torch.cat(x, 1) for x in zip(*parts, strict=True)), *state.weights, *state.momentum, *state.anchor

    with torch.no_grad():
        whole = run_in(())
        for ends in ((21,), (1, 2, 16, 20, 33, 36)):
            for expected, got in zip(whole, run_in(ends), strict=True):
                assert_close(f"{len(ends) + 1} calls", expected, got, TOLERANCES[torch.float32][0])


@pytest.mark.parametrize("op", OPS)
def test_ops_keep_the_rules_of_torch(op):
    """Schema, fake tensors, registration of gradients; and a compiled call is one graph."""
    import memlm_kernels.recurrence.delta_triton
    import memlm_kernels.recurrence.linear_triton  # noqa: F401

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

    tensors = [
        torch.rand(2, 20, 1, *rest, device=DEVICE, requires_grad=True) for rest in ((6,), (6,), (5,), (), (), ())
    ]
    state = [torch.rand(2, 1, 1, 6, 5, device=DEVICE, requires_grad=True) for _ in range(3)]
    initial = torch.rand(2, 1, 6, 5, device=DEVICE, requires_grad=True)
    cu, position = torch.tensor([[0, 9, 20], [0, 20, 20]], device=DEVICE), torch.tensor([[3], [0]], device=DEVICE)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*tensors, cu, position, *state, initial, 4, True, True)
    torch.library.opcheck(torch.ops.memlm.neural_memory, arguments, test_utils=tests)
    inputs = on_device(x for x in memory_inputs(20, 6, 5)[:7])
    compiled = torch.compile(lambda *x: memory(4)(x, "triton")[0], fullgraph=True, backend="aot_eager")
    assert_close("o", memory(4)(inputs, "reference")[0], compiled(*inputs), 1e-6)


@pytest.mark.parametrize(
    ("chunk_size", "momentum", "dtype"),
    [
        (12, False, torch.float32),
        # Types and lengths of chunks do not meet in the kernels.
        pytest.param(12, False, torch.float16, marks=pytest.mark.slow),
        pytest.param(12, False, *BFLOAT16.values, marks=BFLOAT16.marks),
        *((64, True, dtype) for dtype in (torch.float32, torch.float16)),
        pytest.param(64, True, *BFLOAT16.values, marks=BFLOAT16.marks),
    ],
)
def test_memories_of_segments(chunk_size, momentum, dtype):
    """Over two calls: the second continues inside chunks."""
    tensors = memory_inputs(56, 20, 6, rows=2)[:6]
    start = 0.3 * torch.randn(2, 3, 3 if momentum else 2, 1, 20, 6, dtype=torch.float64)
    cu = torch.tensor([[0, 0, 10, 26], [0, 5, 28, 28]], device=DEVICE)

    def call(x, backend):
        *tokens, memory = x
        tokens[4] = tokens[4] if momentum else None
        state = SegmentedMemoryState(memory, torch.zeros(2, 3, dtype=torch.int64, device=DEVICE))
        outs = []
        for piece in (slice(28), slice(28, 56)):
            here = [None if t is None else t[:, piece] for t in tokens]
            settings = {"chunk_size": chunk_size, "cu_seqlens": cu, "backend": backend}
            o, state = segmented_neural_memory(*here, **settings, state=state)
            outs.append(o)
        return *outs, state.memory

    compare(call, [*tensors, start], dtype)


def test_the_memory_of_two_layers_keeps_the_rules_of_torch():
    import memlm_kernels.neural_memory.deep  # noqa: F401

    rand = lambda *shape: torch.rand(*shape, device=DEVICE, requires_grad=True)  # noqa: E731
    tokens = [rand(2, 1, 4, n) for n in (6, 6, 5, 4)] + [rand(2, 1, 4)]
    momentum, weights = [rand(2, 1, 4), rand(2, 1, 4), rand(2, 1)], [rand(1, 6, 7), rand(1, 7, 5)]
    memory = [*weights, rand(1, 6, 7), rand(1, 7, 5)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (tokens, momentum, [], [], memory, [], 1, False, True)
    torch.library.opcheck(torch.ops.memlm.deep_memory, arguments, test_utils=tests)
    inputs = on_device(deep_inputs(20, 6, 7, 5))
    compiled = torch.compile(lambda *x: deep(16)(x, "triton")[0], fullgraph=True, backend="aot_eager")
    assert_close("o", deep(16)(inputs, "reference")[0], compiled(*inputs), 1e-6)


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
        (lambda: memory(16)(on_device(memory_inputs(5, 100, 5)), "triton"), "64 of float32, not K=100"),
        (lambda: deep(24)(on_device(deep_inputs(5, 6, 5, 4)), "triton"), "up to 16 or one .* not 24"),
        (lambda: deep(16)(on_device(deep_inputs(5, 130, 5, 4)), "triton"), "at most 128 channels, not K=130"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(call, message):
    with pytest.raises(ValueError, match=f"backend='triton' cannot run here: .*{message}"):
        call()


@pytest.mark.skipif(GPU, reason="no interpreter")
def test_the_interpreter_is_only_for_those_who_ask():
    q = torch.randn(1, 4, 1, 16)
    linear_attention(q, q, q, backend="triton")
    from memlm_kernels.backend import with_triton

    assert with_triton("linear_attention", "auto", q, None)[0][0] == "reference"
