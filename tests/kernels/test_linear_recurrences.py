"""linear_attention, delta_rule and segmented_neural_memory against their recurrences, one token at a time."""

import itertools

import pytest
import torch

from memlm_kernels import (
    SegmentedMemoryState,
    delta_rule,
    linear_attention,
    neural_memory,
    segmented_neural_memory,
)
from memlm_kernels.recurrence.naive import recurrence
from memlm_kernels.testing import Watch, assert_close, grads_of

OPS = ["linear", "linear_scalar", "linear_channel", "delta", "delta_decay", "delta_channel"]
# Segments of three rows: whole rows; empty, one-token and unfinished segments; rows of padding alone.
CUTS = {
    "whole": None,
    "segments": [[0, 0, 10, 10, 70], [0, 75, 75, 75, 75], [0, 4, 5, 40, 75]],
    "padding": [[0, 20, 30], [0, 0, 0], [0, 75, 75]],
}


def inputs(op, length=75, heads=2, keys=6, values=5, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, length, heads, n, dtype=dtype) for n in (keys, keys, values))
    k = k / k.norm(dim=-1, keepdim=True)
    decay = -3 * torch.rand(3, length, heads, keys, dtype=dtype) ** 2
    beta = torch.rand(3, length, heads, dtype=dtype)
    return {
        "linear": [q, k, v],
        "linear_scalar": [q, k, v, decay[..., 0]],
        "linear_channel": [q, k, v, decay],
        "delta": [q, k, v, beta],
        "delta_decay": [q, k, v, beta, decay[..., 0]],
        "delta_channel": [q, k, v, beta, decay],
    }[op]


def run(op, tensors, **options):
    return (delta_rule if op.startswith("delta") else linear_attention)(*tensors, **options)[:2]


def token_by_token(op, tensors, cu_seqlens=None, state=None):
    q, k, v, *gates = tensors
    beta = gates.pop(0) if op.startswith("delta") else None
    return recurrence(q, k, v, beta, gates[0] if gates else None, cu_seqlens, state)


def residuals(tensors, cu_seqlens, state):
    """[B, T, H]: beta |v - k D| of each token, D the decayed matrix that it finds."""
    q, k, v, beta, *decay = (x.detach() for x in tensors)
    cu = torch.tensor([[0, q.shape[1]]] * len(q)) if cu_seqlens is None else cu_seqlens
    found = torch.zeros_like(beta)
    for b, bounds in enumerate(cu.tolist()):
        for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
            M = state[b, s]
            for t in range(begin, end):
                M = M * decay[0][b, t].exp().reshape(len(M), -1, 1) if decay else M
                d = beta[b, t, :, None] * (v[b, t] - (k[b, t, :, :, None] * M).sum(1))
                found[b, t], M = d.norm(dim=-1), M + k[b, t, :, :, None] * d[:, None]
    return found


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("op", OPS)
def test_the_chunked_form_is_the_recurrence(op, cuts):
    tensors = inputs(op)
    cu = None if CUTS[cuts] is None else torch.tensor(CUTS[cuts])
    segments = 1 if cu is None else cu.shape[1] - 1
    state = torch.randn(3, segments, 2, 6, 5, dtype=torch.float64)
    for start in (None, state):
        expected = token_by_token(op, tensors, cu, start)
        got = run(op, tensors, cu_seqlens=cu, state=start)
        assert_close("o", expected[0], got[0], 1e-12)
        assert_close("state", expected[1], got[1], 1e-12)


