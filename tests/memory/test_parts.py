"""Parts that several memories share."""

import torch

from memlm.memory.parts import join_softmax
from memlm_kernels import prefix_window_attention
from memlm_kernels.testing import assert_close, grads_of


def test_streams_under_one_softmax_are_dense_attention():
    """Three streams of keys, of which a query sees others each, and the third not at all at first."""
    torch.manual_seed(0)
    q = 3 * torch.randn(2, 9, 4, 8, dtype=torch.float64)
    sizes, seen = (5, 7, 3), torch.rand(2, 9, 15) < 0.6
    seen[:, :, 0], seen[:, :4, 12:] = True, False
    keys = [torch.randn(2, n, 2, 8, dtype=torch.float64) for n in sizes]
    values = [torch.randn(2, n, 2, 6, dtype=torch.float64) for n in sizes]

    def scores(q, k):
        return torch.einsum("bthk,bshk->bths", q, k.repeat_interleave(2, 2)) * 8**-0.5

    def dense(q, *kv):
        k, v = torch.cat(kv[:3], 1), torch.cat(kv[3:], 1)
        share = scores(q, k).masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
        return torch.einsum("bths,bshv->bthv", share, v.repeat_interleave(2, 2))

    def streams(q, *kv):
        parts = []
        for k, v, mask in zip(kv[:3], kv[3:], seen.split(sizes, -1), strict=True):
            score = scores(q, k).masked_fill(~mask[:, :, None], -1e300)
            o = torch.einsum("bths,bshv->bthv", score.softmax(-1), v.repeat_interleave(2, 2))
            parts.append((o, score.logsumexp(-1).masked_fill(~mask.any(-1)[..., None], float("-inf"))))
        return join_softmax(parts)[0]

    tensors = [q, *keys, *values]
    assert_close("o", dense(*tensors), streams(*tensors), 1e-15)
    for i, (expected, got) in enumerate(zip(grads_of(dense, tensors), grads_of(streams, tensors), strict=True)):
        assert_close(f"gradient {i}", expected, got, 5e-15)


def test_a_window_and_the_window_before_it_are_one_window_of_both():
    """The op's own log-sum-exp, with its gradient, in fp32 and joined with a bf16 output."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 4, 8, dtype=torch.float64).unbind()

    def late(x):
        return torch.cat([torch.zeros_like(x[:, :8]), x[:, :-8]], 1)

    place = torch.arange(40).expand(2, -1)

    def both(q, k, v):
        near = prefix_window_attention(q, k, v, window=8, with_lse=True)
        far = prefix_window_attention(q, late(k), late(v), window=8, positions=(place - 8).clamp(min=0), with_lse=True)
        lse = far.lse.masked_fill((place < 8)[..., None], float("-inf"))
        return join_softmax([(near.o, near.lse), (far.o, lse)])[0]

    def whole(q, k, v):
        return prefix_window_attention(q, k, v, window=16).o

    assert_close("o", whole(q, k, v), both(q, k, v), 1e-15)
    for i, (expected, got) in enumerate(zip(grads_of(whole, [q, k, v]), grads_of(both, [q, k, v]), strict=True)):
        assert_close(f"gradient {i}", expected, got, 5e-15)
    low = [x.bfloat16() for x in (q, k, v)]
    got = both(*low)
    assert got.dtype == torch.bfloat16
    assert_close("bf16", whole(*(x.double() for x in low)), got, 5e-3)
