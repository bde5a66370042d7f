"""The norm by Triton kernels, as an op of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.launch import cdiv, laid, no_products
from memlm_kernels.ops import kernel_op
from memlm_kernels.rms_norm.kernels import normalise, normalise_backward
from memlm_kernels.segments import power_of_two

# Elements of a tile, which its threads hold in registers several times.
_TILE = 2048


def _sizes(x: Tensor, eps: float) -> tuple[dict[str, int], dict[str, Any]]:
    """The limits of tiles, and the sizes of the kernels."""
    count, width = x.numel() // x.shape[-1], power_of_two(x.shape[-1])
    limits = {"BN": min(power_of_two(count), max(1, _TILE // width)), "num_warps": max(4, width // 512)}
    return limits, {"N": count, "K": x.shape[-1], "EPS": eps, "BK": width}


@kernel_op("rms_norm")
def forward(
    x: Tensor, weight: Tensor, gate: Tensor | None, other: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    x, weight, gate, other = laid(x, weight, gate, other)
    y = torch.empty((x if gate is None else gate).shape, device=x.device, dtype=dtype)
    limits, sizes = _sizes(x, eps)
    given = {"x": x, "weight": weight, "gate": gate, "other": other, "y": y}
    normalise(lambda tiles: cdiv(sizes["N"], tiles["BN"]), limits, **given, **sizes)
    return y


@forward.register_fake
def _(x, weight, gate, other, eps, dtype):  # type: ignore[no-untyped-def]
    return torch.empty((x if gate is None else gate).shape, device=x.device, dtype=dtype)


@kernel_op("rms_norm_backward")
def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, other: Tensor | None, eps: float
) -> list[Tensor]:
    """Gradients of the tensors that are given."""
    d_y, x, weight, gate, other = laid(d_y, x, weight, gate, other)
    d_x, d_gate, d_other = (None if part is None else torch.empty_like(part) for part in (x, gate, other))
    limits, sizes = _sizes(x, eps)
    # As few sums for weight as leave enough programs.
    span = limits["BN"] * max(1, min(64, sizes["N"] // (limits["BN"] * 1024)))
    sums = weight.new_empty(cdiv(sizes["N"], span), len(weight), dtype=torch.float32)
    normalise_backward(
        lambda tiles: len(sums),
        limits,
        **{"d_y": d_y, "x": x, "weight": weight, "gate": gate, "other": other},
        **{"d_x": d_x, "d_weight": sums, "d_gate": d_gate, "d_other": d_other, "SPAN": span},
        **sizes,
    )
    found = (d_x, sums.sum(0).to(weight.dtype), d_gate, d_other)
    return [d for d in found if d is not None]


@backward.register_fake
def _(d_y, x, weight, gate, other, eps):  # type: ignore[no-untyped-def]
    return [
        torch.empty(part.shape, device=x.device, dtype=part.dtype)
        for part in (x, weight, gate, other)
        if part is not None
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


@outside_autocast
def _backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
    found = backward(d_y, *ctx.saved_tensors, ctx.eps)
    return *found, *[None] * (6 - len(found))


forward.register_autograd(_backward, setup_context=_setup)
_OPS = torch.ops.memlm
register_flop_formula([_OPS.rms_norm, _OPS.rms_norm_backward])(no_products)
rms_norm_triton = forward
