"""Where routed tokens stand once they are put in the order of their memories: one stable sort, and sizes that follow
from shapes alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.checks import check_range, check_tensors
from memlm_kernels.segments import counts


class MemoryRoutes(NamedTuple):
    """B rows, T tokens of a row, J choices of a token, M memories, S segments: documents x memories.

    place: [B, T, J], of each choice in its row: document by document, memory by memory, each memory's tokens in their
        order, and padding behind them
    cu_seqlens: [B, S + 1], the segments of that order
    grouped: [1, B * T, J], the place of each choice in the order of the whole batch, for ``grouped_linear``: memory by
        memory, row by row, document by document, and padding behind them
    ungrouped: [1, B * T * J, 1], the place in the rows, one after the other, of what stands in that order
    sizes: [M], how many each memory has in that order, padding counted to the last
    """

    place: Tensor
    cu_seqlens: Tensor
    grouped: Tensor
    ungrouped: Tensor
    sizes: Tensor

    @staticmethod
    def of(
        memory: Tensor, num_memories: int, document: Tensor | None = None, num_documents: int = 1
    ) -> "MemoryRoutes":
        """memory: [B, T, J] integers, choices of each token, J different ones

        document: [B, T], of each token, ``num_documents`` for padding; None: each row is one document
        num_documents: that a row may have, known without the device

        Raises ValueError if shapes, types or devices disagree or a number is outside; on a GPU, where they are not
        looked at, such a choice is padding.
        """
        if memory.ndim != 3:
            raise ValueError(f"memory {list(memory.shape)} of {memory.dtype} must be integers [B, T, J]")
        if num_memories < 1 or num_documents < 1:
            raise ValueError(f"num_memories={num_memories} and num_documents={num_documents} must be at least 1")
        if document is not None and document.shape != memory.shape[:2]:
            raise ValueError(f"document {list(document.shape)} must be [B, T] = {list(memory.shape[:2])}")
        check_tensors({}, {"memory": memory, "document": document})
        check_range("memory", memory, 0, num_memories)
        if document is not None:
            check_range("document", document, 0, num_documents + 1)
        batch, length, choices = memory.shape
        routed, segments = length * choices, num_documents * num_memories
        owner, real = memory.long(), memory == memory.clamp(0, num_memories - 1)
        if document is not None:
            owner = document.long()[..., None] * num_memories + owner
            real = real & (document == document.clamp(0, num_documents - 1))[..., None]
        owner = torch.where(real, owner, segments)
        # Stable, for a memory reads its tokens in their order.
        owner, by_owner = owner.flatten(1).sort(dim=1, stable=True)
        here = torch.arange(routed, device=memory.device).expand(batch, -1)
        place = torch.empty_like(by_owner).scatter(1, by_owner, here)
        sizes = counts(owner, segments)
        cu_seqlens = F.pad(sizes.cumsum(1), (1, 0))

        # A run is what one memory gets of one document of one row; the paddings of rows are runs of their own.
        row = torch.arange(batch, device=memory.device)[:, None]
        sizes = sizes.unflatten(1, (num_documents, num_memories)).permute(2, 0, 1)
        runs = torch.cat([sizes.flatten(), routed - cu_seqlens[:, -1]])
        starts = runs.cumsum(0) - runs
        run = (owner % num_memories * batch + row) * num_documents + owner // num_memories
        run = torch.where(owner < segments, run, len(runs) - batch + row)
        in_batch = starts[run] + here - cu_seqlens.gather(1, owner)
        grouped = in_batch.gather(1, place).view(1, batch * length, choices)
        ungrouped = torch.empty_like(in_batch.flatten())
        ungrouped = ungrouped.scatter(0, in_batch.flatten(), (row * routed + here).flatten()).view(1, -1, 1)
        of_memory = sizes.sum((1, 2))
        of_memory = torch.cat([of_memory[:-1], batch * routed - of_memory[:-1].sum(0, keepdim=True)])
        return MemoryRoutes(place.view(memory.shape), cu_seqlens, grouped, ungrouped, of_memory)
