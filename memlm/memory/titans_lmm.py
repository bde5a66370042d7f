"""Titans' long-term memory module (LMM), without attention of its own (arXiv:2501.00663, section 3)."""

from torch import Tensor

from memlm.memory import titans
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.parts import memory_share
from memlm.memory.rows import Rows
from memlm.memory.state import State

Config = titans.NeuralMemoryConfig


class Mixer(titans.NeuralMemory):
    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(config, dims)

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        out = super().forward(x_BTD, state, rows)
        if not rows.metrics:
            return out
        norms = self.store.norms(state, out.state, rows)
        return out._replace(metrics=out.metrics | norms | {"memory_share": memory_share(out.y_BTD, x_BTD)})
