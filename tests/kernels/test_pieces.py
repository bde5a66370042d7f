"""Rows in pieces give the results of whole rows, whatever the pieces are."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from memlm_kernels import (
    NeuralMemoryState,
    SegmentedMemoryState,
    delta_rule,
    linear_attention,
    neural_memory,
    pieces,
    segmented_neural_memory,
)
from memlm_kernels.neural_memory import triton as memory_triton
from memlm_kernels.pieces import cut, in_pieces, pieces_of
from scripts.count_launches import Count

BATCH, LENGTH, HEADS, KEYS, VALUES = 3, 50, 2, 8, 6
BOUNDARIES = torch.tensor([[0, 7, 7, 30, 50], [0, 13, 26, 39, 40], [5, 5, 5, 50, 50]])


def inputs(dtype, length=LENGTH, keys=KEYS, values=VALUES):
    draws = torch.Generator().manual_seed(0)
    q, k = (torch.randn(BATCH, length, HEADS, keys, generator=draws, dtype=dtype) for _ in range(2))
    v = torch.randn(BATCH, length, HEADS, values, generator=draws, dtype=dtype)
    beta, decay = (torch.rand(BATCH, length, HEADS, generator=draws, dtype=dtype) for _ in range(2))
    channels = torch.rand(BATCH, length, HEADS, keys, generator=draws, dtype=dtype)
    state = torch.randn(BATCH, 4, HEADS, keys, values, generator=draws, dtype=dtype)
    return q, F.normalize(k, dim=-1), v, beta, -0.1 * decay, -0.1 * channels, state


RULES = {
    "delta": (lambda q, k, v, beta, decay, channels, **o: delta_rule(q, k, v, beta, with_residual=True, **o), False),
    "gated delta": (
        lambda q, k, v, beta, decay, channels, **o: delta_rule(q, k, v, beta, decay, with_residual=True, **o),
        False,
    ),
    "linear": (lambda q, k, v, beta, decay, channels, **o: linear_attention(q, k, v, **o), True),
    "a decay": (lambda q, k, v, beta, decay, channels, **o: linear_attention(q, k, v, decay, **o), True),
    "a decay per channel": (
        lambda q, k, v, beta, decay, channels, **o: linear_attention(q, k, v, channels, **o),
        True,
    ),
    "delta, a decay per channel": (
        lambda q, k, v, beta, decay, channels, **o: delta_rule(q, k, v, beta, channels, with_residual=True, **o),
        False,
    ),
}


def gradients(results, given):
    draws = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=draws, dtype=x.dtype)).sum() for x in results)
    return torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("count", [2, 7, LENGTH])
@pytest.mark.parametrize("whole", [False, True], ids=["documents", "one document"])
@pytest.mark.parametrize("rule", RULES)
def test_pieces_equal_whole_rows(rule, whole, count):
    """Empty segments, padding on both sides, borders at boundaries; a token a piece."""
    op, diagonal = RULES[rule]
    given = [x.requires_grad_() for x in inputs(torch.float64)]
    q, k, v, *gates, state = given
    cu, state = (None, state[:, :1]) if whole else (BOUNDARIES, state)

    def run(v, cu, state):
        return tuple(op(q, k, v, *gates, cu_seqlens=cu, state=state))

    unit = torch.ones(KEYS, 1, dtype=v.dtype) if diagonal else torch.eye(KEYS, dtype=v.dtype)
    of = cut(torch.tensor([[0, LENGTH]] * BATCH) if whole else BOUNDARIES, LENGTH, count)
    expected, found = run(v, cu, state), in_pieces(run, v, of, state, unit)
    for x, y in zip((*expected, *gradients(expected, given)), (*found, *gradients(found, given)), strict=True):
        torch.testing.assert_close(y, x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("count", [2, 7])
def test_pieces_of_a_memory_begin_with_chunks(count, chunk_size):
    """So the anchor before a piece inside a segment has no effect, and T has rows for M and momentum alone."""
    q, k, v, lr, decay, _, state = inputs(torch.float64)
    state = torch.stack([state, state.roll(1, 0), state.roll(1, 1)], 2)
    given = [x.requires_grad_() for x in (q, k, v, lr, 0.3 * lr, -decay, state)]
    q, k, v, *gates, state = given
    before = torch.tensor([[0, 3, 0, 9], [5, 0, 2, 7], [6, 1, 0, 11]])

    def run(v, cu, state):
        begins = (cu[:, :-1] - BOUNDARIES.gather(1, of.owner)) + before.gather(1, of.owner)
        memory = SegmentedMemoryState(rearrange(state, "b s h (p k) v -> b s p h k v", p=3), begins)
        o, (after, _) = segmented_neural_memory(
            q, k, v, *gates, chunk_size=chunk_size, cu_seqlens=cu, state=memory, backend="reference"
        )
        return o, rearrange(after, "b s p h k v -> b s h (p k) v")

    of = cut(BOUNDARIES, LENGTH, 1, chunk_size, before)
    expected = run(v, BOUNDARIES, rearrange(state, "b s p h k v -> b s h (p k) v"))
    of = cut(BOUNDARIES, LENGTH, count, chunk_size, before)
    unit = torch.eye(3 * KEYS, dtype=v.dtype)[:, : 2 * KEYS]
    found = in_pieces(run, v, of, rearrange(state, "b s p h k v -> b s h (p k) v"), unit)
    for x, y in zip((*expected, *gradients(expected, given)), (*found, *gradients(found, given)), strict=True):
        torch.testing.assert_close(y, x, atol=1e-11, rtol=1e-12)


def test_every_token_is_in_a_piece_of_its_segment():
    of = cut(BOUNDARIES, LENGTH, 9)
    assert of.owner.shape == (BATCH, 4 + 9 - 1)
    for b, row in enumerate(BOUNDARIES.tolist()):
        spans = list(zip(of.cu[b, :-1].tolist(), of.cu[b, 1:].tolist(), of.owner[b].tolist(), strict=True))
        for s, (begin, end) in enumerate(itertools.pairwise(row)):
            mine = [(x, y) for x, y, owner in spans if owner == s]
            assert mine[0][0] == begin and mine[-1][1] == end and all(y - x <= 6 for x, y in mine)
            assert all(one[1] == two[0] for one, two in itertools.pairwise(mine))
        assert of.opens[b].sum() == 4


LONG = ["gated delta"]
MORE = ["a decay per channel", "neural memory", "segmented memory", "neural memory of whole rows"]


def run(case, given, state):
    """The results of Triton's kernels on a row of 26 tokens."""
    q, k, v, lr, decay, channels = given
    rates = (lr, 0.3 * lr, 0.1 * lr)
    cu = torch.tensor([[0, 9, 25]])
    if case in RULES:
        return RULES[case][0](q, k, v, lr, decay, channels, cu_seqlens=cu, state=state, backend="triton")
    if case == "segmented memory":
        memory = SegmentedMemoryState(torch.stack([state, -state, 0.5 * state], 2), torch.tensor([[3, 0]]))
        o, (memory, _) = segmented_neural_memory(
            q, k, v, *rates, chunk_size=4, cu_seqlens=cu, state=memory, backend="triton"
        )
        return o, memory
    if case == "neural memory":
        parts = [(x,) for x in (state[:, 0], -state[:, 0], 0.5 * state[:, 0])]
        places = {"cu_seqlens": cu, "state": NeuralMemoryState(*parts, torch.tensor([3]))}
    else:
        places = {"start": 0}
    o, memory, surprise = neural_memory(
        q, k, v, *rates, weights=[state[0, 1]], chunk_size=4, **places, backend="triton"
    )
    parts = [x for part in memory[:3] for x in part]
    torch.testing.assert_close(surprise[:, 25:].sum() * (case == "neural memory"), torch.tensor(0.0))
    return o, *parts, surprise[:, :25]


