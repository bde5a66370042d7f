"""Titans' long-term memory module (LMM): the memory is the layer's whole mixer (arXiv:2501.00663, section 3)."""

from memlm.memory import titans
from memlm.memory.base import Dims

Config = titans.NeuralMemoryConfig


class Mixer(titans.NeuralMemory):
    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(config, dims)
