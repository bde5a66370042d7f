"""Choosing documents by Triton kernels, as ops of torch; takes the place of ``reference.walk``."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import MOST
from memlm_kernels.launch import arguments_of, at_least_16, cdiv, laid, no_products, precision
from memlm_kernels.ops import kernel_op
from memlm_kernels.route_documents.kernels import choose_best, choose_running, score_chunks
from memlm_kernels.route_documents.reference import Choice, RoutingInputs, RoutingRule, Scored, query_of, walk
from memlm_kernels.segments import power_of_two

# The largest number of places in the sets of all tokens of a program.
_PLACES = 4096


def _split(size: int, programs: int, least: int) -> tuple[int, int]:
    """The number of chunks of a program, and the number of such parts: enough to keep a GPU busy."""
    parts = max(1, 1024 // max(1, programs))
    each = cdiv(max(least, cdiv(size, parts)), 256) * 256
    return each, cdiv(size, each)


def _best(
    values: Tensor,
    names: Tensor,
    spans: tuple[Tensor | None, Tensor | None],
    decisions: int,
    top_k: int,
    known: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The best of values [B, C] with names [B or 1, C] below ``known``: names and values [B, R, J]."""
    last = torch.iinfo(names.dtype).max
    batch, size = values.shape
    set_size = power_of_two(top_k)
    tile = min(16, power_of_two(decisions), _PLACES // set_size)
    rows = batch * cdiv(decisions, tile)
    each, parts = _split(size, rows, 2048)
    best = values.new_empty(batch, decisions, parts * top_k)
    best_name = names.new_empty(best.shape)
    choose_best(
        lambda _: rows * parts,
        {"BC": at_least_16(size)},
        **{"values": values, "names": names, "first": spans[0], "end": spans[1], "best": best, "best_name": best_name},
        **{"C": size, "N": last if known is None else known, "R": decisions, "SPLIT": each, "SPLITS": parts},
        **{"SHARED": len(names) == 1, "J": top_k, "BJ": set_size, "BD": tile, "LAST": last},
    )
    return _merged(best_name, best, parts, top_k)


def _merged(best_name: Tensor, best: Tensor, parts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """[B, R, parts * J] -> [B, R, J]"""
    if parts == 1:
        return best_name, best
    name, value = _best(best.flatten(0, 1), best_name.flatten(0, 1), (None, None), 1, top_k)
    return name.view(*best.shape[:2], top_k), value.view(*best.shape[:2], top_k)


@kernel_op("route_documents")
def forward(
    query: Tensor | None,
    k: Tensor,
    document: Tensor,
    asks: Tensor | None,
    first: Tensor | None,
    end: Tensor | None,
    before_score: Tensor,
    before_asked: Tensor,
    decisions: int,
    top_k: int,
    num_documents: int,
    running: bool,
    mean_heads: bool,
    mean_tokens: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``Choice``. query: [B, M, G, P, K]; without it the choice uses only the scores of earlier calls.

    document, first, end: int32
    """
    query, k, document, asks = laid(query, k, document, asks)
    first, end, before_score, before_asked = laid(first, end, before_score, before_asked)
    score, asked, token = before_score.clone(), before_asked.clone(), torch.zeros_like(before_asked)
    if query is not None:
        batch, length, groups, heads, keys = query.shape
        tile = min(64, at_least_16(length), _PLACES // power_of_two(top_k))
        tiles, chunks = cdiv(length, tile), k.shape[1]
        given = {"query": query, "k": k, "document": document, "asks": asks, "first": first, "end": end}
        width = at_least_16(keys)
        sizes = {"M": length, "C": chunks, "G": groups, "P": heads, "K": keys, "SHARED": len(k) == 1}
        sizes |= {"MEAN": mean_heads, "SUM": mean_tokens, "COSINE": cosine, "PRECISION": precision(query)}
        sizes |= {"BM": tile, "BK": width}
        # A tile of keys is at most 32 KB, of which a multiprocessor holds several.
        limits = {"BC": min(at_least_16(chunks), 2**15 // (width * query.element_size()))}
        # Only the mean needs the number of tokens that routed.
        so_far_score = score.new_empty(batch, tiles, chunks) if running else None
        so_far_asked = asked.new_empty(batch, tiles, chunks) if running and mean_tokens else None
        score_chunks(
            lambda tiles: batch * cdiv(chunks, tiles["BC"]),
            limits,
            **given,
            **{"before_score": before_score, "before_asked": before_asked, "score": score, "asked": asked},
            **{"token": token, "so_far_score": so_far_score, "so_far_asked": so_far_asked, **sizes},
        )
        if running:
            each, parts = _split(chunks, batch * tiles, 256)
            best = score.new_empty(batch, length, parts * top_k)
            best_name = document.new_empty(best.shape)
            choose_running(
                lambda _: batch * tiles * parts,
                limits,
                **given,
                **{"so_far_score": so_far_score, "so_far_asked": so_far_asked, "best": best, "best_name": best_name},
                **{"N": num_documents, "SPLIT": each, "SPLITS": parts, "J": top_k},
                **{"BJ": power_of_two(top_k), "LAST": torch.iinfo(document.dtype).max, **sizes},
            )
            name, value = _merged(best_name, best, parts, top_k)
            return name.long(), value, score, asked, token
    values = score / asked.clamp(min=1) if mean_tokens else score
    values = values.masked_fill(asked == 0, float("-inf"))
    name, value = _best(values, document, (first, end), decisions, top_k, num_documents)
    return name.long(), value, score, asked, token


@forward.register_fake
def _(
    query: Tensor | None,
    k: Tensor,
    document: Tensor,
    asks: Tensor | None,
    first: Tensor | None,
    end: Tensor | None,
    before_score: Tensor,
    before_asked: Tensor,
    decisions: int,
    top_k: int,
    num_documents: int,
    running: bool,
    mean_heads: bool,
    mean_tokens: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, of_chunks = (len(before_score), decisions, top_k), before_score.shape
    new, score = before_asked.new_empty(shape), before_score.new_empty(shape)
    return new, score, before_score.new_empty(of_chunks), before_asked.new_empty(of_chunks), new.new_empty(of_chunks)


@register_flop_formula(torch.ops.memlm.route_documents)
def _flops(*shapes: Any, **_: Any) -> int:
    """A decision at each token computes the scores twice."""
    given = arguments_of(torch.ops.memlm.route_documents, shapes)
    return 2 * math.prod(given["query"] or [0]) * given["k"][1] * (2 if given["running"] else 1)


@kernel_op("merge_topk")
def merge(index: Tensor, score: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[D, n] -> [D, J]"""
    index, score = laid(index, score)
    name, value = _best(score, index, (None, None), 1, top_k)
    return name[:, 0].clone(), value[:, 0].clone()


register_flop_formula(torch.ops.memlm.merge_topk)(no_products)


@merge.register_fake
def _(index: Tensor, score: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return index.new_empty(len(index), top_k), score.new_empty(len(index), top_k)


def merge_topk_triton(index: Tensor, score: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = *index.shape[:-1], top_k
    name, value = merge(index.long().flatten(0, -2), score.float().flatten(0, -2), top_k)
    return name.view(shape).to(index.dtype), value.view(shape).to(score.dtype)


def choose_triton(rule: RoutingRule, asked: RoutingInputs, dtype: torch.dtype) -> Choice:
    """dtype: the type of q; products take the wider of it and k's type."""
    before, query = asked.before, None
    decisions = asked.decisions(rule)
    if not (len(asked.document) and asked.k.shape[1] and decisions):
        return walk(rule, asked)
    if asked.q is not None:
        query = query_of(rule, asked.q, asked.k.shape[2]).to(torch.promote_types(dtype, asked.k.dtype))
    # 32-bit numbers are half the bytes to read; larger numbers are no documents.
    document, *spans = (
        x.clamp(-1, MOST).to(torch.int32) for x in (asked.document[: len(asked.k)], *(asked.spans or ()))
    )
    first, end = spans or (None, None)
    settings = (rule.running, rule.head_reduce == "mean", rule.query_reduce == "mean", rule.similarity == "cosine")
    index, score, *after, token = forward(
        query,
        asked.k.detach(),
        document,
        asked.asks,
        first,
        end,
        before.score.float(),
        before.asked.long(),
        decisions,
        rule.top_k,
        rule.num_documents,
        *settings,
    )
    return Choice(index, score, Scored(*after), token)
