"""Ops called on a CPU whose launches are recorded and not made."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from memlm_kernels.launch import Kernel


@contextmanager
def recording(record: Callable[..., None]) -> Iterator[None]:
    """``record(kernel, programs, limits, **arguments)`` takes the place of each launch.

    Integers that a kernel would have written are zeros: an op may use them as places, and memory that nothing wrote
    holds any number.
    """

    def zeroed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x if x.is_floating_point() else x.zero_()

        return made

    with ExitStack() as stack:
        stack.enter_context(patch.object(Kernel, "__call__", record))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, zeroed(getattr(owner, name))))
        # The ops accept CPU tensors only with the interpreter.
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True
        yield
