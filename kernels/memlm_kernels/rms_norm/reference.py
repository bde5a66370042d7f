"""The norm in PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import in_one_type
from memlm_kernels.segments import exact


def rms_norm_reference(
    x: Tensor, weight: Tensor, gate: Tensor | None, other: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    n = norm(x, weight, eps)
    if gate is None:
        return n.to(dtype)
    # A view of the same shape is a dispatched operation too.
    n = n if n.shape == gate.shape else n.reshape(gate.shape)
    if other is None:
        return (n * F.silu(gate)).to(dtype)
    other = other if other.shape == gate.shape else other.reshape(gate.shape)
    other, n, share = in_one_type(other, n, torch.sigmoid(gate))
    return torch.lerp(other, n, share).to(dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In the type of x."""
    if x.is_cpu and torch.is_grad_enabled():
        # torch has a fused kernel only for GPUs.
        return _Norm.apply(exact(x), exact(weight), eps).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, with its own backward: autograd's takes about 20
    passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        product = d_y * unit
        d_weight = product.sum(list(range(x.ndim - 1)))
        along = product.mul_(weight).mean(-1, keepdim=True)
        d_x = torch.addcmul(d_y * weight, unit, along, value=-1).mul_(scale)
        return d_x, d_weight, None
