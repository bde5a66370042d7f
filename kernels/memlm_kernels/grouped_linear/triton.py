"""The product of rows with the matrix of their group by Triton kernels, as an op of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.grouped_linear.kernels import rows_forward, weights_backward
from memlm_kernels.grouped_linear.reference import ends_of
from memlm_kernels.launch import at_least_16, cdiv, laid, precision, spans
from memlm_kernels.ops import kernel_op

Shape = tuple[int, ...]


@kernel_op("grouped_linear")
def product(x: Tensor, weight: Tensor, sizes: Tensor, back: bool) -> Tensor:
    """x [N, D] -> [N, O] by matrices [G, O, D]; with ``back`` [N, O] -> [N, D]. Rows of no group give zeros."""
    x, weight = laid(x, weight)
    given, wide = _widths(weight, back)
    y, ends = x.new_zeros(len(x), wide), ends_of(sizes, x)
    rows = min(64, at_least_16(len(x)))
    count, tiles, _ = spans(torch.cat([ends.new_zeros(1), ends])[None], len(x), rows)
    assert tiles is not None
    groups = torch.searchsorted(ends, tiles[0, :, 0].contiguous(), right=True).clamp(max=len(weight) - 1)
    rows_forward(
        lambda choice: count * cdiv(wide, choice["BY"]),
        {"BX": at_least_16(given), "BY": at_least_16(wide)},
        **{"x": x, "weight": weight, "tiles": tiles, "groups": groups, "y": y, "X": given, "Y": wide, "BN": rows},
        **({"OF_X": wide, "OF_Y": 1} if back else {"OF_X": 1, "OF_Y": given}),
        **{"PRECISION": precision(x)},
    )
    return y


@product.register_fake
def _(x: Tensor, weight: Tensor, sizes: Tensor, back: bool) -> Tensor:
    return x.new_empty(len(x), _widths(weight, back)[1])


def _widths(weight: Tensor, back: bool) -> tuple[int, int]:
    """The channels before and after."""
    return (weight.shape[1], weight.shape[2]) if back else (weight.shape[2], weight.shape[1])


@kernel_op("grouped_linear_weights")
def weights_gradient(d_y: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    """[N, O], [N, D] -> [G, O, D], zeros for a group without rows."""
    d_y, x = laid(d_y, x)
    groups, wide, given = len(sizes), d_y.shape[1], x.shape[1]
    d_weight = x.new_empty(groups, wide, given)
    weights_backward(
        lambda choice: groups * cdiv(wide, choice["BY"]) * cdiv(given, choice["BX"]),
        {"BX": at_least_16(given), "BY": at_least_16(wide), "BN": at_least_16(len(x))},
        **{"d_y": d_y, "x": x, "ends": ends_of(sizes, x), "d_weight": d_weight, "X": given, "Y": wide},
        **{"PRECISION": precision(x)},
    )
    return d_weight


@weights_gradient.register_fake
def _(d_y: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    return x.new_empty(len(sizes), d_y.shape[1], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


@outside_autocast
def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, sizes = ctx.saved_tensors
    return product(d_y, weight, sizes, True), weights_gradient(d_y, x, sizes), None, None


product.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.memlm.grouped_linear)
def _flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.memlm.grouped_linear_weights)
def _weights_flops(d_y: Shape, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * d_y[0] * d_y[1] * x[1]


def grouped_linear_triton(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return product(x, weight, sizes, False)
