"""Attention to a window and to a few chunks of the past that each token chooses by their pooled keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.attention.choice_reference import chunk_topk_reference, invert_chunks_reference
from memlm_kernels.attention.chunks_reference import Chosen, Keys, Pooled, attend
from memlm_kernels.attention.window import check_heads, check_positions, too_large, window_spans
from memlm_kernels.backend import MOST, as_autocast, choose, with_triton
from memlm_kernels.checks import check_range, check_sizes, check_tensors, named


class Attended(NamedTuple):
    """o: [B, T, H, V]; lse: [B, T, H], the log of the sum of exponentials of the scores, in fp32 at least."""

    o: Tensor
    lse: Tensor


class ChunkReaders(NamedTuple):
    """Of each row and group the tokens that chose chunk 0, those that chose chunk 1, and so on, each ascending.

    token: [B, G, T J], behind the last chunk's any; offsets: [B, G, N + 1], chunk n's are offsets[n] to
    offsets[n + 1] - 1
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
    """The chunks that each token reads, for each group of heads that share keys (NSA, arXiv:2502.11089; MoBA,
    arXiv:2502.13189)::

        score[t, g, n] = sum over the heads h of group g of q[t, h] . k[n, g]

    q: [B, T, H, K]   k: [B, N, G, K], pooled keys, one of each chunk
    spans: first and end, integers [B, T]: a token knows of those of chunks first to end - 1 that there are (None: all)

    Returns their numbers [B, T, G, top_k], best first and of equals the lowest, -1 where there are fewer. Has no
    gradient. At no time more than the scores of ``tile`` tokens with ``tile`` chunks is held. Scores in fp32,
    of 16-bit q by Triton on NVIDIA in tf32.
    Raises ValueError if shapes, types or devices disagree, top_k or tile < 1, or the backend cannot run.
    """
    if top_k < 1 or tile < 1:
        raise ValueError(f"top_k={top_k} and tile={tile} must be at least 1")
    check_heads(q, k)
    check_tensors({"q": q, "k": k})
    _check_spans(q, spans)
    (q,) = as_autocast(q)
    limit = f"its kernels take a top_k of at most 128, not {top_k}" if top_k > 128 else None
    if choose("chunk_topk", backend, *with_triton(q, limit, k)) == "triton" and q.numel() and k.numel():
        from memlm_kernels.attention.choice_triton import choose_chunks

        first, end = (x.clamp(0, k.shape[1]).to(torch.int32) for x in spans) if spans else (None, None)
        return choose_chunks(q.detach(), k.detach(), first, end, top_k)
    with torch.autocast(q.device.type, enabled=False):
        return chunk_topk_reference(q, k, top_k, spans, tile)


