"""Titans, memory as a gate (MAG): sliding-window attention beside a neural memory (arXiv:2501.00663, section 4.2).

    y = g * norm(memory(x)) + (1 - g) * norm(attention(x)),   g = sigmoid(W x + b), one for each channel

The paper multiplies the two normalised branches; the convex gate keeps either branch alive when the
other is silent. Persistent tokens stand before the attention's window; the memory does not write
them, for its learned start M_0 subsumes what they would write.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import RMSNorm
from memlm.memory import attention, titans
from memlm.memory.base import Dims, MixerContext, MixerOutput, SequenceMixer, State, prefixed, substate


@dataclass(frozen=True)
class Config(titans.NeuralMemoryConfig):
    """window_size: tokens the attention branch sees; persistent_tokens: learned tokens it always sees.
    attention_conv_size: width of the attention branch's own convolution, 0 for none.
    """

    window_size: int = 16
    persistent_tokens: int = 4
    attention_conv_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attention()

    def attention(self) -> attention.Config:
        """Settings of the attention branch."""
        return attention.Config(self.window_size, self.attention_conv_size, self.persistent_tokens)


class Mixer(SequenceMixer):
    """Both branches read the same input; neither waits for the other."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.attention = attention.Mixer(config.attention(), dims, layer_idx)
        self.memory = titans.NeuralMemory(config, dims)
        self.attention_norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.memory_norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.branch_gate = nn.Linear(dims.hidden_size, dims.hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.branch_gate.weight)
        init.zeros_(self.branch_gate.bias)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        parts = {"attention": self.attention, "memory": self.memory}
        states = {name: part.init_state(batch_size, device, dtype) for name, part in parts.items()}
        return self._join(states["attention"], states["memory"])

    def forward(self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None) -> MixerOutput:
        seen = self.attention(x_BTD, substate(state, "attention") if state else None, ctx)
        recalled = self.memory(x_BTD, substate(state, "memory") if state else None, ctx)
        gate_BTD = torch.sigmoid(self.branch_gate(x_BTD))
        y_BTD = torch.lerp(self.attention_norm(seen.y_BTD), self.memory_norm(recalled.y_BTD), gate_BTD)
        metrics = {"gate": gate_BTD.detach().mean(), **recalled.metrics}
        return MixerOutput(y_BTD, self._join(seen.state, recalled.state), {}, metrics)

    @staticmethod
    def _join(attention_state: State, memory_state: State) -> State:
        return {
            "position": memory_state["position"],
            **prefixed("attention", attention_state),
            **prefixed("memory", memory_state),
        }
