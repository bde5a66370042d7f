"""Titans, memory as a context (MAC; arXiv:2501.00663, section 4.1): attention in segments, then a write of its
outputs.

A token attends to its segment and to the content of the memory before the segment. For each segment x of C tokens,
with M_0 the memory before it:

    h = M_0*(x)        a = attention([persistent | h | x])        u = norm(x + a)        M <- M(u)
    y = g * norm(M*(u)) + (1 - g) * norm(a)

Read literally, the paper's MAC sees the future: a token attends to h_i of later tokens of its segment, and its second
read is of a memory that has written them. Here token j attends to h_i and x_i of i <= j only, and its second read is
of the memory that has written u_i of i <= j. This equals causal attention over h_0 x_0 h_1 x_1 ... Two more choices
are ours: the memory writes norm(x + a), where the paper writes a; and the convex gate g replaces the paper's product
of both branches.

B batch, T tokens, S tokens of a piece (a segment, or the part of one in a call), N pieces, D hidden.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from memlm.layers import RMSNorm
from memlm.memory import attention, titans
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.parts import BranchGate
from memlm.memory.rows import Rows
from memlm.memory.state import State, in_order, numbered
from memlm.settings import require
from memlm_kernels import read_memory
from memlm_kernels.grid import Grid


@dataclass(frozen=True)
class Config(titans.NeuralMemoryConfig):
    """segment_size: tokens of a segment, a multiple of chunk_size.
    persistent_tokens: learned tokens that every token sees.
    attention_conv_size: width of the attention's own convolution over h_0 x_0 h_1 x_1 ..., 0 for none.
    initial_lr: null: as in ``NeuralMemoryConfig``, with 0.025 instead of 0.047.
    """

    # The memory writes the output of attention to its own reads: with 0.047, noise hides content that is 512 tokens
    # old.
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


class ContextAttention(attention.Mixer):
    """Attention over h_0 x_0 h_1 x_1 ..., of which only the reads of x are used."""

    def forward(self, *given: Any, step: str | None = None) -> Any:
        """Run a step by a call, because tools that load parameters on demand do so at calls."""
        return super().forward(*given) if step is None else getattr(self, step)(*given)

    def read(
        self, pairs_BSD: Tensor, state: State, rows: Rows, persistent: tuple[Tensor, Tensor] | None, keep: bool
    ) -> tuple[Tensor, State]:
        """The reads of x, and the new state if ``keep``."""
        y_BSHK, _, state = self.heads(pairs_BSD, state, rows, persistent, keep)
        return self.output(y_BSHK[:, 1::2]), state


class ContextMemory(titans.NeuralMemory):
    """The same memory in steps, so that all work that needs no earlier segment is done for all tokens at once."""

    def forward(self, *given: Any, step: str | None = None) -> Any:
        """Run a step by a call, because tools that load parameters on demand do so at calls."""
        return super().forward(*given) if step is None else getattr(self, step)(*given)

    def ask(self, x_BTD: Tensor, history_BWC: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the first read's queries, its output gate, and the queries' history for the next call."""
        q_BTC = self.q_proj(x_BTD)
        channels = slice(q_BTC.shape[-1])
        (q_BTHK,), history_BWC = self.convolved([q_BTC], history_BWC, rows, unit=1, channels=channels)
        return self.features(q_BTHK), self.output_gate(x_BTD), history_BWC

    def recall(self, q_BSHK: Tensor, gate_BSC: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The first read, h."""
        return self.output(read_memory(q_BSHK, weights, **self.store.network()), gate_BSC)

    def write(self, u_BSD: Tensor, state: State, rows: Rows) -> tuple[Tensor, State, dict[str, Tensor]]:
        """The second reads before ``finish``, the state, and metrics [B, T]."""
        q_BSHK, k_BSHK, v_BSHK, conv = self.project(u_BSD, state, rows)
        o_BSHK, memory, metrics = self.store(u_BSD, q_BSHK, k_BSHK, v_BSHK, state, rows)
        return o_BSHK, {"conv": conv, **memory}, metrics

    def finish(self, o_BTHK: Tensor, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The second reads, and their output gate."""
        gate_BTC = self.output_gate(u_BTD)
        return self.output(o_BTHK, gate_BTC), gate_BTC


class Mixer(SequenceMixer):
    """Sequential over segments, because attention is inside the memory's recurrence."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.attention = ContextAttention(config.attention(), dims, layer_idx)
        self.norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.memory = ContextMemory(config, dims)
        self.gate = BranchGate(dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        memory = self.memory.init_state(batch_size, device, dtype)
        seen = self.attention.init_state(batch_size, device, dtype)
        # State of the first read: its convolution history, and the memory before the segment.
        channels = self.memory.conv.channels // 3
        read = {"conv": memory["conv"][..., :channels].clone(), "weights": memory["weights"]}
        return {"memory": memory, "attention": seen, "read": read}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        if x_BTD.shape[1] == 0:
            return MixerOutput(x_BTD, state, {}, {})
        memory, read, seen = before = [state[name] for name in ("memory", "read", "attention")]
        q_BTHK, gate_BTC, history_BWC = self.memory(x_BTD, read["conv"], rows, step="ask")
        streams = (x_BTD, q_BTHK, gate_BTC)
        if rows.goes_on and rows.start is not None:
            pieces, grid = self._known(rows, rows.start), None
            parts = [x.split([piece.rows.length for piece in pieces], 1) for x in streams]
        else:
            pieces, grid = self._anywhere(rows)
            parts = [grid.lay(x).unbind(1) for x in streams]
        weights, empty = in_order(read["weights"]), self.attention.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype)
        persistent = self.attention(step="persistent_tokens") if self.config.persistent_tokens else None
        # A piece that opens a segment needs no earlier keys.
        keeps = [not piece.pairs.fresh for piece in pieces[1:]] + [True]
        seen_BSDs, inputs, reads, metrics = [], [], [], []
        for piece, keep, x_BSD, q_BSHK, gate_BSC in zip(pieces, keeps, *parts, strict=True):
            weights = piece.enter(self.memory.store.memory(), in_order(memory["weights"]), weights)
            held_BSD = self.memory(q_BSHK, gate_BSC, weights, step="recall")
            both_BSD = torch.stack([held_BSD, x_BSD], 2).flatten(1, 2)
            kept = empty if piece.pairs.fresh else seen
            read_BSD, seen = self.attention(both_BSD, kept, piece.pairs, persistent, keep, step="read")
            seen_BSDs.append(read_BSD)
            inputs.append(self.norm(x_BSD + seen_BSDs[-1]))
            o_BSHK, memory, of_tokens = self.memory(inputs[-1], memory, piece.rows, step="write")
            reads.append(o_BSHK)
            metrics.append(of_tokens)

        def joined_up(parts: Sequence[Tensor]) -> Tensor:
            x = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
            return x if grid is None else grid.take(x.unflatten(1, (grid.count, -1)))

        seen_BTD, u_BTD, o_BTHK = (joined_up(parts) for parts in (seen_BSDs, inputs, reads))
        recalled_BTD, gate_BTC = self.memory(o_BTHK, u_BTD, step="finish")
        y_BTD, told = self.gate(x_BTD, seen_BTD, recalled_BTD, rows.metrics)
        if rows.metrics:
            told |= {name: joined_up([of_tokens[name] for of_tokens in metrics]) for name in metrics[-1]}
            told |= self.memory.store.norms(before[0], memory, rows) | {"output_gate": titans.mean_size(gate_BTC)}
        read = {"conv": history_BWC, "weights": numbered(weights)}
        return MixerOutput(y_BTD, {"memory": memory, "attention": seen, "read": read}, {}, told)

    def _known(self, rows: Rows, start: int) -> list["_Piece"]:
        """Pieces of rows with one position that the host knows: no token is inspected."""
        size, end = self.config.segment_size, start + rows.length

        def piece(first: int, last: int) -> _Piece:
            def pairs() -> Rows:
                place = 2 * (first % size)
                return Rows(2 * (last - first), torch.full_like(rows.before_B, place), place, metrics=False)

            here = Rows(last - first, torch.full_like(rows.before_B, first), first, metrics=rows.metrics)
            of_place = rows.once((_Piece, "pairs", size), pairs) if last - first == size else pairs()
            return _Piece(here, of_place, first == 0, first % size == 0)

        def make() -> list[_Piece]:
            inside = () if start % size + rows.length <= size else range((start // size + 1) * size, end, size)
            cuts = [start, *inside, end]
            return [piece(*cut) for cut in itertools.pairwise(cuts)]

        return rows.once((_Piece, size), make)

    def _anywhere(self, rows: Rows) -> tuple[list["_Piece"], Grid]:
        """Pieces of rows with different positions: piece n holds each row's tokens of its n-th segment, first."""
        size = self.config.segment_size

        def make() -> tuple[list[_Piece], Grid]:
            positions_BT, before_B, pieces = rows.positions_BT, rows.before_B, []
            cut = rows.within(size).segments()
            assert cut is not None
            token_BT = torch.arange(rows.length, device=rows.device) - cut.cu_seqlens.gather(1, cut.index_BT)
            slots_BT = torch.where(cut.index_BT < cut.most, cut.index_BT * size + token_BT, cut.most * size)
            grid = Grid(rows.length, cut.most, size, slots_BT)
            positions_BNS, lengths_BN = grid.lay(positions_BT), grid.lay(torch.ones_like(positions_BT)).sum(-1)
            for positions_BS, lengths_B in zip(positions_BNS.unbind(1), lengths_BN.unbind(1), strict=True):
                first_B, places_BS = positions_BS[:, 0], positions_BS % size
                new, opens = ((lengths_B > 0) & x for x in (first_B == 0, first_B % size == 0))
                doubled_BS = torch.stack([2 * places_BS, 2 * places_BS + 1], 2).flatten(1)
                # The attention's own positions; it continues nothing else.
                here = Rows(grid.width, before_B, None, positions_BS, lengths_B, metrics=rows.metrics)
                pairs = Rows(2 * grid.width, before_B, None, doubled_BS, 2 * lengths_B, metrics=False)
                pieces.append(_Piece(here, pairs, *(x[:, None, None, None] for x in (new, opens))))
                before_B = here.after_B
            return pieces, grid

        return rows.once((_Piece, size), make)


class _Piece(NamedTuple):
    """rows: the piece's tokens; pairs: the pairs h_i x_i of its attention, positions in their segment
    new, opens: whether the piece starts a document, or a segment: for all rows, or [B, 1, 1, 1]
    """

    rows: Rows
    pairs: Rows
    new: bool | Tensor
    opens: bool | Tensor

    def enter(self, start: Sequence[Tensor], now: Sequence[Tensor], kept: Sequence[Tensor]) -> Sequence[Tensor]:
        """The memory before the piece's segment: M_0 (a new document), the memory now (a new segment), or the kept
        one.
        """
        if isinstance(self.new, Tensor) and isinstance(self.opens, Tensor):
            return [
                torch.where(self.new, w.to(n.dtype), torch.where(self.opens, n, k))
                for w, n, k in zip(start, now, kept, strict=True)
            ]
        if self.new:
            # A view of a parameter asks for gradients under no_grad too, and would stay in the state.
            start = start if torch.is_grad_enabled() else [w.detach() for w in start]
            return [w.to(n.dtype).expand_as(n) for w, n in zip(start, now, strict=True)]
        return now if self.opens else kept
