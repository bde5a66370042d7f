"""Two of Titans' stores at two rates: a fast one, written by each token, and a slow one, written by each chunk of the
fast one.

The idea is Mela's, a memory of levels whose slow level gathers what the fast one has read, and whose reads the first
layers behind it add too. Mela's equations are not public, so this is no Mela: it is Titans' rule (``titans``) twice,
with C tokens in a chunk of the fast store::

    z_t = fast(x_t)                                 s_t = x_t + z_t
    u_j = mean of s_t over the tokens t of chunk j  the slow store writes u_j at the end of chunk j
    w_t = slow_j(s_t)                               chunk j is the last one that ended before t
    y_t = g z_t + (1 - g) w_t                       g = sigmoid(W [x_t; z_t; w_t] + b), 1/2 at first

``slow_ratio`` writes form a chunk of the slow store, C slow_ratio tokens. It has projections and gates of its own, and
no convolution. All of a chunk's tokens read after the same write. So the op gets C copies of the slow store, one for
each place in a chunk, which write the same and read for their own tokens: it costs about as much as the fast store.

The reads z, w and y are ``fast``, ``slow`` and ``mixed`` of ``model.taps``, by which layers behind add them. Mela's
recursion between its levels is not built.

Metrics are those of ``titans`` for the fast store; with ``slow_`` in front, the norms of the slow one and its share
beside the fast one's read; and ``fast_gate``, the mean of g.

B batch, T tokens, D hidden, H memory heads, K memory head dim, W chunks that may end in the call, C chunk_size.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memlm.memory import titans
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.parts import memory_share
from memlm.memory.rows import Rows
from memlm.memory.state import State, in_order, mapped
from memlm.settings import require
from memlm_kernels import read_memory
from memlm_kernels.grid import Grid, place
from memlm_kernels.neural_memory import BLOCKS, block_size
from memlm_kernels.segments import exact


@dataclass(frozen=True)
class Config(titans.NeuralMemoryConfig):
    """The settings of both stores; conv_size is of the fast one.

    chunk_size: tokens of a chunk of the fast store, and of one write of the slow one.
    slow_ratio: writes in a chunk of the slow store. Above chunk_size, its initial lr is lower, as for longer chunks.
    """

    slow_ratio: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.slow_ratio >= 1, f"slow_ratio={self.slow_ratio} must be at least 1")
        require(block_size(self.slow_ratio) <= 64, f"slow_ratio={self.slow_ratio} {BLOCKS}")

    def slow(self) -> titans.NeuralMemoryConfig:
        """Settings of the slow store."""
        assert self.initial_lr is not None  # Set from depth and chunk_size.
        of_fast = {field.name: getattr(self, field.name) for field in fields(titans.NeuralMemoryConfig)}
        lr = self.initial_lr * min(1.0, self.chunk_size / self.slow_ratio)
        return titans.NeuralMemoryConfig(**of_fast | {"chunk_size": self.slow_ratio, "conv_size": 1, "initial_lr": lr})


class Mixer(SequenceMixer):
    publishes = ("fast", "slow", "mixed")

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.size, self.hidden_size = config.chunk_size, dims.hidden_size
        self.fast = titans.NeuralMemory(config, dims)
        self.slow = SlowMemory(config.slow(), dims)
        self.gate = nn.Linear(3 * dims.hidden_size, dims.hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.gate.weight)
        init.zeros_(self.gate.bias)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        parts = {
            "fast": self.fast.init_state(batch_size, device, dtype),
            "slow": self.slow.init_state(batch_size, device, dtype),
        }
        # The sum of s over the tokens of the open chunk.
        dtype = torch.promote_types(dtype, torch.float32)
        return {**parts, "open": torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype)}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        if rows.length == 0:
            return MixerOutput(x_BTD, state, {}, {}, (x_BTD,) * 3)
        z_BTD, fast, _, metrics, _ = self.fast(x_BTD, state["fast"], rows)
        s_BTD, chunks = x_BTD + z_BTD, rows.once((SlowWrites, self.size), lambda: SlowWrites.of(rows, self.size))
        u_BWD, open_BD = chunks.means(s_BTD, state["open"])
        w_BTD, slow = self.slow(s_BTD, u_BWD.to(s_BTD.dtype), state["slow"], rows, chunks)
        gate_BTD = torch.sigmoid(self.gate(torch.cat([x_BTD, z_BTD, w_BTD], -1)))
        y_BTD = torch.lerp(w_BTD, z_BTD, gate_BTD)
        if rows.metrics:
            of_slow = self.slow.store.norms(state["slow"], slow, chunks.writes) if chunks.writes.length else {}
            metrics |= self.fast.store.norms(state["fast"], fast, rows)
            metrics |= {f"slow_{name}": x for name, x in of_slow.items()}
            metrics |= {
                "fast_gate": gate_BTD.detach().mean(-1),
                "slow_share": memory_share((1 - gate_BTD) * w_BTD, gate_BTD * z_BTD, (-1,)),
                "memory_share": memory_share(y_BTD, x_BTD),
            }
        return MixerOutput(y_BTD, {"fast": fast, "slow": slow, "open": open_BD}, {}, metrics, (z_BTD, w_BTD, y_BTD))


class SlowWrites(NamedTuple):
    """The chunks of a call's tokens, and the writes at their ends: a row's chunks that end come first.

    size: C; writes: the ``Rows`` of the W writes of each row, whose positions count the writes of a document
    of_sums: the tokens under the chunk that they end, those of the row's open chunk under chunk W; the others, of a
        chunk that its document leaves open, have no slot
    of_reads: the tokens under the write of this call that they read after
    after_write_BT: whether there is one; first_BT: whether the token is of the row's first document
    into_first_B1, into_open_B1: whether the sum of earlier calls is of a row's first chunk that ends, or of its open
        one
    """

    size: int
    writes: Rows
    of_sums: Grid
    of_reads: Grid
    after_write_BT: Tensor
    first_BT: Tensor
    into_first_B1: Tensor
    into_open_B1: Tensor

    @staticmethod
    def of(rows: Rows, size: int) -> "SlowWrites":
        positions_BT, length, start = rows.positions_BT, rows.length, rows.start
        most = -(-length // size) if start is None or not rows.goes_on else (start % size + length) // size
        token_T, place_BT = torch.arange(length, device=rows.device), positions_BT % size
        real_BT = torch.ones_like(positions_BT, dtype=torch.bool) if rows.real_BT is None else rows.real_BT
        ends_BT = real_BT & (place_BT == size - 1)
        ended_BT = ends_BT.long().cumsum(1) - ends_BT.long()
        # A token's chunk ends in this call if the token at its end is of the same document.
        ahead_BT = size - 1 - place_BT
        end_BT = (token_T + ahead_BT).clamp(max=length - 1)
        same_BT = positions_BT.gather(1, end_BT) == positions_BT + ahead_BT
        closes_BT = real_BT & same_BT & ends_BT.gather(1, end_BT) & (token_T + ahead_BT < length)
        real_B = real_BT.sum(1)
        open_BT = real_BT & (token_T >= (real_B - rows.after_B % size)[:, None])
        under_BT = torch.where(closes_BT, ended_BT, torch.where(open_BT, most, most + 1))
        slots_BT = torch.where(under_BT <= most, under_BT * size + place_BT, (most + 1) * size)
        after_write_BT = real_BT & (positions_BT >= size) & (token_T > place_BT)
        reads_BT = torch.where(after_write_BT, (ended_BT - 1) * size + place_BT, most * size)
        if start is not None and rows.goes_on:
            writes = Rows(most, rows.before_B // size, start // size, metrics=rows.metrics)
        else:
            slot_BT = torch.where(ends_BT, ended_BT, most)
            given_BW = place((positions_BT // size)[..., None], slot_BT, most + 1)[:, :-1, 0]
            documents = min(most, rows.max_documents)
            before_B, ends_B = rows.before_B // size, ends_BT.sum(1)
            writes = Rows(most, before_B, None, given_BW, ends_B, documents, metrics=rows.metrics)
        goes_on_B, idle_B = place_BT[:, 0] > 0, real_B == 0
        return SlowWrites(
            size,
            writes,
            of_sums=Grid(length, most + 1, size, slots_BT),
            of_reads=Grid(length, most, size, reads_BT),
            after_write_BT=after_write_BT,
            first_BT=positions_BT == positions_BT[:, :1] + token_T,
            into_first_B1=(goes_on_B & closes_BT[:, 0])[:, None],
            into_open_B1=(idle_B | (goes_on_B & open_BT[:, 0]))[:, None],
        )

    def means(self, s_BTD: Tensor, open_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of each chunk that ends, [B, W, D], and the sum of the open one; ``open_BD``: of earlier calls."""
        *sums, after_BD = self.of_sums.lay(exact(s_BTD)).sum(2).unbind(1)
        after_BD = after_BD + open_BD.where(self.into_open_B1, 0.0)
        if not sums:
            return s_BTD[:, :0], after_BD
        sums[0] = sums[0] + open_BD.where(self.into_first_B1, 0.0)
        return torch.stack(sums, 1) / self.size, after_BD


