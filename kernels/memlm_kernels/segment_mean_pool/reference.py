"""Segments laid on a grid of equal width, and summed: deterministic, forward and backward, and without the
cancellation of differences of running sums.
"""

import torch
from torch import Tensor

from memlm_kernels.grid import place
from memlm_kernels.segments import exact


def segment_mean_pool_reference(x: Tensor, cu_segments: Tensor, longest: int) -> Tensor:
    batch, count = len(x), cu_segments.shape[1] - 1
    tokens = torch.arange(x.shape[1], device=x.device).expand(batch, -1).contiguous()
    ends = cu_segments[:, 1:].contiguous()
    owner = torch.searchsorted(ends, tokens, right=True)
    inside = (owner < count) & (tokens >= cu_segments[:, :1])
    starts = cu_segments.gather(1, owner.clamp(max=max(count - 1, 0)))
    # One slot more takes what belongs to no segment.
    slots = torch.where(inside, owner * longest + tokens - starts, count * longest)
    laid = place(exact(x), slots, count * longest + 1)[:, :-1].unflatten(1, (count, longest))
    sizes = (ends - cu_segments[:, :-1]).clamp(min=1).to(laid.dtype)
    return laid.sum(2) / sizes.reshape(batch, count, *[1] * (x.ndim - 2))
