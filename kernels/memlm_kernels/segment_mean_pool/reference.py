"""Segments are laid on a grid of equal width and summed. The order of sums is fixed, forward and backward, and no
difference of running sums cancels.
"""

import torch
from torch import Tensor

from memlm_kernels.grid import place
from memlm_kernels.segments import exact


def segment_mean_pool_reference(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    batch, count = len(x), cu_seqlens.shape[1] - 1
    owner, place_in = owners(cu_seqlens, x.shape[1], longest)
    # One more slot takes the tokens of no segment.
    slots = torch.where(owner < count, owner * longest + place_in, count * longest)
    laid = place(exact(x), slots, count * longest + 1)[:, :-1].unflatten(1, (count, longest))
    sizes = cu_seqlens.diff(dim=1).clamp(1, longest).to(laid.dtype)
    return laid.sum(2) / sizes.reshape(batch, count, *[1] * (x.ndim - 2))


def owners(cu_seqlens: Tensor, length: int, longest: int) -> tuple[Tensor, Tensor]:
    """The segment of each token, [B, T], S if it has none, and the token's place in the segment."""
    count = cu_seqlens.shape[1] - 1
    tokens = torch.arange(length, device=cu_seqlens.device).expand(len(cu_seqlens), -1).contiguous()
    owner = torch.searchsorted(cu_seqlens[:, 1:].contiguous(), tokens, right=True)
    place_in = tokens - cu_seqlens.gather(1, owner.clamp(max=max(count - 1, 0)))
    return torch.where((place_in < 0) | (place_in >= longest), count, owner), place_in
