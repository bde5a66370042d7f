"""Titans, memory as a context (MAC): attention in segments, to what the memory held before the segment and to the
segment itself, whose outputs the memory then writes (arXiv:2501.00663, section 4.1).

For each segment x of C tokens, with M_0 the memory before it:

    h = M_0*(x)        a = attention([persistent | h | x])        u = norm(x + a)        M <- M(u)
    y = g * norm(M*(u)) + (1 - g) * norm(a)

Literally read, the paper's MAC looks into the future: a token attends to h_i of later tokens of its segment, and the
second read sees a memory that has written them. Here token j attends to h_i and x_i of i <= j only, and its second
read is of the memory that has written u_i of i <= j. Attention is causal over h_0 x_0 h_1 x_1 ..., which is just that.
Ours too: what is written is norm(x + a), where the paper writes a; and the gate, where it multiplies both branches.

B batch, T tokens, S tokens of a piece (a segment, or what a call has of one), N pieces, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from memlm.layers import RMSNorm
from memlm.memory import attention, titans
from memlm.memory.base import Dims, MixerContext, MixerOutput, SequenceMixer, State, joined, substate, token_positions
from memlm.memory.parts import BranchGate
from memlm.settings import require
from memlm_kernels import read_memory
from memlm_kernels.grid import Grid, ragged_grid


@dataclass(frozen=True)
class Config(titans.NeuralMemoryConfig):
    """segment_size: tokens of a segment, whole chunks of the memory; persistent_tokens: learned tokens that all see;
    attention_conv_size: width of the attention's own convolution over h_0 x_0 h_1 x_1 ..., 0 for none.
    initial_lr null: as for the other forms, but 0.025 instead of 0.047.
    """

    # The memory writes what attention read of it: with 0.047 noise drowns what is 512 tokens old.
    linear_lr: ClassVar[float] = 0.025

    segment_size: int = 32
    persistent_tokens: int = 4
    attention_conv_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.segment_size >= 1 and self.segment_size % self.chunk_size == 0,
            f"segment_size={self.segment_size} must be a multiple of chunk_size={self.chunk_size}",
        )
        self.attention()

    def attention(self) -> attention.Config:
        """Settings of the attention over both streams of a segment."""
        return attention.Config(2 * self.segment_size, self.attention_conv_size, self.persistent_tokens)


class Memory(titans.NeuralMemory):
    def forward(
        self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None, write: bool = True
    ) -> MixerOutput:
        """write: False for a pure query at ``ctx.positions_BT`` of a state that holds ``weights.*``, and in ``conv``
        the queries' history alone.
        """
        if write:
            return super().forward(x_BTD, state, ctx)
        assert state is not None and ctx is not None
        q_BTC = self.q_proj(x_BTD)
        channels = slice(q_BTC.shape[-1])
        q_BTC, conv = self.conv.over_rows(q_BTC, state["conv"], ctx.positions_BT, ctx.lengths_B, channels)
        o_BTHK = read_memory(self.features(self.heads(q_BTC)), _weights(state), **self.store.network())
        return MixerOutput(self.output(o_BTHK, x_BTD)[0], {**state, "conv": conv}, {}, {})


class Mixer(SequenceMixer):
    """Sequential over segments, for attention stands inside the memory's recurrence."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.attention = attention.Mixer(config.attention(), dims, layer_idx)
        self.norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.memory = Memory(config, dims)
        self.gate = BranchGate(dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        memory = self.memory.init_state(batch_size, device, dtype)
        seen = self.attention.init_state(batch_size, device, dtype)
        # For the first read: the convolution of its queries, and the memory before the segment.
        channels = self.memory.conv.channels // 3
        read = {"conv": memory["conv"][..., :channels].clone()}
        read |= {name: x for name, x in memory.items() if name.startswith("weights.")}
        return joined({"memory": memory, "attention": seen, "read": read})

    def forward(self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None) -> MixerOutput:
        if x_BTD.shape[1] == 0:
            return MixerOutput(x_BTD, state or self.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype), {}, {})
        before = substate(state, "memory") if state else None
        grid = None
        if state is None and ctx is None:
            segments = self._whole_segments(x_BTD)
        else:
            segments, grid = self._pieces(x_BTD, state, ctx or MixerContext())

        def joined_up(parts: Sequence[Tensor]) -> Tensor:
            x = torch.cat(list(parts), 1)
            return x if grid is None else grid.take(x.unflatten(1, (grid.count, -1)))

        seen_BTD, recalled_BTD = (joined_up(parts) for parts in zip(*(s[:2] for s in segments), strict=True))
        y_BTD, metrics = self.gate(x_BTD, seen_BTD, recalled_BTD)
        metrics |= {name: joined_up([s.metrics[name] for s in segments]) for name in segments[-1].metrics}
        after = segments[-1].state
        metrics |= self.memory.store.norms(before, substate(after, "memory"), x_BTD.shape[1], ctx)
        return MixerOutput(y_BTD, after, {}, metrics)

    def _whole_segments(self, x_BTD: Tensor) -> list["_Segment"]:
        """Rows from their document's start: segments need no search, and attention starts afresh in each."""
        state = self.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype)
        read, memory, segments = substate(state, "read"), None, []
        starts = zip(self.memory.store.memory(), _weights(read), strict=True)
        weights = tuple(start.to(kept.dtype).expand_as(kept) for start, kept in starts)
        for x_BSD in x_BTD.split(self.config.segment_size, 1):
            asked = _asked(read, weights)
            segments.append(self._segment(x_BSD, asked, memory, MixerContext(aligned=True), None, None))
            read, memory = (substate(segments[-1].state, name) for name in ("read", "memory"))
            weights = _weights(memory)
        return segments

    def _pieces(self, x_BTD: Tensor, state: State | None, ctx: MixerContext) -> tuple[list["_Segment"], Grid]:
        """Rows that start anywhere: laid out so that piece n holds what each row has of its n-th segment, first."""
        state = self.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype) if state is None else state
        size, positions_BT = self.config.segment_size, token_positions(x_BTD, state, ctx)
        opens_BT = positions_BT % size == 0
        in_first_BT = opens_BT.cumsum(1) == opens_BT[:, :1]
        moved_BT = positions_BT - torch.where(in_first_BT, positions_BT[:, :1] % size, 0)
        grid = ragged_grid(moved_BT, ctx.lengths_B, size, ctx.max_documents)
        x_BNSD, positions_BNS = grid.lay(x_BTD), grid.lay(positions_BT)
        lengths_BN = grid.lay(torch.ones_like(positions_BT)).sum(-1)
        segments, starts = [], self.memory.store.memory()
        for n in range(grid.count):
            positions_BS, lengths_B = positions_BNS[:, n], lengths_BN[:, n]
            memory, read, first_B = substate(state, "memory"), substate(state, "read"), positions_BS[:, 0]
            new, opened = (((lengths_B > 0) & x)[:, None, None, None] for x in (first_B == 0, first_B % size == 0))
            weights = [
                torch.where(new, start.to(now.dtype), torch.where(opened, now, kept))
                for start, now, kept in zip(starts, _weights(memory), _weights(read), strict=True)
            ]
            places_BS = positions_BS % size
            pairs = MixerContext(torch.stack([2 * places_BS, 2 * places_BS + 1], 2).flatten(1), 2 * lengths_B)
            segments.append(
                self._segment(
                    x_BNSD[:, n],
                    _asked(read, weights),
                    memory,
                    MixerContext(positions_BS, lengths_B),
                    substate(state, "attention"),
                    pairs,
                )
            )
            state = segments[-1].state
        return segments, grid

    def _segment(
        self,
        x_BSD: Tensor,
        read: State,
        memory: State | None,
        ctx: MixerContext,
        seen_state: State | None,
        seen_ctx: MixerContext | None,
    ) -> "_Segment":
        """read: for the first read; memory, ctx: for the write and the second; the rest for the attention."""
        held = self.memory(x_BSD, read, ctx, write=False)
        pairs = torch.stack([held.y_BTD, x_BSD], 2).flatten(1, 2)
        seen = self.attention(pairs, seen_state, seen_ctx)
        seen_BSD = seen.y_BTD[:, 1::2]
        recalled = self.memory(self.norm(x_BSD + seen_BSD), memory, ctx)
        state = joined({"memory": recalled.state, "attention": seen.state, "read": held.state})
        return _Segment(seen_BSD, recalled.y_BTD, state, recalled.metrics)


class _Segment(NamedTuple):
    """Outputs of both branches, the state after them, the memory's metrics of tokens."""

    seen_BSD: Tensor
    recalled_BSD: Tensor
    state: State
    metrics: dict[str, Tensor]


def _weights(state: State) -> tuple[Tensor, ...]:
    return tuple(substate(state, "weights").values())


def _asked(read: State, weights: Sequence[Tensor]) -> State:
    """What a segment's first read asks: the queries' history, and the memory before it."""
    return {"conv": read["conv"], **{f"weights.{layer}": w for layer, w in enumerate(weights)}}
