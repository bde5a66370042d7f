"""Triton's kernels of LaCT's memory against the reference in fp64."""

import pytest
import torch

from memlm_kernels.testing import assert_close, import_triton_ops, relative_error
from tests.kernels.test_large_chunk_memory import make, run
from tests.kernels.test_triton import BFLOAT16, DEVICE, TOLERANCES, compare, poisoned  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")

MOMENTUM = pytest.mark.parametrize("momentum", [True, False])
# The second row goes on with its open chunk. Documents end inside a chunk and with one, one is empty. Padding ends the
# first row.
DOCUMENTS = [[0, 4, 4, 9], [0, 2, 7, 11]]


def outputs(o, state):
    return o, *(x for part in state[:4] for x in part)


def call(chunk_size, momentum=True, **options):
    def function(x, backend):
        x = [*x]
        if not momentum:
            x[4] = None
        return outputs(*run(x, chunk_size, backend=backend, **options))

    return function


# length, keys, values, hidden, chunk_size
SIZES = {
    "one_token": (1, 5, 4, 6, 4),
    "chunks_of_one": (5, 5, 4, 6, 1),
    "odd": (15, 20, 33, 37, 6),
    "wide": (33, 17, 20, 130, 20),
    "one_open_chunk": (9, 8, 8, 8, 16),
}


@MOMENTUM
@pytest.mark.parametrize("name", SIZES)
def test_any_size(name, momentum):
    length, key, value, width, chunk_size = SIZES[name]
    compare(call(chunk_size, momentum), make(1, length, 1, key, value, width), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_in_16_bits(dtype):
    compare(call(8), make(1, 19, 2, 20, 20, 20), dtype)


def documents_of(momentum, muon_steps=0):
    """Tokens before the call, and the call."""
    inputs, first = make(length=11, heads=1), make(length=3, heads=1, seed=1)
    cu = torch.tensor(DOCUMENTS, device=DEVICE)

    def function(x, backend):
        tokens, before, weights = [*x[:5]], [*x[5:10]], x[10:]
        if not momentum:
            tokens[4] = before[4] = None
        _, state = run([*before, *weights], 4, muon_steps=muon_steps, backend=backend)
        position = torch.tensor([0, 3], device=DEVICE)
        state = state._replace(position=position)
        found = run([*tokens, *weights], 4, muon_steps=muon_steps, backend=backend, state=state, cu_seqlens=cu)
        return outputs(*found)

    return function, [*inputs[:5], *first[:5], *inputs[5:]]


@MOMENTUM
def test_documents(momentum):
    compare(*documents_of(momentum), torch.float32)


@pytest.mark.parametrize("cuts", [[7, 8], [5, 1, 1, 3, 2, 2, 1]], ids=len)
@pytest.mark.parametrize("known", [True, False])
def test_any_division_into_calls_gives_the_same(cuts, known):
    """Gradients through the states too. With ``known`` the host knows where each call starts."""
    inputs = make(1, 15, 1)

    def function(x, backend):
        state, out, start = None, [], 0
        for piece in zip(*(t.split(cuts if backend == "triton" else [15], 1) for t in x[:5]), strict=True):
            given = {"start": start} if known else {}
            o, state = run([*piece, *x[5:]], 4, state=state, backend=backend, **given)
            out.append(o)
            start += o.shape[1]
        return outputs(torch.cat(out, 1), state)

    compare(function, inputs, torch.float32)


@pytest.mark.parametrize("muon_steps", [1, 5])
@pytest.mark.parametrize("packed", [False, True])
@MOMENTUM
def test_muon(momentum, packed, muon_steps):
    """Its steps make rounding errors grow: an error may be twice that of the reference in fp32."""
    function, inputs = (
        documents_of(momentum, muon_steps)
        if packed
        else (call(8, momentum, muon_steps=muon_steps), make(1, 18, 1, 9, 7, 12))
    )
    inputs = [x.to(DEVICE) for x in inputs]
    found = {}
    for name, dtype, backend in (
        ("exact", torch.float64, "reference"),
        ("rounded", torch.float32, "reference"),
        ("got", torch.float32, "triton"),
    ):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(given, backend)
        g = torch.Generator().manual_seed(0)
        weights = [torch.randn(y.shape, generator=g).to(y) for y in out]
        gradients = torch.autograd.grad(out, given, weights, allow_unused=True)
        found[name] = [*out, *(x for x in gradients if x is not None)]
    for i, (exact, rounded, got) in enumerate(zip(*found.values(), strict=True)):
        assert_close(f"result {i}", exact, got, 2 * relative_error(exact, rounded) + TOLERANCES[torch.float32][1])


def test_weights_of_zeros_stay_zeros():
    """Lines without a norm, and a gradient that is zero."""
    inputs = make(1, 9, 1)
    inputs[5][..., 0] = 0.0
    inputs[6] *= 0.0
    inputs[7][:, 1:] = 0.0
    compare(call(4), inputs, torch.float32)


def test_ops_keep_the_rules_of_torch():
    import_triton_ops()
    rand = lambda *shape: torch.rand(*shape, device=DEVICE)  # noqa: E731
    ab, e, lr, memory = rand(2, 5, 12), rand(2, 5, 6), rand(2, 5, 3), [rand(2, 18, 4) for _ in range(4)]
    products, mean, border = [rand(2, 12, 3), rand(2, 6, 4)], rand(2), torch.tensor([1, 2]).int()
    # Norms of lines, by whose squares gradients of 16 bits are divided.
    line = 0.5 + rand(2, 16)
    border = border.to(DEVICE)
    ops, tests = torch.ops.memlm, ("test_schema", "test_faketensor")
    half = torch.float16
    for op, given in (
        (ops.large_chunk_hidden, (ab,)),
        (ops.large_chunk_hidden_backward, (ab, e)),
        (ops.large_chunk_slopes, (ab, e, lr)),
        (ops.large_chunk_slopes_backward, (ab, e, lr, ab, e)),
        (ops.large_chunk_write, (memory[0], None, products, None, mean, None, memory[1], line, None, torch.float32)),
        (ops.large_chunk_write, (*memory[:2], products, memory[2], mean, memory[3], memory[1], line, border, half)),
        (
            ops.large_chunk_write_backward,
            (memory[0], line, line, memory[1], mean, border, memory[2], products, *memory[1:], 3, 4, half, False),
        ),
        (
            ops.large_chunk_write_backward,
            (memory[0], line, line, None, None, None, memory[2], [], None, None, None, 3, 4, torch.float32, True),
        ),
    ):
        torch.library.opcheck(op, given, test_utils=tests)


def test_what_is_kept_for_backward_is_a_memory_for_each_group_of_chunks():
    inputs, kept = make(1, 64, 1, 16, 16, 16, dtype=torch.float32), {}

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        run([x.to(DEVICE).requires_grad_() for x in inputs], 4, backend="triton")
    assert sum(kept.values()) < 4 * 3 * (3 * 16 * 16) + 64 * 4 * 16
