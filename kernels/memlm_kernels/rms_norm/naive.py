"""The norm of one vector after the other:

    r = 1 / sqrt(mean(x^2) + eps)        u = r x        n = u w        y = n silu(g), or o + sigmoid(g) (n - o)

Gradients, for d_n of n:

    d_u = d_n w        d_w = sum d_n u        d_x = r (d_u - u mean(u d_u))
    y = n silu(g):             d_n = d_y silu(g)        d_g = d_y n silu'(g)
    y = o + sigmoid(g)(n - o): d_n = d_y sigmoid(g)     d_o = d_y - d_n     d_g = d_y (n - o) sigmoid'(g)
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None, other: Tensor | None, eps: float) -> Tensor:
    """[N, K] each."""
    rows = []
    for i in range(len(x)):
        n = x[i] / ((x[i] * x[i]).mean() + eps).sqrt() * weight
        if gate is not None:
            share = 1 / (1 + torch.exp(-gate[i]))
            n = n * gate[i] * share if other is None else other[i] + share * (n - other[i])
        rows.append(n)
    return torch.stack(rows)
