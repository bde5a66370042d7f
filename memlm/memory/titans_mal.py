"""Titans, memory as a layer (MAL): a neural memory, then attention on it (arXiv:2501.00663, section 4.3).

    h = memory(x)        y = h + attention(norm(x + h))

The residual connections are the paper's "residual connections in all blocks". Persistent tokens come only before the
attention's window. In the paper the memory writes them first; here its learned initial weights M_0 can hold as much.
With ``eidetic_slots``, attention also sees the tokens that surprised the memory most (``memlm.memory.eidetic``).
"""

import torch
from torch import Tensor

from memlm.layers import RMSNorm
from memlm.memory import titans
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.parts import memory_share
from memlm.memory.rows import Rows
from memlm.memory.state import State

Config = titans.HybridConfig


class Mixer(SequenceMixer):
    """Attention sees each token with its read of the memory added."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.memory = titans.NeuralMemory(config, dims)
        self.slots = self.memory.store.with_surprise = config.eidetic_slots > 0
        self.norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.attention = config.branch(dims, layer_idx)

    @property
    def at_once(self) -> bool:  # type: ignore[override]
        return self.memory.at_once and not self.slots

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        parts = {"memory": self.memory, "attention": self.attention}
        return {name: part.init_state(batch_size, device, dtype) for name, part in parts.items()}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        recalled = self.memory(x_BTD, state["memory"], rows)
        input_BTD = self.norm(x_BTD + recalled.y_BTD)
        surprise = [recalled.metrics["surprise"]] if self.slots else []
        seen = self.attention(input_BTD, state["attention"], rows, *surprise)
        metrics: dict[str, Tensor] = {}
        if rows.metrics:
            metrics = seen.metrics | recalled.metrics
            metrics |= self.memory.store.norms(state["memory"], recalled.state, rows)
            metrics["memory_share"] = memory_share(recalled.y_BTD, seen.y_BTD)
        after = {"memory": recalled.state, "attention": seen.state}
        return MixerOutput(recalled.y_BTD + seen.y_BTD, after, {}, metrics)
