"""Attention of one token a row: all that it sees is scored at once, and autograd goes through.

B rows, H query heads in G groups of R, K key dim, V value dim, L keys, S that the token scores, J chosen chunks of C
keys.
"""

import torch
from torch import Tensor

from memlm_kernels.attention.chunks_reference import Keys, flat_keys, vectors
from memlm_kernels.segments import exact


def read_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, 1, H, V], and lse [B, 1, H], over all keys [B, S, G, K] and values."""
    return _read(q, _scores(q, _by_group(k), k.shape[2]) * scale, _by_group(v))


def read_chosen(
    near: Keys, far: Keys, first: Tensor | None, chunk_size: int, window: int, positions: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same over the window and chosen chunks before it, see ``chunk_sparse_attention``.

    first: [B, G, J], the key that each chunk starts with, of none any that is not before the window; None: no chunks
    """
    seen = min(window, near.k.shape[1])
    groups = near.k.shape[2]
    scores, v = _scores(near.q, _by_group(near.k[:, -seen:]), groups), _by_group(near.v[:, -seen:])
    if positions is not None:
        hidden = torch.arange(seen - 1, -1, -1, device=v.device) > positions
        scores = scores.masked_fill(hidden.repeat_interleave(groups, 0)[:, None], float("-inf"))
    before = far.v.shape[1] - window
    if first is not None and before > 0:
        key = (first[..., None] + torch.arange(chunk_size, device=v.device)).flatten(2)
        there = key.clamp(0, before - 1)
        far_k, far_v = _gathered([far.k, far.v], there)
        of_chunks = _scores(far.q, far_k, groups).masked_fill((there != key).flatten(0, 1)[:, None], float("-inf"))
        scores, v = torch.cat([scores, of_chunks], 2), torch.cat([v, far_v], 1)
    return _read(near.q, scores * scale, v)


def _by_group(x: Tensor) -> Tensor:
    """[B, S, G, K] -> [B G, S, K]"""
    return exact(x).transpose(1, 2).flatten(0, 1)


def _gathered(tensors: list[Tensor], key: Tensor) -> list[Tensor]:
    """[B, L, G, K], [B, G, S] -> [B G, S, K]"""
    found, flat, shape = [], dict[int, Tensor](), (len(key) * key.shape[1], key.shape[2])
    for x in tensors:
        each, apart = vectors(x)
        if apart not in flat:
            flat[apart] = flat_keys(key[:, None], apart)
        found.append(exact(each.index_select(0, flat[apart]).view(*shape, x.shape[3])))
    return found


def _scores(q: Tensor, k: Tensor, groups: int) -> Tensor:
    return torch.bmm(exact(q).reshape(len(k), q.shape[2] // groups, q.shape[3]), k.mT)


def _read(q: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """scores: [B G, R, S]; v: [B G, S, V]"""
    output = torch.bmm(scores.softmax(-1), v)
    return output.to(q.dtype).view(*q.shape[:3], v.shape[2]), scores.logsumexp(-1).view(q.shape[:3])