class SlowMemory(titans.NeuralMemory):
    """Writes by ``u``, reads by ``s``; queries, keys and values are of single tokens or writes."""

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.store.init_state(batch_size, device, dtype)

    def forward(  # type: ignore[override]
        self, s_BTD: Tensor, u_BWD: Tensor, state: State, rows: Rows, chunks: SlowWrites
    ) -> tuple[Tensor, State]:
        """The reads of all tokens, [B, T, D], and the state after the writes."""
        q_BTC = self.q_proj(s_BTD)
        (q_BTHK,) = self._made([q_BTC], slice(q_BTC.shape[-1]))
        q_BTHK = self.features(q_BTHK)
        o_BTHK = self._read_before(q_BTHK, state, rows, chunks)
        if chunks.writes.length:
            read_BTHK, state = self._write(q_BTHK, u_BWD, state, chunks)
            if read_BTHK is not None:
                o_BTHK = torch.where(chunks.after_write_BT[..., None, None], read_BTHK, o_BTHK)
        return self.output(o_BTHK, self.output_gate(s_BTD)), state

    def _made(self, x: list[Tensor], channels: slice) -> tuple[Tensor, ...]:
        """SiLU of scaled channels; the first part has heads of unit length."""
        none_B0C = x[0].new_zeros(len(x[0]), 0, sum(part.shape[-1] for part in x))
        whole = Rows.of(x[0])
        return tuple(self.convolved(x, none_B0C, whole, unit=1, channels=channels)[0])

    def _read_before(self, q_BTHK: Tensor, state: State, rows: Rows, chunks: SlowWrites) -> Tensor:
        """The reads of tokens before the first write of their document in this call."""
        initial, network = self.store.memory(), self.store.network()
        fresh = [w.expand(len(q_BTHK), *w.shape) for w in initial]
        weights = fresh
        if not rows.fresh:
            new_B111 = (rows.first_B < chunks.size)[:, None, None, None]
            held = in_order(state["weights"])
            weights = [torch.where(new_B111, w.to(h.dtype), h) for w, h in zip(fresh, held, strict=True)]
        # In a row's first document, such tokens are of its first chunk.
        near_BSHK = read_memory(q_BTHK[:, : chunks.size], weights, **network)
        count = near_BSHK.shape[1]
        if rows.given_BT is None:
            return F.pad(near_BSHK, (0, 0, 0, 0, 0, rows.length - count))
        o_BTHK = read_memory(q_BTHK, fresh, **network)
        near_BSHK = torch.where(chunks.first_BT[:, :count, None, None], near_BSHK, o_BTHK[:, :count])
        return torch.cat([near_BSHK, o_BTHK[:, count:]], 1)

    def _write(self, q_BTHK: Tensor, u_BWD: Tensor, state: State, chunks: SlowWrites) -> tuple[Tensor | None, State]:
        """The reads of tokens after a write of this call, None if there is no such token, and the state."""
        k_BWC, v_BWC = self.k_proj(u_BWD), self.v_proj(u_BWD)
        k_BWHK, v_BWC = self._made([k_BWC, v_BWC], slice(k_BWC.shape[-1], None))
        k_BWHK, v_BWHK = self.features(k_BWHK), v_BWC.unflatten(-1, (self.config.memory_heads, -1))
        if self.config.memory_norm:
            # The scale of a LayerNorm output.
            v_BWHK = F.rms_norm(v_BWHK, v_BWHK.shape[-1:], eps=self.norm.eps)
        writes = replace(chunks.writes, metrics=False)
        if chunks.of_reads.length == 1:
            _, state, _ = self.store(u_BWD, k_BWHK, k_BWHK, v_BWHK, state, writes)
            return None, state
        size = chunks.size

        def copies(x: Tensor) -> Tensor:
            return x.repeat_interleave(size, 0)

        q_NWHK = chunks.of_reads.lay(q_BTHK).transpose(1, 2).flatten(0, 1)
        tokens = [q_NWHK, copies(k_BWHK), copies(v_BWHK)]
        o_NWHK, after, _ = self.store(copies(u_BWD), *tokens, mapped(copies, state), _copied(writes, size))
        o_BTHK = chunks.of_reads.take(o_NWHK.unflatten(0, (-1, size)).transpose(1, 2))
        return o_BTHK, mapped(lambda x: x[::size].clone(), after)


def _copied(rows: Rows, count: int) -> Rows:
    """Each row ``count`` times."""
    before_B, given_BT, lengths_B = (
        None if x is None else x.repeat_interleave(count, 0) for x in (rows.before_B, rows.given_BT, rows.lengths_B)
    )
    assert before_B is not None
    return Rows(rows.length, before_B, rows.start, given_BT, lengths_B, rows.max_documents, metrics=rows.metrics)
