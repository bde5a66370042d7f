"""Attention to a window and to a few chunks of the past, which each token chooses by their pooled keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.attention.choice_reference import chunk_topk_reference, invert_chunks_reference
from memlm_kernels.attention.chunks_reference import Chosen, Keys, Pooled, attend, first_keys
from memlm_kernels.attention.one_token import read_all, read_chosen
from memlm_kernels.attention.window import check_heads, check_positions, from_zero, kernel_spans, too_large
from memlm_kernels.backend import MOST, as_autocast, pick
from memlm_kernels.checks import asks_gradient, check_range, check_sizes, check_tensors, named


class Attended(NamedTuple):
    """o: [B, T, H, V]; lse: [B, T, H], the log of the sum of exponentials of the scores, at least in fp32."""

    o: Tensor
    lse: Tensor


class ChunkReaders(NamedTuple):
    """For each row and group, the tokens that chose chunk 0, then those that chose chunk 1, and so on, each ascending.

    token: [B, G, T J]; entries behind those of the last chunk are arbitrary
    offsets: [B, G, N + 1]; the tokens of chunk n are the entries offsets[n] to offsets[n + 1] - 1
    """

    token: Tensor
    offsets: Tensor


def chunk_topk(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int,
    spans: tuple[Tensor, Tensor] | None = None,
    tile: int = 256,
    backend: str = "auto",
) -> Tensor:
    """Choose the chunks that each token reads, for each group of heads that share keys (NSA, arXiv:2502.11089; MoBA,
    arXiv:2502.13189)::

        score[t, g, n] = sum over the heads h of group g of q[t, h] . k[n, g]

    q: [B, T, H, K]   k: [B, N, G, K], the pooled key of each chunk   top_k: chunks to choose, at least 1
    spans: first and end, integers [B, T]: a token may choose chunks first to end - 1, within 0 to N - 1 (None: all)
    tile: tokens, and chunks, that are scored at once

    Returns the chunks' numbers [B, T, G, top_k], best first, among equal scores the lowest, -1 where there are fewer;
    no gradient. At no time are more scores held than those of ``tile`` tokens with ``tile`` chunks. Scores are in
    fp32; for 16-bit q, Triton computes them in tf32 on NVIDIA. Raises ValueError if shapes, types or devices disagree,
    top_k or tile < 1, or the backend cannot run.
    """
    if top_k < 1 or tile < 1:
        raise ValueError(f"top_k={top_k} and tile={tile} must be at least 1")
    check_heads(q, k)
    check_tensors({"q": q, "k": k})
    _check_spans(q, spans)
    (q,) = as_autocast(q)
    limit = f"its kernels take a top_k of at most 128, not {top_k}" if top_k > 128 else None
    if pick("chunk_topk", backend, q, limit, k) == "triton" and q.numel() and k.numel():
        from memlm_kernels.attention.choice_triton import choose_chunks

        first, end = (x.clamp(0, k.shape[1]).to(torch.int32) for x in spans) if spans else (None, None)
        return choose_chunks(q.detach(), k.detach(), first, end, top_k)
    with torch.autocast(q.device.type, enabled=False):
        return chunk_topk_reference(q, k, top_k, spans, tile)


def invert_chunks(index: Tensor, *, num_chunks: int, backend: str = "auto") -> ChunkReaders:
    """The tokens that read each chunk. With it, a backward gives each chunk's keys to one program, without atomics.

    index: [B, T, G, J] integers, the chunks that each token chose, as ``chunk_topk`` returns them; negative: none

    Returns ``ChunkReaders``. Raises ValueError if index has another shape or type or holds num_chunks or more, or the
    backend cannot run. On a GPU values are not checked, and num_chunks or more counts as none.
    """
    if index.ndim != 4:
        raise ValueError(f"index {list(index.shape)} of {index.dtype} must be integers [B, T, G, J]")
    if num_chunks < 0:
        raise ValueError(f"num_chunks={num_chunks} must not be negative")
    check_tensors({}, {"index": index})
    limit = _too_many(index, num_chunks)
    chosen = pick("invert_chunks", backend, index, limit, products=False)
    check_range("index", index, None, num_chunks)
    if chosen == "triton" and index.numel():
        from memlm_kernels.attention.choice_triton import invert

        return ChunkReaders(*invert(index, num_chunks))
    return ChunkReaders(*invert_chunks_reference(index, num_chunks))


def chunk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    starts: Tensor | None,
    *,
    chunk_size: int,
    window: int,
    far: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tile: int | None = None,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Attended:
    """softmax(scale q k^T) v of each token over its window and the chunks that it chose; a key in both counts once
    (NSA, arXiv:2502.11089; MoBA, arXiv:2502.13189).

    The tokens of the call are the last T keys. With T = 1 this is a step of decoding.

    q: [B, T, H, K]   k: [B, L, G, K]   v: [B, L, G, V]
    index: [B, T, G, J] integers, the chunks that each token and group chose, each at most once; negative: none. N or
        more raises on a CPU, and counts as none on a GPU, where values are not checked
    starts: [B, N] integers, the first key of each chunk; arbitrary for chunks that no token chose. No two chosen
        chunks may share keys (None: chunk n starts at key n chunk_size)
    chunk_size: keys of a chunk; a token sees those before its window
    window: the number of last keys that a token sees, itself included; at least 1
    far: queries [B, T, H, K] and keys [B, L, G, K] that score the keys of chunks, for other position encodings than in
        the window; k may then hold only the last keys of v (None: q and k)
    scale: factor of the scores; None for 1 / sqrt(K)
    positions: [B, T], the number of keys before each token in its document: a token sees only these and itself (None:
        all keys before it)
    tile: tokens that are scored at once; None: 32, or more while that takes no more than 1 MB in fp32

    Returns ``Attended``. The work is T (window + 32 + at most 4 J chunk_size) scores; the scores of ``tile`` tokens
    are held at once, in the backward too. Accumulates in fp32. Raises ValueError if shapes, types or devices disagree,
    chunk_size, window or tile < 1, or the backend cannot run. ``naive`` derives the tiled form.
    """
    for name, value in (("chunk_size", chunk_size), ("window", window), ("tile", tile)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    check_heads(q, k)
    batch, length, groups = len(q), q.shape[1], k.shape[2]
    if v.ndim != 4 or v.shape[2] != groups or not length <= k.shape[1] <= v.shape[1]:
        raise ValueError(f"v {list(v.shape)} must be [B, L, G, V] with k {list(k.shape)}, L at least T={length}")
    far_q, far_k = (q, k) if far is None else far
    if far_q.shape != q.shape or far_k.shape != (batch, v.shape[1], *k.shape[2:]):
        raise ValueError(
            f"queries {list(far_q.shape)} and keys {list(far_k.shape)} of chunks must be [B, T, H, K] and "
            f"[B, L, G, K] with q {list(q.shape)} and v {list(v.shape)}"
        )
    if index.shape[:3] != (batch, length, groups) or index.ndim != 4:
        raise ValueError(f"index {list(index.shape)} must be integers [B, T, G, J], {[batch, length, groups]} and any")
    if starts is not None and (starts.ndim != 2 or len(starts) != batch):
        raise ValueError(f"starts {list(starts.shape)} must be integers [B, N] with B={batch}")
    check_sizes("v", v)
    check_tensors({"q": q, "k": k, "v": v, **named("far", far or ())}, {"index": index, "starts": starts})
    q, k, v, *rest = as_autocast(q, k, v, *(far or ()))
    far = (rest[0], rest[1]) if far else None
    chunks = -(-v.shape[1] // chunk_size) if starts is None else starts.shape[1]
    limit = too_large(q, k, v) or _too_many(index, chunks)
    if index.shape[3] > 128:
        limit = limit or f"its kernels take at most 128 chunks of each token, not {index.shape[3]}"
    by = pick("chunk_sparse_attention", backend, q, limit, v, index, starts)
    check_range("index", index, None, chunks)
    check_positions(q, positions)
    has_chunks = index.shape[3] > 0 and chunks > 0
    if by == "triton" and q.numel():
        from memlm_kernels.attention.triton import attend_triton

        if starts is None:
            starts = (torch.arange(chunks, device=v.device) * chunk_size).expand(batch, -1)
        choice = (index, starts, chunk_size, window) if has_chunks else None
        learns = asks_gradient(q, k, v, *(far or ()))
        spans = kernel_spans(q, k, window, positions, learns)
        return Attended(*attend_triton(q, k, v, *spans, window, scale, far=far, choice=choice))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    index = index.long() if has_chunks else index.new_zeros(*index.shape[:3], 0)
    first = index * chunk_size if starts is None or not has_chunks else first_keys(index, starts)
    chosen = Chosen(first, chunk_size, window, from_zero(positions))
    pairs = [Keys(q, k)] if far is None else [Keys(q, k), Keys(*far)]
    with torch.autocast(q.device.type, enabled=False):
        if length == 1:
            return Attended(*read_chosen(chosen, pairs, v, scale))
        return Attended(*attend(chosen, pairs, v, scale, tile))


def chunk_mean_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tile: int | None = None,
    backend: str = "auto",
) -> Attended:
    """softmax(scale q k^T) v of each token over pooled chunks (NSA's compressed branch, arXiv:2502.11089). Its
    gradient teaches the choice of ``chunk_topk``.

    q: [B, T, H, K]   k: [B, N, G, K] and v: [B, N, G, V], the pooled key and value of each chunk
    spans: as in ``chunk_topk``; a token without chunks reads zeros, with lse -inf
    scale: factor of the scores; None for 1 / sqrt(K)
    tile: tokens that are scored at once; None: 128, or more while that takes no more than 1 MB in fp32

    Returns ``Attended``. At no time are the scores of more than ``tile`` tokens held, in the backward too. Accumulates
    in fp32. Raises ValueError if shapes, types or devices disagree, tile < 1, or the backend cannot run.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    check_heads(q, k)
    _check_spans(q, spans)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {list(v.shape)} must be [B, N, G, V] with k {list(k.shape)}")
    check_sizes("v", v)
    check_tensors({"q": q, "k": k, "v": v})
    q, k, v = as_autocast(q, k, v)
    if pick("chunk_mean_attention", backend, q, too_large(q, k, v), v) == "triton" and q.numel():
        from memlm_kernels.attention.triton import attend_triton

        if k.shape[1]:
            number = q.new_zeros(q.shape[:2], dtype=torch.int32)
            first, end = spans or (number, number + k.shape[1])
            first, end = (x.clamp(0, k.shape[1]) for x in (first, end))
            return Attended(*attend_triton(q, k, v, first, end, k.shape[1], scale))
    with torch.autocast(q.device.type, enabled=False):
        scale = q.shape[3] ** -0.5 if scale is None else scale
        if q.shape[1] == 1 and spans is None and k.shape[1]:
            return Attended(*read_all(q, k, v, scale))
        return Attended(*attend(Pooled(spans), [Keys(q, k)], v, scale, tile))


def _check_spans(q: Tensor, spans: tuple[Tensor, Tensor] | None) -> None:
    for x in spans or ():
        if x.shape != q.shape[:2]:
            raise ValueError(f"spans {list(x.shape)} must be integers [B, T] = {list(q.shape[:2])}")
    check_tensors({"q": q}, named("spans", spans or ()))


def _too_many(index: Tensor, num_chunks: int) -> str | None:
    """The reason why Triton's radix sort does not take a call, None if it takes it."""
    entries = index.shape[1] * index.shape[3]
    if max(entries, num_chunks) <= MOST:
        return None
    return f"its kernels take at most {MOST} chunks, and choices T J of a group, not {num_chunks} and {entries}"
