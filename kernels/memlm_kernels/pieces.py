"""A recurrence cut along its rows, so that few rows and heads still fill a GPU.

A recurrence that is linear in its state maps the state at the start of a piece, S, to T S + U, whatever S is. All
pieces compute their T and U at once, the starts follow from one another, and then all pieces run at once, each from
its start. T comes from the recurrence itself: a state of unit columns, and values of zero for them.

B batch, T tokens of a row, S segments of a row, J pieces of a row, H heads, N rows of a state, V its columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.segments import segments_of, whole_rows

# values [B, T, H, V], boundaries [B, J + 1], states [B, J, H, N, V] -> output, states after the segments
Recurrence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Tokens of the shortest piece: below it the passes over T cost more than the shorter chain saves.
SHORTEST = 1024

MOST = 64


class Pieces(NamedTuple):
    """cu: [B, J + 1], the boundaries of the pieces; each belongs to one segment
    opens: [B, J], whether a piece is the first of its segment; owner: [B, J], the segment
    last: [B, S], the last piece of each segment
    """

    cu: Tensor
    opens: Tensor
    owner: Tensor
    last: Tensor


def cut(cu_seqlens: Tensor, length: int, pieces: int) -> Pieces:
    """Cut the rows at ``pieces - 1`` equal distances, and leave the boundaries of segments. J = S + pieces - 1."""
    cu = cu_seqlens.long()
    borders = torch.arange(1, pieces, device=cu.device) * -(-length // pieces)
    # Padding has no pieces.
    borders = borders.expand(len(cu), -1).clamp(cu[:, :1], cu[:, -1:])
    # A border at a boundary makes a piece without tokens behind it, or before the end.
    place = torch.arange(cu.shape[1], device=cu.device)
    first = torch.searchsorted(borders.contiguous(), cu.contiguous()) + place
    first[:, -1] = cu.shape[1] + pieces - 2
    piece = torch.arange(cu.shape[1] + pieces - 2, device=cu.device).expand(len(cu), -1).contiguous()
    owner = torch.searchsorted(first[:, 1:].contiguous(), piece, right=True)
    opens = first[:, :-1].gather(1, owner) == piece
    return Pieces(torch.cat([cu, borders], 1).sort(1).values, opens, owner, first[:, 1:] - 1)


def in_pieces(
    op: Recurrence, v: Tensor, cu_seqlens: Tensor | None, state: Tensor, pieces: int, diagonal: bool = False
) -> tuple[Tensor, Tensor]:
    """``op(v, cu_seqlens, state)``, with each row cut into ``pieces``.

    op: linear in v and state together, and alike for each of their columns
    state: [B, S, H, N, V], before each segment
    diagonal: whether T is a diagonal matrix; one column then holds it

    The gradient goes through T and U.
    """
    of = cut(whole_rows(v) if cu_seqlens is None else cu_seqlens, v.shape[1], pieces)
    *_, heads, rows, columns = state.shape
    unit = state.new_ones(rows, 1) if diagonal else torch.eye(rows, dtype=state.dtype, device=state.device)
    more = unit.shape[1]
    both = F.pad(unit, (columns, 0)).expand(*of.owner.shape, heads, -1, -1)
    U, T = op(F.pad(v, (0, more)), of.cu, both)[1].split([columns, more], -1)
    initial = _pick(state, of.owner)
    start, starts = initial[:, 0], []
    for j in range(of.owner.shape[1]):
        if j:
            mapped = T[:, j - 1] * start if diagonal else T[:, j - 1] @ start
            start = torch.where(of.opens[:, j, None, None, None], initial[:, j], U[:, j - 1] + mapped)
        starts.append(start)
    o, after = op(v, of.cu, torch.stack(starts, 1))
    return o, _pick(after, of.last)


def long_rows(
    op: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]],
    q: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """``op(v, cu_seqlens, state)``, in pieces where they pay. state: [B, S, H, K, V], None: zeros"""
    batch, length, heads, keys = q.shape
    segments, columns = segments_of(cu_seqlens), v.shape[-1]
    # A program has up to 64 columns.
    chains = batch * segments * heads * -(-columns // 64)
    count = pieces_of(q, length, chains, 1 if diagonal else keys, columns)
    if count == 1:
        return op(v, cu_seqlens, state)
    if state is None:
        state = torch.zeros(batch, segments, heads, keys, columns, device=q.device)
    return in_pieces(op, v, cu_seqlens, state, count, diagonal)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """[B, X, ...], [B, Y] -> [B, Y, ...]"""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def pieces_of(x: Tensor, length: int, chains: int, rows: int, columns: int) -> int:
    """Into how many pieces rows are worth cutting; 1: leave them whole.

    x: a tensor of the call
    chains: programs that run along the rows of one call
    rows, columns: of T, and of a state; the pass for T and U has both, beside the columns of the pass itself
    """
    count = min(slots(x.device) * columns // (chains * (rows + 2 * columns)), length // SHORTEST, MOST)
    return count if count >= 3 else 1


@torch.compiler.assume_constant_result
def slots(device: torch.device) -> int:
    """Programs of a chain that a device runs at once, one on each multiprocessor; none on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
