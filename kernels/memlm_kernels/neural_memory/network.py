"""The memory's network: an MLP without biases, optionally with a residual and a norm, x + LayerNorm(MLP(x)).

G rows and heads, J tokens of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6

InnerLoss = Callable[[Tensor, Tensor], Tensor]
Function = Callable[[Tensor], Tensor]


class Activation(NamedTuple):
    """A function with its first and second derivative."""

    value: Function
    slope: Function
    curvature: Function


def _gelu_curvature(x: Tensor) -> Tensor:
    square = x * x
    return (square * -0.5).exp_().mul_((2 * torch.pi) ** -0.5).mul_(2 - square)


def _silu_curvature(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


# torch's own backward functions are single passes.
ACTIVATIONS = {
    "gelu": Activation(F.gelu, lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x), _gelu_curvature),
    "silu": Activation(F.silu, lambda x: torch.ops.aten.silu_backward(torch.ones_like(x), x), _silu_curvature),
}


class Tail(NamedTuple):
    """x + LayerNorm(f): gain and bias, each [G, 1, V] beside [..., G, J, V]."""

    gain: Tensor
    bias: Tensor

    def read(self, x: Tensor, f: Tensor) -> Tensor:
        return x + _normalised(f)[0] * self.gain + self.bias


def output_error(loss: InnerLoss, f: Tensor, k: Tensor, v: Tensor, tail: Tail | None) -> Tensor:
    """Gradient of the inner loss with respect to the MLP's output f = MLP(k), [G, J, V]."""
    if tail is None:
        return loss(f, v)
    y, scale = _normalised(f)
    error = loss(k + y * tail.gain + tail.bias, v) * tail.gain
    return scale * (error - error.mean(-1, keepdim=True) - y * (error * y).mean(-1, keepdim=True))


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean) / deviation over the last dimension, and 1 / deviation."""
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + _EPS)
    return (x - mean) * scale, scale
