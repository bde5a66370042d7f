"""Softmax attention to a window, to a prefix, and to chunks or documents that each token chooses.

Files:

    naive               attention, one query at a time, and the derivation of the tiled form
    window, chunks, documents       the ops
    window_reference, chunks_reference, choice_reference  the ops in plain PyTorch
    one_token           the ops of chunks for a single token per row
    kernels, chunk_kernels, triton  attention of all ops in Triton
    cut, gathering  the programs of a call; chunks that gather the tokens that chose them
    choice_kernels, choice_triton   the choice of chunks in Triton
"""

from memlm_kernels.attention.chunks import (
    Attended,
    ChunkReaders,
    chunk_mean_attention,
    chunk_sparse_attention,
    chunk_topk,
    invert_chunks,
)
from memlm_kernels.attention.documents import document_attention
from memlm_kernels.attention.window import WindowAttended, prefix_window_attention
from memlm_kernels.attention.window_reference import plain

__all__ = [
    "Attended",
    "ChunkReaders",
    "WindowAttended",
    "chunk_mean_attention",
    "chunk_sparse_attention",
    "chunk_topk",
    "document_attention",
    "invert_chunks",
    "plain",
    "prefix_window_attention",
]
