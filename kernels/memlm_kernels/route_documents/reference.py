"""Routing in tiles of chunks. The mean over heads is linear, so it goes into the query:

    mean_h q[t, h] . k[c, group of h] = q~[t] . k[c],    q~[t, g] = sum_{h in g} q[t, h] / H

which is one product of depth G * K for each token and chunk. A document may lie across tiles: the partial score of a
tile's last document is carried into the next tile.

Gradients do not need the scores. With maxima, the score of a document depends on one token and one chunk; their
indices are kept, and the score is computed again from these two. A mean over tokens computes the scores again, tile by
tile.

B rows, M tokens, C chunks, N documents, H query heads in G groups, K key dim, R decisions of a row, J = top_k.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.segments import exact
from memlm_kernels.topk import NEVER, Best, best_of

# Inside the square root, so that a vector of zeros has a gradient.
_EPS = 1e-12


class RoutingRule(NamedTuple):
    similarity: str
    head_reduce: str
    query_reduce: str
    chunk_reduce: str
    top_k: int
    num_documents: int
    running: bool
    tile: int


class Scored(NamedTuple):
    """For each chunk, [B, C]: the maximum (or the sum) of its scores over the tokens that routed so far, and the
    number of these tokens. Both are 0 where none did.
    """

    score: Tensor
    asked: Tensor


class Routes(NamedTuple):
    """document, score: [B, R, J]; scored: an argument of the next call; scores: [B, N], or None if not requested."""

    document: Tensor
    score: Tensor
    scored: Scored
    scores: Tensor | None


def route_documents_reference(
    rule: RoutingRule,
    q: Tensor | None,
    k: Tensor,
    document: Tensor,
    asks: Tensor | None,
    spans: tuple[Tensor, Tensor] | None,
    scored: Scored | None,
    return_scores: bool,
    choose: Callable[[RoutingRule, "RoutingInputs"], "Choice"] | None = None,
) -> Routes:
    """See ``route_documents``. choose: a function that chooses in place of ``walk``."""
    batch = len(q) if q is not None else len(spans[0]) if spans else len(k)
    # A call may have no tokens.
    q = _prepared(rule, q) if q is not None and q.shape[1] else None
    if scored is None:
        zeros = exact(torch.zeros(batch, k.shape[1], device=k.device, dtype=k.dtype))
        scored = Scored(zeros, torch.zeros_like(zeros, dtype=torch.int64))
    asked = RoutingInputs(q, k, document.expand(batch, -1), asks, spans, scored)
    with torch.no_grad():
        document, score, after, token = (choose or walk)(rule, asked)
    scores = _document_scores(rule, asked, after, token) if return_scores else None
    return Routes(document, score, after, scores)


def walk(rule: RoutingRule, asked: "RoutingInputs") -> "Choice":
    walk = _Walk(rule, asked)
    for start in range(0, asked.k.shape[1], rule.tile):
        walk.visit(slice(start, start + rule.tile))
    return walk.finish()


class Choice(NamedTuple):
    """document, score: [B, R, J]; after: the chunks' scores; token: [B, C], the token of each chunk's maximum"""

    document: Tensor
    score: Tensor
    after: Scored
    token: Tensor


class RoutingInputs(NamedTuple):
    """The inputs of ``route_documents``; q as ``_prepared``, k not; before: ``scored``."""

    q: Tensor | None
    k: Tensor
    document: Tensor
    asks: Tensor | None
    spans: tuple[Tensor, Tensor] | None
    before: Scored

    def decisions(self, rule: RoutingRule) -> int:
        # If all tokens count, decisions differ between tokens only if these may choose different documents.
        return self.tokens() if rule.running or self.spans is not None else 1

    def tokens(self) -> int:
        return self.q.shape[1] if self.q is not None else self.spans[0].shape[1] if self.spans else 1

    def knows(self, document: Tensor) -> Tensor:
        """Which tokens score each chunk, [B, M, n]."""
        known = (document >= 0)[:, None].expand(-1, self.tokens(), -1)
        if self.asks is not None:
            known = known & self.asks[..., None]
        if self.spans is not None:
            first, end = (x[..., None] for x in self.spans)
            known = known & (document[:, None] >= first) & (document[:, None] < end)
        return known


class _Walk:
    """Visits the tiles in order.

    best: the decisions so far, index and score, [B, R, J]
    open: name, value and size of the document at the end of the last tile, which may continue
    parts: for each tile, the values of chunks that ``finish`` returns
    """

    def __init__(self, rule: RoutingRule, asked: RoutingInputs) -> None:
        self.rule, self.asked = rule, asked
        batch, device, dtype = len(asked.document), asked.k.device, asked.before.score.dtype
        self.query = None if asked.q is None else query_of(rule, asked.q, asked.k.shape[2])
        self.values = asked.tokens() if rule.running else 1
        index = torch.full((batch, asked.decisions(rule), 0), -1, device=device, dtype=torch.int64)
        self.best = best_of(index, index.to(dtype), rule.top_k)
        none = torch.full((batch, 1), -1, device=device, dtype=torch.int64)
        nothing = torch.full((batch, self.values, 1), NEVER, device=device, dtype=dtype)
        self.open = (none, nothing, torch.zeros_like(none))
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = [
            (asked.before.score[:, :0], asked.before.asked[:, :0], asked.document[:, :0])
        ]

    def visit(self, tile: slice) -> None:
        score, count = self._over_tokens(tile)
        values = torch.where(count > 0, score / count if self.rule.query_reduce == "mean" else score, NEVER)
        self._over_chunks(self.asked.document[:, tile], values[:, -self.values :])

    def _over_tokens(self, tile: slice) -> tuple[Tensor, Tensor]:
        """Scores of the tile's chunks, and the number of tokens in them, after each token, [B, M, n]."""
        document = self.asked.document[:, tile]
        before, token = Scored(*(x[:, tile] for x in self.asked.before)), torch.zeros_like(document)
        if self.query is None:
            self.parts.append((*before, token))
            score, count = (x[:, None].expand(-1, self.values, -1) for x in before)
            return score, count
        scores = _similarities(self.rule, self.query, _prepared(self.rule, self.asked.k[:, tile]))
        known = self.asked.knows(document)
        count = before.asked[:, None] + known.long().cumsum(1)
        if self.rule.query_reduce == "mean":
            score = before.score[:, None] + (scores * known).cumsum(1)
        else:
            scores = scores.masked_fill(~known, NEVER)
            token = scores.max(1).indices
            past = before.score.masked_fill(before.asked == 0, NEVER)
            score = torch.maximum(scores.cummax(1).values, past[:, None]).masked_fill(count == 0, 0.0)
        self.parts.append((score[:, -1], count[:, -1], token))
        return score, count

    def _over_chunks(self, document: Tensor, values: Tensor) -> None:
        """Enter the documents that end in the tile into the best; carry the last one on."""
        width = values.shape[2]
        changes = (document[:, 1:] != document[:, :-1]).long()
        segment = F.pad(changes.cumsum(1), (1, 0))
        name = torch.full_like(document, self.rule.num_documents).scatter(1, segment, document)
        size = torch.zeros_like(document).scatter_add(1, segment, torch.ones_like(document))
        spread = segment[:, None].expand(values.shape)
        total = _reduced(self.rule, values, spread, width)

        open_name, open_value, open_size = self.open
        goes_on = open_name == name[:, :1]
        joined = torch.where(goes_on[..., None], _join(self.rule, open_value, total[..., :1]), total[..., :1])
        total = torch.cat([joined, total[..., 1:]], -1)
        size = torch.cat([size[:, :1] + torch.where(goes_on, open_size, 0), size[:, 1:]], 1)
        # In the order of their numbers; the open one comes first.
        self._enter(open_name, open_value.masked_fill(goes_on[..., None], NEVER), open_size)

        last = segment[:, -1:]
        self.open = (
            name.gather(1, last),
            total.gather(2, last[:, None].expand(-1, self.values, -1)),
            size.gather(1, last),
        )
        ended = torch.arange(width, device=document.device) < last
        self._enter(name, total.masked_fill(~ended[:, None], NEVER), size)

    def _enter(self, name: Tensor, value: Tensor, size: Tensor) -> None:
        """name, size: [B, n]   value: [B, R or 1, n]"""
        if self.rule.chunk_reduce == "mean":
            value = value / size.clamp(min=1)[:, None]
        exists = ((name >= 0) & (name < self.rule.num_documents))[:, None]
        if self.asked.spans is not None:
            first, end = (x[..., None] for x in self.asked.spans)
            exists = exists & (name[:, None] >= first) & (name[:, None] < end)
        value = torch.where(exists, value, NEVER)
        index = torch.where(value > NEVER, name[:, None], -1)
        index, value = (torch.cat([a, b], -1) for a, b in zip(self.best, (index, value), strict=True))
        self.best = best_of(index, value, self.rule.top_k)

    def finish(self) -> Choice:
        self._enter(*self.open)
        score, count, token = (torch.cat(x, 1) for x in zip(*self.parts, strict=True))
        return Choice(*self.best, Scored(score, count), token)


