"""Means of short segments of each row."""

from torch import Tensor

from memlm_kernels.backend import choose, with_triton
from memlm_kernels.segment_mean_pool.reference import segment_mean_pool_reference

__all__ = ["segment_mean_pool"]


def segment_mean_pool(x: Tensor, cu_segments: Tensor, *, longest: int, backend: str = "auto") -> Tensor:
    """The mean of each segment's entries; a segment may have any length up to ``longest``, none too.

    x: [B, T, ...]   cu_segments: [B, S + 1] integers, segment s of row b holds x[b, cu[b, s] : cu[b, s + 1]]
    longest: an upper bound on a segment's length, known without the device

    Returns [B, S, ...] in fp32 (fp64 for fp64), zeros where a segment is empty. What stands outside all segments is
    ignored. Raises ValueError if shapes disagree, longest < 1, or the backend cannot run.
    """
    if cu_segments.ndim != 2 or len(cu_segments) != len(x) or cu_segments.shape[1] < 1:
        raise ValueError(f"cu_segments {list(cu_segments.shape)} must be [B, S + 1] with B={len(x)}")
    if cu_segments.is_floating_point():
        raise ValueError(f"cu_segments are {cu_segments.dtype}; give integers")
    if longest < 1:
        raise ValueError(f"longest={longest} must be at least 1")
    chosen = choose("segment_mean_pool", backend, *with_triton(x, None, products=False))
    if chosen == "reference" or x.numel() == 0 or cu_segments.shape[1] == 1:
        return segment_mean_pool_reference(x, cu_segments, longest)
    from memlm_kernels.segment_mean_pool.triton import segment_mean_pool_triton

    return segment_mean_pool_triton(x, cu_segments, longest)
