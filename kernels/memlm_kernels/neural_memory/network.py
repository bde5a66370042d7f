"""The memory's network: an MLP without biases, optionally with a residual and a norm, x + LayerNorm(MLP(x)).

G rows and heads, J tokens of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Large: decay shrinks a function that its norm scales up again, and with less of a floor the gradient through
# thousands of writes explodes. So a memory that has decayed says nothing.
EPS = 0.1

InnerLoss = Callable[[Tensor, Tensor], Tensor]
Function = Callable[[Tensor], Tensor]


class Activation(NamedTuple):
    """A function, its backward pass (d, x) -> d f'(x), and its second derivative."""

    value: Function
    pull_back: Callable[[Tensor, Tensor], Tensor]
    curvature: Function


def _gelu_curvature(x: Tensor) -> Tensor:
    square = x * x
    return (square * -0.5).exp_().mul_((2 * torch.pi) ** -0.5).mul_(2 - square)


def _silu_curvature(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


# torch's own backward functions are single passes.
ACTIVATIONS = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward, _gelu_curvature),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward, _silu_curvature),
}


class Normalised(NamedTuple):
    """y = (f - mean) * scale, scale = 1 / deviation, over the last dimension; torch's own passes."""

    f: Tensor
    y: Tensor
    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(f: Tensor) -> "Normalised":
        return Normalised(f, *torch.ops.aten.native_layer_norm(f, f.shape[-1:], None, None, EPS))

    def pull_back(self, d_y: Tensor) -> Tensor:
        """d_f = scale (d_y - mean(d_y) - y mean(y d_y)); as a map of d_y it is symmetric."""
        width, which = self.f.shape[-1:], [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(
            d_y.contiguous(), self.f, width, self.mean, self.scale, None, None, which
        )[0]


class Tail(NamedTuple):
    """x + LayerNorm(f): gain and bias, each [G, 1, V] beside [..., G, J, V]."""

    gain: Tensor
    bias: Tensor

    def read(self, x: Tensor, f: Tensor) -> Tensor:
        return x + Normalised.of(f).y * self.gain + self.bias


def output_error(loss: InnerLoss, f: Tensor, k: Tensor, v: Tensor, tail: Tail | None) -> Tensor:
    """Gradient of the inner loss with respect to the MLP's output f = MLP(k), [G, J, V]."""
    if tail is None:
        return loss(f, v)
    norm = Normalised.of(f)
    return norm.pull_back(loss(torch.addcmul(k + tail.bias, norm.y, tail.gain), v) * tail.gain)