def merge_topk_reference(index: Tensor, score: Tensor, top_k: int) -> Best:
    score = score.masked_fill(index < 0, NEVER)
    # Each index in a row, its best score first.
    score, order = score.sort(dim=-1, descending=True, stable=True)
    index, again = index.gather(-1, order).sort(dim=-1, stable=True)
    repeated = F.pad(index[..., 1:] == index[..., :-1], (1, 0))
    return best_of(index, score.gather(-1, again).masked_fill(repeated, NEVER), top_k)


def _similarities(rule: RoutingRule, query: Tensor, k: Tensor) -> Tensor:
    """Similarities of ``query_of``'s queries and ``_prepared`` keys, reduced over heads, [B, M, n]."""
    if rule.head_reduce == "mean":
        return query.flatten(2) @ k.flatten(2).mT
    grouped = query.permute(0, 2, 1, 3, 4)
    scores = grouped.flatten(2, 3) @ k.permute(0, 2, 3, 1)
    return scores.unflatten(2, grouped.shape[2:4]).amax((1, 3))


def _document_scores(rule: RoutingRule, asked: RoutingInputs, after: Scored, token: Tensor) -> Tensor:
    """The scores of documents, [B, N], with a gradient: computed again from the few products that they depend on."""
    q, k, before = asked.q, asked.k, asked.before
    size, chunks = rule.num_documents, k.shape[1]
    name = asked.document.clamp(min=0)
    name = torch.where(asked.document < 0, size, name).clamp(max=size)
    known = after.score.masked_fill(after.asked == 0, NEVER)
    if rule.query_reduce == "mean":
        total = after.score
        if q is not None and chunks:
            total = _Sum.apply(rule, asked, query_of(rule, q, k.shape[2]), k, total)
        value = (total / after.asked.clamp(min=1)).masked_fill(after.asked == 0, NEVER)
        return _of_documents(rule, value, name)
    if q is None or chunks == 0:
        return _of_documents(rule, known, name)
    chunk = torch.arange(chunks, device=k.device).expand_as(name)
    if rule.chunk_reduce == "max":
        # The first chunk of each document with the document's maximum.
        best = _reduced(rule, known, name, size + 1)
        first = chunk.masked_fill(known < best.gather(1, name), chunks)
        chunk = torch.full_like(best, chunks, dtype=torch.int64).scatter_reduce(1, name, first, "amin")
        chunk = chunk[:, :size].clamp(max=chunks - 1)
        known = best[:, :size]
        token, before = token.gather(1, chunk), Scored(*(x.gather(1, chunk) for x in before))
    of_q, of_k = _at(query_of(rule, q, k.shape[2]), token), _prepared(rule, _at(k, chunk))
    again = (of_q * of_k[:, :, :, None]).sum(-1).flatten(2)
    again = again.sum(-1) if rule.head_reduce == "mean" else again.amax(-1)
    # Scores of an earlier call have no gradient here.
    new = (known > NEVER) & ((before.asked == 0) | (before.score < known))
    value = torch.where(new, again, known)
    return value if rule.chunk_reduce == "max" else _of_documents(rule, value, name)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """[B or 1, T, ...], [B, S] -> [B, S, ...]. Unlike in ``pick``, the gradients of an entry that is taken more than
    once are added in a fixed order, also on a GPU.
    """
    return x[torch.arange(len(x), device=x.device)[:, None], index]


