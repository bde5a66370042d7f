"""The choice of documents that a query reads: scores of pooled chunks are reduced to documents, and the best are kept.

Files:

    naive               the scores as loops, and the derivation of the tiled form
    reference           routing in tiles of chunks, in PyTorch
    bank                routing over a large bank: the few documents that a query can choose
    kernels, triton     Triton kernels, and the ops around them
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from memlm_kernels.backend import MOST, pick
from memlm_kernels.checks import check_ascending, check_range, check_sizes, check_tensors, named, readable
from memlm_kernels.route_documents.bank import (
    RouterShard,
    bank_keys,
    keys_of,
    nominated_in_tiles,
    numbered,
    restored_keys,
)
from memlm_kernels.route_documents.reference import (
    Routes,
    RoutingRule,
    Scored,
    merge_topk_reference,
    route_documents_reference,
)
from memlm_kernels.topk import Best

__all__ = [
    "Best",
    "RouterShard",
    "Routes",
    "Scored",
    "bank_keys",
    "merge_topk",
    "nominate_documents",
    "restored_keys",
    "route_documents",
]

SIMILARITIES = ("cosine", "dot")
REDUCTIONS = ("mean", "max")


def route_documents(
    q: Tensor | None,
    k: Tensor,
    document: Tensor,
    *,
    top_k: int,
    num_documents: int,
    asks: Tensor | None = None,
    spans: tuple[Tensor, Tensor] | None = None,
    running: bool = False,
    scored: Scored | None = None,
    similarity: str = "cosine",
    head_reduce: str = "mean",
    query_reduce: str = "max",
    chunk_reduce: str = "max",
    return_scores: bool = False,
    tile: int = 4096,
    backend: str = "auto",
) -> Routes:
    """The top_k documents of each row or token (Memory Sparse Attention, arXiv:2603.23516).

    The score of a chunk is its similarity to a token, reduced over heads, and then over the tokens that route. The
    score of a document is the scores of its chunks, reduced::

        s[doc] = chunk_reduce_c query_reduce_t head_reduce_h sim(q[t, h], k[c, group of h])

    q: [B, M, H, K], or None if no token routes   k: [B or 1, C, G, K], pooled keys; 1 for a bank that all rows share
    document: [B or 1, C] integers, the document of each chunk, ascending; a chunk with a negative number, or with
        num_documents or more, belongs to no document
    top_k: documents of a decision, at least 1   num_documents: N, above every document's number
    asks: [B, M] bool, the tokens that route (None: all)
    spans: first and end, [B, M] each: a token may choose documents first to end - 1 (None: all)
    running: reduce over the tokens up to each one, so that no decision depends on a later token; otherwise over all
    scored: ``scored`` of an earlier call with the same chunks, two tensors [B, C]: the tokens of that call count too
    similarity: "cosine" (of the pooled key), or "dot" for q . k / sqrt(K)
    head_reduce, query_reduce, chunk_reduce: "mean" or "max"
    return_scores: return the score of every document too, with a gradient; -inf where no token may choose it
    tile: chunks that are scored at once

    Returns ``Routes``: the documents [B, R, top_k], -1 where there are fewer, and their scores, best first, among
    equal scores the lowest number; R = M if ``running`` or ``spans``, else 1. Only ``scores`` has a gradient. At no
    time are the scores of more than ``tile`` chunks held. Accumulates in fp32; Triton multiplies sums over heads in
    the type of q and k. Raises ValueError if a setting is unknown, shapes, types or devices disagree, or the backend
    cannot run. ``naive`` derives the tiled form.
    """
    _check_rule(similarity, head_reduce=head_reduce, query_reduce=query_reduce, chunk_reduce=chunk_reduce)
    if top_k < 1 or tile < 1:
        raise ValueError(f"top_k={top_k} and tile={tile} must be at least 1")
    if k.ndim != 4 or document.shape != k.shape[:2]:
        raise ValueError(f"k {list(k.shape)} and document {list(document.shape)} must be [B, C, G, K] and [B, C]")
    if q is not None and (q.ndim != 4 or len(k) not in (1, len(q)) or q.shape[3] != k.shape[3]):
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must be [B, M, H, K] and [B or 1, C, G, K]")
    check_sizes("k", k)
    if q is not None:
        check_sizes("q", q)
    if q is not None and q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} heads of k")
    for name, x in {"asks": asks, **named("spans", spans or ())}.items():
        if x is not None and q is not None and x.shape != q.shape[:2]:
            raise ValueError(f"{name} {list(x.shape)} must be [B, M] = {list(q.shape[:2])}")
    _check_asks(asks)
    score, count = scored or (None, None)
    numbers = {"document": document, "scored.asked": count, **named("spans", spans or ())}
    check_tensors({"q": q, "k": k, "scored.score": score}, numbers | {"asks": None if asks is None else asks.int()})
    rule = RoutingRule(similarity, head_reduce, query_reduce, chunk_reduce, top_k, num_documents, running, tile)
    limit = _too_many(top_k)
    if chunk_reduce == "mean":
        limit = "its kernels take chunk_reduce='max', not 'mean'"
    if num_documents > MOST:
        limit = f"its kernels take at most {MOST} documents, not num_documents={num_documents}"
    chosen = None
    if pick("route_documents", backend, k, limit, q) == "triton":
        from memlm_kernels.route_documents.triton import choose_triton

        chosen = functools.partial(choose_triton, dtype=k.dtype if q is None else q.dtype)
    if readable(document):
        check_ascending("document", torch.where((document < 0) | (document >= num_documents), -1, document))
    return route_documents_reference(rule, q, k, document, asks, spans, scored, return_scores, chosen)


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
    backend: str = "auto",
) -> Best:
    """A few documents of a whole bank, among which are all that ``route_documents`` would choose at any token (Memory
    Sparse Attention, arXiv:2603.23516).

    q: [B, M, H, K]   shards: the parts of the bank, whose keys are of ``bank_keys``
    asks: [B, M] bool, the tokens that route (None: all)
    held: about the number of scores held at a time, at least 1
    The other settings are those of ``route_documents``.

    Returns the documents' numbers [B, R, top_k] and scores, R = M if ``running``, else 1; -1 and -inf where there are
    fewer, as in a row where no token routes. Each shard is a call of ``route_documents``, which reads nothing back
    from the device. With ``auto`` on a CPU, each token keeps its own best, and only the chunks of a tile that beat
    them are examined. No gradient. Raises ValueError if a setting is unknown, shapes, types or devices disagree, or
    the backend cannot run.
    """
    _check_rule(similarity, head_reduce=head_reduce, query_reduce=query_reduce, chunk_reduce=chunk_reduce)
    if top_k < 1 or held < 1:
        raise ValueError(f"top_k={top_k} and held={held} must be at least 1")
    if q.ndim != 4:
        raise ValueError(f"q {list(q.shape)} must be [B, M, H, K]")
    check_sizes("q", q)
    if asks is not None and asks.shape != q.shape[:2]:
        raise ValueError(f"asks {list(asks.shape)} must be [B, M] = {list(q.shape[:2])}")
    _check_asks(asks)
    check_tensors({"q": q}, {"asks": None if asks is None else asks.int()})
    for i, shard in enumerate(shards):
        _check_shard(f"shards[{i}]", shard, q)
    rows = (len(q), q.shape[1] if running else 1)
    if not (shards and q.shape[1]):
        none = torch.full((*rows, top_k), -1, device=q.device)
        return Best(none, torch.full(none.shape, float("-inf"), device=q.device))
    if q.device.type == "cpu" and backend == "auto":
        rule = RoutingRule(similarity, head_reduce, query_reduce, chunk_reduce, top_k, 0, running, 1)
        return Best(*nominated_in_tiles(rule, q, shards, asks, held))
    index = torch.full((*rows, 0), -1, device=q.device)
    score = torch.empty(index.shape, device=q.device)
    for shard in shards:
        # float8 keys are restored tile by tile; but a mean over chunks needs all keys of a document at once.
        whole = shard.scale is None or chunk_reduce == "mean"
        size = max(1, len(shard.k) if whole else 32 * held // shard.k[0].numel())
        for start in range(0, len(shard.k), size):
            tile = slice(start, start + size)
            routes = route_documents(
                q,
                keys_of(shard, tile, q.dtype)[None],
                shard.document[None, tile],
                top_k=top_k,
                num_documents=len(shard.number),
                asks=asks,
                running=running,
                similarity=similarity,
                head_reduce=head_reduce,
                query_reduce=query_reduce,
                chunk_reduce=chunk_reduce,
                tile=max(4096, held // q[..., 0, 0].numel()),
                backend=backend,
            )
            index, score = (torch.cat(x, -1) for x in zip((index, score), numbered(routes, shard), strict=True))
            # A document may lie across tiles.
            index, score = merge_topk_reference(index, score, top_k)
    return Best(index, score)


def merge_topk(parts: Sequence[tuple[Tensor, Tensor]], *, top_k: int, backend: str = "auto") -> Best:
    """Merge the best entries of several banks; an index in several parts keeps its best score.

    parts: index and score [..., any] of each bank, -1 and -inf where there is none; all use one numbering

    Returns index and score [..., top_k], best first, among equal scores the lowest index; no gradient. Raises
    ValueError if there are no parts, shapes, types or devices disagree, top_k < 1, or the backend cannot run.
    """
    if top_k < 1 or not parts:
        raise ValueError(f"top_k={top_k} and the number of parts, {len(parts)}, must be at least 1")
    for i, s in parts:
        if i.shape != s.shape or i.shape[:-1] != parts[0][0].shape[:-1] or i.ndim == 0:
            raise ValueError(
                f"index {list(i.shape)} and score {list(s.shape)} must have equal shapes except for the last size"
            )
        check_tensors({"score": s, "score of the first": parts[0][1]}, {"index": i})
    index, score = (torch.cat(tensors, -1).detach() for tensors in zip(*parts, strict=True))
    chosen = pick("merge_topk", backend, score, _too_many(top_k), products=False)
    if chosen == "reference" or index.numel() == 0:
        return merge_topk_reference(index, score, top_k)
    from memlm_kernels.route_documents.triton import merge_topk_triton

    return Best(*merge_topk_triton(index, score, top_k))


def _check_rule(similarity: str, **reductions: str) -> None:
    for name, value in {"similarity": similarity, **reductions}.items():
        known = SIMILARITIES if name == "similarity" else REDUCTIONS
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")


def _check_asks(asks: Tensor | None) -> None:
    if asks is not None and asks.dtype != torch.bool:
        raise ValueError(f"asks is {asks.dtype}; give bool")


def _check_shard(name: str, shard: RouterShard, q: Tensor) -> None:
    k, scale = shard.k, shard.scale
    if k.ndim != 3 or k.shape[2] != q.shape[3] or not k.shape[1] or q.shape[2] % k.shape[1]:
        raise ValueError(f"{name}.k {list(k.shape)} must be [C, G, K={q.shape[3]}], where G divides H={q.shape[2]}")
    if shard.document.shape != k.shape[:1] or shard.number.ndim != 1:
        raise ValueError(
            f"{name}.document {list(shard.document.shape)} must be [C] = [{len(k)}], "
            f"{name}.number {list(shard.number.shape)} [N]"
        )
    if (k.dtype == torch.float8_e4m3fn) != (scale is not None) or (
        scale is not None and scale.shape != (*k.shape[:2], 1)
    ):
        raise ValueError(
            f"{name}.k is {str(k.dtype)[6:]}; float8_e4m3fn has a scale [C, G, 1] of bank_keys, others none"
        )
    if k.dtype == torch.float64 and q.dtype != torch.float64:
        raise ValueError(f"{name}.k is float64, q {str(q.dtype)[6:]}; give q in float64 too, or k in fewer bits")
    # Keys may be narrower than float64 queries.
    floats = {f"{name}.k": k if scale is None else None, f"{name}.scale": scale}
    check_tensors(floats, {f"{name}.document": shard.document, f"{name}.number": shard.number})
    check_tensors({"q": q}, {f"{name}.document": shard.document})
    check_range(f"{name}.document", shard.document, -1, len(shard.number))


def _too_many(top_k: int) -> str | None:
    return None if top_k <= 128 else f"its kernels keep at most 128 documents, not top_k={top_k}"
