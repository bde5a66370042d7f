"""Titans' long-term memory module (LMM): the memory is the layer's whole mixer (arXiv:2501.00663, section 3)."""

from torch import Tensor

from memlm.memory import titans
from memlm.memory.base import Dims, MixerContext, MixerOutput, State
from memlm.memory.parts import memory_share

Config = titans.NeuralMemoryConfig


class Mixer(titans.NeuralMemory):
    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(config, dims)

    def forward(self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None) -> MixerOutput:
        out = super().forward(x_BTD, state, ctx)
        norms = self.store.norms(state, out.state, x_BTD.shape[1], ctx)
        return out._replace(metrics=out.metrics | norms | {"memory_share": memory_share(out.y_BTD, x_BTD)})
