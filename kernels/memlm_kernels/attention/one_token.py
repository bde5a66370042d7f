"""Attention of one token per row. All its keys are scored at once, and torch's autograd gives the gradients.

B rows, H query heads in G groups of R, K key dim, V value dim, L keys, S scored keys, J chosen chunks of C keys.
"""

import torch
from torch import Tensor

from memlm_kernels.attention.chunks_reference import Chosen, Keys, apart, first_vector, vectors
from memlm_kernels.segments import exact


def read_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, 1, H, V], and lse [B, 1, H], over all keys [B, S, G, K] and values."""
    return _read(q, _scores(q, _by_group(k), k.shape[2]) * scale, _by_group(v))


def read_chosen(chosen: Chosen, pairs: list[Keys], v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same over the window and the chosen chunks before it, see ``chunk_sparse_attention``."""
    (q, near_k), (far_q, far_k), groups = pairs[0], pairs[-1], v.shape[2]
    seen = min(chosen.window, near_k.shape[1])
    scores, seen_v = _scores(q, _by_group(near_k[:, -seen:]), groups), _by_group(v[:, -seen:])
    if chosen.positions is not None:
        hidden = torch.arange(seen - 1, -1, -1, device=v.device) > chosen.positions
        scores = scores.masked_fill(hidden.repeat_interleave(groups, 0)[:, None], float("-inf"))
    before = v.shape[1] - chosen.window
    if chosen.first.shape[3] and before > 0:
        key = (chosen.first[:, 0, :, :, None] + torch.arange(chosen.chunk_size, device=v.device)).flatten(2)
        there = key.clamp(0, before - 1)
        of_chunks, chosen_v = _gathered([far_k, v], there)
        of_chunks = _scores(far_q, of_chunks, groups).masked_fill((there != key).flatten(0, 1)[:, None], float("-inf"))
        scores, seen_v = torch.cat([scores, of_chunks], 2), torch.cat([seen_v, chosen_v], 1)
    return _read(q, scores * scale, seen_v)


def _by_group(x: Tensor) -> Tensor:
    """[B, S, G, K] -> [B G, S, K]"""
    return exact(x).transpose(1, 2).flatten(0, 1)


def _gathered(tensors: list[Tensor], key: Tensor) -> list[Tensor]:
    """[B, L, G, K], [B, G, S] -> [B G, S, K]"""
    found, space = [], -1
    for x in tensors:
        if apart(x) != space:
            space, places = apart(x), (key * x.shape[2] + first_vector(x)[:, 0]).flatten()
        chosen = vectors(x).index_select(0, places).view(len(key) * x.shape[2], key.shape[2], x.shape[3])
        found.append(exact(chosen))
    return found


def _scores(q: Tensor, k: Tensor, groups: int) -> Tensor:
    return torch.bmm(exact(q).reshape(len(k), q.shape[2] // groups, q.shape[3]), k.mT)


def _read(q: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """scores: [B G, R, S]; v: [B G, S, V]"""
    output = torch.bmm(scores.softmax(-1), v)
    return output.to(q.dtype).view(*q.shape[:3], v.shape[2]), scores.logsumexp(-1).view(q.shape[:3])
