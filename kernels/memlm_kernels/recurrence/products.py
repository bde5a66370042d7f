"""Products of batched matrices with a backward outside the caller's autocast, as their forward is: it would otherwise
round to bf16 there. [G, *, *]
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast


def product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a b, or a b + added."""
    return _Product.apply(a, b, added)


def unit_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1, of A below the diagonal alone."""
    return _UnitInverse.apply(A)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b) if added is None else torch.baddbmm(added, a, b)

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (of_a, of_b, of_added) = ctx.saved_tensors, ctx.needs_input_grad
        d_a, d_b = torch.bmm(d, b.mT) if of_a else None, torch.bmm(a.mT, d) if of_b else None
        return d_a, d_b, d if of_added else None


class _UnitInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        # The solver reads only the entries below the diagonal.
        X = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        return torch.bmm(torch.bmm(X.mT, d), X.mT).tril_(-1).neg_()
