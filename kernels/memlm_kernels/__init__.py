"""Memory operators: a plain PyTorch reference for each, and faster backends behind the same signature.

Imports torch, and Triton lazily, and nothing else.
"""

from memlm_kernels.attention import (
    chunk_mean_attention,
    chunk_sparse_attention,
    chunk_topk,
    invert_chunks,
    prefix_window_attention,
)
from memlm_kernels.backend import choose, set_backend
from memlm_kernels.grouped_linear import grouped_linear
from memlm_kernels.large_chunk_memory import LargeChunkMemoryState, large_chunk_memory
from memlm_kernels.neural_memory import (
    NeuralMemoryState,
    SegmentedMemoryState,
    neural_memory,
    read_memory,
    segmented_neural_memory,
)
from memlm_kernels.recurrence import delta_rule, linear_attention
from memlm_kernels.route_documents import merge_topk, route_documents
from memlm_kernels.routed_memory import MemoryRoutes, combine_reads, dispatch_tokens
from memlm_kernels.segment_mean_pool import segment_mean_pool

__all__ = [
    "LargeChunkMemoryState",
    "MemoryRoutes",
    "NeuralMemoryState",
    "SegmentedMemoryState",
    "choose",
    "chunk_mean_attention",
    "chunk_sparse_attention",
    "chunk_topk",
    "combine_reads",
    "delta_rule",
    "dispatch_tokens",
    "grouped_linear",
    "invert_chunks",
    "large_chunk_memory",
    "linear_attention",
    "merge_topk",
    "neural_memory",
    "prefix_window_attention",
    "read_memory",
    "route_documents",
    "segment_mean_pool",
    "segmented_neural_memory",
    "set_backend",
]
