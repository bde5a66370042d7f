"""Rotary positions of queries and keys.

Files:

    naive               the definition
    reference           two products and a shift in PyTorch
    kernels, triton     a Triton kernel, and the op around it
"""

from typing import NamedTuple

from torch import Tensor

from memlm_kernels.backend import pick
from memlm_kernels.checks import check_sizes, check_tensors, once_a_kind
from memlm_kernels.rotary.reference import rotate

__all__ = ["RotaryOutput", "rotary", "rotate"]


class RotaryOutput(NamedTuple):
    """q, k: rotated"""

    q: Tensor
    k: Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> RotaryOutput:
    """Rotate the pairs (i, i + K/2) of each head by the angles of its token (arXiv:2104.09864), as in Llama:

        y_i = c_i x_i - s_i x_{i + K/2}        y_{i + K/2} = c_i x_{i + K/2} + s_i x_i

    q: [B, T, H, K]; k: [B, T, G, K]
    cos, sin: [c, c] and [-s, s], [B or 1, T, 1, K]; they get no gradient

    Raises ValueError if shapes, types or devices disagree, K is odd, or the backend cannot run.
    """
    _check(q, k, cos, sin)
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    chosen = pick("rotary", backend, q, None, k, cos, sin, products=False)
    if chosen == "reference" or q.numel() * k.numel() == 0:
        return RotaryOutput(rotate(q, cos, sin), rotate(k, cos, sin))
    from memlm_kernels.rotary.triton import rotary_triton

    return RotaryOutput(*rotary_triton(q, k, cos, sin))


@once_a_kind
def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_sizes("q", q)
    check_sizes("k", k)
    check_tensors({"q": q, "k": k, "cos": cos, "sin": sin})
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must be [B, T, *, K] with an even K")
    angles = [cos.shape[0], q.shape[1], 1, q.shape[3]]
    if list(cos.shape) != angles or cos.shape != sin.shape or cos.shape[0] not in (1, len(q)):
        raise ValueError(f"cos {list(cos.shape)} and sin {list(sin.shape)} must be [B or 1, T, 1, K]")