@pytest.mark.parametrize("case", [*LONG, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_kernels_take_long_rows_in_pieces(case, monkeypatch):
    """Where a device would have idle multiprocessors."""
    *given, state = (x[:1].requires_grad_() for x in inputs(torch.float32, 26, 16, 16))
    results, counts, real = [], [], pieces.cut
    monkeypatch.setattr(pieces, "SHORTEST", 8)
    monkeypatch.setattr(pieces, "FEWEST", 3)
    for module in (pieces, memory_triton):
        monkeypatch.setattr(module, "cut", lambda *a: counts.append(a[2]) or real(*a))
    for processors in (0, 50):
        monkeypatch.setattr(pieces, "slots", lambda device, processors=processors: processors)
        out = run(case, given, state[:, :2])
        # A surprise has no gradient.
        results.append((*out, *gradients([x for x in out if x.requires_grad], [*given, state])))
    assert counts == [3]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(y, x, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    ("length", "chains", "rows", "expected"),
    # Delta rules of 128 channels on an H200: one row and one head; 16 heads; 8 rows of 4,096 with 16 heads; shorter.
    [
        (131_072, 2, 128, 22),
        (131_072, 32, 128, 1),
        (4_096, 256, 128, 1),
        (4_096, 2, 128, 1),
        (8_192, 2, 128, 8),
        (2_048, 1, 1, 1),
    ],
)
def test_rows_are_cut_where_processors_idle(length, chains, rows, expected, monkeypatch):
    monkeypatch.setattr(pieces, "slots", lambda device: 132)
    assert pieces_of(torch.empty(0), length, chains, rows, 128) == expected


def test_starts_follow_in_fp32_under_autocast():
    """Rounded transitions would lose most digits of a long row."""
    q, k, v, beta, decay, _, state = inputs(torch.float32)

    def run(v, cu, state):
        return delta_rule(q, k, v, beta, decay, cu_seqlens=cu, state=state, backend="reference")[:2]

    with torch.autocast("cpu", torch.bfloat16):
        found = in_pieces(run, v, cut(BOUNDARIES, LENGTH, 7), state, torch.eye(KEYS))
        expected = run(v, BOUNDARIES, state)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_start_of_a_piece_takes_one_launch_and_few_backward(diagonal):
    def launches(count):
        state, unit = torch.randn(1, 1, HEADS, KEYS, VALUES).requires_grad_(), torch.eye(KEYS)
        of = cut(torch.tensor([[0, 8 * count]]), 8 * count, count)
        forward, backward = Count(), Count()
        with forward:
            v = torch.randn(1, 8 * count, HEADS, VALUES)
            o, after = in_pieces(lambda v, _, s: (v, s.cos()), v, of, state, torch.ones(KEYS, 1) if diagonal else unit)
        with backward:
            (o.sum() + after.sum()).backward()
        return forward.total().launches, backward.total().launches

    forward, backward = ((more - few) / 10 for few, more in zip(launches(10), launches(20), strict=True))
    assert forward <= 1 and backward <= (6 if diagonal else 4)
