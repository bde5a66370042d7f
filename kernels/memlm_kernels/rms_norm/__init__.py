"""Root-mean-square norm, alone or with the gate that follows it in a memory.

Files:

    naive               the definition and its gradients
    reference           the norm in PyTorch
    kernels, triton     Triton kernels, and the op around them
"""

import torch
from torch import Tensor

from memlm_kernels.backend import pick
from memlm_kernels.checks import FLOATS, check_tensors, once_a_kind
from memlm_kernels.rms_norm.reference import norm, rms_norm_reference

__all__ = ["norm", "rms_norm"]

# Kernels hold a whole vector.
_WIDEST = 8192


def rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    other: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """n = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467), and a gate on it.

    x: [..., K]; weight: [K]
    gate: as many elements as x, in their order, before its activation. The result is n silu(gate), or, with ``other``,
        other + sigmoid(gate) (n - other)
    other: as many elements as x
    dtype: the result's type; None: of x, or of the gate

    Returns the shape of the gate, or of x. Sums are in fp32 (fp64 for fp64). Raises ValueError if shapes, types or
    devices disagree, or the backend cannot run.
    """
    dtype = dtype or (x if gate is None else gate).dtype
    _check(x, weight, gate, other, dtype)
    limit = f"its kernels take at most {_WIDEST} channels, not {len(weight)}" if len(weight) > _WIDEST else None
    chosen = pick("rms_norm", backend, x, limit, weight, gate, other, products=False)
    if chosen == "reference" or x.numel() == 0:
        return rms_norm_reference(x, weight, gate, other, eps, dtype)
    from memlm_kernels.rms_norm.triton import rms_norm_triton

    return rms_norm_triton(x, weight, gate, other, eps, dtype)


@once_a_kind
def _check(x: Tensor, weight: Tensor, gate: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> None:
    tensors = {"x": x, "weight": weight, "gate": gate, "other": other}
    if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != len(weight) or len(weight) == 0:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must be [..., K] and [K]")
    if any(part is not None and part.numel() != x.numel() for part in (gate, other)):
        shapes = {name: list(part.shape) for name, part in tensors.items() if part is not None}
        raise ValueError(f"gate and other must have the elements of x: {shapes}")
    if other is not None and gate is None:
        raise ValueError("other is given and gate is not; give both")
    check_tensors(tensors)
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype} is no type of floats that ops take")
