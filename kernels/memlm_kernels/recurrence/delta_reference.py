"""The chunked form in plain PyTorch. Let g_i be the sum of log_decay up to token i of a chunk, i included, and

    d_i = beta_i (v_i - exp(g_i - g_{i-1}) k_i M_{i-1})

the correction of token i, so that M_i = exp(g_i - g_{i-1}) M_{i-1} + k_i^T d_i. Unrolled to the state M before the
chunk, this is a triangular system,

    (I + A) d = beta v - (beta exp(g) k) M        A[i, j] = beta_i exp(g_i - g_j) k_i . k_j  for j < i

whose solution is linear in M: with Y = (I + A)^-1 diag(beta), d = U - W M for U = Y v and W = Y (exp(g) k). Then, with
E[i, j] = exp(g_i - g_j) for j <= i,

    o = (exp(g) q) M + (E * q k^T) d              M' = exp(g_C) M + (exp(g_C - g) k)^T d

With a decay per channel, g_i has a number for each channel of the key: exp(g) is a factor of channels, and
exp(g_i - g_j) a factor of each channel inside k_i . k_j and q_i . k_j.
"""

import torch
from torch import Tensor

from memlm_kernels.recurrence import one_token
from memlm_kernels.recurrence.carry import carry
from memlm_kernels.recurrence.decay import across_channels, channel_scores, within_chunks
from memlm_kernels.recurrence.linear_reference import CHANNEL_WIDTH, WIDTH
from memlm_kernels.recurrence.products import product, unit_inverse
from memlm_kernels.segments import chunk_width, exact, lay_out, state_of


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    told: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o, the state, and with ``told`` the corrections d [B, T, H, V]."""
    length, values = q.shape[1], v.shape[-1]
    per_channel = log_decay is not None and log_decay.ndim == 4
    with torch.autocast(q.device.type, enabled=False):
        exact_q = exact(q)
        state = state_of(exact_q, cu_seqlens, *k.shape[2:], values) if state is None else exact(state)
        if q.numel() == 0:
            return v.clone(), state, v
        if length == 1 and cu_seqlens is None:
            o, state, d = one_token.of_rows(exact_q, exact(k), exact(v), beta, log_decay, state)
            return o.to(v.dtype), state, d
        width = chunk_width(length, cu_seqlens, CHANNEL_WIDTH if per_channel else WIDTH)
        segments = lay_out(cu_seqlens, length, width)
        q_c, k_c, v_c = (segments.lay(x).flatten(0, 2) for x in (exact_q, exact(k), exact(v)))
        gates = [exact(x)[..., None] if x.ndim == 3 else exact(x) for x in (beta, log_decay) if x is not None]
        beta_c, g = segments.lay(torch.cat(gates, -1)).flatten(0, 2).tensor_split([1], -1)
        reads, corrected, writes, keep = q_c, k_c, k_c, None
        if per_channel:
            from_start, to_end, keep = across_channels(g)
            scores, A = channel_scores(torch.stack([q_c, k_c]), k_c, g)
        else:
            scores, A = product(q_c, k_c.mT), product(k_c, k_c.mT)
            if log_decay is not None:
                from_start, E, to_end, keep = within_chunks(g)
                scores, A = scores * E, A * E
        if log_decay is not None:
            reads, corrected, writes = q_c * from_start, k_c * from_start, k_c * to_end
        Y = unit_inverse(A * beta_c) * beta_c.mT
        M, d, state = carry(segments, state, product(Y, v_c), product(Y, corrected), writes, keep)
        o = product(reads, M, product(scores.tril(), d))
        chunks = (segments.grid.count, *state.shape[::2][:2])
        corrections = segments.take(d.detach().unflatten(0, chunks)) if told else None
        return segments.take(o.unflatten(0, chunks)).to(v.dtype), state, corrections
