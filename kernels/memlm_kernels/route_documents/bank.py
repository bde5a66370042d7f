"""Routing over a bank too large for a mask: find the few documents that a query can choose at all.

Let a document's score be a maximum over tokens and chunks. Then the top_k at any token are among the top_k of that
token alone, or of an earlier token alone. To see this, let token t give document d its score: documents that outrank d
at t outrank it at all later tokens too. So each token keeps its own best. In a tile of chunks, only those that beat a
token's worst are examined further; the others cost one product and one maximum.

B rows, M tokens, C chunks, H query heads in G groups, K key dim, D decisions, J = top_k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.route_documents.reference import (
    Routes,
    RoutingRule,
    _prepared,
    _similarities,
    query_of,
    route_documents_reference,
)
from memlm_kernels.segments import exact
from memlm_kernels.topk import NEVER, best_of


class RouterShard(NamedTuple):
    """A part of a bank, which holds whole documents.

    k, scale: [C, G, K] and [C, G, 1] or None, from ``bank_keys``
    document: [C], the index of each chunk's document in ``number``, ascending; -1: deleted
    number: [N], the numbers of the documents, ascending, also from part to part
    """

    k: Tensor
    document: Tensor
    number: Tensor
    scale: Tensor | None = None


def bank_keys(k: Tensor, similarity: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Pooled router keys [..., K] in the form that a bank stores: of length 1 for the cosine, and, for float8, divided
    by a scale per key, [..., 1], which is returned too. dtype: None for fp32 (or fp64)
    """
    k = _prepared(RoutingRule(similarity, "mean", "max", "max", 1, 0, False, 1), k)
    if dtype != torch.float8_e4m3fn:
        return k.to(dtype or k.dtype), None
    scale = (k.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max).clamp(min=1e-30)
    return (k / scale).to(dtype), scale


def restored_keys(k: Tensor, scale: Tensor | None) -> Tensor:
    """The keys that ``bank_keys`` returned, in fp32 (or fp64)."""
    return exact(k) if scale is None else k.float() * scale


def nominated_in_tiles(
    rule: RoutingRule, q: Tensor, shards: Sequence[RouterShard], asks: Tensor | None, held: int
) -> tuple[Tensor, Tensor]:
    """See ``nominate_documents``. Reads values back from the device."""
    batch, tokens = q.shape[:2]
    asks = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if asks is None else asks
    # A token that does not route is replaced by one that does.
    place = torch.where(asks, torch.arange(tokens, device=q.device), asks.long().argmax(1, keepdim=True))
    rule = rule._replace(tile=max(1, held // q[..., 0, 0].numel()))
    q = _prepared(rule, q)
    if rule.query_reduce != "max" or rule.chunk_reduce != "max":
        return _best_of_means(rule, q, asks, shards)
    q = q.gather(1, place[..., None, None].expand(q.shape))
    idle = ~asks.any(1).repeat_interleave(tokens if rule.running else 1)
    index, score = (x.unflatten(0, (batch, -1)) for x in _best(rule, q, shards, idle))
    return index, score


def _best(rule: RoutingRule, q: Tensor, shards: Sequence[RouterShard], idle: Tensor) -> tuple[Tensor, Tensor]:
    """The best of each decision and their scores, [D, J]. A decision is one row, or one token if ``running``."""
    query = query_of(rule, q, shards[0].k.shape[1])
    none = torch.full((len(idle), 0), -1, device=q.device)
    index, score = best_of(none, none.to(q.dtype), rule.top_k)
    size = min(16 * rule.top_k, rule.tile)
    for shard in shards:
        start = 0
        while start < len(shard.k):
            # The first chunks are all among the best, so the first tiles are small.
            tile, size = slice(start, start + size), min(2 * size, rule.tile)
            start, k = tile.stop, _tile_of(rule, shard, tile, q.dtype)
            if rule.head_reduce == "mean":
                scores = query.flatten(2).flatten(0, 1) @ k.flatten(1).mT
            else:
                scores = _similarities(rule, query, k[None].expand(len(q), -1, -1, -1)).flatten(0, 1)
            if not rule.running:
                scores = scores.unflatten(0, q.shape[:2]).amax(1)
            worst = score[:, -1:].masked_fill(idle[:, None], float("inf"))
            beats = ((scores - worst).amax(0) > 0) & (shard.document[tile] >= 0)
            column = beats.nonzero()[:, 0]
            if len(column):
                number = shard.number[shard.document[tile][column]]
                index, score = _entered(rule, index, score, number, scores[:, column])
    return index.masked_fill(idle[:, None], -1), score.masked_fill(idle[:, None], NEVER)


def _tile_of(rule: RoutingRule, shard: RouterShard, tile: slice, dtype: torch.dtype) -> Tensor:
    """Keys in the type of the product; for the cosine, rounded keys are scaled to length 1 again."""
    return shard.k[tile] if shard.k.dtype == dtype else _prepared(rule, keys_of(shard, tile, dtype))


def _entered(rule: RoutingRule, index: Tensor, score: Tensor, number: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The best after entering chunks of documents ``number`` [n] with their scores [D, n]."""
    name, owner = number.unique_consecutive(return_inverse=True)
    value = torch.full((len(scores), len(name)), NEVER, device=scores.device, dtype=scores.dtype)
    value = value.scatter_reduce(1, owner.expand(scores.shape), scores, "amax")
    # The first document may have begun in the tile before, and be among the best already.
    again = index == name[0]
    value[:, 0] = torch.maximum(value[:, 0], score.masked_fill(~again, NEVER).amax(1))
    score = score.masked_fill(again, NEVER)
    return best_of(torch.cat([index, name.expand(value.shape)], 1), torch.cat([score, value], 1), rule.top_k)


def _best_of_means(rule: RoutingRule, q: Tensor, asks: Tensor, shards: Sequence[RouterShard]) -> tuple[Tensor, Tensor]:
    """The best and their scores, [B, D, J], for a mean, which needs every score."""
    parts = []
    for shard in shards:
        of_shard = rule._replace(num_documents=len(shard.number), tile=4096)
        k = exact(keys_of(shard, slice(None), q.dtype))[None]
        routes = route_documents_reference(of_shard, q, k, shard.document[None], asks, None, None, False)
        parts.append(numbered(routes, shard))
    index, score = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    return best_of(index, score, rule.top_k)


def keys_of(shard: RouterShard, tile: slice, dtype: torch.dtype) -> Tensor:
    """Keys in a type that ``route_documents`` takes with queries of ``dtype``."""
    k = shard.k[tile] if shard.scale is None else restored_keys(shard.k[tile], shard.scale[tile])
    return k.double() if dtype == torch.float64 else k


def numbered(routes: Routes, shard: RouterShard) -> tuple[Tensor, Tensor]:
    """Numbers and scores of the chosen documents, from their indices in a shard."""
    return torch.where(routes.document < 0, -1, shard.number[routes.document]), routes.score
