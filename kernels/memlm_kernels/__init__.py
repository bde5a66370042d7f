"""Memory operators: a plain PyTorch reference for each, and faster backends behind the same signature.

Every op takes ``backend``: ``auto`` (the default), ``reference``, or another that its docstring or
``kernels/README.md`` names. All tensors of a call lie on one device. Floats are float32, float16 and bfloat16, also
mixed, or all float64.

The package imports only torch; it imports Triton lazily.

Files:

    neural_memory       Titans' memory, for rows and for segments
    large_chunk_memory  LaCT's memory
    recurrence          linear recurrences: linear attention and the delta rule
    attention           attention to a window, a prefix and chosen chunks
    routed_memory       tokens sent to the memories that a router chose, and their reads summed
    grouped_linear      products of rows with the matrix of their group, and of few rows with several matrices
    route_documents     the choice of the best documents for a query
    segment_mean_pool   means of short segments
    rms_norm            the root-mean-square norm, and the gate behind it
    rotary              rotary positions of queries and keys
    short_convolution   the causal convolution in front of a memory
    grid                rows of tokens, ragged or packed, laid on chunks
    segments            rows as segments, each with its own state, laid on chunks
    pieces              a recurrence cut along its rows
    checks              checks of types, devices and indices, shared by all ops
    backend             the choice of a backend, per call or for all (``hardware.kernels``)
    proof, trial        the checks of kernels on this machine, and their verdicts
    loops               loops in Python as single ops for a compiler
    launch              launching Triton kernels: tiles and shared code
    ops                 ops of torch that launch kernels, at little host time
    topk                the largest scores and their entries
    calls               a call of every op, of any size
    testing             comparison and gradients for tests
"""

from memlm_kernels.attention import (
    chunk_mean_attention,
    chunk_sparse_attention,
    chunk_topk,
    document_attention,
    invert_chunks,
    prefix_window_attention,
)
from memlm_kernels.backend import choose, set_backend
from memlm_kernels.grouped_linear import grouped_linear, linears
from memlm_kernels.large_chunk_memory import LargeChunkMemoryState, large_chunk_memory
from memlm_kernels.neural_memory import (
    NeuralMemoryState,
    SegmentedMemoryState,
    neural_memory,
    read_memory,
    segmented_neural_memory,
)
from memlm_kernels.recurrence import delta_rule, linear_attention
from memlm_kernels.rms_norm import rms_norm
from memlm_kernels.rotary import rotary
from memlm_kernels.route_documents import RouterShard, merge_topk, nominate_documents, route_documents
from memlm_kernels.routed_memory import MemoryRoutes, combine_reads, dispatch_tokens
from memlm_kernels.segment_mean_pool import segment_mean_pool
from memlm_kernels.short_convolution import short_convolution

__all__ = [
    "LargeChunkMemoryState",
    "MemoryRoutes",
    "NeuralMemoryState",
    "RouterShard",
    "SegmentedMemoryState",
    "choose",
    "chunk_mean_attention",
    "chunk_sparse_attention",
    "chunk_topk",
    "combine_reads",
    "delta_rule",
    "dispatch_tokens",
    "document_attention",
    "grouped_linear",
    "invert_chunks",
    "large_chunk_memory",
    "linear_attention",
    "linears",
    "merge_topk",
    "neural_memory",
    "nominate_documents",
    "prefix_window_attention",
    "read_memory",
    "rms_norm",
    "rotary",
    "route_documents",
    "segment_mean_pool",
    "segmented_neural_memory",
    "set_backend",
    "short_convolution",
]
