"""Memories that go on from step to step (``train.carry``): row g of a batch continues row g of the batch before.

B rows of a batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from memlm.cache import MemoryCache
from memlm.memory.state import mapped


class Carried:
    """The memories of a process, one for each of its forwards. Their gradients end with the step.

    Row g of a batch is in part g % count of it, as in ``Mixture.batch``; so any division of the rows into processes
    and forwards can take over the memories of another one.
    """

    def __init__(
        self, parts: Sequence[int], count: int, device: torch.device, saved: dict[str, Any] | None = None
    ) -> None:
        """parts: this process's, one a forward; count: all parts of a batch; saved: the result of ``saved``"""
        self._parts = parts
        self.memories = [MemoryCache() for _ in parts]
        if saved is not None:
            for part, memory in zip(parts, self.memories, strict=True):
                memory.states = [mapped(lambda x, part=part: x[part::count].clone(), of) for of in saved["states"]]
                memory.position, memory.start = saved["position"][part::count].clone(), None
                memory.signature, memory.seen = saved["signature"], saved["seen"]
                memory.to(device)
        self.begin()

    def begin(self) -> None:
        """Remember the memories before a step."""
        self._before = [memory.fork() for memory in self.memories]

    def undo(self) -> None:
        """Pass over the text of the step: states are those before it, of zeros before the first step."""
        for memory, before in zip(self.memories, self._before, strict=True):
            memory.states = before.states or [mapped(torch.zeros_like, state) for state in memory.states]

    def saved(self, processes: int) -> dict[str, Any]:
        """The memories of all processes, by row of the batch, for a checkpoint. All processes call this."""
        own = [(part, _content(memory)) for part, memory in zip(self._parts, self.memories, strict=True)]
        every = dict(gather_object(own) if processes > 1 else own)
        contents = [every[part] for part in sorted(every)]

        def by_row(*of_parts: Tensor) -> Tensor:
            return torch.stack(of_parts, 1).flatten(0, 1)

        layers = zip(*(content["states"] for content in contents), strict=True)
        return {
            **contents[0],
            "position": by_row(*(content["position"] for content in contents)),
            "states": [mapped(by_row, *of_parts) for of_parts in layers],
        }


def _content(memory: MemoryCache) -> dict[str, Any]:
    def copied(x: Tensor) -> Tensor:
        return x.detach().cpu().clone()

    assert memory.position is not None
    states = [mapped(copied, state) for state in memory.states]
    return {
        **{"signature": memory.signature, "seen": memory.seen},
        **{"position": copied(memory.position), "states": states},
    }
