"""The rotation of one pair after the other: (x_i, x_{i + K/2}) as a complex number, times c_i + i s_i. Its transpose,
the gradient, is the rotation back.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, K]; cos, sin: [T, K / 2]"""
    half, y = x.shape[1] // 2, torch.zeros_like(x)
    for t in range(len(x)):
        for i in range(half):
            turned = torch.complex(x[t, i], x[t, i + half]) * torch.complex(cos[t, i], sin[t, i])
            y[t, i], y[t, i + half] = turned.real, turned.imag
    return y
