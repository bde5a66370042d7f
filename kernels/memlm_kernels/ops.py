"""Ops of torch that launch kernels. ``torch.library.custom_op`` does the same and takes several times the host time:
it looks for aliases, completes arguments and flattens lists at every call. Tests check all of it (``opcheck``).
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("memlm", "FRAGMENT")


class Op:
    """An op ``memlm::name`` that a function of tensors computes, by CUDA kernels or on a CPU.

    It changes no argument and returns new tensors, one, a tuple or a list of them. No argument has a default.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Compiled code calls the op, and its compiler would look into the function.
        _LIBRARY.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.memlm, name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates the function that gives the outputs' shapes and types."""
        return torch.library.register_fake(self.overload, function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """backward: (ctx, *gradients) -> the gradient of each argument, or None; a list of outputs has a list of
        gradients. setup_context: (ctx, inputs, output). No argument is a list of tensors.
        """
        overload = self.overload
        listed = isinstance(overload._schema.returns[0].type, torch.ListType)

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, keys: Any, *inputs: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    output = overload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
                setup_context(ctx, inputs, output)
                return tuple(output) if listed else output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                found = backward(ctx, [*gradients]) if listed else backward(ctx, *gradients)
                return (None, *found) if isinstance(found, tuple) else (None, found)

        def autograd(keys: Any, *inputs: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                output = Differentiable.apply(keys, *inputs)
                return [*output] if listed else output
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

        _LIBRARY.impl(self.name, autograd, "Autograd", with_keyset=True)


def kernel_op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorates the function of an op."""
    return lambda function: Op(name, function)
