"""The decays between the tokens of a chunk: exp of sums of log_decay. The sums have terms of at most zero, so nothing
overflows, and no sum is computed as a difference of two, so nothing cancels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def within_chunks(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g: [..., C, 1], log_decay of a head.

    With g_i its sum over the tokens of a chunk up to i, returns exp(g_i) [..., C, 1]; exp(g_i - g_j) [..., C, C],
    valid where j <= i; exp(g_C - g_j) [..., C, 1]; exp(g_C) [..., 1, 1].
    """
    from_start = g.cumsum(-2).exp()
    between = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2).exp()
    return from_start, between, between[..., -1:, :].mT, from_start[..., -1:, :]


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
