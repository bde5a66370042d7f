"""The memory-off ablation: a trained model without its long-term memory, to measure the memory's contribution."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memlm.attached.call import Attached
from memlm.memory.base import MixerOutput


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """Replace the output of every part with ``long_term = True`` by zeros, or of attached memories as a whole; states
    continue as usual.

    Raises ValueError if the model has no such part.
    """
    parts = long_term(model)
    if not parts:
        raise ValueError("memory_off=true, but the model has no long-term memory; leave it out, or name another run")
    hooks = [part.register_forward_hook(_silence) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def long_term(model: nn.Module) -> list[nn.Module]:
    """The parts of a long-term memory; none if the model has none."""
    attached: list[nn.Module] = [m for m in model.modules() if isinstance(m, Attached)]
    return attached or [m for m in model.modules() if getattr(m, "long_term", False)]


def _silence(part: nn.Module, inputs: Any, output: MixerOutput | Tensor) -> MixerOutput | Tensor:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return output._replace(y_BTD=torch.zeros_like(output.y_BTD))
