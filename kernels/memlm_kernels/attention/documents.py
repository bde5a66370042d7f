"""Attention to a span of keys, and to the pooled keys of the documents that each token chose."""

import torch
from torch import Tensor

from memlm_kernels.attention.window import check_heads, too_large, window_spans
from memlm_kernels.attention.window_reference import plain, read_documents, sdpa
from memlm_kernels.backend import as_autocast, choose, with_triton
from memlm_kernels.checks import check_sizes, check_tensors, in_one_type, named


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    document: Tensor,
    chosen: Tensor,
    *,
    spans: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T) v of each token over a span of keys, and over the pooled keys of the documents that it
    chose, in one softmax (Memory Sparse Attention, arXiv:2603.23516).

    The tokens of the call are the last T keys. H / G heads of queries share one head of keys.

    q: [B, T, H, K]   k: [B, L, G, K]   v: [B, L, G, V]
    pooled_k: [1 or B, C, G, K]   pooled_v: [1 or B, C, G, V], keys and values of the documents' chunks
    document: [1 or B, C] integers, the document of each chunk; negative: none
    chosen: [B, T, D] integers, the documents of each token, as ``route_documents`` returns them; negative: none
    spans: first and end, integers [B, T]: a token sees keys first to end - 1, within 0 to L - 1, and at least one
        (None: all keys up to itself)
    scale: factor of the scores; None for 1 / sqrt(K)

    Returns o: [B, T, H, V].

    Backends: ``sdpa``, torch's own attention in blocks of queries; ``reference``, plain products in blocks;
    ``triton``, which skips tiles of chunks that no token of a tile chose. Accumulates in fp32. Raises ValueError if
    shapes, types or devices disagree, or the backend cannot run. ``naive`` derives the tiled form.
    """
    _check(q, k, v, pooled_k, pooled_v, document, chosen, spans)
    q, k, v, pooled_k, pooled_v = as_autocast(q, k, v, pooled_k, pooled_v)
    given = q.dtype
    q, k, v, pooled_k, pooled_v = in_one_type(q, k, v, pooled_k, pooled_v)
    available, refused = with_triton("document_attention", backend, q, too_large(q, k, v), v, pooled_k)
    at = available.index("reference")
    by = choose("document_attention", backend, (*available[:at], "sdpa", *available[at:]), refused)
    first, end = spans or window_spans(q, k, None, None)
    if by == "triton" and q.numel():
        from memlm_kernels.attention.triton import attend_triton

        some = document.shape[1] > 0 and chosen.shape[2] > 0
        prefix, documents = ((None, pooled_k, pooled_v), (document, chosen)) if some else (None, None)
        span = first.clamp(min=0), end.clamp(max=k.shape[1])
        return attend_triton(q, k, v, *span, k.shape[1], scale, prefix=prefix, documents=documents)[0].to(given)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    attend = sdpa if by == "sdpa" else plain
    with torch.autocast(q.device.type, enabled=False):
        return read_documents(q, k, v, pooled_k, pooled_v, document, chosen, (first, end), scale, attend).to(given)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    document: Tensor,
    chosen: Tensor,
    spans: tuple[Tensor, Tensor] | None,
) -> None:
    check_heads(q, k)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or q.shape[1] > k.shape[1]:
        raise ValueError(f"v {list(v.shape)} must be [B, L, G, V] with k {list(k.shape)}, L at least T={q.shape[1]}")
    rows, size = pooled_k.shape[0], pooled_k.shape[:2]
    fits = pooled_k.shape == (*size, *k.shape[2:]) and pooled_v.shape == (*size, *v.shape[2:])
    if not fits or rows not in (1, len(q)) or document.shape != size:
        raise ValueError(
            f"pooled_k {list(pooled_k.shape)}, pooled_v {list(pooled_v.shape)} and document {list(document.shape)} "
            f"must be [1 or B, C, G, K], [1 or B, C, G, V] and [1 or B, C], as k {list(k.shape)} and v {list(v.shape)}"
        )
    if chosen.ndim != 3 or chosen.shape[:2] != q.shape[:2]:
        raise ValueError(f"chosen {list(chosen.shape)} must be integers [B, T, D], {list(q.shape[:2])} and any")
    check_sizes("v", v)
    floats = {"q": q, "k": k, "v": v, "pooled_k": pooled_k, "pooled_v": pooled_v}
    check_tensors(floats, {"document": document, "chosen": chosen, **named("spans", spans or ())})
    for i, x in enumerate(spans or ()):
        if x.shape != q.shape[:2]:
            raise ValueError(f"spans[{i}] {list(x.shape)} must be integers [B, T] = {list(q.shape[:2])}")
