"""Which documents a query reads: scores of pooled chunks, reduced to documents, of which the best are kept."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from memlm_kernels.backend import MOST, choose, with_triton
from memlm_kernels.checks import check_ascending, check_sizes, check_tensors, named, readable
from memlm_kernels.route_documents.bank import RouterShard, bank_keys, nominate_documents
from memlm_kernels.route_documents.reference import (
    Routes,
    Rule,
    Scored,
    merge_topk_reference,
    route_documents_reference,
)

__all__ = ["RouterShard", "Routes", "Scored", "bank_keys", "merge_topk", "nominate_documents", "route_documents"]

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

    A chunk's score is its similarity to a token, reduced over heads, then over the tokens that ask; a document's is
    its chunks', reduced::

        s[doc] = chunk_reduce_c query_reduce_t head_reduce_h sim(q[t, h], k[c, group of h])

    q: [B, M, H, K], or None if no token asks   k: [B or 1, C, G, K], pooled; 1 for a bank that all rows share
    document: [B or 1, C] integers, the document of each chunk, ascending; negative, or num_documents or more: none
    asks: [B, M] bool, tokens that route (None: all)
    spans: first and end, [B, M] each: a token knows of documents first to end - 1 (None: all)
    running: reduce over the tokens up to each one, so that no decision sees a later token; otherwise over all
    scored: what an earlier call returned, for the same chunks: its tokens count too
    similarity: "cosine" (of the pooled key), or "dot", over the root of K
    return_scores: also the score of every document, with a gradient; -inf where no token that asks knows of it

    Returns the documents [B, R, top_k], -1 where there are fewer, and their scores, best first and of equals the
    lowest number; R = M if ``running`` or ``spans``, else 1. Only ``scores`` has a gradient. At no time is more held
    than the scores of ``tile`` chunks. Accumulates in fp32.
    Raises ValueError if a setting is unknown, shapes, types or devices disagree, or the backend cannot run.
    """
    for name, value, known in (
        ("similarity", similarity, SIMILARITIES),
        ("head_reduce", head_reduce, REDUCTIONS),
        ("query_reduce", query_reduce, REDUCTIONS),
        ("chunk_reduce", chunk_reduce, REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
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
        raise ValueError(f"q has {q.shape[2]} heads, which do not divide by the {k.shape[2]} of k")
    for name, x in {"asks": asks, **named("spans", spans or ())}.items():
        if x is not None and q is not None and x.shape != q.shape[:2]:
            raise ValueError(f"{name} {list(x.shape)} must be [B, M] = {list(q.shape[:2])}")
    if asks is not None and asks.dtype != torch.bool:
        raise ValueError(f"asks is {asks.dtype}; give bool")
    score, count = scored or (None, None)
    numbers = {"document": document, "scored.asked": count, **named("spans", spans or ())}
    check_tensors({"q": q, "k": k, "scored.score": score}, numbers | {"asks": None if asks is None else asks.byte()})
    rule = Rule(similarity, head_reduce, query_reduce, chunk_reduce, top_k, num_documents, running, tile)
    limit = _too_many(top_k)
    if chunk_reduce == "mean":
        limit = "its kernels take chunk_reduce='max', not 'mean'"
    if num_documents > MOST:
        limit = f"its kernels take at most {MOST} documents, not num_documents={num_documents}"
    chosen = None
    if choose("route_documents", backend, *with_triton(k, limit, q)) == "triton":
        from memlm_kernels.route_documents.triton import choose_triton

        chosen = functools.partial(choose_triton, dtype=k.dtype if q is None else q.dtype)
    if readable(document):
        check_ascending("document", torch.where((document < 0) | (document >= num_documents), -1, document))
    return route_documents_reference(rule, q, k, document, asks, spans, scored, return_scores, chosen)


def merge_topk(parts: Sequence[tuple[Tensor, Tensor]], top_k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The best of several banks' best; of an index that several hold, the best score.

    parts: index and score [..., any] of each, -1 and -inf where there is none; indices are of one numbering
    Returns index and score [..., top_k], best first, of equals the lowest index; without a gradient. Raises ValueError
    if there are no parts, shapes, types or devices disagree, top_k < 1, or the backend cannot run.
    """
    if top_k < 1 or not parts:
        raise ValueError(f"top_k={top_k} and the number of parts, {len(parts)}, must be at least 1")
    for i, s in parts:
        if i.shape != s.shape or i.shape[:-1] != parts[0][0].shape[:-1] or i.ndim == 0:
            raise ValueError(f"index {list(i.shape)} and score {list(s.shape)} must be alike but for the last size")
        check_tensors({"score": s, "score of the first": parts[0][1]}, {"index": i})
    index, score = (torch.cat(tensors, -1).detach() for tensors in zip(*parts, strict=True))
    chosen = choose("merge_topk", backend, *with_triton(score, _too_many(top_k), products=False))
    if chosen == "reference" or index.numel() == 0:
        return merge_topk_reference(index, score, top_k)
    from memlm_kernels.route_documents.triton import merge_topk_triton

    return merge_topk_triton(index, score, top_k)


def _too_many(top_k: int) -> str | None:
    return None if top_k <= 128 else f"its kernels keep at most 128 documents, not top_k={top_k}"
