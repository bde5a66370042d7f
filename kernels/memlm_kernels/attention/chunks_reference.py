"""Softmax attention of tiles of queries to sets of keys. The backward computes scores again, so none are kept.

The queries of a tile share some keys (those of the window, or all); others belong to one query (those of its chosen
chunks). One softmax covers both. The backward adds gradients of keys into one tensor as large as the keys.

B rows, T tokens, Q of a tile, H query heads in G groups of R, K key dim, V value dim, L keys, S that a tile scores.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.segments import exact

_NEVER = float("-inf")
# All keys are scored, and none gathered, if they are at most so many times the keys of a token's chunks.
_DENSE = 4
# A key that there is not.
_NONE = 2**31 - 2**16


class Keys(NamedTuple):
    """q: [B, T, H, K]; k: [B, L, G, K]; v: [B, L, G, V]"""

    q: Tensor
    k: Tensor
    v: Tensor


class Look(NamedTuple):
    """The keys that a tile scores: a slice that all its queries share, or [B, Q, G, S], the keys of each query; seen:
    which of them a query sees, [B, Q, 1 or G, 1, S].
    """

    where: slice | Tensor
    seen: Tensor


class Plan(Protocol):
    def looks(self, keys: list[Keys], tile: slice) -> list[Look]:
        """The keys of each of ``keys`` that the queries of a tile see."""


class Pooled(NamedTuple):
    """Spans of keys, see ``chunk_topk``."""

    spans: tuple[Tensor, Tensor] | None

    def looks(self, keys: list[Keys], tile: slice) -> list[Look]:
        number = torch.arange(keys[0].k.shape[1], device=keys[0].k.device)
        seen = torch.ones_like(number, dtype=torch.bool)[None, None]
        if self.spans is not None:
            first, end = (x[:, tile, None] for x in self.spans)
            seen = (number >= first) & (number < end)
        return [Look(slice(None), seen[:, :, None, None])]


class Chosen(NamedTuple):
    """The window, and chosen chunks before it, see ``chunk_sparse_attention``."""

    choice: Tensor
    starts: Tensor
    chunk_size: int
    window: int
    positions: Tensor | None

    def looks(self, keys: list[Keys], tile: slice) -> list[Look]:
        near, far = keys
        tokens = torch.arange(tile.start, tile.stop, device=near.k.device)
        end = near.k.shape[1] - near.q.shape[1] + tile.stop
        start = max(0, end - (tile.stop - tile.start) - self.window + 1)
        distance = (end - tile.stop + tokens)[:, None] - torch.arange(start, end, device=near.k.device)
        seen = ((distance >= 0) & (distance < self.window))[None]
        if self.positions is not None:
            seen = seen & (distance <= self.positions[:, tile, None])
        window = Look(slice(start, end), seen[:, :, None, None])

        first = first_keys(self.choice[:, tile], self.starts)
        key = first[..., None] + torch.arange(self.chunk_size, device=first.device)
        distance = (far.k.shape[1] - far.q.shape[1] + tokens)[:, None, None, None] - key
        known = (distance >= self.window) & (key >= 0)
        key, known, last = key.flatten(3), known.flatten(3), far.k.shape[1] - 1
        if far.k.shape[1] > _DENSE * key.shape[3]:
            return [window, Look(key.clamp(0, last), known[:, :, :, None])]
        # Scoring few keys is faster than gathering them. One more entry takes the unknown ones.
        seen = torch.zeros(*known.shape[:3], last + 2, device=key.device, dtype=torch.bool)
        seen = seen.scatter(3, torch.where(known, key, last + 1), True)[..., :-1]
        return [window, Look(slice(None), seen[:, :, :, None])]


def first_keys(choice: Tensor, starts: Tensor) -> Tensor:
    """The key that each chosen chunk [B, T, G, J] starts with; of none one far behind all."""
    choice = torch.where(choice < starts.shape[1], choice, -1)
    # One more chunk, for entries without a choice.
    starts = F.pad(starts, (1, 0), value=_NONE)[:, None, None].expand(*choice.shape[:3], -1)
    return starts.gather(3, choice.clamp(min=-1) + 1)


def attend(plan: Plan, keys: list[Keys], scale: float | None, tile: int) -> tuple[Tensor, Tensor]:
    """output [B, T, H, V] in q's type, and lse [B, T, H]."""
    scale = keys[0].q.shape[3] ** -0.5 if scale is None else scale
    return _Attend.apply(plan, scale, tile, *(x for each in keys for x in each))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, scale: float, tile: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        keys = _of(tensors)
        q, v = keys[0].q, keys[0].v
        output = q.new_empty(*q.shape[:3], v.shape[3])
        lse = exact(q.new_empty(q.shape[:3]))
        for part in _tiles(q.shape[1], tile):
            looks = plan.looks(keys, part)
            scores = [_scores(x, _take(x.k, look), look, part, scale) for x, look in zip(keys, looks, strict=True)]
            total = torch.cat(scores, -1).logsumexp(-1)
            reads = [
                _sum(_weights(s, total), _take(x.v, look), look)
                for s, x, look in zip(scores, keys, looks, strict=True)
            ]
            output[:, part], lse[:, part] = torch.stack(reads).sum(0).flatten(2, 3), total.flatten(2)
        ctx.save_for_backward(output, lse, *tensors)
        ctx.plan, ctx.scale, ctx.tile = plan, scale, tile
        return output, lse

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        output, lse, *tensors = ctx.saved_tensors
        keys = _of(tensors)
        groups = keys[0].k.shape[2]
        d_keys = [Keys(*(exact(x.new_zeros(x.shape)) for x in each)) for each in keys]
        for part in _tiles(output.shape[1], ctx.tile):
            o, total, d_o, d_total = (_grouped(x, part, groups) for x in (output, lse, d_output, d_lse))
            delta = (d_o * o).sum(-1) - d_total
            for x, d_x, look in zip(keys, d_keys, ctx.plan.looks(keys, part), strict=True):
                k = _take(x.k, look)
                weights = _weights(_scores(x, k, look, part, ctx.scale), total)
                d_scores = weights * (_product(d_o, _take(x.v, look), look) - delta[..., None]) * ctx.scale
                d_x.q[:, part] += _sum(d_scores, k, look).flatten(2, 3)
                _add(d_x.k, look, _outer(d_scores, _grouped(x.q, part, groups), look))
                _add(d_x.v, look, _outer(weights, d_o, look))
        gradients = [d.to(x.dtype) for d, x in zip((d for each in d_keys for d in each), tensors, strict=True)]
        return None, None, None, *gradients


