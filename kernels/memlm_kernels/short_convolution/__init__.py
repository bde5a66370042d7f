"""The short causal convolution in front of a memory, with SiLU and unit length per head.

Files:

    naive               the definition, token by token, and its gradients
    reference           sums over taps in PyTorch
    kernels, triton     Triton kernels, and the op around them
    backward_kernels    Triton kernels of the gradients
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.backend import pick
from memlm_kernels.checks import check_tensors, named, once_a_kind
from memlm_kernels.short_convolution.reference import parts_of, short_convolution_reference, unit_length

__all__ = ["ShortConvolutionOutput", "parts_of", "short_convolution", "unit_length"]


class ShortConvolutionOutput(NamedTuple):
    """o: the parts, [B, T, H, K] for heads of unit length, else [B, T, size]
    state: [B, W - 1, C], the last inputs, for the next call
    """

    o: tuple[Tensor, ...]
    state: Tensor


def short_convolution(
    x: Sequence[Tensor],
    weight: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    silu: bool = False,
    unit: int = 0,
    head_dim: int = 1,
    eps: float = 0.0,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
    state: Tensor | None = None,
    backend: str = "auto",
) -> ShortConvolutionOutput:
    """Causal depthwise convolution of C channels along each document: y_t = sum_j weight[:, W - 1 - j] x_{t - j}.
    Missing tokens before a document's first count as zero.

    x: tensors [B, T, *] whose channels, one tensor after the other, are the C channels
    weight: [C, W]; the last tap is the token itself
    sizes: channels of the parts to return; None: those of ``x``
    silu: SiLU follows
    unit: heads of the first ``unit`` parts, of ``head_dim`` channels each, get unit length: they are divided by
        sqrt(|y|^2 + eps)
    factor: of the first part, at last
    dtype: the type of the parts; unit length is then computed in fp32 (fp64 for fp64). None: the type of x
    lengths: [B], the number of real tokens of each row, which come first; None: all. It concerns the new state only
    positions: [B, T], positions of tokens in their documents; None: ``state`` is zero or of the same document, and
        none starts in this call
    state: [B, W - 1, C], the inputs before; None: x begins with them, and they get no output

    Sums are in fp32 in Triton, and in the type of x in the reference. Raises ValueError if shapes, types or devices
    disagree, or the backend cannot run.
    """
    sizes = [part.shape[-1] for part in x] if sizes is None else list(sizes)
    _check(x, weight, sizes, unit, head_dim, lengths, positions, state)
    limit = f"its kernels take 1 to 3 parts, not {len(sizes)}" if len(sizes) > 3 else None
    if unit and head_dim > 512:
        limit = f"its kernels take heads of up to 512 channels, not {head_dim}"
    chosen = pick("short_convolution", backend, x[0], limit, *x[1:], weight, positions, products=False)
    options = (sizes, silu, unit, head_dim, eps, factor, dtype, lengths, positions, state)
    if chosen == "reference" or x[0].shape[0] * x[0].shape[1] == 0:
        return ShortConvolutionOutput(*short_convolution_reference(x, weight, *options))
    from memlm_kernels.short_convolution.triton import short_convolution_triton

    return ShortConvolutionOutput(*short_convolution_triton(x, weight, *options))


@once_a_kind
def _check(
    x: Sequence[Tensor],
    weight: Tensor,
    sizes: list[int],
    unit: int,
    head_dim: int,
    lengths: Tensor | None,
    positions: Tensor | None,
    state: Tensor | None,
) -> None:
    rows, shapes = x[0].shape[:2], [list(part.shape) for part in x]
    if any(part.ndim != 3 or part.shape[:2] != rows for part in x):
        raise ValueError(f"x {shapes} must be tensors [B, T, *]")
    if state is None and (positions is not None or lengths is not None or rows[1] < weight.shape[-1] - 1):
        raise ValueError("without state, x begins with W - 1 tokens, and positions and lengths are None")
    channels = sum(part.shape[-1] for part in x)
    if weight.ndim != 2 or len(weight) != channels or 0 in weight.shape:
        raise ValueError(f"weight {list(weight.shape)} must be [C, W] with C={channels}, the channels of x {shapes}")
    if sum(sizes) != channels or min(sizes) < 1:
        raise ValueError(f"sizes={sizes} must be at least 1 and sum to the {channels} channels of x")
    if any(size % head_dim for size in sizes[:unit]):
        raise ValueError(f"sizes={sizes}: the first {unit} must be multiples of head_dim={head_dim}")
    expected = [rows[0], weight.shape[1] - 1, channels]
    if state is not None and list(state.shape) != expected:
        raise ValueError(f"state {list(state.shape)} must be [B, W - 1, C] = {expected}")
    if positions is not None and positions.shape != rows:
        raise ValueError(f"positions {list(positions.shape)} must be [B, T] = {list(rows)}")
    if lengths is not None and lengths.shape != rows[:1]:
        raise ValueError(f"lengths {list(lengths.shape)} must be [B] = {list(rows[:1])}")
    places = {"lengths": lengths, "positions": positions}
    check_tensors({**named("x", x), "weight": weight, "state": state}, places)
