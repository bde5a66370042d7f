"""Ops of torch that launch kernels. ``torch.library.custom_op`` does the same and takes several times the host time:
it looks for aliases, completes arguments and flattens lists at every call. Tests check all of it (``opcheck``).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memlm_kernels.checks import TENSORS

_LIBRARY = torch.library.Library("memlm", "FRAGMENT")


class Op:
    """An op ``memlm::name`` that a function of tensors computes, by CUDA kernels or on a CPU.

    It changes no argument and returns new tensors, one, a tuple or a list of them. No argument has a default.
    """

    differentiable: type[torch.autograd.Function] | None = None

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Compiled code calls the op, and its compiler would look into the function.
        _LIBRARY.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.memlm, name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The dispatcher turns all arguments into its own types and back, which takes as long as a small op.
        return self.overload(*args, **kwargs) if kwargs or not _alone(args) else self.function(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates the function that gives the outputs' shapes and types."""
        return torch.library.register_fake(self.overload, function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """backward: (ctx, *gradients) -> the gradient of each argument, or None; a list of tensors has a list of
        gradients. setup_context: (ctx, inputs, output).
        """
        overload = self.overload
        listed = [isinstance(x.type, torch.ListType) for x in overload._schema.arguments]
        returns_list = isinstance(overload._schema.returns[0].type, torch.ListType)

        def run(keys: Any, inputs: Sequence[Any]) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                # These come last, so that ``ctx.needs_input_grad`` begins with the op's arguments.
                *flat, ctx.sizes, keys = given
                inputs = tuple(_nested(flat, ctx.sizes))
                output = run(keys, inputs)
                setup_context(ctx, inputs, output)
                return tuple(output) if returns_list else output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                found = backward(ctx, [*gradients]) if returns_list else backward(ctx, *gradients)
                return *_flat(found if isinstance(found, tuple) else (found,), ctx.sizes), None, None

        # Profiles show the name of the op.
        differentiable: Any = type(f"memlm_{self.name}", (Differentiable,), {})
        self.differentiable = differentiable

        def autograd(keys: Any, *inputs: Any) -> Any:
            if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
                return run(keys, inputs)
            sizes = [len(x) if of_list else None for x, of_list in zip(inputs, listed, strict=True)]
            output = differentiable.apply(*_flat(inputs, sizes), sizes, keys)
            return [*output] if returns_list else output

        _LIBRARY.impl(self.name, autograd, "Autograd", with_keyset=True)


def _alone(arguments: Sequence[Any]) -> bool:
    """Whether nothing but the op's function needs to see a call: no gradient, compiler, transform, mode, profiler or
    special kind of tensors.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    ):
        return False
    return _plain(arguments, torch.is_grad_enabled())


def _plain(arguments: Sequence[Any], learns: bool) -> bool:
    for x in arguments:
        of_x = type(x)
        if of_x in TENSORS:
            if learns and x.requires_grad:
                return False
        elif of_x in (list, tuple):
            if x and not _plain(x, learns):
                return False
        elif isinstance(x, Tensor):
            return False
    return True


def _flat(arguments: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """Arguments with the entries of lists in their place; sizes: their number, None for other arguments."""
    flat: list[Any] = []
    for x, size in zip(arguments, sizes, strict=True):
        if size is None:
            flat.append(x)
        else:
            flat += [None] * size if x is None else x
    return flat


def _nested(flat: Sequence[Any], sizes: Sequence[int | None]) -> Iterator[Any]:
    rest = iter(flat)
    for size in sizes:
        yield next(rest) if size is None else [next(rest) for _ in range(size)]


def kernel_op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorates the function of an op."""
    return lambda function: Op(name, function)
