"""Exact memory beside a window: the tokens of the past that surprised most keep their keys and values, in M slots.

    near      the last W tokens, and persistent tokens
    slots     of all tokens before the window, the M with the largest scores
    y         one softmax over both, and over streams of other keys that a memory adds

The idea is that of B'MOJO's eidetic tokens (arXiv:2407.06324) and of HOLA (arXiv:2607.02303). The memory gives the
score of a token: how little another memory, which fades, expected of it. The choice is hard and gives the score no
gradient. Where scores are equal, the earlier token stays. Keys of slots meet queries without rotary positions, so far
tokens look as in training, however long the document.

The slots change once a chunk. After the last token of a chunk, at position p - 1, they become the M largest of
themselves and of tokens p - W to p - W + C - 1, which leave the window during the next chunk. A token is hidden from
those that still see it in their window. So at any time each token is in the window, or in a slot, or lost to others.

B batch, T tokens, H heads in G groups, K head dim, W window_size, C chunk_size, M slots; N ends of chunks in a call,
P pieces of chunks, R = B P, L entries: the slots, the W - 1 tokens before the call, and its tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.layers import rotary, rotary_of_both
from memlm.memory import attention
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.kv import join
from memlm.memory.parts import ReadEntries, join_softmax
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.settings import require
from memlm_kernels import prefix_window_attention
from memlm_kernels.attention import plain
from memlm_kernels.grid import Grid, keep_last, pick, pick_each, place
from memlm_kernels.segments import exact

# Outputs and log-sum-exps of streams of keys, as ``join_softmax`` takes them, by name.
Streams = dict[str, tuple[Tensor, Tensor]]
# The score of an empty slot; and its place and its entry, which are after all others.
_EMPTY, _NOWHERE = float("-inf"), 2**62


def check_slots(slots: int, chunk_size: int, window_size: int, name: str) -> None:
    require(slots >= 0, f"{name}={slots} must be 0 (none) or more")
    require(
        not slots or chunk_size <= window_size,
        f"chunk_size={chunk_size} must be window_size={window_size} at most with {name}={slots}, "
        "because slots change at the ends of chunks; lower it, or raise window_size",
    )


class SlotChunks(NamedTuple):
    """The pieces of chunks that a call has, and the tokens that its ends of chunks offer to the slots.

    grid: pieces of at most C tokens; set_BP: the number of ends before each piece
    offered_BN: the first offered token among the W - 1 + T tokens, at each end; C follow
    fits_BNC: whether an offered token is of the document; opens_BN: whether the end is a document's first
    count_B: the number of ends
    """

    grid: Grid
    set_BP: Tensor
    offered_BN: Tensor
    fits_BNC: Tensor
    opens_BN: Tensor
    count_B: Tensor

    @staticmethod
    def of(rows: Rows, chunk_size: int, window_size: int) -> "SlotChunks":
        length, size, batch, device = rows.length, chunk_size, len(rows.before_B), rows.device
        token_C = torch.arange(size, device=device) - window_size
        if rows.goes_on and rows.start is not None:
            # The host knows all places.
            before = rows.start % size
            count, pieces = (before + length) // size, (before + length + size - 1) // size
            ends_N = torch.arange(1, count + 1, device=device) * size
            after_N = rows.start - before + ends_N
            set_BP = torch.arange(pieces, device=device).expand(batch, -1)
            grid = Grid(length, pieces, size)
            if length == 1:
                grid = Grid(1, 1, 1)
            elif before:
                grid = Grid(
                    length, pieces, size, torch.arange(before, before + length, device=device).expand(batch, -1)
                )
            return SlotChunks(
                grid,
                set_BP,
                (ends_N - before - 1).expand(batch, -1),
                (after_N[:, None] + token_C >= 0).expand(batch, -1, -1),
                (after_N == size).expand(batch, -1),
                torch.full_like(rows.before_B, count),
            )
        positions_BT = rows.positions_BT
        cut = rows.within(size).segments()
        assert cut is not None
        token_BT = torch.arange(length, device=device).expand(batch, -1)
        place_BT = cut.index_BT * size + token_BT - cut.cu_seqlens.gather(1, cut.index_BT)
        grid = Grid(length, cut.most, size, torch.where(cut.index_BT < cut.most, place_BT, cut.most * size))
        ends_BT = (positions_BT + 1) % size == 0
        if rows.real_BT is not None:
            ends_BT = ends_BT & rows.real_BT
        so_far_BT, most = ends_BT.long().cumsum(1), (length + size - 1) // size
        set_BP = grid.lay(so_far_BT - ends_BT.long())[:, :, 0]
        # One more slot, for tokens that end no chunk.
        at_BT = torch.where(ends_BT, so_far_BT - 1, most)
        offered_BN = place(token_BT, at_BT, most + 1)[:, :-1]
        after_BN, count_B = pick(positions_BT, offered_BN) + 1, so_far_BT[:, -1]
        is_end_BN = torch.arange(most, device=device) < count_B[:, None]
        fits_BNC = (after_BN[..., None] + token_C >= 0) & is_end_BN[..., None]
        return SlotChunks(grid, set_BP, offered_BN, fits_BNC, after_BN == size, count_B)


def running_first(rank_BNM: Tensor, opens_BN: Tensor) -> Tensor:
    """The M smallest numbers, sorted, of each set and those before it, back to the last that opens.

    Sets are sorted. Log2(N) steps, each for all N at once: a set joins that of 1, 2, 4, ... before.
    """
    count, slots, back = *rank_BNM.shape[1:], 1
    while back < count:
        old_BNM = F.pad(rank_BNM[:, :-back], (0, 0, back, 0), value=_NOWHERE)
        both_BNM = torch.cat([old_BNM.masked_fill(opens_BN[..., None], _NOWHERE), rank_BNM], -1)
        rank_BNM = both_BNM.sort(dim=-1).values[..., :slots]
        opens_BN = opens_BN | F.pad(opens_BN[:, :-back], (back, 0))
        back *= 2
    return rank_BNM


def slot_choices(old_BM: Tensor, score_BL: Tensor, layout: SlotChunks, chunk_size: int) -> Tensor:
    """The entries in the slots before the first end of a chunk and after each, [B, N + 1, M], the largest score first;
    ``_NOWHERE``: none.

    old: scores of the slots before the call, which are the first entries; score: of the others
    """
    slots, device = old_BM.shape[1], old_BM.device
    order_BL = torch.cat([old_BM, score_BL], 1).sort(dim=-1, descending=True, stable=True).indices
    count = torch.arange(order_BL.shape[1], device=device).expand_as(order_BL)
    # The order's inverse.
    rank_BL = torch.empty_like(order_BL).scatter_(1, order_BL, count)
    offered_BNC = layout.offered_BN[..., None] + torch.arange(slots, slots + chunk_size, device=device)
    rank_BNC = pick(rank_BL, offered_BNC.flatten(1)).view(offered_BNC.shape)
    rank_BNC = rank_BNC.masked_fill(~layout.fits_BNC, _NOWHERE).sort(dim=-1).values
    rank_BNM = F.pad(rank_BNC[..., :slots], (0, max(0, slots - chunk_size)), value=_NOWHERE)
    held_BM = rank_BL[:, :slots].masked_fill(old_BM == _EMPTY, _NOWHERE)
    rank_BNM = running_first(torch.cat([held_BM[:, None], rank_BNM], 1), F.pad(layout.opens_BN, (1, 0)))
    none_BNM = rank_BNM == _NOWHERE
    entry_BX = order_BL.gather(1, rank_BNM.masked_fill(none_BNM, 0).flatten(1))
    return entry_BX.view(rank_BNM.shape).masked_fill(none_BNM, _NOWHERE)


class EideticAttention(attention.Mixer):
    """Attention to a window and to slots. The ops compute it, so ``attn_implementation`` has no effect."""

    at_once = has_room = False

    def __init__(self, config: attention.Config, slots: int, chunk_size: int, dims: Dims, layer_idx: int) -> None:
        super().__init__(config, dims, layer_idx)
        assert config.window_size is not None
        self.window_size, self.slots, self.chunk_size = config.window_size, slots, chunk_size
        self.chosen = ReadEntries()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        state = super().init_state(batch_size, device, dtype)
        if not self.slots:
            return state
        shape = (batch_size, self.slots, self.dims.num_key_value_heads, self.dims.head_dim)
        score = torch.zeros(
            batch_size, self.window_size - 1, device=device, dtype=torch.promote_types(dtype, torch.float32)
        )
        slots = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}
        slots["score"] = score.new_full(shape[:2], _EMPTY)
        slots["place"] = torch.full(shape[:2], _NOWHERE, device=device)
        return state | {"score": score, "slots": slots}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows, score_BT: Tensor | None = None) -> MixerOutput:
        """score: of each token; its largest stay. None: without slots"""
        if rows.length == 0:
            return MixerOutput(x_BTD, state, {}, {})
        _, streams, after = self.streams(x_BTD, state, rows, score_BT)
        y_BTD, metrics = self.joined(streams, rows)
        return MixerOutput(y_BTD, after, {}, metrics)

    def joined(self, streams: Streams, rows: Rows, gate_H: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and as metrics the share of each stream but the window's in the softmax, [B, T].

        gate_H: of all streams but the window's: 0 for the window alone, 1, or None, for one softmax over all
        """
        y_BTHK, share_BTHN = join_softmax([*streams.values()])
        metrics: dict[str, Tensor] = {}
        if gate_H is not None:
            y_BTHK = torch.lerp(streams["window"][0], y_BTHK, gate_H[:, None].to(y_BTHK.dtype))
            share_BTHN = gate_H[:, None] * share_BTHN
        if rows.metrics:
            shares = zip(streams, share_BTHN.detach().mean(2).unbind(-1), strict=True)
            metrics = {f"{name}_share": share for name, share in shares if name != "window"}
        return self.output(y_BTHK), metrics

    def streams(
        self, x_BTD: Tensor, state: State, rows: Rows, score_BT: Tensor | None
    ) -> tuple[Tensor, Streams, State]:
        """Rotated queries; the streams of the window and of the slots; the new state."""
        length, near = rows.length, self.window_size - 1
        (q_BTHK, k_BTGK, v_BTGK), after = self.project(x_BTD, state, rows)
        turned_BTHK, turned_BTGK = rotary_of_both(q_BTHK, k_BTGK, self.angles(rows, q_BTHK.dtype))
        seen = {name: join(state[name], x) for name, x in (("k", turned_BTGK), ("v", v_BTGK))}
        for name, x in seen.items():
            after[name] = keep_last(x, near, length, rows.lengths_B)
        prefix = (q_BTHK, *self.persistent_tokens()) if self.config.persistent_tokens else None
        streams = {"window": within(rows, turned_BTHK, seen["k"], seen["v"], self.window_size, prefix=prefix)}
        if self.slots:
            assert score_BT is not None
            streams["slots"] = self._read_slots(q_BTHK, (k_BTGK, seen["v"]), score_BT, state, after, rows)
        return turned_BTHK, streams, after

    def _read_slots(
        self, q_BTHK: Tensor, kv: tuple[Tensor, Tensor], score_BT: Tensor, state: State, after: State, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """The stream of the slots; adds them, and the scores of the window, to the new state.

        kv: keys of the call's tokens without positions; values of these and of the window before them
        """
        size, window, old = self.chunk_size, self.window_size, state["slots"]
        layout = rows.once((SlotChunks, size, window), lambda: SlotChunks.of(rows, size, window))
        score_BL = join(state["score"], exact(score_BT).detach().to(state["score"].dtype))
        after["score"] = keep_last(score_BL, window - 1, rows.length, rows.lengths_B)
        if layout.offered_BN.shape[1]:
            held, after["slots"] = self._changed(kv, score_BL, state, layout, rows)
        else:
            # One piece.
            held = after["slots"] = old
        grid = layout.grid
        left_RC1 = rows.once(
            ("left", size, window), lambda: (grid.lay(rows.positions_BT) - window).flatten(0, 1)[..., None]
        )
        mask_RCM = self.chosen(held["place"][:, None] <= left_RC1)
        q_RCHK = grid.lay(q_BTHK).flatten(0, 1)
        read = plain(q_RCHK, held["k"], held["v"], mask_RCM[:, None], q_BTHK.shape[-1] ** -0.5)
        o_BTHK, lse_BTH = (grid.take(x.unflatten(0, (len(q_BTHK), grid.count))) for x in read)
        return o_BTHK, lse_BTH

    def _changed(
        self, kv: tuple[Tensor, Tensor], score_BL: Tensor, state: State, layout: SlotChunks, rows: Rows
    ) -> tuple[State, State]:
        """The slots that each piece reads, [R, M, ...], and those after the call, [B, M, ...]."""
        (k_BTGK, v_BLGK), old, kept_BSGK = kv, state["slots"], state["k"]
        if not rows.fresh and self.config.rotary:
            # The window's keys have positions, those of slots have none.
            places_BL, rope = self._places(rows), self.dims.rope
            back_BS = rows.once(("turned back", self.window_size), lambda: -places_BL[:, : self.window_size - 1])
            kept_BSGK = rotary(kept_BSGK, rows.rotary(rope._replace(scale=1 / rope.scale), kept_BSGK.dtype, back_BS))
        entries = {
            "k": torch.cat([x.to(k_BTGK.dtype) for x in (old["k"], kept_BSGK, k_BTGK)], 1),
            "v": torch.cat([old["v"].to(v_BLGK.dtype), v_BLGK], 1),
            "score": torch.cat([old["score"], score_BL], 1),
            "place": torch.cat([old["place"], self._places(rows)], 1),
        }
        entry_BNM = slot_choices(old["score"], score_BL, layout, self.chunk_size)
        # The last set is that after the call.
        entry_BXM = pick(entry_BNM, torch.cat([layout.set_BP, layout.count_B[:, None]], 1))
        none_BXM = entry_BXM == _NOWHERE
        held = dict(zip(entries, pick_each([*entries.values()], entry_BXM.masked_fill(none_BXM, 0)), strict=True))
        held["score"] = held["score"].masked_fill(none_BXM, _EMPTY)
        held["place"] = held["place"].masked_fill(none_BXM, _NOWHERE)
        after = {name: x[:, -1].clone() for name, x in held.items()}
        return {name: x[:, :-1].flatten(0, 1) for name, x in held.items()}, after

    def _places(self, rows: Rows) -> Tensor:
        """Positions of the window's tokens before the call, and of its tokens."""

        def make() -> Tensor:
            back_S = torch.arange(self.window_size - 1, 0, -1, device=rows.device)
            return torch.cat([rows.positions_BT[:, :1] - back_S, rows.positions_BT], 1)

        return rows.once(("window's places", self.window_size), make)


def within(
    rows: Rows,
    q_BTHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    window: int,
    late: int = 0,
    prefix: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream of the last ``window`` keys up to that of the token ``late`` places before each token.

    k, v: those of the call's tokens, so many places late, are the last ones
    """
    options: dict[str, Any] = {"prefix": prefix, "with_lse": True}
    if rows.length == 1 and rows.goes_on and rows.start is not None:
        # One token sees all keys, so it needs no mask.
        known = min(rows.start - late + 1, window)
        k_BLGK, v_BLGK = k_BLGK[:, -known:], v_BLGK[:, -known:]
    elif rows.fresh and not late:
        k_BLGK, v_BLGK = k_BLGK[:, -rows.length :], v_BLGK[:, -rows.length :]
        options["window"] = window
    else:
        options |= {"window": window, "positions": (rows.positions_BT - late).clamp(min=0)}
    read = prefix_window_attention(q_BTHK, k_BLGK, v_BLGK, **options)
    assert read.lse is not None
    return read.o, read.lse
