"""The chunked form in plain PyTorch. Inside a chunk, with g_i the sum of log_decay up to token i, i included,

    o_i = (q_i exp(g_i)) M + sum_{j <= i} (q_i . exp(g_i - g_j) k_j) v_j
    M' = diag(exp(g_C)) M + sum_j (exp(g_C - g_j) k_j)^T v_j

Differences of g are sums of numbers below zero, taken as such: nothing overflows and nothing cancels.
"""

import torch
from torch import Tensor

from memlm_kernels.recurrence import one_token
from memlm_kernels.segments import chunk_width, exact, lay_out, state_of, sums_after, sums_between

# With a decay for each channel a pair of tokens has a factor for each channel, so pairs must be few.
_WIDTH, _CHANNEL_WIDTH, _CHANNEL_BLOCK = 64, 16, 4


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    per_channel = log_decay is not None and log_decay.ndim == 4
    with torch.autocast(q.device.type, enabled=False):
        exact_q = exact(q)
        state = state_of(exact_q, cu_seqlens, *k.shape[2:], v.shape[-1]) if state is None else exact(state)
        if length == 0:
            return v.clone(), state
        if length == 1 and cu_seqlens is None:
            o, state = one_token.of_rows(exact_q, exact(k), exact(v), None, log_decay, state)
            return o.to(v.dtype), state
        width = chunk_width(length, cu_seqlens, _CHANNEL_WIDTH if per_channel else _WIDTH)
        segments = lay_out(cu_seqlens, length, width)
        q_c, k_c, v_c = (segments.lay(x) for x in (exact_q, exact(k), exact(v)))
        if log_decay is None:
            scores, keep, reads, writes = (q_c @ k_c.mT).tril(), None, q_c, k_c
        else:
            g = segments.lay(exact(log_decay) if per_channel else exact(log_decay)[..., None])
            keep = g.sum(-2).exp()[..., None]
            reads, writes = q_c * g.cumsum(-2).exp(), k_c * sums_after(g).exp()
            if per_channel:
                scores = _channel_scores(q_c, k_c, g)
            else:
                scores = (q_c @ k_c.mT) * sums_between(g).exp()[..., 0]
        # Unbound, for the gradient of an index is a tensor as large as all chunks.
        new = (writes.mT @ v_c).unbind()
        kept = None if keep is None else keep.unbind()

        def step(n: int, memory: Tensor) -> Tensor:
            return memory + new[n] if kept is None else torch.addcmul(new[n], memory, kept[n])

        starts, state = segments.scan(state, step)
        return segments.take(reads @ starts + scores @ v_c).to(v.dtype), state


def _channel_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """q, k, g: [..., C, K] -> [..., C, C]: sum over K of q_i k_j exp(g_{j+1} + ... + g_i), 0 above the diagonal.

    Inside a small block the factors as they are; between blocks split at the start of the query's block, so that both
    parts are sums of what lies on one side of it.
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
