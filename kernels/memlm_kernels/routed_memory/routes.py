"""The places of routed tokens in the order of their memories: a stable sort of each row, one of the whole batch, and
sizes that follow from shapes alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.checks import check_range, check_tensors, readable


class MemoryRoutes(NamedTuple):
    """B rows, T tokens of a row, J choices of a token, M memories, S segments: documents x memories.

    place: [B, T, J], the place of each choice in its row, which is sorted by document, then by memory, then by token;
        padding comes last
    cu_seqlens: [B, S + 1], the segments of that order
    grouped: [1, B * T, J], the place of each choice in the whole batch, for ``grouped_linear``: sorted by memory, then
        by row, then by document; padding comes last
    ungrouped: [1, B * T * J, 1], the inverse: for each entry of that order its place in the rows, laid one behind the
        other
    sizes: [M], the number of entries of each memory in that order; padding counts as the last memory's

    A shared memory is one more choice in ``place`` and one more memory in ``cu_seqlens``, the last in both. It gets
    all tokens; in ``ungrouped`` they follow those of the other memories.
    """

    place: Tensor
    cu_seqlens: Tensor
    grouped: Tensor
    ungrouped: Tensor
    sizes: Tensor

    @staticmethod
    def of(
        memory: Tensor,
        num_memories: int,
        document: Tensor | None = None,
        num_documents: int = 1,
        *,
        shared: bool = False,
    ) -> "MemoryRoutes":
        """Sort the choices of all tokens.

        memory: [B, T, J] integers, the J different memories of each token
        document: [B, T], the document of each token, ``num_documents`` for padding; None: each row is one document
        num_documents: the largest number of documents in a row, as a Python int
        shared: whether there is one more memory, which gets every token

        Raises ValueError if shapes, types or devices disagree or a number is out of range. On a GPU numbers are not
        checked: such a choice counts as padding.
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
        memories, device = num_memories + shared, memory.device
        segments, chosen = num_documents * memories, memory.long()
        if not readable(memory):
            chosen = torch.where(chosen < num_memories, chosen, -1)
        if shared:
            chosen = F.pad(chosen, (0, 1), value=num_memories)
        owner = group = chosen
        if document is not None or not readable(memory):
            real = chosen >= 0
            if document is not None:
                real = real & (document == document.clamp(0, num_documents - 1))[..., None]
                owner = document.long()[..., None] * memories + chosen
            owner = torch.where(real, owner, segments)
            # Padding comes after the tokens of all memories, and the shared memory's tokens come last.
            group = torch.where(real, chosen, num_memories).masked_fill(chosen == num_memories, num_memories + 1)

        # Stable, because a memory reads its tokens in their order.
        owner, by_owner = owner.flatten(1).sort(dim=1, stable=True)
        place = _places(by_owner)
        cu_seqlens = torch.searchsorted(owner, torch.arange(segments + 1, device=device).repeat(batch, 1))
        group, by_group = group.flatten().sort(stable=True)
        grouped = _places(by_group).view(1, batch * length, choices + shared)[..., :choices]
        starts = torch.searchsorted(group, torch.arange(num_memories, device=device))
        sizes = torch.cat([starts, starts.new_full((1,), memory.numel())]).diff()
        in_batch = place
        if batch > 1:
            in_batch = place + place.shape[1] * torch.arange(batch, device=device)[:, None]
        ungrouped = in_batch.flatten().index_select(0, by_group).view(1, -1, 1)
        return MemoryRoutes(place.view(chosen.shape), cu_seqlens, grouped, ungrouped, sizes)


def _places(order: Tensor) -> Tensor:
    """The inverse of a permutation, along the last dimension."""
    here = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, here)
