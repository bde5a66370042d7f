"""Laying rows of tokens on a grid of chunks. All sizes follow from shapes, so nothing is read from the device.

B batch, T tokens of the call, N chunks, C slots of a chunk, H heads. Chunks are counted from the first token of
each document; a row may start inside a chunk, hold several documents, and end in padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.checks import check_range, check_tensors, number, readable


@dataclass(frozen=True)
class Grid:
    """The place of each token of a call.

    slots: [B, T], each token's slot; None if every row fills the grid from the first slot on
    opens_document, opens_chunk: [B, N], where a document or a chunk starts; None if ``slots`` is None
    """

    length: int
    count: int
    width: int
    slots: Tensor | None = None
    opens_document: Tensor | None = None
    opens_chunk: Tensor | None = None

    def lay(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] -> [B, N, C, ...]; a slot without a token holds ``fill``."""
        size = self.count * self.width
        if self.slots is None:
            if size > self.length:
                x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, size - self.length), value=fill)
        else:
            # One more slot takes the tokens that are not real.
            x = place(x, self.slots, size + 1, fill)[:, :-1]
        return x.unflatten(1, (self.count, self.width))

    def take(self, x: Tensor) -> Tensor:
        """[B, N, C, ...] -> [B, T, ...]; a token that is not real gets zeros."""
        x = x.flatten(1, 2)
        if self.slots is None:
            return x[:, : self.length]
        return pick(F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1)), self.slots)


