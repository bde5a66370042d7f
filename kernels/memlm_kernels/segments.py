"""Rows of tokens as segments, each with its own state, laid on chunks. No size depends on the device's data.

B batch, T tokens of a row, S segments of a row, N chunks, C slots of a chunk, H heads. Segment s of row b holds the
tokens cu_seqlens[b, s] to cu_seqlens[b, s + 1] - 1, possibly none. Tokens before the first segment or behind the last
one are padding. Segments are the documents of a packed row, or the tokens that a router sent to each memory.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.checks import check_sizes, check_tensors, number, once_a_kind, readable, segments_within
from memlm_kernels.grid import Grid


@dataclass(frozen=True)
class ChunkedRows:
    """Rows of segments, laid on chunks; a chunk belongs to one segment.

    A segment's positions start at 0 with its first token, which may be of an earlier call. Chunks end at multiples of
    their width.

    positions: [B, T], the position of each token in its segment, arbitrary for padding
    segment: [B, N], the segment of each chunk, arbitrary for chunks without tokens
    start: [B, N], the position of each chunk's first token, -1 for chunks without tokens
    enters: [B, N], whether the chunk is the first one of its segment in this call
    last: [B, S], the last chunk of each segment, arbitrary if it is empty
    empty: [B, S], whether a segment has no tokens
    All six are None where each row is one segment of all its tokens, and starts with a chunk.
    """

    grid: Grid
    positions: Tensor | None = None
    segment: Tensor | None = None
    start: Tensor | None = None
    enters: Tensor | None = None
    last: Tensor | None = None
    empty: Tensor | None = None

    def opens(self, size: int) -> Tensor | None:
        """[B, N], whether the chunk's first token is at a multiple of ``size``, which is a multiple of the width."""
        return None if self.start is None else (self.start >= 0) & (self.start % size == 0)

    def lay(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, H, ...] -> [N, B, H, C, ...]; a slot without a token holds ``fill``."""
        x = self.grid.lay(x, fill)
        # Contiguous: otherwise each product with it would copy it and keep the copy.
        return x.permute(1, 0, 3, 2, *range(4, x.ndim)).contiguous()

    def take(self, x: Tensor) -> Tensor:
        """[N, B, H, C, ...] -> [B, T, H, ...]; padding gets zeros."""
        return self.grid.take(x.permute(1, 0, 3, 2, *range(4, x.ndim)))

    def before_chunks(self, state: Tensor) -> Tensor:
        """[B, S, ...] -> [N, B, ...], the entry of each chunk's segment; [1, B, ...] where rows are one segment."""
        if self.segment is None:
            return state.transpose(0, 1)
        rows, count = state.shape[:2]
        index = self.segment + count * torch.arange(rows, device=state.device)[:, None]
        return state.flatten(0, 1).index_select(0, index.mT.flatten()).unflatten(0, (self.grid.count, rows))

    def after_segments(self, after: Tensor, state: Tensor) -> Tensor:
        """[N, B, ...], the state after each chunk -> [B, S, ...]. A segment without tokens keeps its ``state``. Where
        rows are one segment: [1, B, ...] -> [B, 1, ...].
        """
        if self.last is None or self.empty is None:
            return after.transpose(0, 1)
        index = self.last * len(state) + torch.arange(len(state), device=state.device)[:, None]
        last = after.flatten(0, 1).index_select(0, index.flatten()).view_as(state)
        return torch.where(self.empty.reshape(*self.empty.shape, *[1] * (state.ndim - 2)), state, last)

    def scan(self, state: Tensor, step: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Carry a state through the chunks of each row, ``step(n, state) -> state``, both [B, ...].

        state: [B, S, ...], the state at the start of each segment

        Returns the states at the start of the chunks, [N, B, ...], and after each segment's last token, [B, S, ...].
        """
        opens, initial = None, self.before_chunks(state).unbind()
        if self.enters is not None:
            opens = self.enters.mT.reshape(self.grid.count, -1, *[1] * (state.ndim - 2))
        # A copy: a view would keep the initial states of all chunks.
        current, starts, ends = initial[0].clone(), [], []
        for n in range(self.grid.count):
            if opens is not None and n:
                current = torch.where(opens[n], initial[n], current)
            starts.append(current)
            current = step(n, current)
            ends.append(current)
        after = current[None] if opens is None else torch.stack(ends)
        return torch.stack(starts), self.after_segments(after, state)


def lay_out(cu_seqlens: Tensor | None, length: int, width: int, before: Tensor | None = None) -> ChunkedRows:
    """Chunks of ``width`` slots for rows of ``length`` tokens.

    before: [B, S], the number of tokens that each segment had in earlier calls, or [B, 1], that of the first segments;
        None: 0
    """
    # A single token needs no chunk around it.
    slots_of = width if length > 1 else 1
    if cu_seqlens is None:
        return ChunkedRows(Grid(length, -(-length // slots_of), slots_of))
    cu = cu_seqlens.long()
    count_of = cu.shape[1] - 1
    sizes = offset = cu.diff(dim=1)
    # Each segment adds less than one chunk, or two if it starts inside one; every chunk in use has a token.
    spare = min(count_of, length) * (width - 1)
    if before is None:
        chunks = (sizes + width - 1) // width
    else:
        spare += min(before.shape[1], length) * (width - 1)
        before = F.pad(before, (0, count_of - before.shape[1]))
        offset = before % width
        chunks = torch.where(sizes > 0, (offset + sizes + width - 1) // width, 0)
    count = min(length, (length + spare) // width)
    ends = chunks.cumsum(1)
    begins = ends - chunks
    token = torch.arange(length, device=cu.device).expand(len(cu), -1).contiguous()
    owner = torch.searchsorted(cu[:, 1:].contiguous(), token, right=True)
    real, owner = (owner < count_of) & (token >= cu[:, :1]), owner.clamp(max=count_of - 1)
    chunk = torch.arange(count, device=cu.device).expand(len(cu), -1).contiguous()
    segment = torch.searchsorted(ends, chunk, right=True)
    used, segment = segment < count_of, segment.clamp(max=count_of - 1)
    index = chunk - begins.gather(1, segment)
    positions, start, enters = token - cu.gather(1, owner), index * width, used & (index == 0)
    place = positions
    if before is not None:
        place = positions + offset.gather(1, owner)
        positions = positions + before.gather(1, owner)
        start = torch.where(enters, before.gather(1, segment), start + (before - offset).gather(1, segment))
    slots = begins.gather(1, owner) * width + place if length > 1 else torch.zeros_like(token)
    grid = Grid(length, count, slots_of, torch.where(real, slots, count * slots_of))
    start = torch.where(used, start, -1)
    return ChunkedRows(grid, positions, segment, start, enters, (ends - 1).clamp(min=0), chunks == 0)


def next_position(cu_seqlens: Tensor, before: Tensor) -> Tensor:
    """[B], the position after each row's last token in its segment; before: [B], the position of its first token."""
    begins, end = cu_seqlens[:, :-1], cu_seqlens[:, -1:]
    # Segments behind the last one that has tokens are empty.
    size = (end - torch.where(begins < end, begins, 0).amax(1, keepdim=True))[:, 0]
    return torch.where(cu_seqlens[:, 1] == end[:, 0], end[:, 0] - cu_seqlens[:, 0] + before, size)


def chunk_width(length: int, cu_seqlens: Tensor | None, most: int) -> int:
    """The width of chunks, a power of two, for recurrences whose result does not depend on it. It is small where
    segments are short, because each may leave all but one slot of its last chunk empty.
    """
    share = length / segments_of(cu_seqlens)
    return min(most, max(power_of_two(share / 8), min(16, power_of_two(share))))


def power_of_two(x: float) -> int:
    """The smallest power of two that is at least x, and at least 1. Triton's own function is slow outside kernels."""
    return 1 << max(0, math.ceil(x) - 1).bit_length()


def whole_rows(x: Tensor) -> Tensor:
    """cu_seqlens [B, 2] of rows x [B, T, ...] that are one segment each."""
    # Not from a list, which would be copied to the device.
    return (torch.arange(2, device=x.device) * x.shape[1]).expand(len(x), 2)


def segments_of(cu_seqlens: Tensor | None) -> int:
    """S, the number of segments of each row."""
    return 1 if cu_seqlens is None else cu_seqlens.shape[1] - 1


def counts(index: Tensor, size: int) -> Tensor:
    """[B, size]: how often each row of index [B, T] holds 0, 1, ... size - 1; ``size`` itself is not counted."""
    zeros = torch.zeros(len(index), size + 1, dtype=torch.int64, device=index.device)
    return zeros.scatter_add(1, index, torch.ones_like(index))[:, :size]


def exact(x: Tensor) -> Tensor:
    """x in fp32; fp64 stays fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def exact_type(x: Tensor) -> torch.dtype:
    """The type of ``exact(x)``."""
    # ``torch.promote_types`` is a dispatched operation.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def state_of(x: Tensor, cu_seqlens: Tensor | None, *shape: int) -> Tensor:
    """Zeros [B, S, *shape] for rows x [B, ...]."""
    return x.new_zeros(len(x), segments_of(cu_seqlens), *shape)


class RecurrenceOutput(NamedTuple):
    """o: [B, T, H, V] in v's dtype, zeros at padding; state: [B, S, H, K, V], M after each segment's last token."""

    o: Tensor
    state: Tensor


class DeltaOutput(NamedTuple):
    """o, state: as in ``RecurrenceOutput``; residual: [B, T, H], at least in fp32, without a gradient, zeros at
    padding, or None if it was not requested.
    """

    o: Tensor
    state: Tensor
    residual: Tensor | None


def check_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor | None],
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    by_channel: Collection[str] = (),
) -> Tensor | None:
    """cu_seqlens, within the rows. Raises ValueError unless the inputs of a linear recurrence agree.

    gates: [B, T, H]; those named in ``by_channel`` may also have the shape of q
    """
    _check_recurrence(q, k, v, gates, cu_seqlens, state, by_channel)
    return None if cu_seqlens is None else segments_within("cu_seqlens", cu_seqlens, q.shape[1])


@once_a_kind
def _check_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor | None],
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    by_channel: Collection[str],
) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must be [B, T, H, K], v {list(v.shape)} [B, T, H, V]"
        )
    check_sizes("q", q)
    check_sizes("v", v)
    for name, gate in gates.items():
        shapes = (q.shape[:3], q.shape) if name in by_channel else (q.shape[:3],)
        if gate is not None and gate.shape not in shapes:
            more = f" or [B, T, H, K] = {list(q.shape)}" if name in by_channel else ""
            raise ValueError(f"{name} {list(gate.shape)} must be [B, T, H] = {list(q.shape[:3])}{more}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 2 or len(cu_seqlens) != len(q) or cu_seqlens.shape[1] < 2):
        raise ValueError(f"cu_seqlens {list(cu_seqlens.shape)} must be integers [B, S + 1] with B={len(q)}")
    expected = (len(q), segments_of(cu_seqlens), q.shape[2], q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state {list(state.shape)} must be [B, S, H, K, V] = {list(expected)}")
    check_tensors({"q": q, "k": k, "v": v, **gates, "state": state}, {"cu_seqlens": cu_seqlens})


def check_documents(x: Tensor, cu_seqlens: Tensor | None, start: int | None, has_state: bool) -> Tensor | None:
    """cu_seqlens, within the rows x [B, T, ...]. Raises ValueError unless cu_seqlens and ``start`` are valid for
    ``neural_memory``.
    """
    if start is not None and (cu_seqlens is not None or start < 0 or (start > 0 and not has_state)):
        raise ValueError(f"start={start} must be at least 0, 0 without a state, and None with cu_seqlens")
    if cu_seqlens is None:
        return None
    if cu_seqlens.ndim != 2 or len(cu_seqlens) != len(x) or cu_seqlens.shape[1] < 2:
        raise ValueError(f"cu_seqlens {list(cu_seqlens.shape)} must be integers [B, D + 1] with B={len(x)}")
    check_tensors({"q": x}, {"cu_seqlens": cu_seqlens})
    cu_seqlens = segments_within("cu_seqlens", cu_seqlens, x.shape[1])
    if readable(cu_seqlens) and number((cu_seqlens[:, 0] != 0).any()):
        raise ValueError("cu_seqlens must start at 0 in each row: padding comes last")
    return cu_seqlens
