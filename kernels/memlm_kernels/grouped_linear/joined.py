"""Linear maps of the same rows, which a decoded token takes in one launch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.backend import as_autocast, pick
from memlm_kernels.checks import check_tensors, in_one_type, named, once_a_kind
from memlm_kernels.segments import exact

# Matrices that the kernel takes at once.
MOST_MAPS = 4


class LinearsOutput(NamedTuple):
    """y: of each matrix, [N, O_i]"""

    y: tuple[Tensor, ...]


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    wide: Sequence[bool],
    *,
    backend: str = "auto",
) -> LinearsOutput:
    """y_i = x weights_i^T + biases_i. The kernel reads each matrix once for every 16 rows, so it suits few rows.

    x: [N, D]   weights: [O_i, D]   biases: [O_i] or None
    wide: for each matrix, whether its y is in fp32 (fp64 for fp64 inputs)

    Returns y, in the widest type of x and weights unless it is wide. Raises ValueError if shapes, types or devices
    disagree, or the backend cannot run.
    """
    _check(x, weights, biases, wide)
    limit = None if len(weights) <= MOST_MAPS else f"its kernel takes at most {MOST_MAPS} matrices, not {len(weights)}"
    chosen = pick("linears", backend, x, limit, *weights, products=False)
    x, *matrices = in_one_type(*as_autocast(x, *weights))
    if chosen == "triton" and x.numel():
        from memlm_kernels.grouped_linear.triton import linears_triton

        return LinearsOutput(tuple(linears_triton(x, matrices, [*biases], [*wide])))
    with torch.autocast(x.device.type, enabled=False):
        y = [
            F.linear(exact(x), exact(w), None if b is None else exact(b))
            if to_exact
            else F.linear(x, w, None if b is None else b.to(x.dtype))
            for w, b, to_exact in zip(matrices, biases, wide, strict=True)
        ]
    return LinearsOutput(tuple(y))


@once_a_kind
def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], wide: Sequence[bool]) -> None:
    shapes = [list(w.shape) for w in weights]
    if x.ndim != 2 or not weights or any(w.ndim != 2 or w.shape[1] != x.shape[1] or 0 in w.shape for w in weights):
        raise ValueError(f"x {list(x.shape)} and weights {shapes} must be [N, D] and at least one [O, D]")
    if not len(weights) == len(biases) == len(wide):
        raise ValueError(f"{len(weights)} weights, {len(biases)} biases, {len(wide)} wide: give one of each for a map")
    for w, b in zip(weights, biases, strict=True):
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"bias {list(b.shape)} must be [O] of its weight {list(w.shape)}")
    given = {f"biases[{i}]": b for i, b in enumerate(biases)}
    check_tensors({"x": x, **named("weights", weights), **given})
