"""Routing over a bank too large for a mask: which few of its documents a query can choose at all.

Where a document's score is a maximum over tokens and chunks, the top_k at any token are among the top_k of that token
or of one before it: what outranks a document at the token that gave it its score outranks it ever after. So each token
keeps its own best, and of a tile of chunks only those that beat a token's worst are looked at further: beside one
product and one maximum a chunk costs nothing.

B rows, M tokens, C chunks, H query heads in G groups, K key dim, D decisions, J = top_k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.route_documents.reference import (
    Rule,
    _prepared,
    _similarities,
    best_of,
    query_of,
    route_documents_reference,
)
from memlm_kernels.segments import exact

_NEVER = float("-inf")


class RouterShard(NamedTuple):
    """A part of a bank, of whole documents.

    k: [C, G, K], as ``bank_keys``   document: [C], of ``number`` [N], ascending; -1: none any more
    number: of the documents, ascending, over the parts too
    """

    k: Tensor
    document: Tensor
    number: Tensor


def bank_keys(k: Tensor, similarity: str) -> Tensor:
    """Pooled router keys [..., K] as a bank keeps them: in fp32 (or fp64), for cosines of length 1."""
    return _prepared(Rule(similarity, "mean", "max", "max", 1, 0, False, 1), k)


@torch.no_grad()
def nominate_documents(
    q: Tensor,
    shards: Sequence[RouterShard],
    *,
    top_k: int,
    asks: Tensor | None = None,
    running: bool = False,
    similarity: str = "cosine",
    head_reduce: str = "mean",
    query_reduce: str = "max",
    chunk_reduce: str = "max",
    held: int = 1 << 21,
) -> tuple[Tensor, Tensor]:
    """Of a whole bank, a few documents that hold all that ``route_documents`` would choose at some token.

    q: [B, M, H, K]   asks: [B, M], tokens that route (None: all)   the settings: as of ``route_documents``
    held: scores at a time, about
    Returns the documents' numbers [B, R, top_k], of each token if ``running``, else of the row or of each token, and
    their scores, -1 and -inf where there is none: so in a row where no token asks. Asks the device.
    """
    batch, tokens = q.shape[:2]
    asks = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if asks is None else asks
    if tokens == 0 or not shards:
        none = torch.full((batch, tokens if running else 1, 0), -1, device=q.device)
        return best_of(none, exact(q).new_empty(none.shape), top_k)
    # In place of a token that does not ask, one that does.
    place = torch.where(asks, torch.arange(tokens, device=q.device), asks.long().argmax(1, keepdim=True))
    rule = Rule(
        similarity, head_reduce, query_reduce, chunk_reduce, top_k, 0, running, max(1, held // q[..., 0, 0].numel())
    )
    q = _prepared(rule, q).gather(1, place[..., None, None].expand(q.shape))
    if query_reduce == chunk_reduce == "max":
        idle = ~asks.any(1).repeat_interleave(tokens if running else 1)
        index, score = _best(rule, q, shards, idle)
        return index.unflatten(0, (batch, -1)), score.unflatten(0, (batch, -1))
    return _best_of_means(rule, q, asks, shards)


def _best(rule: Rule, q: Tensor, shards: Sequence[RouterShard], idle: Tensor) -> tuple[Tensor, Tensor]:
    """The best of each decision, and their scores, [D, J]; they are the rows', or running the tokens'."""
    query = query_of(rule, q, shards[0].k.shape[1])
    none = torch.full((len(idle), 0), -1, device=q.device)
    index, score = best_of(none, none.to(q.dtype), rule.top_k)
    size = min(16 * rule.top_k, rule.tile)
    for shard in shards:
        start = 0
        while start < len(shard.k):
            # Of the first few all are among the best.
            tile, size = slice(start, start + size), min(2 * size, rule.tile)
            start, k = tile.stop, shard.k[tile]
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
    return index.masked_fill(idle[:, None], -1), score.masked_fill(idle[:, None], _NEVER)


def _entered(rule: Rule, index: Tensor, score: Tensor, number: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The best with chunks of documents ``number`` [n] and their scores [D, n]."""
    name, owner = number.unique_consecutive(return_inverse=True)
    value = torch.full((len(scores), len(name)), _NEVER, device=scores.device, dtype=scores.dtype)
    value = value.scatter_reduce(1, owner.expand(scores.shape), scores, "amax")
    # The first may have begun in the tile before, and stand among the best.
    again = index == name[0]
    value[:, 0] = torch.maximum(value[:, 0], score.masked_fill(~again, _NEVER).amax(1))
    score = score.masked_fill(again, _NEVER)
    return best_of(torch.cat([index, name.expand(value.shape)], 1), torch.cat([score, value], 1), rule.top_k)


def _best_of_means(rule: Rule, q: Tensor, asks: Tensor, shards: Sequence[RouterShard]) -> tuple[Tensor, Tensor]:
    """[B, D, J] where a mean needs every score."""
    none = torch.full((len(q), 1, 0), -1, device=q.device)
    best = best_of(none, none.to(q.dtype), rule.top_k)
    for shard in shards:
        of_shard = rule._replace(num_documents=len(shard.number), tile=4096)
        routes = route_documents_reference(of_shard, q, shard.k[None], shard.document[None], asks, None, None, False)
        number = torch.where(routes.document < 0, -1, shard.number[routes.document])
        old = [x.expand(-1, number.shape[1], -1) for x in best]
        best = best_of(torch.cat([old[0], number], -1), torch.cat([old[1], routes.score], -1), rule.top_k)
    return best
