"""The chunked form in plain PyTorch. Inside a chunk, with g_i the sum of log_decay up to token i, i included,

o_i = (q_i exp(g_i)) M + sum_{j <= i} (q_i . exp(g_i - g_j) k_j) v_j
M' = diag(exp(g_C)) M + sum_j (exp(g_C - g_j) k_j)^T v_j
"""

import torch
from torch import Tensor

from memlm_kernels.recurrence import one_token
from memlm_kernels.recurrence.carry import carry
from memlm_kernels.recurrence.decay import sums_after, sums_between, within_chunks
from memlm_kernels.segments import chunk_width, exact, lay_out, state_of

# With a decay per channel, a pair of tokens has a factor per channel, so pairs must be few.
_WIDTH, _CHANNEL_WIDTH, _CHANNEL_BLOCK = 32, 16, 4


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
            o, state = one_token.of_rows(exact_q, exact(k), exact(v), None, log_decay, state)
            return o.to(v.dtype), state
        width = chunk_width(length, cu_seqlens, _CHANNEL_WIDTH if per_channel else _WIDTH)
        segments = lay_out(cu_seqlens, length, width)
        q_c, k_c, v_c = (segments.lay(x).flatten(0, 2) for x in (exact_q, exact(k), exact(v)))
        if log_decay is None:
            scores, keep, reads, writes = torch.bmm(q_c, k_c.mT).tril(), None, q_c, k_c
        elif per_channel:
            g = segments.lay(exact(log_decay)).flatten(0, 2)
            from_start = g.cumsum(-2).exp()
            reads, writes, keep = q_c * from_start, k_c * sums_after(g).exp(), from_start[:, -1:].mT
            scores = _channel_scores(q_c, k_c, g)
        else:
            from_start, E, to_end, keep = within_chunks(segments.lay(exact(log_decay)[..., None]).flatten(0, 2))
            reads, writes, scores = q_c * from_start, k_c * to_end, (torch.bmm(q_c, k_c.mT) * E).tril()
        M, _, state = carry(segments, state, v_c, None, writes, keep)
        o = torch.baddbmm(torch.bmm(scores, v_c), reads, M)
        return segments.take(o.unflatten(0, (segments.grid.count, *state.shape[::2][:2]))).to(v.dtype), state


def _channel_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """q, k, g: [..., C, K] -> [..., C, C]: sum over K of q_i k_j exp(g_{j+1} + ... + g_i), 0 above the diagonal.

    Inside a small block, the factors are used as they are. Between blocks, they are split at the start of the query's
    block, so that each part sums terms on one side of it.
    """
    size = q.shape[-2]
    block = min(_CHANNEL_BLOCK, size)
    count = size // block
    q_b, k_b, g_b = (x.unflatten(-2, (count, block)) for x in (q, k, g))
    within = (q_b[..., :, None, :] * k_b[..., None, :, :] * sums_between(g_b).exp()).sum(-1)
    slot = torch.arange(size, device=q.device)
    before = (slot < slot[::block, None])[..., None]
    to_block = sums_after(torch.where(before, g[..., None, :, :], 0.0)).masked_fill(~before, float("-inf"))
    across = (q_b * g_b.cumsum(-2).exp()) @ (k[..., None, :, :] * to_block.exp()).mT
    diagonal = torch.diag_embed(within.movedim(-3, -1), dim1=-4, dim2=-2)
    return across.flatten(-3, -2) + diagonal.flatten(-4, -3).flatten(-2)
