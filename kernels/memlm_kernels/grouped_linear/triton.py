"""The product of rows with the matrix of their group by Triton kernels, as an op of torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.grouped_linear.kernels import maps_forward, rows_forward, weights_backward
from memlm_kernels.grouped_linear.reference import ends_of
from memlm_kernels.launch import at_least_16, cdiv, laid, precision, spans
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import exact_type

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


# Rows of a tile: a product's least.
_ROWS = 16


@kernel_op("linears")
def linears_triton(
    x: Tensor, weights: list[Tensor], biases: Sequence[Tensor | None], wide: Sequence[bool]
) -> list[Tensor]:
    """x: [N, D]; weights: up to four [O, D] in the type of x; biases: [O] or None; wide: whether y is in fp32."""
    (x, *matrices), of_maps = laid(x, *weights), laid(*biases)
    outputs = _mapped(x, weights, wide)
    absent = [None] * (4 - len(weights))
    widths = [len(w) for w in weights] + [0] * len(absent)
    given = {"weight": [*matrices, *absent], "bias": [*of_maps, *absent], "y": [*outputs, *absent], "O": widths}
    tiles = cdiv(len(x), _ROWS)
    maps_forward(
        lambda choice: tiles * sum(cdiv(wide, choice["BO"]) for wide in widths),
        {"BD": at_least_16(x.shape[1])},
        x=x,
        **{f"{name}{i}": part for name, parts in given.items() for i, part in enumerate(parts)},
        **{"N": len(x), "D": x.shape[1], "BN": _ROWS, "PRECISION": "ieee" if any(wide) else precision(x)},
    )
    return outputs


@linears_triton.register_fake
def _(x: Tensor, weights: list[Tensor], biases: Sequence[Tensor | None], wide: Sequence[bool]) -> list[Tensor]:
    return _mapped(x, weights, wide)


def _mapped(x: Tensor, weights: list[Tensor], wide: Sequence[bool]) -> list[Tensor]:
    types = [exact_type(x) if is_wide else x.dtype for is_wide in wide]
    return [x.new_empty(len(x), len(w), dtype=dtype) for w, dtype in zip(weights, types, strict=True)]


def _linears_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, _ = inputs
    ctx.types = [None if b is None else b.dtype for b in biases]
    ctx.save_for_backward(x, *weights)


@outside_autocast
def _linears_backward(ctx: Any, d_y: list[Tensor]) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    rounded = [d.to(x.dtype) for d in d_y]
    d_x = torch.stack([d @ w for d, w in zip(rounded, weights, strict=True)]).sum(0)
    d_biases = [None if dtype is None else d.sum(0).to(dtype) for d, dtype in zip(d_y, ctx.types, strict=True)]
    return d_x, [d.mT @ x for d in rounded], d_biases, None


linears_triton.register_autograd(_linears_backward, setup_context=_linears_setup)


@register_flop_formula(torch.ops.memlm.linears)
def _linears_flops(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * sum(w[0] for w in weights)


def grouped_linear_triton(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return product(x, weight, sizes, False)
