"""Titans, memory as a gate (MAG): sliding-window attention beside a neural memory (arXiv:2501.00663, section 4.2).

Persistent tokens come before the attention's window. The memory does not write them, because its learned initial
weights M_0 can hold as much. With ``eidetic_slots``, attention also sees the tokens that surprised the memory most
(``memlm.memory.eidetic``).
"""

import torch
from torch import Tensor

from memlm.memory import titans
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.parts import BranchGate
from memlm.memory.rows import Rows
from memlm.memory.state import State

Config = titans.HybridConfig


class Mixer(SequenceMixer):
    """Both branches read the same input; without slots, neither waits for the other."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.attention = config.branch(dims, layer_idx)
        self.memory = titans.NeuralMemory(config, dims)
        self.slots = self.memory.store.with_surprise = config.eidetic_slots > 0
        self.gate = BranchGate(dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()

    @property
    def at_once(self) -> bool:  # type: ignore[override]
        return self.memory.at_once and not self.slots

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        parts = {"memory": self.memory, "attention": self.attention}
        return {name: part.init_state(batch_size, device, dtype) for name, part in parts.items()}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        recalled = self.memory(x_BTD, state["memory"], rows)
        surprise = [recalled.metrics["surprise"]] if self.slots else []
        seen = self.attention(x_BTD, state["attention"], rows, *surprise)
        y_BTD, metrics = self.gate(x_BTD, seen.y_BTD, recalled.y_BTD, rows.metrics)
        if rows.metrics:
            metrics |= seen.metrics | recalled.metrics
            metrics |= self.memory.store.norms(state["memory"], recalled.state, rows)
        return MixerOutput(y_BTD, {"memory": recalled.state, "attention": seen.state}, {}, metrics)
