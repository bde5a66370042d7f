"""Softmax attention to a window, to a prefix, and to chunks that each token chooses.

``window`` and ``chunks`` hold the ops, ``*_reference`` their form in plain PyTorch. One set of Triton kernels serves
all ops: ``kernels`` and ``chunk_kernels`` attend, ``triton`` launches them; ``choice_kernels`` and ``choice_triton``
choose chunks.
"""

from memlm_kernels.attention.chunks import (
    Attended,
    ChunkReaders,
    chunk_mean_attention,
    chunk_sparse_attention,
    chunk_topk,
    invert_chunks,
)
from memlm_kernels.attention.window import WindowAttended, prefix_window_attention
from memlm_kernels.attention.window_reference import plain

__all__ = [
    "Attended",
    "ChunkReaders",
    "WindowAttended",
    "chunk_mean_attention",
    "chunk_sparse_attention",
    "chunk_topk",
    "invert_chunks",
    "plain",
    "prefix_window_attention",
]