class _Sum(torch.autograd.Function):
    """The sum over tokens of each chunk's scores, [B, C], which is known. Backward computes the scores in tiles."""

    @staticmethod
    def forward(ctx: Any, rule: RoutingRule, asked: RoutingInputs, query: Tensor, k: Tensor, total: Tensor) -> Tensor:
        ctx.rule, ctx.asked = rule, asked._replace(q=None)
        ctx.save_for_backward(query, k)
        return total.clone()

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        query, k = (x.detach() for x in ctx.saved_tensors)
        d_query, d_k = torch.zeros_like(query), []
        for start in range(0, k.shape[1], ctx.rule.tile):
            tile = slice(start, start + ctx.rule.tile)
            leaves = query.requires_grad_(), k[:, tile].requires_grad_()
            with torch.enable_grad():
                scores = _similarities(ctx.rule, leaves[0], _prepared(ctx.rule, leaves[1]))
                total = (scores * ctx.asked.knows(ctx.asked.document[:, tile])).sum(1)
            of_query, of_k = torch.autograd.grad(total, leaves, d_total[:, tile])
            d_query += of_query
            d_k.append(of_k)
        return None, None, d_query, torch.cat(d_k, 1), None


def _of_documents(rule: RoutingRule, value: Tensor, name: Tensor) -> Tensor:
    """[B, C] -> [B, N]"""
    total = _reduced(rule, value, name, rule.num_documents + 1)
    if rule.chunk_reduce == "mean":
        total = total / torch.zeros_like(total).scatter_add(1, name, torch.ones_like(value)).clamp(min=1)
    return total[:, : rule.num_documents]