@pytest.mark.parametrize("cuts", ["whole", "segments"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_equal_those_of_the_recurrence(op, cuts):
    cu = None if CUTS[cuts] is None else torch.tensor(CUTS[cuts])
    state = torch.randn(3, 1 if cu is None else 4, 2, 6, 5, dtype=torch.float64)

    def both(function):
        def out(*tensors):
            o, after = function(op, tensors[:-1], cu_seqlens=cu, state=tensors[-1])
            return torch.cat([o.flatten(), after.flatten()])

        return grads_of(out, [*inputs(op), state])

    for i, (expected, got) in enumerate(zip(both(token_by_token), both(run), strict=True)):
        assert_close(f"gradient {i}", expected, got, 1e-11)


@pytest.mark.parametrize("op", OPS)
def test_one_token_is_a_step_of_its_own(op):
    """The same numbers and gradients, in few operations: without a chunk, a grid or a mask."""
    tensors = [*inputs(op, 1), torch.randn(3, 1, 2, 6, 5, dtype=torch.float64)]

    def both(function):
        def out(*tensors):
            o, after = function(op, tensors[:-1], state=tensors[-1])
            return torch.cat([o.flatten(), after.flatten()])

        return [out(*tensors), *grads_of(out, tensors)]

    for i, (expected, got) in enumerate(zip(both(token_by_token), both(run), strict=True)):
        assert_close(f"{i}", expected, got, 1e-13)
    with torch.no_grad(), Watch() as watch:
        run(op, tensors[:-1], state=tensors[-1])
    assert watch.operations <= 16


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_chunk_takes_few_operations(op, segmented):
    """Forward and backward: only the state goes from chunk to chunk; all else is done for all chunks at once."""
    operations, width = [], 16 if op.endswith("channel") else 32
    for length in (512, 1024):
        tensors = [x.requires_grad_() for x in inputs(op, length, heads=1, dtype=torch.float32)]
        cu = torch.tensor([[0, 100, length]] * 3) if segmented else None
        with Watch() as watch:
            o, state = run(op, tensors, cu_seqlens=cu)
            (o.sum() + state.sum()).backward()
        operations.append(watch.operations)
    assert operations[1] - operations[0] <= 8 * 512 / width


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 500])
@pytest.mark.parametrize("op", OPS)
def test_any_length_in_fp32(op, length):
    tensors = inputs(op, length, heads=1, keys=8, values=3, dtype=torch.float32)
    expected = run(op, [x.double() for x in tensors])
    got = run(op, tensors)
    assert_close("o", expected[0], got[0], 1e-5)
    assert_close("state", expected[1], got[1], 1e-5)


@pytest.mark.parametrize("length", [1, 75])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("op", ["delta", "delta_decay", "delta_channel"])
def test_the_residual_is_the_size_of_each_correction(op, cuts, length):
    """For each token beta |v - k D|, from states that hold something; no gradient, zeros at padding."""
    tensors = [x.requires_grad_() for x in inputs(op, length)]
    cu = None if CUTS[cuts] is None else torch.tensor(CUTS[cuts]).clamp(max=length)
    state = torch.randn(3, 1 if cu is None else cu.shape[1] - 1, 2, 6, 5, dtype=torch.float64)
    got = delta_rule(*tensors, with_residual=True, cu_seqlens=cu, state=state)
    expected = residuals(tensors, cu, state)
    assert not got.residual.requires_grad
    assert_close("residual", expected, got.residual, 1e-12)
    assert delta_rule(*tensors, cu_seqlens=cu, state=state).residual is None


@pytest.mark.parametrize("op", ["linear_scalar", "linear_channel", "delta_decay", "delta_channel"])
def test_strong_decay_neither_overflows_nor_loses_digits(op):
    tensors = inputs(op, 200)
    tensors[-1] = tensors[-1] * 40
    expected, got = token_by_token(op, tensors), run(op, [x.float() for x in tensors])
    assert_close("o", expected[0], got[0], 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op):
    tensors = [x[:, :0] for x in inputs(op)]
    state = torch.randn(3, 1, 2, 6, 5, dtype=torch.float64)
    o, after = run(op, tensors, state=state)
    assert o.shape == (3, 0, 2, 5) and torch.equal(after, state)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 128])
