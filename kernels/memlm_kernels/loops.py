"""Differentiable functions with a loop in Python. A compiler calls them as an op of torch: it would unroll the loop,
which takes minutes and gives a graph that is no faster.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import asks_gradient

Tensors = Sequence[Tensor | None]


class Loop(NamedTuple):
    """Called with a plan and tensors, it gives the outputs of ``forward``, with gradients by ``backward``.

    forward: (plan, keep, tensors) -> the outputs, and tensors that backward needs besides the given ones: none unless
        ``keep``
    backward: (plan, tensors, kept, gradients of outputs) -> the gradient of each tensor
    outputs: (plan, tensors) -> tensors of the outputs' shapes and types, None for an output that is None

    A plan is a hashable named tuple without tensors. Each floating-point tensor that is given gets a gradient; other
    gradients are None.
    """

    forward: Callable[[Any, bool, Tensors], tuple[Tensors, list[Tensor]]]
    backward: Callable[[Any, Tensors, list[Tensor], Tensors], Tensors]
    outputs: Callable[[Any, Tensors], Tensors]

    def __call__(self, plan: Any, *tensors: Tensor | None) -> Any:
        keep = asks_gradient(*tensors)
        if not torch.compiler.is_compiling():
            return _Function.apply(self, plan, keep, *tensors)
        given, present = _apart(tensors)
        # Dynamo loses the content of a named tuple that it makes a constant.
        found = _forward(given, present, _number(self, type(plan), *plan), keep)
        return _whole(found, [x is not None for x in self.outputs(plan, tensors)])


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loop: Loop, plan: Any, keep: bool, *tensors: Tensor | None) -> Tensors:
        outputs, kept = loop.forward(plan, keep, tensors)
        ctx.set_materialize_grads(False)
        given, ctx.present = _apart(tensors)
        ctx.loop, ctx.plan = loop, plan
        if keep:
            ctx.save_for_backward(*given, *kept)
        return tuple(outputs)

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # Read once: checkpointing computes saved tensors again at each access.
        saved = ctx.saved_tensors
        tensors = _whole(saved, ctx.present)
        return None, None, None, *ctx.loop.backward(ctx.plan, tensors, [*saved[sum(ctx.present) :]], d_outputs)


# Loops with their plans, by the numbers that compiled code has for them: an op takes no Python objects.
_calls: dict[tuple[Loop, Any], int] = {}


@torch.compiler.assume_constant_result
def _number(loop: Loop, kind: type, *plan: Any) -> int:
    return _calls.setdefault((loop, kind(*plan)), len(_calls))


def _call(number: int) -> tuple[Loop, Any]:
    return list(_calls)[number]


def _apart(tensors: Tensors) -> tuple[list[Tensor], list[bool]]:
    """The tensors that are not None, and which these are."""
    return [x for x in tensors if x is not None], [x is not None for x in tensors]


def _whole(given: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    rest = iter(given)
    return [next(rest) if there else None for there in present]


def _own(given: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors that share no memory with the given ones or each other, as an op's outputs must be."""
    taken, own = {x.untyped_storage()._cdata for x in given}, []
    for x in found:
        x = x.contiguous()
        own.append(x.clone() if x.untyped_storage()._cdata in taken else x)
        taken.add(own[-1].untyped_storage()._cdata)
    return own


def _run(given: list[Tensor], present: list[bool], number: int, keep: bool) -> list[Tensor]:
    """The outputs that are not None, and the tensors that backward needs."""
    loop, plan = _call(number)
    outputs, kept = loop.forward(plan, keep, _whole(given, present))
    return _own(given, [*_apart(outputs)[0], *kept])


_forward = torch.library.custom_op("memlm::loop", _run, mutates_args=())


@_forward.register_fake
def _(given: list[Tensor], present: list[bool], number: int, keep: bool) -> list[Tensor]:
    loop, plan = _call(number)
    tensors = _whole(given, present)
    outputs = [x.new_empty(x.shape) for x in loop.outputs(plan, tensors) if x is not None]
    # The shapes of kept tensors follow from a run.
    kept = loop.forward(plan, keep, tensors)[1] if keep else []
    return [*outputs, *(x.new_empty(x.shape) for x in kept)]


def _run_backward(
    given: list[Tensor],
    present: list[bool],
    number: int,
    kept: list[Tensor],
    d_given: list[Tensor],
    d_present: list[bool],
) -> list[Tensor]:
    """Gradients of the given tensors of a floating-point type."""
    loop, plan = _call(number)
    found = loop.backward(plan, _whole(given, present), kept, _whole(d_given, d_present))
    return _own([*given, *kept, *d_given], _apart(found)[0])


_backward = torch.library.custom_op("memlm::loop_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(given: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in given if x.is_floating_point()]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given, ctx.present, ctx.number, _keep = inputs
    loop, plan = _call(ctx.number)
    ctx.outputs = [x is not None for x in loop.outputs(plan, _whole(given, ctx.present))]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *output[sum(ctx.outputs) :])


@outside_autocast
def _gradients(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    saved, count = ctx.saved_tensors, sum(ctx.present)
    given, kept = [*saved[:count]], [*saved[count:]]
    d_outputs = _whole(gradients[: sum(ctx.outputs)], ctx.outputs)  # type: ignore[arg-type]
    d_given, d_present = _apart(d_outputs)
    found = iter(_backward(given, ctx.present, ctx.number, kept, d_given, d_present))
    return [next(found) if x.is_floating_point() else None for x in given], None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def _count_flops(op: Any, run: Callable[..., list[Tensor]]) -> None:
    """Count the FLOPs of an op by running its function on tensors without data."""

    def flops(*given: Any, **_: Any) -> int:
        mode = FakeTensorMode()
        given = tree_map_only(Tensor, lambda x: mode.from_tensor(x.detach()), given)
        with torch.no_grad(), mode, FlopCounterMode(display=False) as counter:
            run(*given)
        return counter.get_total_flops()

    register_flop_formula(op, get_raw=True)(flops)


# torch counts these products only where they make a new tensor.
flop_registry.setdefault(torch.ops.aten.baddbmm_, flop_registry[torch.ops.aten.baddbmm])
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])
_count_flops(torch.ops.memlm.loop, _run)
_count_flops(torch.ops.memlm.loop_backward, _run_backward)
