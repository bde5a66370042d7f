"""Titans, memory as a gate (MAG): sliding-window attention beside a neural memory (arXiv:2501.00663, section 4.2).

Persistent tokens stand before the attention's window; the memory does not write them, for its learned start M_0
subsumes what they would write.
"""

import torch
from torch import Tensor

from memlm.memory import attention, titans
from memlm.memory.base import Dims, MixerContext, MixerOutput, SequenceMixer, State, joined, substate
from memlm.memory.parts import BranchGate

Config = titans.HybridConfig


class Mixer(SequenceMixer):
    """Both branches read the same input; neither waits for the other."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.attention = attention.Mixer(config.attention(), dims, layer_idx)
        self.memory = titans.NeuralMemory(config, dims)
        self.gate = BranchGate(dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        parts = {"memory": self.memory, "attention": self.attention}
        return joined({name: part.init_state(batch_size, device, dtype) for name, part in parts.items()})

    def forward(self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None) -> MixerOutput:
        seen = self.attention(x_BTD, substate(state, "attention") if state else None, ctx)
        own = substate(state, "memory") if state else None
        recalled = self.memory(x_BTD, own, ctx)
        y_BTD, metrics = self.gate(x_BTD, seen.y_BTD, recalled.y_BTD)
        state = joined({"memory": recalled.state, "attention": seen.state})
        metrics |= recalled.metrics | self.memory.store.norms(own, recalled.state, x_BTD.shape[1], ctx)
        return MixerOutput(y_BTD, state, {}, metrics)
