"""Triton's memory of one layer in blocks: places of its blocks, any division into calls."""

import itertools

import pytest
import torch

from memlm_kernels import neural_memory
from memlm_kernels.testing import assert_close, grads_of
from tests.kernels.test_neural_memory import make, names, run, token_by_token
from tests.kernels.test_triton import DEVICE, TOLERANCES, compare, memory_inputs

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")


def blocks(length, chunk_size, cu=None, position=None):
    """The tokens of each block, the tokens of each chunk in it, and the block that began its chunk."""
    from memlm_kernels.neural_memory.triton import _Call

    q = torch.empty(1 if cu is None else len(cu), length, 1, 16, device=DEVICE)
    places = (None if x is None else torch.tensor(x, device=DEVICE) for x in (cu, position))
    call = _Call(q, q, *places, chunk_size)
    call.lay()
    return call, call.given["table"].cpu(), call.given["first"].cpu()


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 20, 33, 64, 100, 1000])
@pytest.mark.parametrize("ragged", [False, True])
def test_blocks_cover_each_segment_and_keep_to_its_chunks(chunk_size, ragged):
    length, cu, position = 300, [[0, 300]], [[0]]
    if ragged:
        cu, position = [[0, 0, 1, 290, 290], [7, 140, 150, 160, 300]], [[5, 3, 19, 2], [0, 64, 99, 1001]]
    call, table, first = blocks(length, chunk_size, *((cu, position) if ragged else ()))
    for row, (bounds, before) in enumerate(zip(cu, position, strict=True)):
        used = 0
        for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
            at, n, p = begin, int(first[row, s]), before[s]
            assert n == used
            for block in range(n, int(first[row, s + 1])):
                start, stop, opener, segment = table[row, block].tolist()
                assert start == at < stop <= start + call.width and segment == s
                at, used = stop, block + 1
                place = p + start - begin
                chunk = place - place % chunk_size
                if opener == block:
                    assert place == chunk
                else:
                    # It lies in one chunk, which began with ``opener``, or in an earlier call.
                    assert p + stop - begin <= chunk + chunk_size
                    assert (opener == -1) if chunk < p else p + int(table[row, opener, 0]) - begin == chunk
            assert at == end
            if end > begin:
                # The last chunk has blocks of its own.
                chunk = (p + end - begin - 1) // chunk_size * chunk_size
                starts = [p + int(x) - begin for x in table[row, n:used, 0]]
                assert chunk < p or chunk in starts
        assert (table[row, used:, 0] >= table[row, used:, 1]).all()


@pytest.mark.parametrize(
    ("cuts", "dtype"),
    [
        ([40], torch.float16),
        ([13, 27], torch.float16),
        ([13, 27], torch.float32),
        ([1, 4, 10, 5, 2, 11, 7], torch.float32),
    ],
)
def test_any_division_into_calls_gives_the_same(cuts, dtype):
    """Gradients through the states too."""
    tensors = memory_inputs(40, 20, 6)[:7]

    def call(x, backend):
        *tokens, weights = x
        state, parts, t = None, [], 0
        for size in cuts if backend == "triton" else [40]:
            here = [y[:, t : t + size] for y in tokens]
            o, state, surprise = neural_memory(*here, weights=[weights], chunk_size=12, state=state, backend=backend)
            parts.append((o, surprise))
            t += size
        o, surprise = (torch.cat(y, 1) for y in zip(*parts, strict=True))
        return o, *state.weights, *state.momentum, *state.anchor, surprise

    compare(call, tensors, dtype)


def test_strong_gates_neither_overflow_nor_lose_digits():
    """Momentum and decay from 0 to almost 1."""
    tensors = memory_inputs(40, 6, 5)[:7]
    tensors[4] = torch.where(torch.arange(40)[:, None] % 3 == 0, 1e-6, tensors[4])
    tensors[5] = torch.where(torch.arange(40)[:, None] % 5 == 0, 1 - 1e-6, tensors[5] * 1e-3)

    def call(x, backend):
        *tokens, weights = x
        o, state, _ = neural_memory(*tokens, weights=[weights], chunk_size=4, backend=backend)
        return o, *state.weights, *state.momentum

    outputs = {}
    for backend in ("reference", "triton"):
        given = [x.to(DEVICE, torch.float64 if backend == "reference" else torch.float32) for x in tensors]
        outputs[backend] = call(given, backend)
    for expected, got in zip(*outputs.values(), strict=True):
        assert_close("o or state", expected, got, TOLERANCES[torch.float32][0])


def test_a_row_without_tokens_ends_with_the_memory_of_a_start():
    tensors, cu = memory_inputs(5, 6, 5, rows=2)[:7], torch.tensor([[0, 0, 0], [0, 3, 5]], device=DEVICE)

    def call(x, backend):
        *tokens, weights = x
        given = {"weights": [weights], "chunk_size": 4, "cu_seqlens": cu, "backend": backend}
        o, state, _ = neural_memory(*tokens, **given)
        return o, *state.weights, *state.momentum, *state.anchor

    compare(call, tensors, torch.float32)


def test_gates_at_their_ends_have_the_gradients_of_the_token_recurrence():
    """A momentum of 0 or near it, and a decay of 1: gradients are divided by these factors."""
    inputs = make(length=16, batch=1)
    for gate, places in ((4, {3: 0.0, 9: 1e-4}), (5, {6: 1.0})):
        for token, value in places.items():
            inputs[gate][:, token] = value
    expected = grads_of(lambda *x: token_by_token(*x, chunk_size=4), inputs)
    in_torch = grads_of(lambda *x: run(x, 4).o, inputs)
    single = [x.to(DEVICE, torch.float32) for x in inputs]
    in_triton = grads_of(lambda *x: run(x, 4, backend="triton").o, single)
    for name, e, r, t in zip(names(inputs), expected, in_torch, in_triton, strict=True):
        assert_close(f"{name}, in torch", e, r, 1e-5)
        assert_close(f"{name}, in Triton", e, t.cpu(), 1e-5)
