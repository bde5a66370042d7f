"""LaCT's memory (arXiv:2505.23884) of one row and head, one token at a time::

    f(x; W) = (silu(x W_1) * (x W_3)) W_2        o_t = f(q_t; W)        D_j += lr_tj d(f(k_t; W) . v_t) / dW_j

and at the end of a chunk, with the mean over its tokens::

    S_j <- mean(momentum) S_j + D_j      W_j <- |columns of the first W_j| normalize(W_j + muon(S_j))      D_j <- 0

The chunked form. W changes only at the end of a chunk, so each line above is a few products for all tokens of a chunk.
With a row per token in Q, K, V and L_j (the lr of W_j), and A = K W_1, B = K W_3, H = silu(A) * B, E = V W_2^T,

    o = f(Q; W)     D_2 = H^T (L_2 * V)     D_3 = K^T (L_3 * E * silu(A))     D_1 = K^T (L_1 * E * B * silu'(A))

where each D_j is the sum over the chunk's tokens of lr_tj times the gradient above.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.large_chunk_memory.chunks import MUON

Weights = list[Tensor]


def swiglu(x: Tensor, W: Sequence[Tensor]) -> Tensor:
    return (F.silu(x @ W[0]) * (x @ W[2])) @ W[1]


def muon(S: Tensor, steps: int) -> Tensor:
    """Newton-Schulz steps towards the orthogonal matrix with the singular vectors of S."""
    x = S / S.norm() if steps else S
    for a, b, c in MUON[:steps]:
        x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
    return x


def large_chunk_memory(
    tokens: Sequence[Tensor], first: Sequence[Tensor], chunk_size: int, muon_steps: int = 0
) -> tuple[Tensor, Weights, Weights, Weights]:
    """tokens: q, k, v [T, K or V], lr [T, 3], momentum [T] or None; first: W_1 to W_3. Returns o [T, V], W, D, S."""
    q, k, v, lr, momentum = tokens
    W, o = list(first), []
    D, S = [0.0 * w for w in W], [0.0 * w for w in W]
    for t in range(len(q)):
        o.append(swiglu(q[t], W))
        with torch.enable_grad():
            at = [w if w.requires_grad else w.clone().requires_grad_() for w in W]
            ascent = torch.autograd.grad((swiglu(k[t], at) * v[t]).sum(), at, create_graph=True)
        D = [d + lr[t, j] * g for j, (d, g) in enumerate(zip(D, ascent, strict=True))]
        if (t + 1) % chunk_size == 0:
            mean = 0.0 if momentum is None else momentum[t + 1 - chunk_size : t + 1].mean()
            S = [mean * s + d for s, d in zip(S, D, strict=True)]
            W = [w + muon(s, muon_steps) for w, s in zip(W, S, strict=True)]
            W = [w / w.norm(dim=0) * f.norm(dim=0) for w, f in zip(W, first, strict=True)]
            D = [0.0 * d for d in D]
    return torch.stack(o), W, D, S