def _reduced(rule: RoutingRule, values: Tensor, owner: Tensor, size: int) -> Tensor:
    """[..., n] reduced by owner to [..., size]: maxima or sums; -inf where an owner has no entry."""
    start = torch.full((*values.shape[:-1], size), NEVER, device=values.device, dtype=values.dtype)
    if rule.chunk_reduce == "max":
        return start.scatter_reduce(-1, owner, values, "amax")
    return start.scatter_reduce(-1, owner, values, "sum", include_self=False)


def _join(rule: RoutingRule, a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b) if rule.chunk_reduce == "max" else a + b


def query_of(rule: RoutingRule, q: Tensor, groups: int) -> Tensor:
    """q, ``_prepared`` and scaled, in groups of heads [B, M, G, P, K]; summed to P = 1 for a mean over heads."""
    scale = 1.0 if rule.similarity == "cosine" else q.shape[3] ** -0.5
    grouped = q.unflatten(2, (groups, -1))
    return grouped.sum(3, keepdim=True) * (scale / q.shape[2]) if rule.head_reduce == "mean" else grouped * scale


def _prepared(rule: RoutingRule, x: Tensor) -> Tensor:
    """x in fp32 (or fp64), and of length 1 for the cosine."""
    x = exact(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) if rule.similarity == "cosine" else x
