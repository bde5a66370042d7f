"""Segments laid on a grid of equal width, and summed: deterministic, forward and backward, and without the
cancellation of differences of running sums.
"""

import torch
from torch import Tensor

from memlm_kernels.grid import place
from memlm_kernels.segments import exact


def segment_mean_pool_reference(x: Tensor, cu_segments: Tensor, longest: int) -> Tensor:
    batch, count = len(x), cu_segments.shape[1] - 1
    owner = owners(cu_segments, x.shape[1])
    starts = cu_segments.gather(1, owner.clamp(max=max(count - 1, 0)))
    # One slot more takes what belongs to no segment.
    place_in = torch.arange(x.shape[1], device=x.device) - starts
    slots = torch.where(owner < count, owner * longest + place_in, count * longest)
    laid = place(exact(x), slots, count * longest + 1)[:, :-1].unflatten(1, (count, longest))
    sizes = cu_segments.diff(dim=1).clamp(min=1).to(laid.dtype)
    return laid.sum(2) / sizes.reshape(batch, count, *[1] * (x.ndim - 2))


def owners(cu_segments: Tensor, length: int) -> Tensor:
    """The segment of each token, [B, T]; S of none."""
    tokens = torch.arange(length, device=cu_segments.device).expand(len(cu_segments), -1).contiguous()
    owner = torch.searchsorted(cu_segments[:, 1:].contiguous(), tokens, right=True)
    return torch.where(tokens < cu_segments[:, :1], cu_segments.shape[1] - 1, owner)
