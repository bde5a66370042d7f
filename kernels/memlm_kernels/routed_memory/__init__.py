"""Mixtures of memories (MoM, arXiv:2502.13685): send tokens to the memories that a router chose, and sum their reads.

    routes = MemoryRoutes.of(memory, num_memories)
    k, v = (dispatch_tokens(x, routes.place) for x in (k, v))
    o, state = linear_attention(..., cu_seqlens=routes.cu_seqlens)
    y = combine_reads(o, routes.place, weight)

No single op does all of this, because each memory has its own projections and convolution between these steps.

Files:

    naive               a mixture, one memory at a time, and the derivation of the routed form
    routes              the places of tokens in the order of memories
    reference           the copies and sums in PyTorch
    kernels, triton     Triton kernels, and the ops around them
"""

import torch
from torch import Tensor

from memlm_kernels.backend import MOST, pick
from memlm_kernels.checks import check_range, check_tensors, number, readable
from memlm_kernels.routed_memory.reference import combine_reads_reference, dispatch_tokens_reference
from memlm_kernels.routed_memory.routes import MemoryRoutes

__all__ = ["MemoryRoutes", "combine_reads", "dispatch_tokens"]


def dispatch_tokens(x: Tensor, place: Tensor, *, backend: str = "auto") -> Tensor:
    """Copy each token to its J places: y[b, place[b, t, j]] = x[b, t].

    x: [B, T, ...]   place: [B, T, J] int64; each row holds the numbers from 0 to T * J - 1, each once

    Returns [B, T * J, ...] in x's dtype. The gradient of a token is the sum of its J rows, in order of j. On a GPU the
    places are not checked: a token sent out of range is lost, and a row without a token holds arbitrary values. Raises
    ValueError if shapes, types or devices disagree, place holds other numbers, or the backend cannot run.
    """
    _check("x", x, place, routed=False)
    check_tensors({"x": x}, {"place": place})
    rows = place.shape[1] * place.shape[2]
    limit = f"its kernels take at most {MOST} rows, not {rows}" if rows > MOST else None
    chosen = pick("dispatch_tokens", backend, x, limit, place, products=False)
    _check_places(place)
    if chosen == "reference" or x.numel() * place.numel() == 0:
        return dispatch_tokens_reference(x, place)
    from memlm_kernels.routed_memory.triton import dispatch_tokens_triton

    return dispatch_tokens_triton(x, place)


def combine_reads(
    o: Tensor, place: Tensor, weight: Tensor, shared: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """The weighted sum of the reads of a token's memories (MoM, arXiv:2502.13685, eqs. 3-8)::

        y[b, t] = shared[b, t] + sum_j weight[b, t, j] o[b, place[b, t, j]]

    o: [B, T * J, ...], reads in the order of ``dispatch_tokens``   place: [B, T, J], as there   weight: [B, T, J]
    shared: [B, T, ...], a read that is added with weight 1; None: none

    Returns [B, T, ...] in o's dtype, summed in fp32 (fp64 for fp64). A place out of range, which is not checked on a
    GPU, counts as a read of 0. Raises ValueError if shapes, types or devices disagree, place holds other numbers, or
    the backend cannot run.
    """
    _check("o", o, place, routed=True)
    if weight.shape != place.shape:
        raise ValueError(f"weight {list(weight.shape)} must be [B, T, J] = {list(place.shape)}")
    expected = (*place.shape[:2], *o.shape[2:])
    if shared is not None and shared.shape != expected:
        raise ValueError(f"shared {list(shared.shape)} must be [B, T, ...] = {list(expected)}")
    check_tensors({"o": o, "weight": weight, "shared": shared}, {"place": place})
    chosen = pick("combine_reads", backend, o, None, place, products=False)
    _check_places(place)
    if chosen == "reference" or o.numel() == 0:
        return combine_reads_reference(o, place, weight, shared)
    from memlm_kernels.routed_memory.triton import combine_reads_triton

    return combine_reads_triton(o, place, weight, shared)


def _check_places(place: Tensor) -> None:
    """Raise ValueError unless each row has each number once. Checked if ``readable``."""
    if readable(place):
        size = place.shape[1] * place.shape[2]
        check_range("place", place, 0, size)
        found = torch.zeros(len(place), size, dtype=torch.bool).scatter(1, place.flatten(1), True)
        if not number(found.all()):
            raise ValueError(f"place has numbers more than once in a row; give each from 0 to {size - 1} once")


def _check(name: str, x: Tensor, place: Tensor, *, routed: bool) -> None:
    if place.ndim != 3 or place.dtype != torch.int64:
        raise ValueError(f"place {list(place.shape)} of {place.dtype} must be [B, T, J] of int64")
    batch, length, choices = place.shape
    expected = (batch, length * choices if routed else length)
    if x.shape[:2] != expected:
        raise ValueError(
            f"{name} {list(x.shape)} must be [B, {'T * J' if routed else 'T'}, ...] = {list(expected)}, "
            f"because place is {list(place.shape)}"
        )
