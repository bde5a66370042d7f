"""Products of rows with matrices: each row belongs to a group, and each group has its own matrix.

Files:

    naive               the definition as a loop over groups, and the form in tiles
    reference           three ways to compute the product
    joined              several linear maps of the same few rows at once
    kernels, triton     Triton: tiles of rows read the matrix of their group as it is
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memlm_kernels.backend import as_autocast, choose, exact_products, with_triton
from memlm_kernels.checks import check_range, check_tensors, in_one_type, number, readable
from memlm_kernels.grouped_linear.joined import MOST_MAPS, LinearsOutput, linears
from memlm_kernels.grouped_linear.reference import by_group, by_tile, grouped_mm, takes_grouped_mm
from memlm_kernels.segments import counts

__all__ = ["MOST_MAPS", "LinearsOutput", "grouped_linear", "linear_of_group", "linears"]

_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grouped_mm": grouped_mm,
    "by_group": by_group,
    "reference": by_tile,
}


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, *, backend: str = "auto") -> Tensor:
    """y_i = x_i weight[group of i]^T. The cost grows with the rows, not with the number of groups.

    x: [N, D], group after group   weight: [G, O, D], one matrix per group
    sizes: [G] integers, the number of rows of each group; their sum is N
    backend: ``grouped_mm``, torch's, for bf16 on Hopper and later; ``triton``; ``by_group``, one product per group, on
        CPUs, where sizes may be read; ``reference``, a batched product of tiles of few rows, with a copy of the matrix
        per tile

    Returns [N, O], in the wider type of x and weight. On a GPU the sizes are not checked: groups end where x ends, and
    rows without a group have arbitrary results. Raises ValueError if shapes, types or devices disagree, the sizes do
    not add up to N, or the backend cannot run.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or sizes.shape != weight.shape[:1]:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, sizes {list(sizes.shape)} must be [N, D], [G, O, D], [G]"
        )
    check_tensors({"x": x, "weight": weight}, {"sizes": sizes})
    check_range("sizes", sizes, 0, len(x) + 1)
    if readable(sizes) and (total := number(sizes.sum())) != len(x):
        raise ValueError(f"sizes add up to {total} rows, but x has {len(x)}")
    x, weight = in_one_type(*as_autocast(x, weight))
    fast = ["by_group"] if x.device.type == "cpu" else ["grouped_mm"] if takes_grouped_mm(x, weight) else []
    exact = not torch.version.hip and exact_products(x)
    # Where auto takes another backend first, no trial of the kernels is held.
    asked = "reference" if backend == "auto" and (fast or exact) else backend
    # Products of 64 channels at a time: no width is too large.
    known, refused = with_triton("grouped_linear", asked, x, None, weight, products=False)
    if exact:
        known = tuple(sorted(known))
    chosen = choose("grouped_linear", backend, (*fast, *known), refused)
    if chosen == "triton" and x.numel():
        from memlm_kernels.grouped_linear.triton import grouped_linear_triton

        return grouped_linear_triton(x, weight, sizes)
    return _BACKENDS.get(chosen, by_tile)(x, weight, sizes)


def linear_of_group(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """y_i = x_i weight[group_i]^T: ``grouped_linear`` with rows in any order.

    x: [N, D]   weight: [G, O, D], one matrix per group   group: [N] integers from 0 to G - 1, the group of each row

    Returns [N, O], in the wider type of x and weight. A few rows, as in decoding, are not sorted: each takes a copy of
    its matrix. Raises ValueError if shapes, types or devices disagree, or, on a CPU, a group is out of range.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or group.shape != x.shape[:1]:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, group {list(group.shape)} must be [N, D], [G, O, D], [N]"
        )
    check_tensors({"x": x, "weight": weight}, {"group": group})
    check_range("group", group, 0, len(weight))
    x, weight = in_one_type(*as_autocast(x, weight))
    groups = len(weight)
    if len(x) <= groups:
        return torch.bmm(weight.index_select(0, group), x[..., None])[..., 0]
    order = group.argsort(stable=True)
    y = grouped_linear(x.index_select(0, order), weight, counts(group[None], groups)[0])
    return torch.empty_like(y).index_copy(0, order, y)
