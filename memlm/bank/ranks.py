"""The processes that share a bank: the owner of each document, and the communication between them."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from memlm_kernels.route_documents import merge_topk

T = TypeVar("T")


class Ranks:
    """group: a torch.distributed group; None: this process alone. All processes must call every method but ``own``.

    A document's name decides its process, so adding and deleting moves no document.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def own(self, names: Sequence[str]) -> Tensor:
        """Which documents belong to this process, [N]."""
        if self.size == 1:
            return torch.ones(len(names), dtype=torch.bool)
        return torch.tensor([zlib.crc32(name.encode()) % self.size == self.rank for name in names], dtype=torch.bool)

    def best(self, index: Tensor, score: Tensor, top_k: int) -> Tensor:
        """The best top_k over all processes of each one's documents and scores [..., top_k]; on ties the lowest
        number.
        """
        if self.size == 1:
            return index
        # One tensor, one collective; a float64 holds every number below 2 ** 53 exactly.
        mine = torch.stack([index.double(), score.double()])
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        # Not by a kernel, because numbers take more than 32 bits.
        return merge_topk([(part[0].long(), part[1]) for part in parts], top_k=top_k, backend="reference").number

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes, where each entry is zero in all but one; x, contiguous, is overwritten."""
        if self.size > 1:
            # Summing bytes works for every dtype.
            dist.all_reduce(x.view(torch.uint8), group=self.group)
        return x

    def told(self, x: Any) -> Any:
        """The value of the first process."""
        said = [x]
        if self.size > 1:
            dist.broadcast_object_list(said, group=self.group, group_src=0)
        return said[0]

    def all_say(self, x: Any) -> list[Any]:
        said = [x] * self.size
        if self.size > 1:
            dist.all_gather_object(said, x, group=self.group)
        return said

    def first(self, do: Callable[[], T]) -> T:
        """The result of ``do`` on the first process. Its error is raised everywhere, so that no process waits
        for it.
        """
        done = _attempted(do) if self.rank == 0 else None
        return _result(*self.told(done))

    def each(self, do: Callable[[], T]) -> T:
        """The result of ``do`` on this process. An error of one process is raised everywhere."""
        result, error = _attempted(do)
        errors = [e for e in self.all_say(error) if e is not None]
        return _result(result, errors[0] if errors else None)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(self.group)


def _attempted(do: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return do(), None
    except Exception as error:
        return None, error


def _result(result: Any, error: Exception | None) -> Any:
    if error is not None:
        raise error
    return result
