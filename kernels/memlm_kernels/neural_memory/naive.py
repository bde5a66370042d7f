"""Titans' neural memory (arXiv:2501.00663, eqs. 9-15) of one row and head, one token at a time. M is an MLP, l the
inner loss, A the memory at the start of the token's chunk::

    S_t = momentum_t S_{t-1} - lr_t grad l(A(k_t), v_t)      M_t = (1 - decay_t) M_{t-1} + S_t      o_t = M_t(q_t)

A is the same for a whole chunk, so one pass forward and backward gives all its gradients G_i. Unrolled from W and S,
the memory and the momentum before the chunk, the two linear recurrences are

    S_r = m_r S - sum_{i <= r} P_ri G_i              P_ri = lr_i prod_{i < j <= r} momentum_j
    M_r = b_r W + f_r S - sum_{i <= r} C_ri G_i      C_ri = sum_{i <= l <= r} P_li prod_{l < j <= r} (1 - decay_j)
    m_r = prod_{j <= r} momentum_j                   b_r = prod_{j <= r} (1 - decay_j)
    f_r = sum_{l <= r} m_l prod_{l < j <= r} (1 - decay_j)

In each layer G_i = x_i^T e_i, the outer product of input and error. So a layer with input h returns, without M_r,

    h M_r = b_r h W + f_r h S - sum_{i <= r} C_ri (h . x_i) e_i

The last term is masked attention from h to x, with values e. See ``reference``."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.neural_memory.network import EPS


def squared_error(y: Tensor, v: Tensor) -> Tensor:
    return 0.5 * (y - v).square().sum()


def read(M: Sequence[Tensor], x: Tensor, activation: str = "gelu", norm: Sequence[Tensor] | None = None) -> Tensor:
    """M(x); norm: gain and bias [V]."""
    h = x @ M[0]
    for w in M[1:]:
        h = (F.gelu(h) if activation == "gelu" else F.silu(h)) @ w
    return h if norm is None else x + F.layer_norm(h, h.shape, norm[0], norm[1], EPS)


def neural_memory(
    tokens: Sequence[Any], M: Any, chunk_size: int, loss: Any = squared_error, window: int = 1, **network: Any
) -> Tensor:
    """tokens: q, k, v [T, K or V], lr, momentum, decay [T] or None, the weights of losses [T] (None: 1)
    M: weights [in, out] of the layers; window: number of losses per step (ATLAS, arXiv:2505.23735). Returns o [T, V].
    """
    q, k, v, lr, momentum, decay, weight = tokens
    A, S, o = M, [0.0 * w for w in M], []
    for t in range(len(q)):
        A = M if t % chunk_size == 0 else A
        with torch.enable_grad():
            A = [w if w.requires_grad else w.clone().requires_grad_() for w in A]
            seen = range(max(0, t - window + 1), t + 1)
            losses = [loss(read(A, k[i], **network), v[i]) * (1 if weight is None else weight[i]) for i in seen]
            G = torch.autograd.grad(sum(losses), A, create_graph=True)
        S = [(0 if momentum is None else momentum[t]) * s - lr[t] * g for s, g in zip(S, G, strict=True)]
        M = [(1 if decay is None else 1 - decay[t]) * w + s for w, s in zip(M, S, strict=True)]
        o.append(read(M, q[t], **network))
    return torch.stack(o)
