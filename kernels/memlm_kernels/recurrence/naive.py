"""Linear attention and the delta rule, one token at a time. With a_t = exp(log_decay_t), for each row and head::

    linear attention    M_t = a_t M_{t-1} + k_t^T v_t
    delta rule          M_t = a_t M_{t-1} + beta_t k_t^T (v_t - k_t (a_t M_{t-1}))
    both                o_t = q_t M_t

The chunked form. Both rules are M_t = a_t M_{t-1} + k_t^T d_t, where d_t is v_t for linear attention and the
correction beta_t (v_t - k_t a_t M_{t-1}) for the delta rule. Let M be the state before a chunk, and g_i the sum of
log_decay over the chunk's tokens up to i. Unrolled,

    M_i = exp(g_i) M + sum_{j <= i} exp(g_i - g_j) k_j^T d_j
    o_i = exp(g_i) q_i M + sum_{j <= i} exp(g_i - g_j) (q_i . k_j) d_j

so all reads of a chunk are matrix products with a mask, and only M goes from chunk to chunk. With a decay per channel,
exp(g_i - g_j) is a factor of each channel inside q_i . k_j and k_i . k_j. For the delta rule, a_i M_{i-1} is the first
line without its term j = i, and so

    d_i = beta_i (v_i - exp(g_i) k_i M - sum_{j < i} exp(g_i - g_j) (k_i . k_j) d_j)

which is a triangular system; ``delta_reference`` solves it once per chunk.
"""

import torch
from torch import Tensor


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``delta_rule``, or ``linear_attention`` if beta is None, with the same arguments and results."""
    batch, length, heads, keys = q.shape
    cu = torch.tensor([[0, length]] * batch) if cu_seqlens is None else cu_seqlens
    segments = cu.shape[1] - 1
    state = q.new_zeros(batch, segments, heads, keys, v.shape[-1]) if state is None else state
    o, after = torch.zeros_like(v), torch.zeros_like(state)
    for b in range(batch):
        for s in range(segments):
            M = state[b, s]
            for t in range(int(cu[b, s]), int(cu[b, s + 1])):
                if log_decay is not None:
                    M = log_decay[b, t].exp().reshape(heads, -1, 1) * M
                d = v[b, t]
                if beta is not None:
                    d = beta[b, t, :, None] * (d - torch.einsum("hk,hkv->hv", k[b, t], M))
                M = M + torch.einsum("hk,hv->hkv", k[b, t], d)
                o[b, t] = torch.einsum("hk,hkv->hv", q[b, t], M)
            after[b, s] = M
    return o, after
