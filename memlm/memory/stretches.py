"""Sequence parallelism: every process of a group holds one stretch of each row, in the order of their ranks.

A memory's state is all that a later token needs of earlier ones, so a process that continues the state of the one
before it computes the row exactly, whatever the memory is. The state of a layer is handed on as soon as the layer is
done: while process r works on layer i, process r + 1 works on layer i - 1. So P processes need the time of N + P - 1
layers on a stretch for N layers. The backward hands the states' gradients back in the same way.

Every process calls the model with the same shapes; the lengths of stretches are equal.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.memory.state import State, named, nested
from memlm_kernels.grid import keep_last

# Messages on their way, and their tensors. They outlive the model that sent them.
_sent: list[tuple[Any, Tensor]] = []

# Tensors, or None.
Tensors = Sequence[Any]
# columns, shared, state -> output, state after the tokens, ...
Carried = Callable[[Any, Any, Tensor], Sequence[Tensor]]


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

    def refuse(self, layer: int, aux_losses: dict[str, Tensor]) -> None:
        """Raise ValueError if a layer whose state is handed on has losses of its own."""
        if aux_losses:
            raise ValueError(
                f"sequence parallelism: layer{layer}/{next(iter(aux_losses))} is a loss of whole rows; set its weight "
                "in model.mixers to 0"
            )

    def gather(self, x: Tensor, tie: Tensor) -> tuple[Tensor, Tensor]:
        """x of all processes, [P, ...]; and ``tie``.

        The backward is an exchange too, in which all take part. So the output must depend on the returned tie, even
        where it does not depend on x of the others.
        """
        tie, parts = _Gather.apply(tie, self, x)
        return parts, tie

    def all(self, x: Tensor) -> Tensor:
        """x of all processes, [P, ...], without a gradient."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous(), group=self.group)
        self._count(x)
        return parts

    def shift(self, x: Tensor, to: int) -> Tensor:
        """x of the process ``to`` places earlier, zeros if there is none; without a gradient."""
        source, target = self.rank - to, self.rank + to
        x, other, moves = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format), []
        if 0 <= target < self.size:
            moves.append(dist.P2POp(dist.isend, x, group=self.group, group_peer=target))
            self.messages, self.bytes = self.messages + 1, self.bytes + x.numel() * x.element_size()
        if 0 <= source < self.size:
            moves.append(dist.P2POp(dist.irecv, other, group=self.group, group_peer=source))
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()
        return other

    def past(self, x: Tensor, given: Tensor, lengths_B: Tensor | None, whole: bool) -> tuple[Tensor, Tensor]:
        """``Rows.past``: from the neighbour where its stretch is long enough, else from all."""
        length, count = x.shape[1], given.shape[1]
        if not whole and count == 0:
            return x, given
        if not whole and lengths_B is None and count <= length:
            x, past = _Neighbour.apply(x, self, count)
            return x, past
        parts, x = self.gather(x, x)
        lengths = [None] * self.size if lengths_B is None else self.all(lengths_B)
        past = given.to(x.dtype)
        for part, of_part in zip(parts[: self.rank], lengths, strict=False):
            past = torch.cat([past, part], 1)
            past = keep_last(past, past.shape[1] if whole else count, length, of_part)
        return x, past

    def carry(
        self, op: Carried, columns: Tensors, shared: Tensors, before: Tensor, diagonal: bool = False
    ) -> tuple[Tensor, ...]:
        """``op(columns, shared, state)``, from the state after all earlier stretches, for an op that is linear in its
        state and columns, and treats each of their last channels alike and apart from the others. Its results: the
        output, the state [..., N, V] after the tokens, and values without a gradient.

        A stretch maps its first state S to T S + U. T is the op's result on an identity with columns of zeros, and U
        that on zeros. One gather of T and U gives every process its first state. In the backward, one gather of the
        gradients of the first states gives that of the last states: T^T maps them, and T and U need none.

        before: the state before the row; diagonal: T is a diagonal matrix, so one channel holds it
        """
        results: tuple[Tensor, ...] = _Carry.apply(self, op, diagonal, len(columns), before, *columns, *shared)
        return results

    def _count(self, x: Tensor) -> None:
        self.messages, self.bytes = self.messages + 1, self.bytes + (self.size - 1) * x.numel() * x.element_size()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over the processes, without a gradient."""
        return self.all(x.detach()).mean(0)

    def everywhere(self, flag_B: Tensor) -> Tensor:
        """Whether a flag is true on all processes."""
        number_B = flag_B.long()
        dist.all_reduce(number_B, dist.ReduceOp.MIN, group=self.group)
        return number_B.bool()

    def push(self, tensors: list[Tensor], to: int) -> None:
        """Send tensors to the process ``to`` places further, as one message for each dtype."""
        # One state is on its way at a time, so a fast process does not fill the memory.
        for work, _ in _sent:
            work.wait()
        _sent.clear()
        for _, places in _by_dtype(tensors):
            flat = torch.cat([tensors[i].reshape(-1) for i in places]).view(torch.uint8)
            if flat.numel():
                _sent.append((dist.isend(flat, group=self.group, group_dst=self.rank + to), flat))
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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tie: Tensor, stretches: Stretches, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.stretches = stretches
        return tie.view_as(tie), stretches.all(x)

    @staticmethod
    def backward(ctx: Any, d_tie: Tensor, d_parts: Tensor) -> tuple[Tensor | None, ...]:
        mine = torch.empty_like(d_parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(mine, d_parts.contiguous(), group=ctx.stretches.group)
        ctx.stretches._count(d_parts[0])
        return d_tie, None, mine.sum(0)


class _Neighbour(torch.autograd.Function):
    """x, and the last ``count`` entries of x of the process before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stretches: Stretches, count: int) -> tuple[Tensor, Tensor]:
        ctx.stretches, ctx.count = stretches, count
        return x.view_as(x), stretches.shift(x[:, x.shape[1] - count :], 1)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_past: Tensor) -> tuple[Tensor | None, ...]:
        d_x = d_x.clone()
        d_x[:, d_x.shape[1] - ctx.count :] += ctx.stretches.shift(d_past, -1)
        return d_x, None, None


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stretches: Stretches,
        op: Carried,
        diagonal: bool,
        count: int,
        before: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        columns, shared = tensors[:count], tensors[count:]
        rows, width = before.shape[-2:]
        unit = before.new_ones(rows, 1) if diagonal else torch.eye(rows, dtype=before.dtype, device=before.device)
        wide = [None if x is None else F.pad(x, (0, unit.shape[1])) for x in columns]
        both = torch.cat([torch.zeros_like(before), unit.expand(*before.shape[:-1], -1)], -1)
        U, T = stretches.all(op(wide, shared, both)[1]).split([width, unit.shape[1]], -1)
        start = before
        for j in range(stretches.rank):
            start = U[j] + (T[j] * start if diagonal else T[j] @ start)
        results = op(columns, shared, start)
        ctx.save_for_backward(start, T[stretches.rank + 1 :].clone(), *tensors)
        ctx.stretches, ctx.op, ctx.diagonal, ctx.count = stretches, op, diagonal, count
        kind = before.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        start, T, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        tensors = [None if x is None else x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
        start = start.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(start.device.type, **ctx.autocast):
            o, end, *_ = ctx.op(tensors[: ctx.count], tensors[ctx.count :], start)
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        (d_start,) = torch.autograd.grad(o, start, d_o, retain_graph=True, **options)
        d_starts, d_end = ctx.stretches.all(d_start), torch.zeros_like(end)
        for j in reversed(range(len(T))):
            d_end = d_starts[j + len(d_starts) - len(T)] + (T[j] * d_end if ctx.diagonal else T[j].mT @ d_end)
        inputs = [x for x, w in zip(tensors, wanted, strict=True) if w]
        found = iter(torch.autograd.grad((o, end), inputs, (d_o, d_end), **options))
        return None, None, None, None, None, *(next(found) if w else None for w in wanted)
