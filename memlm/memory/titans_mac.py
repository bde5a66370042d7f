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
from memlm.memory.base import Dims, MixerOutput, SequenceMixer, joined, substate
from memlm.memory.parts import BranchGate
from memlm.memory.rows import Rows, State
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
    def forward(self, x_BTD: Tensor, state: State, rows: Rows, write: bool = True) -> MixerOutput:
        """write: False for a pure query, of a state with ``weights.*``, and the queries' history alone in ``conv``."""
        if write:
            return super().forward(x_BTD, state, rows)
        q_BTC = self.q_proj(x_BTD)
        channels = slice(q_BTC.shape[-1])
        q_BTC, conv = self.conv.over_rows(q_BTC, state["conv"], rows.history_BT, rows.lengths_B, channels)
        o_BTHK = read_memory(self.features(self.heads(q_BTC)), _weights(state), **self.store.network())
        return MixerOutput(self.output(o_BTHK, x_BTD, False)[0], {**state, "conv": conv}, {}, {})


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

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        if x_BTD.shape[1] == 0:
            return MixerOutput(x_BTD, state, {}, {})
        grid = None
        if rows.goes_on and rows.start is not None:
            segments = self._known_segments(x_BTD, state, rows, rows.start)
        else:
            segments, grid = self._pieces(x_BTD, state, rows)

        def joined_up(parts: Sequence[Tensor]) -> Tensor:
            x = torch.cat(list(parts), 1)
            return x if grid is None else grid.take(x.unflatten(1, (grid.count, -1)))

        seen_BTD, recalled_BTD = (joined_up(parts) for parts in zip(*(s[:2] for s in segments), strict=True))
        y_BTD, metrics = self.gate(x_BTD, seen_BTD, recalled_BTD, rows.metrics)
        metrics |= {name: joined_up([s.metrics[name] for s in segments]) for name in segments[-1].metrics}
        after = segments[-1].state
        metrics |= self.memory.store.norms(substate(state, "memory"), substate(after, "memory"), rows)
        return MixerOutput(y_BTD, after, {}, metrics)

    def _known_segments(self, x_BTD: Tensor, state: State, rows: Rows, start: int) -> list["_Segment"]:
        """Rows that stand at one place, which the host knows: no token has to be looked at."""
        size, segments = self.config.segment_size, []
        first = min(rows.length, size - start % size)
        rest = rows.length - first
        for x_BSD in x_BTD.split([first, *[size] * (rest // size), *([rest % size] if rest % size else [])], 1):
            memory, read, seen = (substate(state, name) for name in ("memory", "read", "attention"))
            here, pairs = _known(rows, x_BSD.shape[1], start, size)
            place = start % size
            if place == 0:
                seen = self.attention.init_state(len(x_BSD), x_BSD.device, x_BSD.dtype)
            weights = _weights(memory) if place == 0 else _weights(read)
            if start == 0:
                initial = zip(self.memory.store.memory(), weights, strict=True)
                weights = tuple(w.to(kept.dtype).expand_as(kept) for w, kept in initial)
            segments.append(self._segment(x_BSD, _asked(read, weights), memory, here, seen, pairs))
            state, start = segments[-1].state, start + here.length
        return segments

    def _pieces(self, x_BTD: Tensor, state: State, rows: Rows) -> tuple[list["_Segment"], Grid]:
        """Rows that start anywhere: laid out so that piece n holds what each row has of its n-th segment, first."""
        size, positions_BT = self.config.segment_size, rows.positions_BT
        opens_BT = positions_BT % size == 0
        in_first_BT = opens_BT.cumsum(1) == opens_BT[:, :1]
        moved_BT = positions_BT - torch.where(in_first_BT, positions_BT[:, :1] % size, 0)
        grid = ragged_grid(moved_BT, rows.lengths_B, size, rows.max_documents)
        x_BNSD, positions_BNS = grid.lay(x_BTD), grid.lay(positions_BT)
        lengths_BN = grid.lay(torch.ones_like(positions_BT)).sum(-1)
        segments, starts, before_B = [], self.memory.store.memory(), rows.before_B
        for n in range(grid.count):
            positions_BS, lengths_B = positions_BNS[:, n], lengths_BN[:, n]
            memory, read, first_B = substate(state, "memory"), substate(state, "read"), positions_BS[:, 0]
            new, opened = (((lengths_B > 0) & x)[:, None, None, None] for x in (first_B == 0, first_B % size == 0))
            weights = [
                torch.where(new, start.to(now.dtype), torch.where(opened, now, kept))
                for start, now, kept in zip(starts, _weights(memory), _weights(read), strict=True)
            ]
            places_BS = positions_BS % size
            doubled_BS = torch.stack([2 * places_BS, 2 * places_BS + 1], 2).flatten(1)
            # The attention's own places; it goes on from none but those.
            here = Rows(grid.width, before_B, None, positions_BS, lengths_B, metrics=rows.metrics)
            pairs = Rows(2 * grid.width, before_B, None, doubled_BS, 2 * lengths_B, metrics=False)
            seen, asked = substate(state, "attention"), _asked(read, weights)
            segments.append(self._segment(x_BNSD[:, n], asked, memory, here, seen, pairs))
            state, before_B = segments[-1].state, here.after_B
        return segments, grid

    def _segment(
        self, x_BSD: Tensor, read: State, memory: State, rows: Rows, seen_state: State, pairs: Rows
    ) -> "_Segment":
        """read: for the first read; memory: for the write and the second; seen_state, pairs: of the attention."""
        held = self.memory(x_BSD, read, rows, write=False)
        both_BSD = torch.stack([held.y_BTD, x_BSD], 2).flatten(1, 2)
        seen = self.attention(both_BSD, seen_state, pairs)
        seen_BSD = seen.y_BTD[:, 1::2]
        recalled = self.memory(self.norm(x_BSD + seen_BSD), memory, rows)
        state = joined({"memory": recalled.state, "attention": seen.state, "read": held.state})
        return _Segment(seen_BSD, recalled.y_BTD, state, recalled.metrics)


class _Segment(NamedTuple):
    """Outputs of both branches, the state after them, the memory's metrics of tokens."""

    seen_BSD: Tensor
    recalled_BSD: Tensor
    state: State
    metrics: dict[str, Tensor]


def _known(rows: Rows, length: int, start: int, size: int) -> tuple[Rows, Rows]:
    """A segment's tokens, ``length`` from ``start`` on, and the pairs that its attention sees."""
    place = start % size

    def make() -> tuple[Rows, Rows]:
        here = Rows(length, torch.full_like(rows.before_B, start), start, metrics=rows.metrics)
        return here, Rows(2 * length, torch.full_like(rows.before_B, 2 * place), 2 * place, metrics=False)

    return rows.once((_known, start, size), make)


def _weights(state: State) -> tuple[Tensor, ...]:
    return tuple(substate(state, "weights").values())


def _asked(read: State, weights: Sequence[Tensor]) -> State:
    """What a segment's first read asks: the queries' history, and the memory before it."""
    return {"conv": read["conv"], **{f"weights.{layer}": w for layer, w in enumerate(weights)}}
