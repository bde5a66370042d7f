"""Sequence parallelism: every process of a group holds one stretch of each row, in the order of their ranks.

A memory's state is all that a later token needs of earlier ones, so a process that continues the state of the one
before it computes the row exactly, whatever the memory is. The state of a layer is handed on as soon as the layer is
done: while process r works on layer i, process r + 1 works on layer i - 1. So P processes need the time of N + P - 1
layers on a stretch for N layers. The backward hands the states' gradients back in the same way.

Every process calls the model with the same shapes; the lengths of stretches are equal.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memlm.memory.state import State, named, nested


class Stretches:
    """The place of this process among those that hold the rows.

    group: a torch.distributed group; its ranks hold the stretches in order
    messages, bytes: sent by this process so far
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.messages = self.bytes = 0
        # Shapes and dtypes of the state that a layer sends, or gets, at a length.
        self._forms: dict[Any, Any] = {}
        self._sent: list[tuple[Any, Tensor]] = []

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    def receive(self, key: Any, x_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        """The input of a layer as it is, and the state after the stretch before; of the first stretch, ``state``.

        key: the layer and all that decides the state's shapes, equal on all processes
        """
        if self.first:
            return x_BTD, state
        x_BTD, *tensors = _Receive.apply(_link(x_BTD), self, key, x_BTD)
        return x_BTD, nested(dict(zip(sorted(named(state)), tensors, strict=True)))

    def send(self, key: Any, y_BTD: Tensor, state: State) -> Tensor:
        """Hand a layer's state on. Returns its output, whose backward takes the state's gradient."""
        if self.last:
            return y_BTD
        tensors = [x for _, x in sorted(named(state).items())]
        y: Tensor = _Send.apply(_link(y_BTD), self, key, y_BTD, *tensors)
        return y

    def start(self, x_BTD: Tensor, position_ids: Tensor | None, lengths_B: Tensor | None) -> dict[str, Any]:
        """``before_B`` and ``start`` of the stretch's ``Rows``."""
        batch, length, _ = x_BTD.shape
        if position_ids is not None:
            return {"start": 0 if self.first else None, "before_B": position_ids[:, 0].clamp(min=0)}
        if lengths_B is None:
            start = self.rank * length
            return {"start": start, "before_B": torch.full((batch,), start, device=x_BTD.device)}
        parts = [torch.empty_like(lengths_B) for _ in range(self.size)]
        dist.all_gather(parts, lengths_B.contiguous(), group=self.group)
        return {"start": None, "before_B": torch.stack(parts)[: self.rank].sum(0)}

    def everywhere(self, flag_B: Tensor) -> Tensor:
        """Whether a flag is true on all processes."""
        number_B = flag_B.long()
        dist.all_reduce(number_B, dist.ReduceOp.MIN, group=self.group)
        return number_B.bool()

    def push(self, tensors: list[Tensor], to: int) -> None:
        """Send tensors to the process ``to`` places further, as one message for each dtype."""
        # One state is on its way at a time, so a fast process does not fill the memory.
        for work, _ in self._sent:
            work.wait()
        self._sent = []
        for _, places in _by_dtype(tensors):
            flat = torch.cat([tensors[i].reshape(-1) for i in places]).view(torch.uint8)
            if flat.numel():
                self._sent.append((dist.isend(flat, group=self.group, group_dst=self.rank + to), flat))
                self.messages, self.bytes = self.messages + 1, self.bytes + flat.numel()

    def pull(self, forms: list[tuple[torch.Size, torch.dtype]], device: torch.device, away: int) -> list[Tensor]:
        """Tensors of these shapes and dtypes from the process ``away`` places further."""
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms]
        for dtype, places in _by_dtype(tensors):
            sizes = [tensors[i].numel() for i in places]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            if flat.numel():
                dist.recv(flat.view(torch.uint8), group=self.group, group_src=self.rank + away)
            for i, part in zip(places, flat.split(sizes), strict=True):
                tensors[i] = part.view(tensors[i].shape)
        return tensors

    def tell(self, key: Any, tensors: tuple[Tensor, ...]) -> None:
        """Tell the next process the shapes of a state, once for each key."""
        forms = [(x.shape, x.dtype) for x in tensors]
        if key not in self._forms:
            dist.send_object_list([forms], group=self.group, group_dst=self.rank + 1)
        elif self._forms[key] != forms:
            raise ValueError(
                "sequence parallelism: the shapes of a layer's state differ between calls of equal shapes"
            )
        self._forms[key] = forms

    def told(self, key: Any) -> list[tuple[torch.Size, torch.dtype]]:
        """The shapes of the state that the process before sends."""
        key = ("before", key)
        if key not in self._forms:
            forms: list[Any] = [None]
            dist.recv_object_list(forms, group=self.group, group_src=self.rank - 1)
            self._forms[key] = forms[0]
        return self._forms[key]


def _by_dtype(tensors: list[Tensor]) -> Iterator[tuple[torch.dtype, list[int]]]:
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        yield dtype, [i for i, x in enumerate(tensors) if x.dtype == dtype]


def _link(x: Tensor) -> Tensor:
    """An input that asks for a gradient: both sides of an exchange must run its backward, whatever else is trained."""
    return torch.empty(0, device=x.device, requires_grad=True)


class _Receive(torch.autograd.Function):
    """The state arrives; in the backward its gradient leaves."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, stretches: Stretches, key: Any, x_BTD: Tensor) -> tuple[Tensor, ...]:
        tensors = stretches.pull(stretches.told(key), x_BTD.device, -1)
        ctx.stretches, ctx.real = stretches, [x.is_floating_point() for x in tensors]
        ctx.mark_non_differentiable(*(x for x in tensors if not x.is_floating_point()))
        return x_BTD.view_as(x_BTD), *tensors

    @staticmethod
    def backward(ctx: Any, d_x_BTD: Tensor, *d_tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stretches.push([d for d, real in zip(d_tensors, ctx.real, strict=True) if real], -1)
        return None, None, None, d_x_BTD


class _Send(torch.autograd.Function):
    """The state leaves; in the backward its gradient arrives."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, stretches: Stretches, key: Any, y_BTD: Tensor, *tensors: Tensor) -> Tensor:
        stretches.tell(key, tensors)
        stretches.push(list(tensors), 1)
        ctx.stretches, ctx.forms = stretches, [(x.shape, x.dtype) for x in tensors]
        return y_BTD.view_as(y_BTD)

    @staticmethod
    def backward(ctx: Any, d_y_BTD: Tensor) -> tuple[Tensor | None, ...]:
        real = [dtype.is_floating_point for _, dtype in ctx.forms]
        arrived = iter(ctx.stretches.pull([f for f, r in zip(ctx.forms, real, strict=True) if r], d_y_BTD.device, 1))
        return None, None, None, d_y_BTD, *(next(arrived) if r else None for r in real)