def aligned_grid(length: int, width: int) -> Grid:
    """The grid of rows that start at a chunk's start, have only real tokens, and hold one document."""
    if length == 1:
        # A single token needs no chunk around it.
        width = 1
    return Grid(length, -(-length // width), width)


def ragged_grid(
    positions: Tensor, lengths: Tensor | None, width: int, max_documents: int, chunk_size: int | None = None
) -> Grid:
    """The grid of any rows.

    positions: [B, T], positions in documents; a 0 starts one
    lengths: [B], the number of real tokens of each row, which come first (None: all)
    chunk_size: the chunks whose start ``opens_chunk`` marks, in tokens, a multiple of width (None: width)

    Only the first chunk of a row and the last one of each document may be short, which bounds the number of chunks.
    """
    length = positions.shape[1]
    opens_chunk = positions % (chunk_size or width) == 0
    opens = positions % width == 0
    if length == 1:
        # A single token needs no chunk around it.
        width = 1
    count = min(length, (length + (max_documents + 1) * (width - 1)) // width)
    slots = (opens.cumsum(1) - opens[:, :1].long()) * width + positions % width
    slots = slots.clamp(max=count * width)
    if lengths is not None:
        real = torch.arange(length, device=positions.device) < lengths[:, None]
        slots = torch.where(real, slots, count * width)
    grid = Grid(length, count, width, slots)
    flags = (grid.lay(x.long()).amax(-1).bool() for x in (positions == 0, opens_chunk))
    return Grid(length, count, width, slots, *flags)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """[B, T, ...], [B, S] -> [B, S, ...]: the entries of each row at its indices. Whole entries are copied, which is
    several times as fast as ``gather``.
    """
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).unflatten(0, index.shape)


def place(x: Tensor, index: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """[B, T, ...], [B, T] -> [B, size, ...]: each entry at its index, ``fill`` elsewhere."""
    out = x.new_full((len(x) * size, *x.shape[2:]), fill)
    # As fast as ``index_copy_``, whose gradient keeps x.
    return out.index_put_((_flat(index, size),), x.flatten(0, 1)).unflatten(0, (len(x), size))


def _flat(index: Tensor, size: int) -> Tensor:
    """[B, S] -> [B * S], indices into rows of ``size`` entries that lie one after the other."""
    return (index + size * torch.arange(len(index), device=index.device)[:, None]).flatten()


def to_rows(x: Tensor) -> Tensor:
    """[B, N, C, H, ...] -> [N, B * H, C, ...]"""
    return x.movedim(3, 1).movedim(2, 0).flatten(1, 2)


def from_rows(x: Tensor, heads: int) -> Tensor:
    """[N, B * H, C, ...] -> [B, N, C, H, ...]"""
    return x.unflatten(1, (-1, heads)).movedim(0, 1).movedim(2, 3)


def row_flags(flags: Tensor, heads: int) -> Tensor:
    """[B, N] -> [N, B * H, 1, 1]"""
    return flags.mT.repeat_interleave(heads, 1)[..., None, None]


def next_position(positions: Tensor, lengths: Tensor | None, before: Tensor) -> Tensor:
    """[B], the position after each row's last real token; ``before`` if a row has none."""
    if positions.shape[1] == 0:
        return before
    if lengths is None:
        return positions[:, -1] + 1
    last = positions.gather(1, (lengths - 1).clamp(0, positions.shape[1] - 1)[:, None])[:, 0]
    return torch.where(lengths > 0, last + 1, before)


def keep_last(x: Tensor, size: int, new: int, lengths: Tensor | None) -> Tensor:
    """The last ``size`` real entries of x along dimension 1. x holds history, then ``new`` entries of this call.

    The first ``lengths[b]`` of the new entries of row b are real (None: all). If there are fewer than ``size`` real
    entries, the left ones are arbitrary: callers mask by position.
    """
    total = x.shape[1]
    if lengths is None:
        if size == total:
            return x.contiguous()
        # A copy if x has more than one new token, because a view would keep all of x alive.
        return x[:, total - size :] if new == 1 else x[:, total - size :].clone()
    index = torch.arange(total - size, total, device=x.device) - new + lengths[:, None]
    return pick(x, index.clamp(0, total - 1))


def check_places(x: Tensor, positions: Tensor | None, lengths: Tensor | None, max_documents: int) -> None:
    """Raise ValueError unless positions and lengths fit the tokens of x, [B, T, ...]. Where they are not checked, a
    token for which ``ragged_grid`` has no room counts as not real.
    """
    batch, length = x.shape[:2]
    if max_documents < 1:
        raise ValueError(f"max_documents={max_documents} must be at least 1")
    if positions is not None and positions.shape != (batch, length):
        raise ValueError(f"positions {list(positions.shape)} must be integers [B, T] = {[batch, length]}")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths {list(lengths.shape)} must be integers [B] = {[batch]}")
    check_tensors({"q": x}, {"positions": positions, "lengths": lengths})
    if lengths is not None:
        check_range("lengths", lengths, 0, length + 1)
    if positions is not None and positions.numel() and readable(positions):
        after, before = positions[:, 1:], positions[:, :-1]
        real = torch.ones_like(after, dtype=torch.bool)
        if lengths is not None:
            real = torch.arange(1, length) < lengths[:, None]
        if number((real & (after != 0) & (after != before + 1)).any()):
            raise ValueError(
                "positions neither increase by 1 nor start at 0; give the number of tokens before each in its document"
            )
        most = 1 + number((real & (after == 0)).sum(1).amax())
        if most > max_documents:
            raise ValueError(f"positions have {most} documents in a row; max_documents={max_documents} is too small")


def check_start(positions: Tensor | None, lengths: Tensor | None, before: Tensor | None) -> None:
    """Raise ValueError unless each row's first token starts a document or continues at its state's position,
    ``before`` [B] (None: 0). Checked on a CPU only, because a GPU would have to wait.
    """
    if positions is None or positions.numel() == 0 or not readable(positions):
        return
    first = positions[:, 0]
    follows = torch.zeros_like(first) if before is None else before
    wrong = (first != 0) & (first != follows)
    if lengths is not None:
        wrong = wrong & (lengths > 0)
    if number(wrong.any()):
        row = int(wrong.nonzero()[0])
        found, goes_on = int(first[row]), int(follows[row])
        raise ValueError(f"positions start row {row} at {found}; 0 starts a document, {goes_on} continues one")
