"""Three ways to compute the product of rows with the matrix of their group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.segments import chunk_width, lay_out

_WIDTH = 64

Shape = tuple[int, ...]


def by_tile(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """A batched product of tiles of rows, each of one group; the overhead of a tile is a copy of its matrix."""
    cu_seqlens = F.pad(ends_of(sizes, x), (1, 0))[None]
    segments = lay_out(cu_seqlens, len(x), chunk_width(len(x), cu_seqlens, _WIDTH))
    assert segments.segment is not None
    tiles = segments.grid.lay(x[None])[0]
    return segments.grid.take((tiles @ weight[segments.segment[0]].mT)[None])[0]


def takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's product runs without reading the sizes back from the device."""
    if x.device.type != "cuda":
        return False
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return x.dtype == torch.bfloat16 and len(x) > 0 and aligned and hopper


def grouped_mm(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=ends_of(sizes, x).int())


def ends_of(sizes: Tensor, x: Tensor) -> Tensor:
    """[G], the end of each group's rows, at most that of x."""
    return sizes.long().clamp(min=0).cumsum(0).clamp(max=len(x))


# A custom operator, so that a compiler, or a tensor without data, needs no sizes.
@torch.library.custom_op("memlm::grouped_linear_by_group", mutates_args=())
def by_group(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """One product per group; reads the sizes, which costs nothing on a CPU."""
    y = x.new_empty(len(x), weight.shape[1])
    for rows, w, out in zip(*_split(sizes, x), weight, y.split(sizes.tolist()), strict=True):
        torch.mm(rows, w.mT, out=out)
    return y


@torch.library.custom_op("memlm::grouped_outer_by_group", mutates_args=())
def _outer_by_group(y: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    """[N, O], [N, D] -> [G, O, D]: y_g^T x_g of each group."""
    out = x.new_empty(len(sizes), y.shape[1], x.shape[1])
    for of_y, of_x, of_out in zip(*_split(sizes, y, x), out, strict=True):
        torch.mm(of_y.mT, of_x, out=of_out)
    return out


def _split(sizes: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [x.split(sizes.tolist()) for x in tensors]


@by_group.register_fake
def _(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


@_outer_by_group.register_fake
def _(y: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    return x.new_empty(len(sizes), y.shape[1], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@outside_autocast
def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, sizes = ctx.saved_tensors
    d_y = d_y.contiguous()
    return by_group(d_y, weight.mT.contiguous(), sizes), _outer_by_group(d_y, x, sizes), None


by_group.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.memlm.grouped_linear_by_group)
def _flops(x_shape: Shape, weight_shape: Shape, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.memlm.grouped_outer_by_group)
def _outer_flops(y_shape: Shape, x_shape: Shape, *_: Any, **__: Any) -> int:
    return 2 * y_shape[0] * y_shape[1] * x_shape[1]
