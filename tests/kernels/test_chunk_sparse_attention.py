"""The choice of chunks and attention to them, against loops over rows, tokens, heads and keys in fp64."""

import itertools
import math

import pytest
import torch

from memlm_kernels import chunk_mean_attention, chunk_sparse_attention, chunk_topk, invert_chunks
from memlm_kernels.attention import naive
from memlm_kernels.testing import Watch, assert_close, grads_of

NEVER = float("-inf")
GROUPED = [(2, 2), (4, 2), (6, 1)]


def heads_of(batch, tokens, keys, heads=4, groups=2, dim=6, value_dim=5, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    q = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    k = torch.randn(batch, keys, groups, dim, dtype=dtype)
    return q, k, torch.randn(batch, keys, groups, value_dim, dtype=dtype)


def spans_of(batch, tokens, chunks, seed=0):
    """Spans of any length, also empty."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(chunks + 1, (batch, tokens), generator=generator)
    return first, first + torch.randint(chunks + 2, (batch, tokens), generator=generator) - 1


def topk_oracle(q, k, top_k, spans):
    out = torch.full((*q.shape[:2], k.shape[2], top_k), -1)
    chunks = k.shape[1]
    for b, t, g in itertools.product(*map(range, out.shape[:3])):
        known = range(chunks) if spans is None else range(max(0, spans[0][b, t]), min(chunks, spans[1][b, t]))
        order = naive.chunk_topk(q[b, t].unflatten(0, (k.shape[2], -1))[g], k[b, :, g], top_k, known)
        out[b, t, g, : len(order)] = torch.tensor(order, dtype=torch.int64)
    return out


@pytest.mark.parametrize(("heads", "groups"), GROUPED)
@pytest.mark.parametrize("tile", [1, 3, 1024])
@pytest.mark.parametrize("spanned", [True, False])
def test_topk_equals_a_loop(heads, groups, tile, spanned):
    q, k, _ = heads_of(2, 11, 10, heads, groups)
    spans = spans_of(2, 11, 10) if spanned else None
    for top_k in (1, 3, 12):
        got = chunk_topk(q, k, top_k=top_k, spans=spans, tile=tile)
        assert torch.equal(topk_oracle(q, k, top_k, spans), got), top_k


@pytest.mark.parametrize("tile", [1, 2, 4, 1024])
def test_equal_scores_take_the_lowest_chunk(tile):
    # Products and sums of small integers are exact in any order.
    k = (8 * heads_of(1, 3, 9)[1]).round()
    k[:, 3:] = k[:, :1]
    k[:, 1:3] = -k[:, :1]
    q = k[:, :1].repeat_interleave(2, 2).expand(-1, 3, -1, -1)
    got = chunk_topk(q, k, top_k=4, tile=tile)
    assert torch.equal(got, torch.tensor([0, 3, 4, 5]).expand(1, 3, 2, 4))
    zeros = torch.zeros_like(q)
    assert torch.equal(chunk_topk(zeros, k, top_k=9, tile=tile), torch.arange(9).expand(1, 3, 2, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_scores_in_fp32(dtype):
    """No chunk that was not chosen has a higher score than a chosen one, beyond the rounding of fp32."""
    q, k, _ = heads_of(2, 20, 50, dim=64, dtype=torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    got = chunk_topk(q, k, top_k=5, tile=16)
    folded = q.double().unflatten(2, (2, 2)).sum(3)
    score = torch.einsum("btgk,bngk->btgn", folded, k.double())
    taken = torch.zeros_like(score, dtype=torch.bool).scatter(3, got, True)
    assert (taken.sum(-1) == 5).all()
    slack = score.masked_fill(~taken, math.inf).amin(-1) - score.masked_fill(taken, NEVER).amax(-1)
    assert slack.min() > -1e-4


def test_no_tensor_holds_more_scores_than_a_tile():
    q, k, v = heads_of(1, 64, 64, 2, 2, dim=2, value_dim=2)
    index, starts = torch.full((1, 64, 2, 1), 3), torch.arange(0, 64, 4)[None]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with Watch() as watch:
        chunk_topk(q, k, top_k=2, tile=8)
        chunk_mean_attention(*leaves, tile=8).o.sum().backward()
        chunk_sparse_attention(*leaves, index, starts, chunk_size=4, window=4, tile=8).o.sum().backward()
    assert watch.largest < 64 * 64


def test_inverted_index():
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(2 * 9 * 2)]).view(2, 9, 2, 3)
    index = torch.where(torch.rand(index.shape, generator=generator) < 0.3, -1, index)
    readers = invert_chunks(index, num_chunks=8)
    for b in range(2):
        for g in range(2):
            for n in range(8):
                expected = [t for t in range(9) if n in index[b, t, g]]
                start, end = readers.offsets[b, g, n : n + 2].tolist()
                assert readers.token[b, g, start:end].tolist() == expected
    assert readers.offsets[..., -1].tolist() == (index >= 0).sum((1, 3)).tolist()
    assert invert_chunks(index[:, :0], num_chunks=8).offsets.sum() == 0
    assert invert_chunks(index[..., :0], num_chunks=0).offsets.shape[2] == 1


def sparse_oracle(q, k, v, index, starts, chunk_size, window, positions=None, far=None):
    """Output and lse side by side, [B, T, H, V + 1]; k as long as v."""

    def sees(b, t, g):
        here = k.shape[1] - q.shape[1] + t
        near = naive.window_of(here, window, None if positions is None else positions[b, t].item())
        chosen = index[b, t, g].tolist(), starts[b].tolist(), chunk_size
        return near, naive.chunk_keys(*chosen, here - window + 1)

    return naive.attend([(q, k, v), (*(far or (q, k)), v)], sees)


def choices(batch, tokens, groups, chunks, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, tokens, groups, chunks, generator=generator).argsort(-1)[..., :count]
    return torch.where(torch.rand(index.shape, generator=generator) < 0.2, -1, index)


def side_by_side(attended):
    return torch.cat([attended.o, attended.lse[..., None]], -1)


# Keys, tokens, chunk size, window: the first chunk may start before the first key, a token may choose later chunks.
# If there are more keys than twelve times the chunk's size, chosen keys are gathered; otherwise all are scored.
SIZES = [(23, 23, 4, 5), (30, 9, 2, 7), (12, 1, 3, 4), (41, 3, 3, 4), (15, 15, 1, 1), (8, 8, 4, 20)]


@pytest.mark.parametrize(("heads", "groups"), GROUPED)
@pytest.mark.parametrize(("keys", "tokens", "chunk_size", "window"), SIZES)
def test_attention_equals_a_loop_and_so_do_its_gradients(heads, groups, keys, tokens, chunk_size, window):
    q, k, v = heads_of(2, tokens, keys, heads, groups)
    chunks = keys // chunk_size
    index = choices(2, tokens, groups, chunks, 3)
    starts = torch.stack([torch.arange(chunks) * chunk_size + shift for shift in (0, -1)])

    def expected(q, k, v):
        return sparse_oracle(q, k, v, index, starts, chunk_size, window)

    options = dict(chunk_size=chunk_size, window=window)
    reads, gradients = expected(q, k, v), grads_of(expected, [q, k, v])
    for tile in (1, 4, 128):

        def got(q, k, v, tile=tile):
            return side_by_side(chunk_sparse_attention(q, k, v, index, starts, tile=tile, **options))

        assert_close("output and lse", reads, got(q, k, v), 1e-12)
        for name, a, b in zip("qkv", gradients, grads_of(got, [q, k, v]), strict=True):
            assert_close(f"gradient of {name}", a, b, 1e-11)


def test_documents_and_far_positions():
    """A window stops at its document's start; chunks have their own queries and keys; k holds only the last keys."""
    q, k, v = heads_of(2, 14, 21)
    far_q, far_k, _ = heads_of(2, 14, 21, seed=1)
    positions = torch.tensor([[7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [20 - i for i in range(13, -1, -1)]])
    index, starts = choices(2, 14, 2, 4, 2), torch.tensor([[0, 4, 11, 15], [0, 5, 10, 15]])
    options = dict(chunk_size=4, window=6, positions=positions)

    def expected(q, k, v, far_q, far_k):
        return sparse_oracle(q, k, v, index, starts, 4, 6, positions, (far_q, far_k))

    def got(q, k, v, far_q, far_k, kept=21):
        near = k[:, 21 - kept :]
        return side_by_side(chunk_sparse_attention(q, near, v, index, starts, far=(far_q, far_k), tile=5, **options))

    inputs = [q, k, v, far_q, far_k]
    assert_close("output and lse", expected(*inputs), got(*inputs), 1e-12)
    assert_close("last keys only", expected(*inputs), got(*inputs, kept=19), 1e-12)
    for i, (a, b) in enumerate(zip(grads_of(expected, inputs), grads_of(got, inputs), strict=True)):
        assert_close(f"gradient {i}", a, b, 1e-11)


def test_one_token_equals_a_loop_and_so_do_its_gradients():
    """Rows of other lengths, k with the last keys only; chunks that are -1, before the keys or within the window."""
    q, k, v = heads_of(2, 1, 21)
    far_q, far_k, _ = heads_of(2, 1, 21, seed=1)
    index = torch.tensor([[[[2, 0, -1], [1, -1, 2]]], [[[-1, -1, -1], [3, 4, 0]]]])
    starts, positions = torch.tensor([[-2, 2, 8, 12, 16], [0, 4, 9, 13, 17]]), torch.tensor([[2], [20]])
    options = dict(chunk_size=4, window=6, positions=positions)

    def expected(q, k, v, far_q, far_k):
        return sparse_oracle(q, k, v, index, starts, 4, 6, positions, (far_q, far_k))

    def got(q, k, v, far_q, far_k):
        return side_by_side(chunk_sparse_attention(q, k[:, 14:], v, index, starts, far=(far_q, far_k), **options))

    inputs = [q, k, v, far_q, far_k]
    assert_close("output and lse", expected(*inputs), got(*inputs), 1e-12)
    for i, (a, b) in enumerate(zip(grads_of(expected, inputs), grads_of(got, inputs), strict=True)):
        assert_close(f"gradient {i}", a, b, 1e-11)


@pytest.mark.parametrize("tokens", [1, 9])
def test_without_starts_the_keys_are_cut_into_chunks(tokens):
    q, k, v = heads_of(2, tokens, 30)
    index, starts = choices(2, tokens, 2, 7, 3), torch.arange(0, 30, 4).expand(2, -1)
    expected, got = (
        side_by_side(chunk_sparse_attention(q, k, v, index, s, chunk_size=4, window=5)) for s in (starts, None)
    )
    assert torch.equal(expected, got)
    with pytest.raises(ValueError, match="numbers from 8 to 8; give numbers of less than 8"):
        chunk_sparse_attention(q, k, v, torch.full_like(index, 8), None, chunk_size=4, window=5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("tokens", [1, 9])
def test_it_compiles_with_its_backward(tokens):
    q, k, v = heads_of(2, tokens, 30)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        index = chunk_topk(q, k[:, ::4], top_k=3)
        return chunk_sparse_attention(q, k, v, index, None, chunk_size=4, window=5).o

    results = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        y = run(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


def test_all_chunks_are_full_attention():
    q, k, v = heads_of(2, 33, 33)
    starts = torch.arange(0, 32, 4).expand(2, -1)
    index = torch.arange(8).expand(2, 33, 2, -1)
    got = chunk_sparse_attention(q, k, v, index, starts, chunk_size=4, window=5, tile=8).o
    k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    full = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
    assert_close("output", full.transpose(1, 2), got, 1e-12)


@pytest.mark.parametrize(("heads", "groups"), GROUPED)
@pytest.mark.parametrize("tile", [1, 4, 128])
def test_attention_to_means_equals_a_loop_and_so_do_its_gradients(heads, groups, tile):
    q, k, v = heads_of(2, 11, 6, heads, groups)
    first, end = spans = spans_of(2, 11, 6)

    def expected(q, k, v):
        # Zeros where nothing is seen; the test replaces -inf by zeros too.
        return naive.attend([(q, k, v)], lambda b, t, g: [range(max(0, first[b, t]), min(6, end[b, t]))])

    def got(q, k, v):
        attended = chunk_mean_attention(q, k, v, spans=spans, tile=tile)
        assert ((attended.lse == NEVER) == (first >= end.clamp(max=6))[..., None]).all()
        return side_by_side(attended._replace(lse=attended.lse.masked_fill(attended.lse == NEVER, 0.0)))

    assert (first >= end.clamp(max=6)).any()
    assert_close("output and lse", expected(q, k, v), got(q, k, v), 1e-12)
    for name, a, b in zip("qkv", grads_of(expected, [q, k, v]), grads_of(got, [q, k, v]), strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-11)
    whole = chunk_mean_attention(q, k, v, tile=tile).o
    everything = chunk_mean_attention(q, k, v, spans=(first * 0, end * 0 + 6)).o
    assert_close("without spans", everything, whole, 1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_low_precision_accumulates_in_fp32(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in heads_of(1, 40, 40, dim=64, value_dim=64))
    index, starts = choices(1, 40, 2, 10, 3), torch.arange(0, 40, 4)[None]
    options = dict(chunk_size=4, window=6)
    got = chunk_sparse_attention(q, k, v, index, starts, **options)
    exact = chunk_sparse_attention(q.double(), k.double(), v.double(), index, starts, **options)
    assert got.o.dtype == dtype and got.lse.dtype == torch.float32
    assert_close("output", exact.o, got.o, tolerance)
    assert_close("lse", exact.lse, got.lse, 1e-6)


def test_nothing_to_attend_to():
    q, k, v = heads_of(2, 5, 5)
    none = torch.zeros(2, 5, 2, 0, dtype=torch.int64)
    starts = torch.zeros(2, 0, dtype=torch.int64)
    window = chunk_sparse_attention(q, k, v, none, starts, chunk_size=4, window=3).o
    absent = chunk_sparse_attention(q, k, v, none.new_full((2, 5, 2, 3), -1), starts, chunk_size=4, window=3).o
    assert torch.equal(window, absent)
    assert (chunk_topk(q, k[:, :0], top_k=2) == -1).all()
    assert (chunk_mean_attention(q, k[:, :0], v[:, :0]).o == 0).all()
    empty = chunk_sparse_attention(q[:, :0], k, v, none[:, :0], starts, chunk_size=4, window=3)
    assert empty.o.shape == (2, 0, 4, 5) and empty.lse.shape == (2, 0, 4)
    assert chunk_topk(q[:, :0], k, top_k=2).shape == (2, 0, 2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window=0), "window=0 must be at least 1"),
        (dict(chunk_size=0), "chunk_size=0 must be at least 1"),
        (dict(backend="triton"), "cannot run here"),
        (dict(index=torch.zeros(1, 5, 2, 1)), "index is float32; give int64 or int32"),
        (dict(index=torch.zeros(1, 5, 1, 1)), r"index \[1, 5, 1, 1\] must be integers \[B, T, G, J\]"),
        (dict(starts=torch.zeros(2, 3, dtype=torch.int64)), r"starts \[2, 3\] must be integers \[B, N\] with B=1"),
        (dict(positions=torch.zeros(1, 4, dtype=torch.int64)), r"positions \[1, 4\] must be integers"),
        (dict(k=torch.zeros(1, 4, 2, 6, dtype=torch.float64)), "L at least T=5"),
        (dict(v=torch.zeros(1, 6, 2, 5, dtype=torch.float64)), r"keys \[1, 5, 2, 6\] of chunks"),
        (dict(q=torch.zeros(1, 5, 3, 6, dtype=torch.float64)), "3 heads, not a multiple of the 2"),
    ],
)
def test_bad_inputs_are_named(settings, message):
    q, k, v = heads_of(1, 5, 5)
    index, starts = torch.zeros(1, 5, 2, 1, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    given = {"q": q, "k": k, "v": v, "index": index, "starts": starts, "chunk_size": 2, "window": 3, **settings}
    with pytest.raises(ValueError, match=message):
        chunk_sparse_attention(**given)
    with pytest.raises(ValueError, match="top_k=0"):
        chunk_topk(q, k, top_k=0)
    with pytest.raises(ValueError, match=r"spans \[1, 4\]"):
        chunk_topk(q, k, top_k=1, spans=(index[:, :4, 0, 0], index[:, :4, 0, 0]))
    with pytest.raises(ValueError, match=r"v \[1, 4, 2, 5\] must be"):
        chunk_mean_attention(q, k, v[:, 1:])
    with pytest.raises(ValueError, match="num_chunks=-1"):
        invert_chunks(index, num_chunks=-1)
