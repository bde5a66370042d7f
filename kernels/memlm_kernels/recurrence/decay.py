"""The decays between the tokens of a chunk: exp of sums of log_decay. The sums have terms of at most zero, so nothing
overflows, and no sum is computed as a difference of two, so nothing cancels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of a block inside which each pair has its own factors.
_BLOCK = 4


def kind_of(op: str, log_decay: Tensor | None) -> str:
    """The kind of a call in ``memlm_kernels.calls``; log_decay: [B, T, H] or [B, T, H, K]"""
    if log_decay is None:
        return op
    return f"{op}, {'channels' if log_decay.ndim == 4 else 'decay'}"


def within_chunks(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g: [..., C, 1], log_decay of a head.

    With g_i its sum over the tokens of a chunk up to i, returns exp(g_i) [..., C, 1]; exp(g_i - g_j) [..., C, C],
    valid where j <= i; exp(g_C - g_j) [..., C, 1]; exp(g_C) [..., 1, 1].
    """
    from_start = g.cumsum(-2).exp()
    between = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2).exp()
    return from_start, between, between[..., -1:, :].mT, from_start[..., -1:, :]


def across_channels(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g: [..., C, K], log_decay of each channel. Returns exp(g_i) and exp(g_C - g_i), [..., C, K]; exp(g_C)
    [..., K, 1].
    """
    from_start = g.cumsum(-2).exp()
    return from_start, sums_after(g).exp(), from_start[..., -1:, :].mT


def sums_between(x: Tensor) -> Tensor:
    """[..., C, K] -> [..., C, C, K]: entry (i, j) is the sum over j < l <= i, -inf above the diagonal."""
    size = x.shape[-2]
    ones = torch.ones(size, size, dtype=torch.bool, device=x.device)
    each = x[..., :, None, :].expand(*x.shape[:-1], size, x.shape[-1])
    below = each.masked_fill(~ones.tril(-1)[..., None], 0.0).cumsum(-3)
    return below.masked_fill(~ones.tril()[..., None], float("-inf"))


def sums_after(x: Tensor) -> Tensor:
    """[..., C, K]: for each entry, the sum over the later ones along C."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def channel_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """q, k, g: [..., C, K] -> [..., C, C]: sum over K of q_i k_j exp(g_{j+1} + ... + g_i), 0 above the diagonal.

    Inside a small block, the factors are used as they are. Between blocks, they are split at the start of the query's
    block, so that each part sums terms on one side of it.
    """
    size = q.shape[-2]
    block = min(_BLOCK, size)
    count = size // block
    q_b, k_b, g_b = (x.unflatten(-2, (count, block)) for x in (q, k, g))
    within = (q_b[..., :, None, :] * k_b[..., None, :, :] * sums_between(g_b).exp()).sum(-1)
    slot = torch.arange(size, device=q.device)
    before = (slot < slot[::block, None])[..., None]
    to_block = sums_after(torch.where(before, g[..., None, :, :], 0.0)).masked_fill(~before, float("-inf"))
    across = (q_b * g_b.cumsum(-2).exp()) @ (k[..., None, :, :] * to_block.exp()).mT
    diagonal = torch.diag_embed(within.movedim(-3, -1), dim1=-4, dim2=-2)
    return across.flatten(-3, -2) + diagonal.flatten(-4, -3).flatten(-2)
