"""The scalars of memories that are solved in blocks, see ``blocks`` for the equations.

N blocks, G rows and heads, C slots of a block. A memory has s parts: W, with momentum S, and in ragged rows the anchor
A, because a chunk may have opened in an earlier block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.neural_memory.rates import Rates
from memlm_kernels.segments import ChunkedRows


class BlockRates(NamedTuple):
    """C: [N, G, C, C], and ``inner``: row a(i) of C for each i, which is 0 if no such token is in the block

    reads: [N, G, C, r], of W and S in the memory of each slot   anchors: [N, G, C, s], of all parts in that of a(i)
    writes: [N, G, C, s], of each token's gradient in the parts after the block   carries: [N, G, s, s]
    """

    C: Tensor
    inner: Tensor
    reads: Tensor
    anchors: Tensor
    writes: Tensor
    carries: Tensor

    def at_once(self, part: slice) -> "BlockRates":
        """Those of some blocks, with blocks and rows in one dimension; the carries keep both."""
        C, inner, reads, anchors, writes = (x[part].flatten(0, 1) for x in self[:5])
        return BlockRates(C, inner, reads, anchors, writes, self.carries[part])


def block_rates(rates: Rates, rows: ChunkedRows, chunk_size: int) -> BlockRates:
    """rates: of positive lr; rows: laid on blocks. Without positions, blocks start with chunks."""
    C, reads, writes, carries = rates
    width, r = C.shape[2], reads.shape[-1]
    # Row i is the memory before slot i, and row 0 is W.
    first = F.pad(C.new_ones(1, 1), (0, r + width - 1, 0, width - 1))
    before = F.pad(torch.cat([reads, C], -1)[:, :, :-1], (0, 0, 1, 0)) + first
    if rows.positions is None or rows.start is None:
        if chunk_size > 1:
            before = before[:, :, ::chunk_size, None].expand(-1, -1, -1, chunk_size, -1).flatten(2, 3)[:, :, :width]
        anchors, inner = before.split([r, width], -1)
        return BlockRates(C, inner, reads, anchors, writes, carries)
    position, slot = rows.grid.lay(rows.positions, fill=-1), torch.arange(width, device=C.device)
    past = position % chunk_size
    # The first slot of each slot's chunk, -1 if that is in an earlier block.
    opened = torch.where((position >= 0) & (position - past >= rows.start[..., None]), slot - past, -1)
    # The chunk that remains open is that of the last token.
    last = torch.where(position >= 0, slot, 0).amax(-1, keepdim=True)
    opened = torch.cat([opened, opened.gather(-1, last)], -1).transpose(0, 1)
    opened = opened.repeat_interleave(C.shape[1] // max(1, opened.shape[1]), 1)[..., None]
    # A product: the gradient of a gather would add in no certain order.
    taken = torch.cat([(opened == slot).to(C.dtype) @ before, (opened < 0).to(C.dtype)], -1)
    anchors = torch.cat([taken[..., :r], taken[..., -1:]], -1)
    inner = taken[..., r:-1]
    # Chunks pass A on, or set it.
    writes = torch.cat([writes, inner[:, :, -1, :, None]], -1)
    carries = torch.cat([F.pad(carries, (0, 1)), anchors[:, :, -1:]], 2)
    return BlockRates(C, inner[:, :, :-1], reads, anchors[:, :, :-1], writes, carries)
