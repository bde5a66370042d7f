"""The inner losses that the memory minimises as it writes. Each function returns the gradient of a loss with respect
to the prediction M(k), [..., V], from prediction and target, [..., V] each. Any differentiable function of this form
is a loss too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

InnerLoss = Callable[[Tensor, Tensor], Tensor]


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """1/2 |M(k) - v|^2 (Titans, arXiv:2501.00663, up to the factor)."""
    return prediction - target


def dot_product(prediction: Tensor, target: Tensor) -> Tensor:
    """-M(k) . v (LaCT, arXiv:2505.23884): a Hebbian rule, whose writes do not depend on the prediction."""
    return -target


def huber(delta: float) -> InnerLoss:
    """Huber's loss of |M(k) - v| (MIRAS, arXiv:2504.13173): gradients longer than ``delta`` are cut to that length."""

    def gradient(prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        return error * (delta / torch.linalg.vector_norm(error, dim=-1, keepdim=True).clamp(min=delta))

    return gradient


def lp(p: float) -> InnerLoss:
    """1/p |M(k) - v|_p^p (MIRAS, arXiv:2504.13173), |e| smoothed to sqrt(e^2 + 1e-6)."""

    def gradient(prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        return error * (error.square() + 1e-6).pow((p - 2) / 2)

    return gradient
