"""Softmax attention of tiles of queries to sets of keys. The backward computes scores again, so none are kept.

The queries of a tile see keys in blocks: Q neighbours share the keys of their windows, all queries of a tile share all
keys, and the keys of chosen chunks belong to one query. The keys of each block are copied, so that one batched product
serves all three. One softmax covers all keys that a query sees. The backward adds gradients of keys into one tensor as
large as the keys.

B rows, T tokens, H query heads in G groups of R, K key dim, V value dim, L keys; a tile has N blocks of Q queries, and
a block scores S keys.
"""

import functools
from collections.abc import Callable
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
# Queries that share the keys of their windows.
_BLOCK = 32
# Elements that a tile computes at once: 1 MB, which stays in a CPU's cache.
_AT_ONCE = 2**18
# The number of a missing key; as a number of vectors it does not overflow.
_NONE = 2**40


class Keys(NamedTuple):
    """q: [B, T, H, K]; k: [B, L, G, K], or its last keys"""

    q: Tensor
    k: Tensor


class Look(NamedTuple):
    """The keys that blocks of queries score.

    pair: the number of the pair of queries and keys
    key, value: [B, N, G, S], places of keys and values among the ``vectors`` of k and v
    hidden: the keys that a query does not see, broadcasts to [B, N, G, Q, R, S]; None: queries see all keys
    """

    pair: int
    key: Tensor
    value: Tensor
    hidden: Tensor | None


# The tokens of a tile, and the number of its blocks.
Looks = Callable[[slice, int], list[Look]]


class Search(Protocol):
    def tile(self, pairs: list[Keys], v: Tensor) -> int:
        """The number of tokens whose scores fit into ``_AT_ONCE``."""

    def looks(self, pairs: list[Keys], v: Tensor, block: int) -> Looks:
        """The looks of a call, made once; block: queries of a block."""


