"""One token in Triton: places on the host and on the device, parts of one tensor, and the host's work of a call."""

import sys

import pytest
import torch

from memlm_kernels import SegmentedMemoryState, neural_memory, segmented_neural_memory
from memlm_kernels.calls import CALLS, titans
from memlm_kernels.testing import assert_close
from tests.kernels.test_triton import DEVICE, TOLERANCES, deep_inputs, memory_inputs

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")


def joined(*tensors):
    """The same tensors as parts of one: rows of each are contiguous, and far apart."""
    sizes = [x.shape[2:].numel() for x in tensors]
    parts = torch.cat([x.flatten(2) for x in tensors], -1).split(sizes, -1)
    return [part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, tensors, strict=True)]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    from memlm_kernels.launch import Kernel

    names, run = [], Kernel.__call__

    def record(kernel, *given, **arguments):
        names.append(kernel.function.__name__)
        return run(kernel, *given, **arguments)

    monkeypatch.setattr(Kernel, "__call__", record)
    return names


HOST, ON_DEVICE = True, False


@pytest.mark.parametrize(
    ("told", "layers", "gates", "dtype"),
    [
        (HOST, 1, "momentum and decay", torch.float32),
        (ON_DEVICE, 1, "momentum and decay", torch.float16),
        (ON_DEVICE, 1, "neither", torch.float32),
        (HOST, 2, "neither", torch.float32),
        (ON_DEVICE, 2, "momentum and decay", torch.float32),
    ],
)
def test_a_token_a_call(told, layers, gates, dtype, launched):
    """Five tokens over ends of chunks of 2 are one launch each and equal the reference; if the host does not know the
    places, the second row starts another document with its fourth token.
    """
    torch.manual_seed(0)
    inputs = deep_inputs(5, 20, 33, 20, rows=2)
    q, k, v, *rest = inputs[:6]
    momentum, decay = rest[1:] if gates != "neither" else (None, None)
    # Two heads, the second another memory.
    q, k, v = (torch.cat([x, x.flip(1)], 2).to(DEVICE, dtype) for x in (q, k, v))
    lr, momentum, decay = (None if x is None else torch.cat([x, 1 - x], 2) for x in (rest[0], momentum, decay))
    shapes = [(2, 20, 33), (2, 33, 20)] if layers == 2 else [(2, 20, 20)]
    weights = [0.3 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    norm = tuple(torch.cat([x, x * 0.5]) for x in inputs[-2:]) if layers == 2 else None

    def tokens(to, kernels):
        state, parts = None, []
        settings = {"weights": [to(w) for w in weights], "chunk_size": 2}
        settings |= {"norm": None if norm is None else tuple(to(x) for x in norm)}
        q_k_v = joined(*(x.double() if to is double else x for x in (q, k, v)))
        of_gates = joined(*(to(x) for x in (lr, momentum, decay) if x is not None))
        for t in range(5):
            if state is not None and not told and t == 3:
                state = state._replace(position=torch.tensor([t, 0], device=DEVICE))
            here = [x[:, t : t + 1] for x in (*q_k_v, *of_gates)]
            launched.clear()
            out = neural_memory(*here, **settings, state=state, start=t if told else None, backend=kernels)
            if kernels == "triton" and state is not None:
                assert launched == ["memory_step" if layers == 1 else "deep_step"]
            state = out.state
            parts.append((out.o, out.surprise))
        o, surprise = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        return [o, surprise, *state.weights, *state.momentum, *state.anchor, state.position]

    def double(x):
        return x.to(DEVICE, torch.float64)

    with torch.no_grad():
        expected = tokens(double, "reference")
        got = tokens(lambda x: x.to(DEVICE, torch.float32), "triton")
    for i, (e, g) in enumerate(zip(expected, got, strict=True)):
        assert_close(f"result {i}", e, g, TOLERANCES[dtype][0])


@pytest.mark.parametrize("momentum", [True, False])
def test_a_token_of_memories_of_segments(momentum, launched):
    inputs = memory_inputs(5, 20, 6, rows=2)
    memory = torch.randn(2, 1, 3 if momentum else 2, 1, 20, 6, dtype=torch.float64)

    def tokens(dtype, kernels):
        state = SegmentedMemoryState(memory.to(DEVICE, dtype), torch.tensor([[3], [0]], device=DEVICE))
        parts = []
        for t in range(5):
            here = [x[:, t : t + 1].to(DEVICE, dtype) for x in inputs[:6]]
            here[4] = here[4] if momentum else None
            launched.clear()
            o, state = segmented_neural_memory(*here, chunk_size=4, state=state, backend=kernels)
            parts.append(o)
            assert launched == (["memory_step"] if kernels == "triton" else [])
        return torch.cat(parts, 1), *state

    with torch.no_grad():
        results = zip(tokens(torch.float64, "reference"), tokens(torch.float32, "triton"), strict=True)
    for i, (e, g) in enumerate(results):
        assert_close(f"result {i}", e, g, 1e-6)


def test_steps_keep_the_rules_of_torch():
    import memlm_kernels.neural_memory.step_triton  # noqa: F401

    rand = lambda *shape: torch.rand(*shape, device=DEVICE)  # noqa: E731
    q, k, v, gate, position = rand(2, 1, 3, 6), rand(2, 1, 3, 6), rand(2, 1, 3, 5), rand(2, 1, 3), torch.arange(2)
    W, initial = [rand(2, 3, 6, 7), rand(2, 3, 7, 5)], [rand(3, 6, 7), rand(3, 7, 5)]
    tests = ("test_schema", "test_faketensor")
    given = (q, k, v, gate, gate, gate, position.to(DEVICE), position.to(DEVICE), W, W, W, initial, [])
    torch.library.opcheck(torch.ops.memlm.neural_memory_step, (*given, 4, False, True, True), test_utils=tests)
    given = (q, k, v, gate, gate, None, position.to(DEVICE)[:, None], rand(2, 3, 3, 6, 5), 4)
    torch.library.opcheck(torch.ops.memlm.segmented_memory_step, given, test_utils=tests)


def calls_of(function):
    """Functions of Python and C that a call runs: its work on the host, the same on every machine."""
    counted = 0

    def count(_, event, __):
        nonlocal counted
        counted += event in ("call", "c_call")

    for _ in range(2):
        function()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counted


# Kinds of calls, tokens, whether gradients follow, and the most functions, a tenth above those of today.
WORK = [
    ("neural_memory", 1, False, 230),
    ("neural_memory", 64, True, 1070),
    ("delta_rule, decay", 1, False, 135),
    ("delta_rule, decay", 64, True, 440),
    ("linear_attention, decay", 64, True, 380),
    ("prefix_window_attention", 64, True, 710),
]


@pytest.mark.parametrize(("kind", "length", "gradients", "most"), WORK)
def test_host_work_of_a_call(kind, length, gradients, most, monkeypatch):
    """Checks, the choice of a backend, torch's machinery and the arguments of launches take few functions."""
    from memlm_kernels.launch import Kernel

    monkeypatch.setattr(Kernel, "__call__", lambda *_, **__: None)
    call = CALLS[kind].of(T=64, K=16, V=16, C=16)
    tensors = {name: x.requires_grad_(gradients and x.is_floating_point()) for name, x in call.make(length).items()}
    tensors = {name: x for name, x in tensors.items() if name not in call.optional}
    if kind == "neural_memory" and length == 1:
        with torch.no_grad():
            state = titans(**tensors, chunk_size=16, backend="triton").state
        call = call._replace(call=lambda **x: titans(**x, state=state, start=1, with_surprise=False))

    def work():
        out = call.run(tensors, backend="triton")
        if gradients:
            out = out if isinstance(out, torch.Tensor) else out[0]
            out.sum().backward()

    with torch.set_grad_enabled(gradients):
        assert calls_of(work) <= most
