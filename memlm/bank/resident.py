"""The routers' keys of many shards in a few large tensors (slabs) on a GPU, so a query reads few tensors.

On a CPU, keys are read from the shards. A deletion marks chunks; a slab is rewritten when less than half of it is in
use.

L layers that route, C chunks, G groups of heads, K head dim.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memlm.bank.shard import Shard
from memlm_kernels.route_documents import RouterShard

# The size of a slab, in chunks: at least _LEAST, and at least 1 / _PART of all chunks.
_LEAST, _PART = 4096, 4


@dataclass
class _Slab:
    """k_LCGK, scale_LCG1, document_C, number_C: as in ``RouterShard``, with room after ``used`` chunks
    numbers, first: its documents, deleted ones too, and the first chunk of each
    """

    k_LCGK: Tensor
    scale_LCG1: Tensor | None
    document_C: Tensor
    number_C: Tensor
    used: int = 0
    dead: int = 0
    numbers: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=lambda: [0])

    @staticmethod
    def like(k_LCGK: Tensor, scale_LCG1: Tensor | None, chunks: int, device: torch.device) -> "_Slab":
        def room(x: Tensor) -> Tensor:
            return torch.empty(len(x), chunks, *x.shape[2:], dtype=x.dtype, device=device)

        scale_LCG1 = None if scale_LCG1 is None else room(scale_LCG1)
        integers = (torch.empty(chunks, dtype=torch.int64, device=device) for _ in range(2))
        return _Slab(room(k_LCGK), scale_LCG1, *integers)

    @property
    def room(self) -> int:
        return len(self.document_C) - self.used

    def append(self, k_LCGK: Tensor, scale_LCG1: Tensor | None, numbers: list[int], counts: Sequence[int]) -> None:
        start, end, before = self.used, self.used + k_LCGK.shape[1], len(self.numbers)
        self.k_LCGK[:, start:end] = k_LCGK
        if self.scale_LCG1 is not None and scale_LCG1 is not None:
            self.scale_LCG1[:, start:end] = scale_LCG1
        place_C = torch.arange(before, before + len(numbers)).repeat_interleave(
            torch.tensor(counts, dtype=torch.int64)
        )
        self.document_C[start:end] = place_C
        self.number_C[before : before + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        self.numbers += numbers
        for count in counts:
            self.first.append(self.first[-1] + count)
        self.used = end

    def forget(self, at: int) -> None:
        start, end = self.first[at : at + 2]
        self.document_C[start:end] = -1
        self.dead += end - start

    def tidied(self) -> "_Slab":
        """A slab without the deleted documents."""
        alive_C = (self.document_C[: self.used] >= 0).nonzero()[:, 0]
        places = self.document_C[alive_C].unique_consecutive().tolist()
        scale = None if self.scale_LCG1 is None else self.scale_LCG1[:, alive_C]
        new = _Slab.like(self.k_LCGK, scale, len(alive_C), self.document_C.device)
        counts = [self.first[i + 1] - self.first[i] for i in places]
        new.append(self.k_LCGK[:, alive_C], scale, [self.numbers[i] for i in places], counts)
        return new


class Resident:
    """The keys of this process's documents, by number."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slabs: list[_Slab] = []

    @property
    def nbytes(self) -> int:
        """Bytes, with free room and deleted chunks."""
        kept = [x for slab in self.slabs for x in (slab.k_LCGK, slab.scale_LCG1) if x is not None]
        return sum(x.nbytes for x in kept)

    def append(self, shard: Shard, expected: int = 0) -> None:
        """Add the documents of a shard that comes after all others; expected: chunks still to come."""
        own_N = (shard.own_N & shard.alive_N).nonzero()[:, 0]
        numbers, counts = ([of_all[i] for i in own_N.tolist()] for of_all in (shard.numbers, shard.count_N.tolist()))
        if not numbers:
            return
        place_C, _ = shard.chunks_of(own_N)
        k, scale = (None if x is None else x[:, place_C] for x in (shard.router_LCGK, shard.scale_LCG1))
        assert k is not None
        if not (self.slabs and self.slabs[-1].room >= len(place_C)):
            held = sum(slab.used for slab in self.slabs)
            size = max(len(place_C), expected, held // _PART, _LEAST)
            self.slabs.append(_Slab.like(k, scale, size, self.device))
        self.slabs[-1].append(k, scale, numbers, counts)

    def forget(self, number: int) -> None:
        """Delete a document, which may belong to another process."""
        at = bisect.bisect_right(self.slabs, number, key=lambda slab: slab.numbers[0]) - 1
        if at < 0:
            return
        slab = self.slabs[at]
        place = bisect.bisect_left(slab.numbers, number)
        if place == len(slab.numbers) or slab.numbers[place] != number:
            return
        slab.forget(place)
        if slab.dead == slab.used:
            del self.slabs[at]
        elif slab.dead * 2 > slab.used:
            self.slabs[at] = slab.tidied()

    def parts(self, layer: int) -> list[RouterShard]:
        found = []
        for slab in self.slabs:
            scale = None if slab.scale_LCG1 is None else slab.scale_LCG1[layer, : slab.used]
            number_N = slab.number_C[: len(slab.numbers)]
            found.append(RouterShard(slab.k_LCGK[layer, : slab.used], slab.document_C[: slab.used], number_N, scale))
        return found
