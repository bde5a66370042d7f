"""Attention to a window, a prefix and chosen chunks, one query after the other. For each token t and head h, with the
scores s_i = q . k_i / sqrt(K) and values v_i of the visible keys,

    lse = log sum_i exp(s_i)        o = sum_i exp(s_i - lse) v_i

The tiled form. A softmax over two disjoint sets A and B of keys is the sum of both, weighted by their lse:

    lse = log(exp(lse_A) + exp(lse_B))        o = exp(lse_A - lse) o_A + exp(lse_B - lse) o_B

So keys may come in any tiles, and a window, a prefix and chunks may be scored separately. A tile may score keys that a
query must not see: with s = -inf they add exp(-inf) = 0. Hence a block of Q queries scores Q + window - 1 keys. The
choice of chunks sums scores over the heads of a group, which is one product: sum_h q_h . k = (sum_h q_h) . k.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Source = Sequence[Tensor]


def attend(sources: Sequence[Source], sees: Callable[[int, int, int], Sequence[Iterable[int]]]) -> Tensor:
    """Output and lse side by side, [B, T, H, V + 1].

    sources: q, k, v of each source (a window, a prefix, ...), with the shapes of the ops
    sees: sees(b, t, g) lists the visible keys of each source for a token and a group of heads
    """
    (q, k, v), *_ = sources
    out = q.new_zeros(*q.shape[:3], v.shape[3] + 1)
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        g, pairs = h * k.shape[2] // q.shape[2], []
        for (of_q, of_k, of_v), keys in zip(sources, sees(b, t, g), strict=True):
            row = b % len(of_k)
            pairs += [(of_q[b, t, h] @ of_k[row, i, g] * q.shape[3] ** -0.5, of_v[row, i, g]) for i in keys]
        if pairs:
            s, values = (torch.stack(x) for x in zip(*pairs, strict=True))
            lse = s.logsumexp(0)
            out[b, t, h] = torch.cat([(s - lse).exp() @ values, lse[None]])
    return out


def window_of(here: int, window: int | None, before: int | None) -> range:
    """The last keys up to ``here``, at most ``window``, of which at most ``before`` come before it."""
    back = min(here if before is None else min(here, before), here if window is None else window - 1)
    return range(here - back, here + 1)


def chunk_keys(chosen: list[int], starts: list[int], size: int, end: int) -> list[int]:
    """The keys before ``end`` of the chosen chunks; a negative number chooses none."""
    return sorted({i for n in chosen if n >= 0 for i in range(max(0, starts[n]), min(starts[n] + size, end))})


def chunk_topk(q: Tensor, k: Tensor, top_k: int, known: Iterable[int]) -> list[int]:
    """For a token and group of heads, q [R, K] and k [N, K]: the best known chunks, among equal scores the lowest."""
    score = {n: sum((of_head @ k[n]).item() for of_head in q) for n in known}
    return sorted(score, key=lambda n: (-score[n], n))[:top_k]
