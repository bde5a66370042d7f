"""Which part of a trained model holds a fact: parts are silenced, or their outputs replaced by another run's."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from memlm.attached.call import Attached
from memlm.memory.base import MixerOutput
from memlm.settings import suggest


@contextmanager
def memory_off(model: nn.Module, only: Sequence[str] | None = None) -> Iterator[None]:
    """Replace the output of every part with ``long_term = True`` by zeros, or of attached memories as a whole; states
    continue as usual.

    only: patterns of the names of parts (``long_term``), with ``*`` and ``?``, such as ``*.layers.1.*``; None: all

    Raises ValueError if the model has no such part, or a pattern fits none.
    """
    parts = long_term(model)
    if not parts:
        raise ValueError("memory_off=true, but the model has no long-term memory; leave it out, or name another run")
    for pattern in only or ():
        if not any(fnmatchcase(name, pattern) for name in parts):
            raise ValueError(f"memory_off: {pattern!r} fits no part; {suggest(pattern, [*parts])}")
    with ExitStack() as stack:
        for name, part in parts.items():
            if only is None or any(fnmatchcase(name, pattern) for pattern in only):
                stack.callback(part.register_forward_hook(_silence).remove)
        yield


def long_term(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a long-term memory, by name; none if the model has none."""
    modules = dict(model.named_modules())
    attached = {name: m for name, m in modules.items() if isinstance(m, Attached)}
    return attached or {name: m for name, m in modules.items() if getattr(m, "long_term", False)}


@contextmanager
def recorded(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the parts in the last forward inside, by name."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda part, inputs, output: found.update({name: _tensor(output).detach()})

    with ExitStack() as stack:
        for name, part in parts.items():
            stack.callback(part.register_forward_hook(hook(name)).remove)
        yield found


@contextmanager
def patched(part: nn.Module, output: Tensor) -> Iterator[None]:
    """Replace the output of a part in the forwards inside, by one that ``recorded`` found in another run."""
    hook = part.register_forward_hook(lambda part, inputs, own: _with(own, output))
    try:
        yield
    finally:
        hook.remove()


def _silence(part: nn.Module, inputs: Any, output: MixerOutput | Tensor) -> MixerOutput | Tensor:
    return _with(output, torch.zeros_like(_tensor(output)))


def _tensor(output: MixerOutput | Tensor) -> Tensor:
    return output if isinstance(output, Tensor) else output.y_BTD


def _with(output: MixerOutput | Tensor, y_BTD: Tensor) -> MixerOutput | Tensor:
    return y_BTD if isinstance(output, Tensor) else output._replace(y_BTD=y_BTD)
