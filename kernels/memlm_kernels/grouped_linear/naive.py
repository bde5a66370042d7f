"""Rows times the matrix of their group, one group after the other: y_i = x_i W_g^T for the rows i of group g.

The tiled form. Rows are laid on tiles of C slots, each of one group, with zeros in slots without a row. For tile n of
group g(n), Y_n = X_n W_{g(n)}^T holds the y_i of its rows, because each row of a product depends on its own row alone.
All tiles are one batched product, so many small groups need no more launches than one.
"""

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """x: [N, D], group after group; weight: [G, O, D]; sizes: the number of rows of each group. Returns [N, O]."""
    return torch.cat([rows @ W.T for rows, W in zip(x.split(sizes), weight, strict=True)])