def invert_chunks(index: Tensor, *, num_chunks: int, backend: str = "auto") -> ChunkReaders:
    """Who reads each chunk: what a backward needs that gives each chunk's keys to one program, without atomics.

    index: [B, T, G, J] integers, chunks that each token chose, as of ``chunk_topk``; negative: none
    Raises ValueError if the shape or type is another, a chunk is num_chunks or more (on a GPU: none), or the backend
    cannot run.
    """
    if index.ndim != 4:
        raise ValueError(f"index {list(index.shape)} of {index.dtype} must be integers [B, T, G, J]")
    if num_chunks < 0:
        raise ValueError(f"num_chunks={num_chunks} must not be negative")
    check_tensors({}, {"index": index})
    limit = _too_many(index, num_chunks)
    chosen = choose("invert_chunks", backend, *with_triton(index, limit, products=False))
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
    starts: Tensor,
    *,
    chunk_size: int,
    window: int,
    far: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tile: int = 32,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Attended:
    """softmax(q k^T) v of each token over its window and the chunks that it chose, a key that is in both once.

    The tokens of the call are the last T keys. With T = 1 this is a step of decoding.

    q: [B, T, H, K]   k: [B, L, G, K]   v: [B, L, G, V]
    index: [B, T, G, J] integers, chunks that each token and group chose; negative: none; no chunk twice; N or more
        raises on a CPU, and is none on a GPU, where index is not looked at
    starts: [B, N] integers, the key that each chunk starts with; any for chunks that nobody chose; of those that are
        chosen no two share keys
    chunk_size: keys of a chunk; a token sees those of them that stand before its window
    window: last keys that a token sees, itself included; 1 at least
    far: queries [B, T, H, K] and keys [B, L, G, K] that score what is seen of chunks, where their positions are given
        otherwise; k may then be shorter than v: its last keys (None: q and k)
    scale: of the scores; None for 1 / sqrt(K)
    positions: [B, T], keys before each token in its document: it sees none beyond (None: all that there are)

    Work is that of T (window + tile + at most 4 J chunk_size) scores, memory that of ``tile`` tokens', in the backward
    too. Accumulates in fp32. Raises ValueError if shapes, types or devices disagree, chunk_size, window or tile < 1,
    or the backend cannot run.
    """
    for name, value in (("chunk_size", chunk_size), ("window", window), ("tile", tile)):
        if value < 1:
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
    if starts.ndim != 2 or len(starts) != batch:
        raise ValueError(f"starts {list(starts.shape)} must be integers [B, N] with B={batch}")
    check_sizes("v", v)
    check_tensors({"q": q, "k": k, "v": v, **named("far", far or ())}, {"index": index, "starts": starts})
    q, k, v, far_q, far_k = as_autocast(q, k, v, far_q, far_k)
    far = None if far is None else (far_q, far_k)
    limit = too_large(q, k, v) or _too_many(index, starts.shape[1])
    if index.shape[3] > 128:
        limit = limit or f"its kernels take at most 128 chunks of each token, not {index.shape[3]}"
    available = with_triton(q, limit, v, index, starts)
    by = choose("chunk_sparse_attention", backend, *available)
    check_range("index", index, None, starts.shape[1])
    positions = check_positions(q, positions)
    has_chunks = index.shape[3] > 0 and starts.shape[1] > 0
    if by == "triton" and q.numel():
        from memlm_kernels.attention.triton import attend_triton

        choice = (index, starts, chunk_size, window) if has_chunks else None
        spans = window_spans(q, k, window, positions)
        return Attended(*attend_triton(q, k, v, *spans, window, scale, far=far, choice=choice))
    near = Keys(q, k, v[:, v.shape[1] - k.shape[1] :])
    chosen = Chosen(index, starts, chunk_size, window, positions)
    with torch.autocast(q.device.type, enabled=False):
        return Attended(*attend(chosen, [near, Keys(far_q, far_k, v)], scale, tile))


def chunk_mean_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tile: int = 128,
    backend: str = "auto",
) -> Attended:
    """softmax(q k^T) v of each token over pooled chunks, through which the choice of ``chunk_topk`` learns (NSA's
    compressed branch, arXiv:2502.11089).

    q: [B, T, H, K]   k: [B, N, G, K]   v: [B, N, G, V], one of each chunk
    spans: as of ``chunk_topk``; a token that knows of none reads zeros, lse -inf
    scale: of the scores; None for 1 / sqrt(K)

    At no time more than the scores of ``tile`` tokens is held, in the backward neither. Accumulates in fp32.
    Raises ValueError if shapes, types or devices disagree, tile < 1, or the backend cannot run.
    """
    if tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    check_heads(q, k)
    _check_spans(q, spans)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {list(v.shape)} must be [B, N, G, V] with k {list(k.shape)}")
    check_sizes("v", v)
    check_tensors({"q": q, "k": k, "v": v})
    q, k, v = as_autocast(q, k, v)
    if choose("chunk_mean_attention", backend, *with_triton(q, too_large(q, k, v), k)) == "triton" and q.numel():
        from memlm_kernels.attention.triton import attend_triton

        if k.shape[1]:
            number = q.new_zeros(q.shape[:2], dtype=torch.int32)
            first, end = spans or (number, number + k.shape[1])
            first, end = (x.clamp(0, k.shape[1]) for x in (first, end))
            return Attended(*attend_triton(q, k, v, first, end, k.shape[1], scale))
    with torch.autocast(q.device.type, enabled=False):
        return Attended(*attend(Pooled(spans), [Keys(q, k, v)], scale, tile))


def _check_spans(q: Tensor, spans: tuple[Tensor, Tensor] | None) -> None:
    for x in spans or ():
        if x.shape != q.shape[:2]:
            raise ValueError(f"spans {list(x.shape)} must be integers [B, T] = {list(q.shape[:2])}")
    check_tensors({"q": q}, named("spans", spans or ()))


def _too_many(index: Tensor, num_chunks: int) -> str | None:
    """What Triton's radix sort does not take."""
    entries = index.shape[1] * index.shape[3]
    if max(entries, num_chunks) <= MOST:
        return None
    return f"its kernels take at most {MOST} chunks, and choices T J of a group, not {num_chunks} and {entries}"