class Pooled(NamedTuple):
    """Spans of keys, see ``chunk_topk``."""

    spans: tuple[Tensor, Tensor] | None

    def tile(self, pairs: list[Keys], v: Tensor) -> int:
        batch, _, heads, _ = pairs[0].q.shape
        return max(128, _AT_ONCE // max(1, batch * heads * (v.shape[1] + v.shape[3])))

    def looks(self, pairs: list[Keys], v: Tensor, block: int) -> Looks:
        number = torch.arange(v.shape[1], device=v.device)
        key, value = (number * v.shape[2] + first_vector(x) for x in (pairs[0].k, v))

        def look(part: slice, _: int) -> list[Look]:
            hidden = None
            if self.spans is not None:
                first, end = (x[:, None, None, part, None, None] for x in self.spans)
                hidden = (number < first) | (number >= end)
            return [Look(0, key, value, hidden)]

        return look


class Chosen(NamedTuple):
    """The window, and chosen chunks before it, see ``chunk_sparse_attention``.

    first: [B, T, G, J], the first key of each chosen chunk; for no chunk, one behind all keys or before all its keys
    """

    first: Tensor
    chunk_size: int
    window: int
    positions: Tensor | None

    def tile(self, pairs: list[Keys], v: Tensor) -> int:
        (batch, _, heads, _), (_, total, groups, size) = pairs[0].q.shape, v.shape
        chosen = self.first.shape[3] * self.chunk_size
        window = min(self.window, pairs[0].k.shape[1]) + _BLOCK
        if self._gathers(total):
            of_token = heads * (window + chosen) + groups * chosen * max(size, pairs[0].k.shape[3])
        else:
            of_token = heads * (window + total)
        return max(_BLOCK, _AT_ONCE // max(1, batch * of_token))

    def looks(self, pairs: list[Keys], v: Tensor, block: int) -> Looks:
        window = self._window(pairs[0], v, block)
        if self.first.shape[3] == 0:
            return lambda part, blocks: [window(part, blocks)]
        chunks = self._chunks(len(pairs) - 1, pairs[-1], v)
        return lambda part, blocks: [window(part, blocks), chunks(part)]

    def _gathers(self, total: int) -> bool:
        return total > _DENSE * self.first.shape[3] * self.chunk_size

    def _window(self, near: Keys, v: Tensor, block: int) -> Callable[[slice, int], Look]:
        length, keys, groups, device = near.q.shape[1], near.k.shape[1], v.shape[2], v.device
        past, seen = keys - length, min(self.window, keys)
        # The keys that a block scores, counted back from its first query.
        back_S = torch.arange(seen - 1, -block, -1, device=device)
        distance = torch.arange(block, device=device)[:, None, None] + back_S
        # Keys ahead of the query get a distance that no query sees.
        distance = distance.masked_fill(distance < 0, keys)
        here = torch.arange(past, keys, device=device)
        sees = here[None] if self.positions is None else torch.minimum(here, self.positions)
        sees = sees.clamp(max=seen - 1)
        number = (here[::block, None] - back_S).clamp(0, keys - 1)[:, None] * groups
        key = value = number + first_vector(v)
        if v.shape[1] != keys or apart(v) != apart(near.k):
            key, value = number + first_vector(near.k), value + (v.shape[1] - keys) * groups

        def look(part: slice, blocks: int) -> Look:
            of_tile = slice(part.start // block, part.start // block + blocks)
            farthest = sees[:, part].unflatten(1, (blocks, 1, -1, 1, 1))
            hidden = distance[: farthest.shape[3]] > farthest
            return Look(0, key[:, of_tile], value[:, of_tile], hidden)

        return look

    def _chunks(self, pair: int, far: Keys, v: Tensor) -> Callable[[slice], Look]:
        length, (_, total, groups, _), device = far.q.shape[1], v.shape, v.device
        gathers = self._gathers(total)
        # Numbers of vectors, or of keys if all of them are scored.
        step, low = (
            (groups, first_vector(v)) if gathers else (1, torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device))
        )
        last = torch.arange(total - length, total, device=device)[:, None, None] - self.window
        first = (self.first * step).masked_fill(last < 0, _NONE) + low
        high = last.clamp(min=0) * step + low
        token_C = torch.arange(self.chunk_size, device=device) * step
        everywhere = None if gathers else torch.arange(total, device=device) * groups + first_vector(v)

        def look(part: slice) -> Look:
            key = (first[:, part, :, :, None] + token_C).flatten(3)
            there = key.clamp(low, high[:, part])
            hidden = there != key
            if everywhere is None:
                return Look(pair, there, there, hidden[:, :, :, None, None])
            # One key more, for those that are not seen.
            all_hidden = torch.ones(*key.shape[:3], total + 1, device=device, dtype=torch.bool)
            all_hidden = all_hidden.scatter_(3, there.masked_fill(hidden, total), False)[..., :total]
            return Look(pair, everywhere, everywhere, all_hidden.transpose(1, 2)[:, None, :, :, None])

        return look


def first_keys(choice: Tensor, starts: Tensor) -> Tensor:
    """The first key of each chosen chunk [B, T, G, J]; for no chunk, one far behind all keys."""
    choice = torch.where(choice < starts.shape[1], choice, -1)
    # One more chunk, for entries without a choice.
    starts = F.pad(starts.long(), (1, 0), value=_NONE)[:, None, None].expand(*choice.shape[:3], -1)
    return starts.gather(3, choice.clamp(min=-1) + 1)


def attend(plan: Search, pairs: list[Keys], v: Tensor, scale: float, tile: int | None) -> tuple[Tensor, Tensor]:
    """output [B, T, H, V] in the type of q, and lse [B, T, H].

    tile: tokens that are scored at once; None: the number that fits into ``_AT_ONCE``
    """
    k = pairs[-1].k
    # The gradients of vectors have no free space between rows; one place serves k and v.
    if torch.is_grad_enabled() or apart(k) != apart(v):
        pairs, v = [Keys(x.q, x.k.contiguous()) for x in pairs], v.contiguous()
    tile = plan.tile(pairs, v) if tile is None else tile
    return _Attend.apply(plan, scale, tile, v, *(x for pair in pairs for x in pair))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Search, scale: float, tile: int, *given: Tensor) -> tuple[Tensor, Tensor]:
        # v is one of the starred arguments because Dynamo loses ctx if these are two.
        v, *tensors = given
        pairs, q = _pairs(tensors), tensors[0]
        looks = plan.looks(pairs, v, _block(q.shape[1], tile))
        output, lse = q.new_empty(*q.shape[:3], v.shape[3]), exact(q.new_empty(q.shape[:3]))
        for part, blocks in _tiles(q.shape[1], tile):
            scored = [(look, _scores(pairs[look.pair], look, part, scale)[2]) for look in looks(part, blocks)]
            shape = (len(q), part.stop - part.start, q.shape[2])
            total = functools.reduce(torch.logaddexp, [_by_token(s.logsumexp(-1), x, shape) for x, s in scored])
            reads, finite = [], _finite(total)[..., None]
            for look, scores in scored:
                weights = _weights(scores, _by_block(finite, look))
                reads.append(_by_token(torch.bmm(weights, _take(v, look.value)), look, shape))
            output[:, part], lse[:, part] = functools.reduce(torch.add, reads), total
        ctx.save_for_backward(output, lse, v, *tensors)
        ctx.plan, ctx.scale, ctx.tile = plan, scale, tile
        return output, lse

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        output, lse, v, *tensors = ctx.saved_tensors
        pairs = _pairs(tensors)
        looks = ctx.plan.looks(pairs, v, _block(output.shape[1], ctx.tile))
        d_v, *d_tensors = (exact(x.new_zeros(x.shape)) for x in (v, *tensors))
        d_pairs, d_values = _pairs(d_tensors), d_v.flatten(0, 2)
        delta = (exact(d_output) * exact(output)).sum(-1) - d_lse
        of_rows = torch.stack([_finite(lse), delta], -1)
        for part, blocks in _tiles(output.shape[1], ctx.tile):
            for look in looks(part, blocks):
                d_q, d_k = d_pairs[look.pair]
                q, k, scores = _scores(pairs[look.pair], look, part, ctx.scale)
                total, d_total = _by_block(of_rows[:, part], look).split(1, -1)
                weights, d_o = _weights(scores, total), _by_block(d_output[:, part], look)
                d_scores = torch.baddbmm(d_total, d_o, _take(v, look.value).mT, beta=-1).mul_(weights)
                d_q = d_q[:, part]
                d_q.add_(_by_token(torch.bmm(d_scores, k), look, d_q.shape))
                d_k.flatten(0, 2).index_add_(0, look.key.flatten(), torch.bmm(d_scores.mT, q).flatten(0, 1))
                d_values.index_add_(0, look.value.flatten(), torch.bmm(weights.mT, d_o).flatten(0, 1))
        for d_q, _ in d_pairs:
            d_q.mul_(ctx.scale)
        gradients = [d.to(x.dtype) for d, x in zip((d_v, *d_tensors), (v, *tensors), strict=True)]
        return None, None, None, *gradients


def _pairs(tensors: Any) -> list[Keys]:
    return [Keys(*tensors[i : i + 2]) for i in range(0, len(tensors), 2)]


def _block(length: int, tile: int) -> int:
    return max(1, min(_BLOCK, tile, length))


def _tiles(length: int, tile: int) -> list[tuple[slice, int]]:
    """The tokens and the number of blocks of each tile; the last block of a call may be shorter than the others."""
    block = _block(length, tile)
    whole = length - length % block
    size = tile - tile % block
    parts = [slice(start, min(start + size, whole)) for start in range(0, whole, size)]
    tiles = [(part, (part.stop - part.start) // block) for part in parts]
    return [*tiles, (slice(whole, length), 1)] if whole < length else tiles


def _by_block(x: Tensor, look: Look) -> Tensor:
    """[B, N Q, H, ...] -> [B N G, Q R, ...]"""
    (batch, length, heads, *rest), (_, blocks, groups, _) = x.shape, look.key.shape
    x = exact(x).reshape(batch, blocks, length // blocks, groups, heads // groups, *rest).transpose(2, 3)
    return x.reshape(batch * blocks * groups, length // blocks * (heads // groups), *rest)


def _by_token(x: Tensor, look: Look, shape: tuple[int, ...]) -> Tensor:
    """[B N G, Q R, ...] -> [B, N Q, H, ...]"""
    (batch, length, heads, *_), (_, blocks, groups, _) = shape, look.key.shape
    x = x.view(batch, blocks, groups, length // blocks, heads // groups, *x.shape[2:]).transpose(2, 3)
    return x.reshape(batch, length, heads, *x.shape[5:])


def _scores(keys: Keys, look: Look, part: slice, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled q [B N G, Q R, K], k [B N G, S, K], and scores [B N G, Q R, S]."""
    q, k = _by_block(keys.q[:, part], look) * scale, _take(keys.k, look.key)
    scores = torch.bmm(q, k.mT)
    if look.hidden is not None:
        batch, blocks, groups, size = look.key.shape
        heads = keys.q.shape[2] // groups
        scores.view(batch, blocks, groups, q.shape[1] // heads, heads, size).masked_fill_(look.hidden, _NEVER)
    return q, k, scores


def _finite(total: Tensor) -> Tensor:
    """If a query sees nothing, its weights are zeros."""
    return total.clamp(min=torch.finfo(total.dtype).min)


def _weights(scores: Tensor, total: Tensor) -> Tensor:
    return scores.sub_(total).exp_()


def _take(x: Tensor, place: Tensor) -> Tensor:
    """[B, L, G, K] -> [B N G, S, K]"""
    batch, blocks, groups, size = place.shape
    return exact(vectors(x).index_select(0, place.flatten()).view(batch * blocks * groups, size, x.shape[3]))


def vectors(x: Tensor) -> Tensor:
    """[B, L, G, K] as a list of vectors. Rows may have free space behind them; this needs no copy."""
    _, length, groups, size = x.shape
    if (space := apart(x)) == length * groups:
        return x.flatten(0, 2)
    return x.as_strided((space * (len(x) - 1) + length * groups, size), (size, 1))


def apart(x: Tensor) -> int:
    """The number of ``vectors`` from one row to the next."""
    _, length, groups, size = x.shape
    if x.is_contiguous() or x.stride()[1:] != (groups * size, size, 1):
        return length * groups
    return x.stride(0) // size


def first_vector(x: Tensor) -> Tensor:
    """[B, 1, G, 1], the place of each group's first key among the ``vectors`` of x."""
    row, group = (torch.arange(n, device=x.device) for n in (len(x), x.shape[2]))
    return (row[:, None] * apart(x) + group)[:, None, :, None]