def _of(tensors: Any) -> list[Keys]:
    return [Keys(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def _tiles(length: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def _grouped(x: Tensor, part: slice, groups: int) -> Tensor:
    """[B, T, H, ...] -> [B, Q, G, R, ...]"""
    return exact(x[:, part]).unflatten(2, (groups, -1))


def _scores(keys: Keys, k: Tensor, look: Look, part: slice, scale: float) -> Tensor:
    """[B, Q, G, R, S]; k: the result of ``_take``."""
    q = _grouped(keys.q, part, keys.k.shape[2])
    return (_product(q, k, look) * scale).masked_fill(~look.seen, _NEVER)


def _weights(scores: Tensor, total: Tensor) -> Tensor:
    # Where nothing is seen, zeros.
    return (scores - total.clamp(min=torch.finfo(total.dtype).min)[..., None]).exp()


def _take(x: Tensor, look: Look) -> Tensor:
    """[B, L, G, K] -> [B, S, G, K], which all queries share, or [B, Q, G, S, K]"""
    if isinstance(look.where, slice):
        return exact(x[:, look.where])
    each, apart = vectors(x)
    return exact(each.index_select(0, flat_keys(look.where, apart)).unflatten(0, look.where.shape))


def _add(x: Tensor, look: Look, d: Tensor) -> None:
    """Add d to the entries of x that ``_take`` reads."""
    if isinstance(look.where, slice):
        x[:, look.where] += d
    else:
        each, apart = vectors(x)
        each.index_add_(0, flat_keys(look.where, apart), d.flatten(0, 3))


def vectors(x: Tensor) -> tuple[Tensor, int]:
    """[B, L, G, K] as a list of vectors, and the number of vectors from one row to the next. Rows may have free space
    behind them; this needs no copy.
    """
    _, length, groups, size = x.shape
    if x.is_contiguous() or x.stride()[1:] != (groups * size, size, 1):
        return x.flatten(0, 2), length * groups
    apart = x.stride(0) // size
    return x.as_strided((apart * (len(x) - 1) + length * groups, size), (size, 1)), apart


def flat_keys(where: Tensor, apart: int) -> Tensor:
    """[B, Q, G, S] -> [B Q G S], into ``vectors``."""
    batch, _, groups, _ = where.shape
    row, group = (torch.arange(n, device=where.device) for n in (batch, groups))
    return (row[:, None, None, None] * apart + where * groups + group[:, None]).flatten()


def _product(q: Tensor, k: Tensor, look: Look) -> Tensor:
    """q . k for each query and key, [B, Q, G, R, S]"""
    if isinstance(look.where, slice):
        return torch.einsum("bqgrk,bsgk->bqgrs", q, k)
    return q @ k.mT


def _sum(weights: Tensor, v: Tensor, look: Look) -> Tensor:
    """Sums over keys, [B, Q, G, R, V]"""
    if isinstance(look.where, slice):
        return torch.einsum("bqgrs,bsgv->bqgrv", weights, v)
    return weights @ v


def _outer(weights: Tensor, q: Tensor, look: Look) -> Tensor:
    """The gradient of ``_product`` or ``_sum`` in k or v, with the shape of ``_take``'s result."""
    if isinstance(look.where, slice):
        return torch.einsum("bqgrs,bqgrk->bsgk", weights, q)
    return weights.mT @ q
