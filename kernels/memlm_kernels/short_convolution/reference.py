"""The convolution as sums over taps, each a shifted view of the inputs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.grid import keep_last
from memlm_kernels.segments import exact

# Elements of the output that a CPU works on at once: 1 MB, which fits its cache.
_AT_ONCE = 2**18


def short_convolution_reference(
    x: Sequence[Tensor],
    weight: Tensor,
    sizes: Sequence[int],
    silu: bool,
    unit: int,
    head_dim: int,
    eps: float,
    factor: float,
    dtype: torch.dtype | None,
    lengths: Tensor | None,
    positions: Tensor | None,
    state: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The parts, and the last inputs."""
    joined = x[0] if len(x) == 1 else torch.cat(list(x), -1)
    past = joined if state is None else torch.cat([state.to(joined.dtype), joined], 1)
    y = convolve(past, weight, positions, silu)
    kept = keep_last(past, weight.shape[1] - 1, joined.shape[1], lengths)
    return parts_of(y, sizes, unit, head_dim, eps, factor, dtype), kept


def parts_of(
    y: Tensor,
    sizes: Sequence[int],
    unit: int = 0,
    head_dim: int = 1,
    eps: float = 0.0,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """y [B, T, C] in parts, as ``short_convolution`` returns them."""
    y = y if dtype is None else exact(y)
    # Not Tensor.split, which takes twice as long for a token.
    if unit == 0:
        parts = [*y.split_with_sizes(sizes, -1)]
    else:
        leading = sum(sizes[:unit])
        units, *rest = y.split_with_sizes([leading, *sizes[unit:]], -1)
        heads = units.unflatten(-1, (-1, head_dim))
        if eps:
            heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + eps)
        else:
            heads = unit_length(heads)
        parts = [*heads.split_with_sizes([size // head_dim for size in sizes[:unit]], -2), *rest]
    if factor != 1:
        parts[0] = parts[0] * factor
    return tuple(part if dtype in (None, part.dtype) else part.to(dtype) for part in parts)


def convolve(past: Tensor, weight: Tensor, positions: Tensor | None, silu: bool) -> Tensor:
    """y [B, T, C] of the last T tokens of past [B, W - 1 + T, C]."""
    taps, width = weight.t(), weight.shape[1]
    if past.shape[1] != width:
        # Contiguous taps: strided ones would be several times slower.
        return _Taps.apply(past, taps.contiguous(), positions, silu)
    # A single token.
    if positions is not None:
        back = torch.arange(width - 1, -1, -1, device=past.device)
        past = past * (positions >= back)[..., None]
    y = (past * taps).sum(1, keepdim=True)
    return (F.silu(y) if silu else y).to(past.dtype)


class _Taps(torch.autograd.Function):
    """y[:, t] = sum over ``back`` of past[:, W - 1 + t - back] * weight[:, W - 1 - back] within a document, then SiLU
    if asked.

    Gradients are summed in place: autograd would make two tensors as large as the input for each tap. The backward
    recomputes the input of SiLU.
    """

    @staticmethod
    def forward(ctx: Any, past: Tensor, taps: Tensor, positions: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(past, taps, positions)
        ctx.silu = silu
        batch, total, channels = past.shape
        out = past.new_empty(batch, total - len(taps) + 1, channels)
        of_taps = taps.unbind()
        for y, x, places in _Taps.pieces(out, past, positions):
            _Taps.convolve(_windows(x, len(of_taps)), of_taps, places, y)
            if silu:
                F.silu(y, inplace=True)
        return out

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        past, taps, positions = ctx.saved_tensors
        d_past, sums, width = torch.zeros_like(past), [], len(taps)
        of_taps = taps.unbind()
        for d_y, x, places, d_x in _Taps.pieces(d_out, past, positions, d_past):
            seen = _windows(x, width)
            d_seen = _windows(d_x, width)
            product = torch.empty_like(d_y, memory_format=torch.contiguous_format)
            if ctx.silu:
                _Taps.convolve(seen, of_taps, places, product)
                d_y = torch.ops.aten.silu_backward(d_y, product)
            for tap in range(width):
                of_tap = _within(d_y, places, width - 1 - tap)
                d_seen[tap].addcmul_(of_tap, of_taps[tap])
                sums.append(torch.mul(of_tap, seen[tap], out=product).sum((0, 1)))
        d_taps = torch.stack(sums)
        if len(sums) > width:
            d_taps = d_taps.unflatten(0, (-1, width)).sum(0)
        return d_past, d_taps, None, None

    @staticmethod
    def pieces(y: Tensor, past: Tensor, positions: Tensor | None, *more: Tensor) -> Iterator[Any]:
        """Parts of y [B, T, C], each with the inputs that its tokens see."""
        length, spare = y.shape[1], past.shape[1] - y.shape[1]
        of_token = y.shape[0] * y.shape[2]
        # Compiled code has one piece, so that it serves every length.
        if y.device.type != "cpu" or torch.compiler.is_compiling() or length * of_token <= _AT_ONCE:
            yield y, past, positions, *more
            return
        size = max(1, _AT_ONCE // of_token)
        for start in range(0, length, size):
            of_y, of_past = slice(start, start + size), slice(start, min(start + size, length) + spare)
            places = None if positions is None else positions[:, of_y]
            yield y[:, of_y], past[:, of_past], places, *(x[:, of_past] for x in more)

    @staticmethod
    def convolve(seen: list[Tensor], taps: tuple[Tensor, ...], positions: Tensor | None, out: Tensor) -> None:
        torch.mul(seen[-1], taps[-1], out=out)
        for back in range(1, len(taps)):
            out.addcmul_(_within(seen[-1 - back], positions, back), taps[-1 - back])


def _windows(past: Tensor, width: int) -> list[Tensor]:
    """Views [B, T, C]: the input of each tap; the last tap is the token itself."""
    length = past.shape[1] - width + 1
    return [past.narrow(1, tap, length) for tap in range(width)]


def _within(x: Tensor, positions: Tensor | None, back: int) -> Tensor:
    """x [B, T, C], with zeros where a document has no token ``back`` places earlier."""
    return x if positions is None or not back else x * (positions >= back)[..., None]


class _Unit(torch.autograd.Function):
    """x / |x| with its own backward: autograd's takes about ten passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_unit: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = torch.linalg.vecdot(d_unit, unit)[..., None]
        return torch.addcmul(d_unit, unit, along, value=-1).div_(length)


def unit_length(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, as ``F.normalize``."""
    return _Unit.apply(x)
