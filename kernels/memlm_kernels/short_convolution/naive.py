"""The convolution, one token after the other. For a token t of a document, with zeros before the document's start:

    a_t = sum_{j < W} w[W - 1 - j] x_{t - j}        s_t = silu(a_t)        u_t = s_t / sqrt(max(|s_t|^2 + eps, 1e-24))

per channel, and |s_t| per head. Outputs are a, or s, and u for the parts of unit length.

Gradients, for d_u of a part of unit length, with r = u / s per head:

    d_s = r (d_u - u (u . d_u))        d_a = d_s sigmoid(a) (1 + a (1 - sigmoid(a)))
    d_x_t = sum_j w[W - 1 - j] d_a_{t + j}        d_w[W - 1 - j] = sum_t d_a_t x_{t - j}

where t + j, and t - j, are tokens of the same document.
"""

import torch
from torch import Tensor


def short_convolution(
    x: Tensor,
    weight: Tensor,
    silu: bool,
    unit: int,
    head_dim: int,
    eps: float,
    positions: Tensor | None,
    state: Tensor,
) -> Tensor:
    """x: [B, T, C]; unit: how many of the first channels have unit length per head. Returns [B, T, C]."""
    past, spare, rows = torch.cat([state, x], 1), weight.shape[1] - 1, []
    for b in range(len(x)):
        tokens = []
        for t in range(x.shape[1]):
            a = torch.zeros_like(x[b, t])
            for j in range(spare + 1):
                if positions is None or int(positions[b, t]) >= j:
                    a = a + weight[:, spare - j] * past[b, spare + t - j]
            s = a * torch.sigmoid(a) if silu else a
            heads = s[:unit].unflatten(0, (-1, head_dim)) if unit else s[:0]
            length = (heads.square().sum(-1, keepdim=True) + eps).clamp(min=1e-24).sqrt()
            tokens.append(torch.cat([(heads / length).flatten() if unit else heads, s[unit:]]))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)
