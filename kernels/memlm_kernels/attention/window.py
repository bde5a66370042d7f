"""Causal attention to a window, and to a prefix that every token sees."""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.attention.window_reference import plain, read_blocks, sdpa
from memlm_kernels.backend import as_autocast, asks_for, choose, with_triton
from memlm_kernels.checks import (
    asks_gradient,
    check_range,
    check_sizes,
    check_tensors,
    in_one_type,
    named,
    readable,
)


class WindowAttended(NamedTuple):
    """o: [B, T, H, V]; lse: [B, T, H], the log of the sum of exponentials of the scores, at least in fp32, or None if
    it was not requested.
    """

    o: Tensor
    lse: Tensor | None


def prefix_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    prefix: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
    with_lse: bool = False,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> WindowAttended:
    """softmax(scale q k^T) v of each token over a window of the last keys and a prefix, in one softmax: persistent
    tokens before a window (Titans, arXiv:2501.00663, sections 3.3 and 4).

    The tokens of the call are the last T keys. H / G heads of queries share one head of keys.

    q: [B, T, H, K]   k: [B, L, G, K]   v: [B, L, G, V]
    window: the number of last keys that a token sees, itself included; None: all
    prefix: queries [B, T, H, K], keys [1 or B, P, G, K] and values [1 or B, P, G, V]; every token sees all P keys
    scale: factor of the scores; None for 1 / sqrt(K)
    positions: integers [B, T], the number of keys before each token in its document: a token sees these and itself
        (None: all keys before it)

    Backends: ``sdpa``, torch's own attention in blocks of queries, which has no lse; ``reference``, plain products in
    blocks; ``triton``. Work and memory grow with T * window, without a window with T * L. Accumulates in fp32. Raises
    ValueError if shapes, types or devices disagree, window < 1, or the backend cannot run. ``naive`` derives the tiled
    form.
    """
    _check(q, k, v, window, positions, prefix)
    q, k, v, *rest = as_autocast(q, k, v, *(prefix or ()))
    given = q.dtype
    q, k, v, *rest = in_one_type(q, k, v, *rest)
    prefix = (rest[0], rest[1], rest[2]) if prefix else None
    # torch's own kernels of plain causal attention are the fastest, and need no trial of ours.
    whole = prefix is None and positions is None and (window is None or window >= k.shape[1])
    whole = whole and not with_lse and q.shape[1] in (1, k.shape[1])
    asked = "sdpa" if whole and backend == "auto" and not asks_for("triton", backend) else backend
    available, refused = with_triton("prefix_window_attention", asked, q, too_large(q, k, v), v, *rest)
    if with_lse:
        refused = {**refused, "sdpa": "it gives no lse"}
    else:
        at = 0 if whole else available.index("reference")
        available = (*available[:at], "sdpa", *available[at:])
    backend = choose("prefix_window_attention", backend, available, refused)
    check_positions(q, positions)
    if backend == "triton" and q.numel():
        from memlm_kernels.attention.triton import attend_triton

        spans = kernel_spans(q, k, window, positions, asks_gradient(q, k, v, *(prefix or ())))
        o, lse = attend_triton(q, k, v, *spans, window or k.shape[1], scale, prefix=prefix)
        return WindowAttended(o.to(given), lse)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    read = read_blocks(q, k, v, window, from_zero(positions), prefix, scale, sdpa if backend == "sdpa" else plain)
    return WindowAttended(read[0].to(given), read[1])


def window_spans(q: Tensor, k: Tensor, window: int | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first key that each token sees, and the end of its keys, [B, T] each; the tokens are the last keys."""
    batch, length, past = len(q), q.shape[1], k.shape[1] - q.shape[1]
    here = torch.arange(past, past + length, device=q.device).expand(batch, -1)
    back = here if positions is None else torch.minimum(here, positions)
    back = back if window is None else back.clamp(max=window - 1)
    return here - back, here + 1


def too_large(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """The reason why Triton's kernels of attention do not take a call, None if they take it."""
    if max(q.shape[3], v.shape[3]) > 256:
        return f"its kernels take heads of at most 256, not K={q.shape[3]} and V={v.shape[3]}"
    if q.shape[2] > 32 * k.shape[2]:
        return f"its kernels take at most 32 heads that share keys, not {q.shape[2]} of {k.shape[2]}"
    return None


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless q is [B, T, H, K] and k [B, any, G, K], with heads and channels, H a multiple of G."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must be [B, T, H, K] and [B, any, G, K]")
    check_sizes("q", q)
    check_sizes("k", k)
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} heads of k")


def kernel_spans(
    q: Tensor, k: Tensor, window: int | None, positions: Tensor | None, learns: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``window_spans``, or what the kernels find them from where no gradient follows."""
    return window_spans(q, k, window, from_zero(positions)) if learns else (positions, None)


def check_positions(q: Tensor, positions: Tensor | None) -> None:
    """Raise ValueError unless positions are integers [B, T], and, if ``readable``, at least 0."""
    if positions is None:
        return
    if positions.shape != q.shape[:2]:
        raise ValueError(f"positions {list(positions.shape)} must be integers [B, T] = {list(q.shape[:2])}")
    check_tensors({"q": q}, {"positions": positions})
    check_range("positions", positions, 0, None)


def from_zero(positions: Tensor | None) -> Tensor | None:
    """positions, those below 0 as 0; a CPU has checked them."""
    return positions if positions is None or readable(positions) else positions.clamp(min=0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    positions: Tensor | None,
    prefix: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    check_heads(q, k)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or q.shape[1] > k.shape[1]:
        raise ValueError(f"v {list(v.shape)} must be [B, L, G, V] with k {list(k.shape)}, L at least T={q.shape[1]}")
    if prefix is not None:
        own_q, own_k, own_v = (x.shape for x in prefix)
        rows, fits = own_k[0] in (1, len(q)), own_k[2:] == k.shape[2:] and own_v[3:] == v.shape[3:]
        if own_q != q.shape or len(own_k) != 4 or own_v[:3] != own_k[:3] or not rows or not fits:
            raise ValueError(
                f"queries {list(own_q)}, keys {list(own_k)} and values {list(own_v)} of the prefix must be "
                f"[B, T, H, K], [1 or B, P, G, K] and [1 or B, P, G, V] with q {list(q.shape)} and v {list(v.shape)}"
            )
    check_sizes("v", v)
    tensors = {"q": q, "k": k, "v": v}
    check_tensors(tensors if prefix is None else tensors | named("prefix", prefix))
