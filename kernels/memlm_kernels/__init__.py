"""Memory operators: a plain PyTorch reference for each, and faster backends behind the same signature.

Imports torch, and Triton lazily, and nothing else.
"""

from memlm_kernels.backend import choose
from memlm_kernels.large_chunk_memory import LargeChunkMemoryState, large_chunk_memory
from memlm_kernels.neural_memory import NeuralMemoryState, neural_memory, read_memory

__all__ = [
    "LargeChunkMemoryState",
    "NeuralMemoryState",
    "choose",
    "large_chunk_memory",
    "neural_memory",
    "read_memory",
]
