"""Means of short segments of each row.

Files:

    naive               the definition as a loop, and the form on a grid
    reference           the means in PyTorch
    kernels, triton     Triton kernels, and the op around them
"""

from torch import Tensor

from memlm_kernels.backend import pick
from memlm_kernels.checks import check_range, check_tensors, segments_within
from memlm_kernels.segment_mean_pool.reference import segment_mean_pool_reference

__all__ = ["segment_mean_pool"]


def segment_mean_pool(x: Tensor, cu_seqlens: Tensor, *, longest: int, backend: str = "auto") -> Tensor:
    """The mean of each segment: y_s = mean(x[start_s : end_s]), such as the pooled keys of chunks (Memory Sparse
    Attention, arXiv:2603.23516). A segment may be empty.

    x: [B, T, ...]
    cu_seqlens: [B, S + 1] integers from 0 to T, ascending; segment s of row b holds x[b, cu[b, s] : cu[b, s + 1]]
    longest: an upper bound on a segment's length, as a Python int

    Returns [B, S, ...] in fp32 (fp64 for fp64), zeros where a segment is empty. Entries outside all segments are
    ignored. On a GPU cu_seqlens are not checked: a number out of range counts as the nearest allowed, and a longer
    segment as its first ``longest`` entries. Raises ValueError if shapes, types or devices disagree, cu_seqlens are
    out of range, longest < 1, or the backend cannot run.
    """
    if x.ndim < 2 or cu_seqlens.ndim != 2 or len(cu_seqlens) != len(x) or cu_seqlens.shape[1] < 1:
        shapes = f"x {list(x.shape)} and cu_seqlens {list(cu_seqlens.shape)}"
        raise ValueError(f"{shapes} must be [B, T, ...] and [B, S + 1]")
    if longest < 1:
        raise ValueError(f"longest={longest} must be at least 1")
    check_tensors({"x": x}, {"cu_seqlens": cu_seqlens})
    cu_seqlens = segments_within("cu_seqlens", cu_seqlens, x.shape[1])
    check_range(f"lengths of segments, longest={longest},", cu_seqlens.diff(dim=1), 0, longest + 1)
    longest = min(longest, max(1, x.shape[1]))
    chosen = pick("segment_mean_pool", backend, x, None, cu_seqlens, products=False)
    if chosen == "reference" or x.numel() == 0 or cu_seqlens.shape[1] == 1:
        return segment_mean_pool_reference(x, cu_seqlens, longest)
    from memlm_kernels.segment_mean_pool.triton import segment_mean_pool_triton

    return segment_mean_pool_triton(x, cu_seqlens, longest)
