"""The state of a mixer: a dict of tensors, batch first. A part of the mixer has a dict of its own in it.

    {"k": [B, ...], "v": [B, ...]}                                      attention
    {"attention": {"k": ..., "v": ...}, "memory": {"conv": ..., ...}}   attention and a memory in one mixer

Its keys are those of ``init_state``, at every call. A key has no dot, and no dict is empty, because in a file a tensor
has one name: its keys, joined by dots (``named``, ``nested``).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from memlm.settings import require

State = dict[str, Any]


def leaves(state: State) -> Iterator[Tensor]:
    """All tensors of a state."""
    for x in state.values():
        if isinstance(x, dict):
            yield from leaves(x)
        else:
            yield x


def mapped(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """A state of the results of ``function``, which gets each tensor of ``state`` and those of ``others`` in its
    place.
    """
    after: State = {}
    for key, x in state.items():
        beside = [other[key] for other in others]
        after[key] = mapped(function, x, *beside) if isinstance(x, dict) else function(x, *beside)
    return after


def numbered(tensors: Iterable[Tensor]) -> State:
    """A state with the keys "0", "1", ..."""
    return {str(i): x for i, x in enumerate(tensors)}


def in_order(state: State) -> tuple[Tensor, ...]:
    """The tensors of ``numbered``."""
    return tuple(state[str(i)] for i in range(len(state)))


def named(state: State) -> dict[str, Tensor]:
    """The tensors by their names in a file. Raises ValueError for keys and dicts that a file cannot hold."""
    tensors: dict[str, Tensor] = {}
    for key, x in state.items():
        require("." not in key, f"state key {key!r} must have no dot; use a dict in a dict")
        if isinstance(x, dict):
            require(bool(x), f"state key {key!r} holds an empty dict; leave it out")
            tensors |= {f"{key}.{name}": leaf for name, leaf in named(x).items()}
        else:
            tensors[key] = x
    return tensors


def nested(tensors: Mapping[str, Tensor]) -> State:
    """The state whose ``named`` tensors these are. Raises ValueError if a name is the beginning of another."""
    state: State = {}
    # In order, so that the shorter of two such names is first.
    for name, x in sorted(tensors.items()):
        *path, key = name.split(".")
        part = state
        for step in path:
            part = part.setdefault(step, {})
            require(isinstance(part, dict), f"tensor {name!r} begins with the name of another tensor")
        part[key] = x
    return state
