"""A recurrence cut along its rows, so that few rows and heads still fill a GPU.

A recurrence that is linear in its state maps the state at the start of a piece, S, to T S + U, whatever S is. All
pieces compute their T and U at once, the starts follow from one another, and then all pieces run at once, each from
its start. T comes from the recurrence itself: a state of unit columns, and values of zero for them.

B batch, T tokens of a row, S segments of a row, J pieces of a row, H heads, N rows of a state, V its columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.segments import segments_of, whole_rows

# values [B, T, H, V], boundaries [B, J + 1], states [B, J, H, N, V] -> output, states after the segments, ...
Recurrence = Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]

# Tokens of the shortest piece, and the fewest and most pieces. Below the first two the passes over T and their
# gradients cost more than shorter chains save: scripts/predict_kernels.py has 0.36 ms for a memory's head on 8 rows of
# 4,096 tokens, and 0.50 ms in four pieces each.
SHORTEST, FEWEST, MOST = 1024, 8, 64


class Pieces(NamedTuple):
    """cu: [B, J + 1], the boundaries of the pieces; each belongs to one segment
    opens: [B, J], whether a piece is the first of its segment; owner: [B, J], the segment
    last: [B, S], the last piece of each segment that has tokens, or else its first
    """

    cu: Tensor
    opens: Tensor
    owner: Tensor
    last: Tensor


def cut(cu_seqlens: Tensor, length: int, pieces: int, chunk_size: int = 1, before: Tensor | None = None) -> Pieces:
    """Cut the rows at ``pieces - 1`` equal distances, and leave the boundaries of segments. J = S + pieces - 1.

    chunk_size: pieces begin with a chunk of their segment, or with the segment
    before: [B, S], the tokens that each segment had in earlier calls; None: 0
    """
    cu = cu_seqlens.long().contiguous()
    count = cu.shape[1] - 1
    borders = torch.arange(1, pieces, device=cu.device) * -(-length // pieces)
    borders = borders.expand(len(cu), -1).contiguous()
    if chunk_size > 1:
        segment = (torch.searchsorted(cu, borders, right=True) - 1).clamp(0, count - 1)
        origin = (cu[:, :-1] if before is None else cu[:, :-1] - before).gather(1, segment)
        borders = origin + (borders - origin + chunk_size - 1) // chunk_size * chunk_size
        borders = torch.minimum(borders, cu[:, 1:].gather(1, segment))
    # Padding has no pieces. A border at a boundary, or in padding, makes a piece without tokens at a segment's end:
    # a segment's first piece has its first tokens.
    borders = torch.where(borders > cu[:, :1], torch.minimum(borders, cu[:, -1:]), cu[:, -1:]).sort(1).values
    first = torch.searchsorted(borders, cu, right=True) + torch.arange(count + 1, device=cu.device)
    piece = torch.arange(count + pieces - 1, device=cu.device).expand(len(cu), -1).contiguous()
    owner = torch.searchsorted(first[:, 1:].contiguous(), piece, right=True)
    opens = first[:, :-1].gather(1, owner) == piece
    cu = torch.cat([cu, borders], 1).sort(1).values
    latest = torch.where(opens | (cu.diff(dim=1) > 0), piece, 0).cummax(1).values
    return Pieces(cu, opens, owner, latest.gather(1, first[:, 1:] - 1))


def in_pieces(op: Recurrence, v: Tensor, of: Pieces, state: Tensor, unit: Tensor) -> tuple[Any, ...]:
    """``op(v, cu_seqlens, state)`` of the segments that are cut, with ``op`` of the pieces.

    op: linear in v and state together, and alike for each of their columns
    state: [B, S, H, N, V], before each segment
    unit: [N, M], the columns of a unit matrix for the rows that matter at the start of a piece inside a segment;
        [N, 1]: ones, for a T that is a diagonal matrix

    The gradient goes through T and U.
    """
    heads, columns = state.shape[2], state.shape[-1]
    width = unit.shape[1]
    opens, initial = of.opens[..., None, None, None], _pick(state, of.owner)
    # A piece that opens a segment has its start.
    begins = torch.cat([torch.where(opens, initial, 0), unit.expand(*opens.shape[:2], heads, -1, -1)], -1)
    ends, T = op(F.pad(v, (0, width)), of.cu, begins)[1].split([columns, width], -1)
    # start <- A start + b from piece to piece: none of a segment's start goes into the next segment.
    A = torch.where(opens[:, :-1] | opens[:, 1:], 0, T[:, :-1])
    b = torch.where(opens[:, 1:], initial[:, 1:], ends[:, :-1])
    after_each = torch.addcmul if width == 1 else torch.baddbmm
    starts = [initial[:, 0].flatten(0, 1).to(b.dtype)]
    # In fp32, whatever autocast takes: the errors of transitions grow from piece to piece.
    with torch.autocast(v.device.type, enabled=False):
        for A_j, b_j in zip(*(x.transpose(0, 1).flatten(1, 2).unbind() for x in (A, b)), strict=True):
            starts.append(after_each(b_j, A_j, starts[-1] if width == 1 else starts[-1][:, :width]))
    o, after, *more = op(v, of.cu, torch.stack(starts, 1).unflatten(0, (-1, heads)).transpose(1, 2))
    return o, _pick(after, of.last), *more


def long_rows(
    op: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Any, ...]],
    q: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    diagonal: bool,
) -> tuple[Any, ...]:
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
    unit = torch.ones(keys, 1, device=q.device) if diagonal else torch.eye(keys, device=q.device)
    of = cut(whole_rows(q) if cu_seqlens is None else cu_seqlens, length, count)
    return in_pieces(op, v, of, state, unit)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """[B, X, ...], [B, Y] -> [B, Y, ...]"""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def pieces_of(x: Tensor, length: int, chains: int, rows: int, columns: int) -> int:
    """Into how many pieces rows are worth cutting; 1: leave them whole.

    x: a tensor of the call
    chains: programs that run along the rows of one call
    rows, columns: of T, and of a state; the pass for T and U has both, beside the columns of the pass itself
    """
    programs = max(1, chains) * (rows + 2 * columns)
    count = min(slots(x.device) * columns // programs, length // SHORTEST, MOST)
    return count if count >= FEWEST else 1


@torch.compiler.assume_constant_result
def slots(device: torch.device) -> int:
    """Programs of a chain that a device runs at once, one on each multiprocessor; none on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
