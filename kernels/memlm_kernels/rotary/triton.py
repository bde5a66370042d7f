"""The rotation by a Triton kernel, as an op of torch. Its gradient is the rotation back."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.launch import cdiv, laid, no_products
from memlm_kernels.ops import kernel_op
from memlm_kernels.rotary.kernels import rotate
from memlm_kernels.segments import power_of_two

# Elements of a tile.
_TILE = 2048


@kernel_op("rotary")
def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = laid(q, k, cos, sin)
    turned_q, turned_k = torch.empty_like(q), torch.empty_like(k)
    count, half = q.shape[0] * q.shape[1], q.shape[3] // 2
    width = power_of_two(half)
    rotate(
        lambda tiles: cdiv(count, tiles["BT"]),
        {"BT": min(power_of_two(count), max(1, _TILE // width))},
        **{"q": q, "k": k, "cos": cos, "sin": sin, "turned_q": turned_q, "turned_k": turned_k},
        **{"N": count, "TC": cos.shape[0] * cos.shape[1], "HQ": q.shape[2], "HK": k.shape[2]},
        **{"HALF": half, "BACK": back, "BH": width},
    )
    return turned_q, turned_k


@forward.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q.contiguous()), torch.empty_like(k.contiguous())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


@outside_autocast
def _backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
    return *forward(d_q, d_k, *ctx.saved_tensors, not ctx.back), None, None, None


forward.register_autograd(_backward, setup_context=_setup)
register_flop_formula(torch.ops.memlm.rotary)(no_products)


def rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned: tuple[Tensor, Tensor] = forward(q, k, cos, sin, False)
    return turned
