"""The memory's network: an MLP without biases, optionally with a residual and a norm, x + LayerNorm(MLP(x)).

G rows and heads, J tokens of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.neural_memory.losses import InnerLoss, squared_error

# Large: decay shrinks the MLP's output, and the norm scales it up again. With a smaller floor, the gradient through
# thousands of writes explodes. With this one, a memory that has decayed adds nothing to x.
EPS = 0.1

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


def _silu_pull_back(d: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(d, x)
    # torch's own backward function has no derivative.
    s = torch.sigmoid(x)
    return d * s * (1 + x * (1 - s))


# torch's own backward functions are single passes.
ACTIVATIONS = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward, _gelu_curvature),
    "silu": Activation(F.silu, _silu_pull_back, _silu_curvature),
}


class Tail(NamedTuple):
    """x + LayerNorm(f): gain and bias, each [G, 1, V] beside [..., G, J, V]."""

    gain: Tensor
    bias: Tensor

    def read(self, x: Tensor, f: Tensor) -> Tensor:
        return torch.addcmul(x + self.bias, F.layer_norm(f, f.shape[-1:], eps=EPS), self.gain)


class OutputError(NamedTuple):
    """The error of the MLP's output f = MLP(k), [..., J, V], under the inner loss.

    error: gradient of the loss with respect to f
    r: the prediction M(k); loss: the gradient with respect to r; None without a tail, where r is f
    y, mean, scale: LayerNorm(f) = y = (f - mean) * scale, scale = 1 / deviation; None without a tail
    """

    error: Tensor
    f: Tensor
    r: Tensor | None = None
    loss: Tensor | None = None
    y: Tensor | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None

    @staticmethod
    def of(loss: InnerLoss, f: Tensor, k: Tensor, v: Tensor, tail: Tail | None) -> "OutputError":
        if tail is None:
            return OutputError(loss(f, v), f)
        y, mean, scale = torch.ops.aten.native_layer_norm(f, f.shape[-1:], None, None, EPS)
        r = torch.addcmul(k + tail.bias, y, tail.gain)
        of_r = loss(r, v)
        return OutputError(_through_norm(of_r * tail.gain, f, mean, scale), f, r, of_r, y, mean, scale)

    def backward(
        self, loss: InnerLoss, d_error: Tensor, v: Tensor, tail: Tail | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tail | None]:
        """Gradients of f, k (None: none), v (None: minus that of f) and the tail, through these equations:

        r = k + y gain + bias   u = loss(r, v) gain   error = scale (u - mean(u) - y mean(u y))
        """
        if tail is None or self.r is None or self.loss is None:
            # The common case, without the cost of autograd.
            d_f, d_v = (d_error, None) if loss is squared_error else _loss_backward(loss, d_error, self.f, v)
            return d_f, None, d_v, None
        assert self.y is not None and self.mean is not None and self.scale is not None
        u = self.loss * tail.gain
        d_u = _through_norm(d_error, self.f, self.mean, self.scale)
        d_r, d_v = _loss_backward(loss, d_u * tail.gain, self.r, v)
        # The error depends on y twice, and on scale; d_error . error is the gradient of log(scale).
        of_y = (d_error * _mean(u, self.y)).addcmul_(u, _mean(d_error, self.y))
        d_y = (d_r * tail.gain).addcmul_(of_y, self.scale, value=-1)
        d_f = _through_norm(d_y, self.f, self.mean, self.scale)
        d_f.addcmul_(self.y, self.scale * _mean(d_error, self.error), value=-1)
        d_gain = (d_u * self.loss).addcmul_(d_r, self.y).sum(-2, keepdim=True)
        return d_f, d_r, d_v, Tail(d_gain, d_r.sum(-2, keepdim=True))


def _through_norm(d_y: Tensor, f: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """d_f = scale (d_y - mean(d_y) - y mean(y d_y)); as a map of d_y it is symmetric."""
    return torch.ops.aten.native_layer_norm_backward(
        d_y.contiguous(), f, f.shape[-1:], mean, scale, None, None, [True, False, False]
    )[0]


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)[..., None] / x.shape[-1]


def _loss_backward(loss: InnerLoss, d: Tensor, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the prediction and the target."""
    if loss is squared_error:
        return d, -d
    return torch.func.vjp(loss, r, v)[1](d)
