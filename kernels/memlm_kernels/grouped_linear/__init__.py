"""Rows that each belong to a group, times the matrix of their group."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.backend import choose
from memlm_kernels.segments import chunk_width, lay_out

__all__ = ["grouped_linear"]

_WIDTH = 64


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, *, backend: str = "auto") -> Tensor:
    """y_i = x_i weight[group of i]^T, at the cost of the rows, however many the groups.

    x: [N, D], group after group   weight: [G, O, D]   sizes: [G] integers, rows of each group, N together
    backend: ``torch`` is ``torch.nn.functional.grouped_mm``; ``reference`` copies a matrix for each 64 rows

    Returns [N, O]. Raises ValueError if shapes disagree or the backend cannot run.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or sizes.shape != weight.shape[:1]:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, sizes {list(sizes.shape)} must be [N, D], [G, O, D], [G]"
        )
    available = ("torch", "reference") if _native(x, weight) else ("reference",)
    if choose("grouped_linear", backend, available) == "torch":
        return F.grouped_mm(x, weight.mT, offs=sizes.cumsum(0).int())
    cu_seqlens = F.pad(sizes.long().cumsum(0), (1, 0))[None]
    segments = lay_out(cu_seqlens, len(x), chunk_width(len(x), cu_seqlens, _WIDTH))
    assert segments.segment is not None
    tiles = segments.grid.lay(x[None])[0]
    return segments.grid.take((tiles @ weight[segments.segment[0]].mT)[None])[0]


def _native(x: Tensor, weight: Tensor) -> bool:
    """Where torch's own product neither asks the device for the sizes nor refuses the type."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if len(x) == 0 or x.dtype != weight.dtype or not aligned:
        return False
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return x.dtype == torch.bfloat16 and hopper
