"""A linear recurrence as a part: from projections to reads by an update rule of ``rules``, and its layer.

B batch, T tokens, D hidden, S segments of a row (see ``memlm_kernels.segments``), H heads, V value dim, C channels of
q, k, v together, L logits of the gates.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import ExactLinear, GroupedLinear, RMSNorm, ShortConv, products
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.joined import Joined
from memlm.memory.parts import Recalled, gate_logits, start_delayed
from memlm.memory.rows import Rows, Segments
from memlm.memory.rules import RULES
from memlm.memory.rules import Config as Config
from memlm.memory.state import State
from memlm.memory.stretches import Stretches
from memlm_kernels.backend import autocast_type
from memlm_kernels.segments import exact, exact_type
from memlm_kernels.short_convolution import parts_of


class Recurrence(nn.Module):
    """From projections to reads: convolution, SiLU, and an update rule, along each segment."""

    def __init__(self, rule: str, config: Config, convolve: bool = True) -> None:
        super().__init__()
        self.config = config
        self.rule = RULES[rule](config)
        convolve = convolve and config.conv_size > 1
        self.conv = ShortConv(sum(config.sizes), config.conv_size, silu=True) if convolve else None

    def init_state(self, batch_size: int, memories: int, device: torch.device, dtype: torch.dtype) -> State:
        """[B, memories, ...]"""
        state = self.rule.init_state(batch_size * memories, device, dtype)
        if self.conv is not None:
            shape = (batch_size * memories, self.config.conv_size - 1, sum(self.config.sizes))
            state["conv"] = torch.zeros(shape, device=device, dtype=dtype)
        return {name: x.unflatten(0, (batch_size, memories)) for name, x in state.items()}

    def forward(
        self,
        qkv_BTC: Tensor,
        logits_BTL: Tensor,
        cu_seqlens: Tensor | None,
        state: State,
        across_N: Tensor | None = None,
        told: bool = True,
        joined: Joined | None = None,
        fresh: bool = False,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """state: [B, S, ...]; across_N: an order of tokens of all rows to convolve along, across segments; fresh:
        whether all states are initial.

        Returns reads [B, T, H, V] in fp32 or more, the new state, and metrics if ``told``.
        """
        state, conv, config = dict(state), {}, self.config
        # The ops round fp32 to autocast's type, so it comes rounded.
        dtype = exact_type(qkv_BTC) if joined else autocast_type(qkv_BTC) or exact_type(qkv_BTC)
        parts: Any = {"sizes": config.sizes, "factor": config.head_dim**-0.5, "dtype": dtype}
        if self.rule.unit_keys:
            parts |= {"unit": 2, "head_dim": config.head_dim, "eps": 1e-6}
        if self.conv is None:
            q, k, v = parts_of(F.silu(qkv_BTC), **parts)
        else:
            history = state.pop("conv")
            if joined is not None:
                ends = self.conv.over_segments(qkv_BTC, history, cu_seqlens)[1]
                qkv_BTC, history = joined.history(qkv_BTC, ends)
            if cu_seqlens is None and across_N is None:
                (q, k, v), after = self.conv([qkv_BTC], history[:, 0], None, None, **parts)
                conv["conv"] = after[:, None]
            elif fresh and qkv_BTC.shape[1] and cu_seqlens is not None and across_N is None and joined is None:
                (q, k, v), conv["conv"] = self.conv.over_fresh_segments(qkv_BTC, cu_seqlens, **parts)
            else:
                convolved_BTC, conv["conv"] = self.conv.over_segments(qkv_BTC, history, cu_seqlens)
                if across_N is not None:
                    row_1NC = qkv_BTC.flatten(0, 1)[across_N][None]
                    start_1WC = row_1NC.new_zeros(1, config.conv_size - 1, row_1NC.shape[2])
                    row_1NC, _ = self.conv.over_rows(row_1NC, start_1WC, None, None)
                    convolved_BTC = convolved_BTC.flatten(0, 1).index_copy(0, across_N, row_1NC[0]).view_as(qkv_BTC)
                q, k, v = parts_of(convolved_BTC, **parts)
        q, k, v = (x if x.ndim == 4 else x.unflatten(-1, (config.num_heads, -1)) for x in (q, k, v))
        o, memory, metrics = self.rule(q, k, v, exact(logits_BTL), cu_seqlens, state, told, joined)
        return o, {**memory, **conv}, metrics


def recur(
    recurrence: Recurrence,
    inputs: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None,
    documents: Segments | None,
    before: State,
    start: State,
    across_N: Tensor | None = None,
    told: bool = True,
    stretches: Stretches | None = None,
    fresh: bool = False,
) -> tuple[Tensor, State, dict[str, Tensor]]:
    """``Recurrence.forward`` with a segment for each document and memory; before, start and the new state: [B, M,
    ...].
    """
    state = documents.spread(before, start) if documents else before
    joined = None
    if stretches is not None:
        memories = len(next(iter(before.values()))[0])
        joined = Joined.counted(stretches, documents, cu_seqlens, inputs[0], memories)
    o, after, metrics = recurrence(*inputs, cu_seqlens, state, across_N, told, joined, fresh)
    return o, documents.collect(after) if documents else after, metrics


class Readout(nn.Module):
    """The heads' reads after a norm, a gate per token, and the output projection."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.value_dim or config.head_dim, eps=dims.rms_norm_eps)
        self.output_gate_proj = nn.Linear(dims.hidden_size, config.sizes[2], bias=False)
        self.o_proj = nn.Linear(config.sizes[2], dims.hidden_size, bias=False)
        self.recalled = Recalled()

    def forward(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        return self.recalled(self.o_proj(self.norm(o_BTHV, self.output_gate_proj(x_BTD))))


class Layer(SequenceMixer):
    """A rule alone: one memory that every token writes."""

    rule: str
    at_once = True

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.recurrence = Recurrence(self.rule, config)
        queries, keys, values = config.sizes
        self.q_proj = nn.Linear(dims.hidden_size, queries, bias=False)
        self.kv_proj = nn.Linear(dims.hidden_size, keys + values, bias=False)
        logits = self.recurrence.rule.logits
        self.gates = ExactLinear(dims.hidden_size, logits, bias=False) if logits else None
        self.reading = Readout(config, dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.recurrence.rule.reset_parameters()
        if self.gates is not None:
            init.zeros_(self.gates.weight)
        if self.config.initialization == "recall":
            start_for_recall(self.q_proj, self.kv_proj, self.recurrence.conv, self.config, 1)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.recurrence.init_state(batch_size, 1, device, dtype)

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        documents = rows.segments()
        start = self.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype) if documents else state
        q_BTC, kv_BTC, *logits = products(x_BTD, self.q_proj, self.kv_proj, *([self.gates] if self.gates else []))
        inputs = torch.cat([q_BTC, kv_BTC], -1), exact(logits[0]) if logits else gate_logits(None, x_BTD)
        cu_seqlens = documents.cu_seqlens if documents else None
        told = rows.metrics
        options: Any = {"told": told, "stretches": rows.stretches, "fresh": rows.start == 0}
        o_BTHV, after, metrics = recur(self.recurrence, inputs, cu_seqlens, documents, state, start, **options)
        if told:
            metrics["memory_norm"] = torch.linalg.vector_norm(after["memory"].detach()) / len(x_BTD) ** 0.5
        return MixerOutput(self.reading(o_BTHV, x_BTD), after, {}, metrics)


def start_for_recall(
    q_proj: nn.Linear, kv_proj: nn.Linear | GroupedLinear, conv: ShortConv | None, config: Config, memories: int
) -> None:
    """Initialise queries equal to the keys of every memory; each key channel looks a random few tokens back."""
    queries, keys, values = config.sizes
    weight = kv_proj.weight.detach().unflatten(0, (memories, keys + values)).clone()
    weight[:, :keys] = weight[:1, :keys].clone()
    init.copy_(q_proj.weight, weight[0, :keys])
    init.copy_(kv_proj.weight, weight.flatten(0, 1))
    if conv is not None:
        start_delayed(conv, queries, keys)
