"""Memories along documents that go on from the stretches of other processes (``memlm.memory.stretches``).

B rows, P processes, S segments of a row (one for each document and memory), M memories, W entries of a history,
C channels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.memory.rows import Segments
from memlm.memory.stretches import Carried, Stretches, Tensors


class Joined(NamedTuple):
    """documents: of this stretch; None: every row is in one
    tokens_PBM: tokens of each memory in the last document of each process's stretch, and -1 - tokens if that document
        starts in the stretch
    """

    stretches: Stretches
    documents: Segments | None
    tokens_PBM: Tensor

    @staticmethod
    def counted(
        stretches: Stretches, documents: Segments | None, cu_seqlens: Tensor | None, like_BTC: Tensor, memories: int
    ) -> "Joined":
        batch, length, _ = like_BTC.shape
        if cu_seqlens is None:
            tokens_BM = torch.full((batch, memories), length, device=like_BTC.device)
            return Joined(stretches, None, tokens_BM.expand(stretches.size, -1, -1))
        tokens_BM = cu_seqlens.long().diff(dim=1)
        if documents is not None:
            tokens_BM = documents.collect({"": tokens_BM})[""]
            starts_B = documents.fresh_B | (documents.last_B > 0)
            tokens_BM = torch.where(starts_B[:, None], -1 - tokens_BM, tokens_BM)
        return Joined(stretches, documents, stretches.all(tokens_BM))

    def history(self, x_BTC: Tensor, after_BSWC: Tensor) -> tuple[Tensor, Tensor]:
        """x, to be used from then on, and the last inputs of each segment before this stretch.

        after: the last inputs after the stretch, zeros before them
        """
        after_BMWC = self._leave(after_BSWC)
        parts, x_BTC = self.stretches.gather(after_BMWC, x_BTC)
        width = after_BMWC.shape[2]
        place_W, history_BMWC = torch.arange(width, device=x_BTC.device), torch.zeros_like(after_BMWC)
        for part_BMWC, tokens_BM in zip(parts[: self.stretches.rank], self.tokens_PBM, strict=False):
            # Older inputs move back by the number of new ones.
            from_BMW = place_W + tokens_BM[..., None]
            stays_BMW = (tokens_BM[..., None] >= 0) & (from_BMW < width)
            index_BMWC = from_BMW.clamp(0, width - 1)[..., None].expand_as(history_BMWC)
            history_BMWC = part_BMWC + history_BMWC.gather(2, index_BMWC) * stays_BMW[..., None]
        return x_BTC, self._enter(history_BMWC)

    def tokens_before(self) -> Tensor:
        """The number of tokens of each segment's document and memory before this stretch, [B, S]."""
        before_BM = torch.zeros_like(self.tokens_PBM[0])
        for tokens_BM in self.tokens_PBM[: self.stretches.rank]:
            before_BM = torch.where(tokens_BM < 0, -1 - tokens_BM, before_BM + tokens_BM)
        return self._enter(before_BM)

    def carry(self, op: Carried, columns: Tensors, shared: Tensors, state: Tensor, diagonal: bool = False) -> Any:
        def of_memories(columns: Tensors, shared: Tensors, memory: Tensor) -> tuple[Tensor, ...]:
            o, after, *more = op(columns, shared, self._enter(memory))
            return o, self._leave(after), *more

        o, after, *more = self.stretches.carry(of_memories, columns, shared, self._leave(state), diagonal)
        return o, self._enter(after), *more

    def _enter(self, x: Tensor) -> Tensor:
        """[B, M, ...] -> [B, S, ...]: the state of the first document; later ones begin with zeros."""
        return x if self.documents is None else self.documents.spread({"": x}, {"": torch.zeros_like(x)})[""]

    def _leave(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [B, M, ...]: the state of the last document."""
        return x if self.documents is None else self.documents.collect({"": x})[""]


def carried(
    joined: Joined | None, op: Carried, columns: Tensors, shared: Tensors, state: Tensor, diagonal: bool = False
) -> Any:
    """The results of ``op``, from the given state or from that after the stretches of earlier processes."""
    if joined is None:
        return op(columns, shared, state)
    return joined.carry(op, columns, shared, state, diagonal)