def test_segmented_memories_are_memories_alone(momentum, chunk_size):
    """Three memories of a row, over two calls: each equals the neural memory of its own tokens."""
    torch.manual_seed(0)
    start = 0.3 * torch.randn(2, 4, 5, dtype=torch.float64)
    q, k, v = (torch.randn(2, 80, 2, n, dtype=torch.float64) for n in (4, 4, 5))
    k = k / k.norm(dim=-1, keepdim=True)
    lr, eta, alpha = (0.3 * torch.rand(2, 80, 2, dtype=torch.float64) for _ in range(3))
    gates = [lr, eta if momentum else None, alpha]
    zeros = torch.zeros(2, 3, 2, 4, 5, dtype=torch.float64)
    memory = torch.stack([start.expand_as(zeros), *[zeros] * (2 if momentum else 1)], 2)
    state = SegmentedMemoryState(memory, torch.zeros(2, 3, dtype=torch.int64))
    calls = [[[0, 5, 40, 40], [0, 0, 31, 40]], [[0, 0, 27, 38], [0, 13, 13, 40]]]
    outs = []
    for call, cuts in enumerate(calls):
        here = slice(40 * call, 40 * call + 40)
        piece = [None if x is None else x[:, here] for x in (q, k, v, *gates)]
        o, state = segmented_neural_memory(*piece, chunk_size=chunk_size, state=state, cu_seqlens=torch.tensor(cuts))
        outs.append(o)
    o = torch.cat(outs, 1)
    for b in range(2):
        for s in range(3):
            tokens = [range(40 * n + cuts[b][s], 40 * n + cuts[b][s + 1]) for n, cuts in enumerate(calls)]
            index = torch.tensor([t for r in tokens for t in r])
            mine = [None if x is None else x[b : b + 1, index] for x in (q, k, v, *gates)]
            alone, after, _ = neural_memory(*mine, weights=[start], chunk_size=chunk_size)
            assert_close(f"o of {b}, {s}", alone[0], o[b, index], 1e-12)
            assert_close(f"memory {b}, {s}", after.weights[0][0], state.memory[b, s, 0], 1e-12)
            assert state.position[b, s] == len(index)


@pytest.mark.parametrize("momentum", [True, False])
def test_one_token_of_a_neural_memory_is_a_step_of_its_own(momentum):
    """One token per call, at different places in a chunk: the results and gradients of one call, in few operations."""
    torch.manual_seed(0)
    rows = (torch.randn(3, 9, 2, n, dtype=torch.float64) for n in (4, 4, 5))
    gates = (0.3 * torch.rand(3, 9, 2, dtype=torch.float64) for _ in range(3 if momentum else 1))
    inputs = [*rows, *gates, torch.randn(3, 1, 3 if momentum else 2, 2, 4, 5, dtype=torch.float64)]
    operations = []

    def of_pieces(length):
        def out(*x):
            state, o = SegmentedMemoryState(x[-1], torch.tensor([[0], [3], [5]])), []
            for pieces in zip(*(y.split(length, 1) for y in x[:-1]), strict=True):
                with Watch() as watch:
                    of_piece, state = segmented_neural_memory(*pieces, chunk_size=4, state=state)
                operations.append(watch.operations)
                o.append(of_piece)
            assert state.position.flatten().tolist() == [9, 12, 14]
            return torch.cat([torch.cat(o, 1).flatten(), state.memory.flatten()])

        return out

    at_once, streamed = ([of_pieces(n)(*inputs), *grads_of(of_pieces(n), inputs)] for n in (9, 1))
    for i, (expected, got) in enumerate(zip(at_once, streamed, strict=True)):
        assert_close(f"{i}", expected, got, 1e-12)
    operations.clear()
    of_pieces(1)(*inputs)
    assert max(operations) <= 44


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 75, 2, 4)}, r"q \[3, 75, 2, 6\] and k \[3, 75, 2, 4\] must be"),
        ({"beta": torch.zeros(3, 75)}, r"beta \[3, 75\] must be \[B, T, H\]"),
        ({"log_decay": torch.zeros(3, 75, 2, 5)}, r"log_decay .* or \[B, T, H, K\] = "),
        ({"cu_seqlens": torch.zeros(2, 3, dtype=torch.long)}, r"cu_seqlens \[2, 3\] must be integers \[B, S \+ 1\]"),
        ({"cu_seqlens": torch.zeros(3, 3)}, "cu_seqlens is float32; give int64 or int32"),
        ({"state": torch.zeros(3, 2, 2, 6, 5)}, r"state \[3, 2, 2, 6, 5\] must be \[B, S, H, K, V\]"),
        ({"backend": "triton"}, "backend='triton' cannot run here"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(zip(("q", "k", "v", "beta", "log_decay"), inputs("delta_decay"), strict=True))
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**arguments, **change})
