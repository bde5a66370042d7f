"""The chunked form in plain PyTorch. Inside a chunk, with g_i the sum of log_decay up to token i, i included,

o_i = (q_i exp(g_i)) M + sum_{j <= i} (q_i . exp(g_i - g_j) k_j) v_j
M' = diag(exp(g_C)) M + sum_j (exp(g_C - g_j) k_j)^T v_j
"""

import torch
from torch import Tensor

from memlm_kernels.recurrence import one_token
from memlm_kernels.recurrence.carry import carry
from memlm_kernels.recurrence.decay import across_channels, channel_scores, within_chunks
from memlm_kernels.recurrence.products import product
from memlm_kernels.segments import chunk_width, exact, lay_out, state_of

# Wider chunks are fewer but slower: the work inside a chunk grows with the square of its width. With a decay per
# channel, a pair of tokens has a factor per channel, so pairs must be few.
WIDTH, CHANNEL_WIDTH = 32, 16


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    per_channel = log_decay is not None and log_decay.ndim == 4
    with torch.autocast(q.device.type, enabled=False):
        exact_q = exact(q)
        state = state_of(exact_q, cu_seqlens, *k.shape[2:], v.shape[-1]) if state is None else exact(state)
        if q.numel() == 0:
            return v.clone(), state
        if length == 1 and cu_seqlens is None:
            o, state, _ = one_token.of_rows(exact_q, exact(k), exact(v), None, log_decay, state)
            return o.to(v.dtype), state
        width = chunk_width(length, cu_seqlens, CHANNEL_WIDTH if per_channel else WIDTH)
        segments = lay_out(cu_seqlens, length, width)
        q_c, k_c, v_c = (segments.lay(x).flatten(0, 2) for x in (exact_q, exact(k), exact(v)))
        if log_decay is None:
            scores, keep, reads, writes = product(q_c, k_c.mT).tril(), None, q_c, k_c
        elif per_channel:
            g = segments.lay(exact(log_decay)).flatten(0, 2)
            from_start, to_end, keep = across_channels(g)
            reads, writes, scores = q_c * from_start, k_c * to_end, channel_scores(q_c, k_c, g)
        else:
            from_start, E, to_end, keep = within_chunks(segments.lay(exact(log_decay)[..., None]).flatten(0, 2))
            reads, writes, scores = q_c * from_start, k_c * to_end, (product(q_c, k_c.mT) * E).tril()
        M, _, state = carry(segments, state, v_c, None, writes, keep)
        o = product(reads, M, product(scores, v_c))
        return segments.take(o.unflatten(0, (segments.grid.count, *state.shape[::2][:2]))).to(v.dtype), state
