"""Laying rows of tokens on a grid of chunks. All sizes follow from shapes, so nothing is read from the device.

B batch, T tokens of the call, N chunks, C slots of a chunk, H heads. ``segments.lay_out`` makes the grid of rows that
start inside a chunk, hold several documents, or end in padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The place of each token of a call.

    slots: [B, T], each token's slot, count * width for padding; None if rows fill the grid from its first slot on
    """

    length: int
    count: int
    width: int
    slots: Tensor | None = None

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
            return x if x.shape[1] == self.length else x[:, : self.length]
        return pick(F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1)), self.slots)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """[B, T, ...], [B, S] -> [B, S, ...]: the entries of each row at its indices. Whole entries are copied, which is
    several times as fast as ``gather``.
    """
    return pick_each([x], index)[0]


def pick_each(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """``pick`` from several tensors with as many entries; the index may have more dimensions, [B, ...]."""
    flat = _flat(index.flatten(1), tensors[0].shape[1])
    return [x.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape) for x in tensors]


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
    return x.permute(1, 0, 3, 2, *range(4, x.ndim)).flatten(1, 2)


def from_rows(x: Tensor, heads: int) -> Tensor:
    """[N, B * H, C, ...] -> [B, N, C, H, ...]"""
    x = x.unflatten(1, (-1, heads))
    return x.permute(1, 0, 3, 2, *range(4, x.ndim))


def row_flags(flags: Tensor, heads: int) -> Tensor:
    """[B, N] -> [N, B * H, 1, 1]"""
    return flags.mT.repeat_interleave(heads, 1)[..., None, None]


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
