"""Checks that every op makes, whatever its backend: of its tensors, and of indices (positions, places, segments).

On a CPU the values of indices are read, and an index out of range raises ValueError. On other devices reading them
would stop the device, and an error inside a kernel ends the program. There an op ignores entries out of range, as its
docstring describes, and touches no memory but its own.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Kernels count with these; narrower integers would overflow.
INTEGERS = (torch.int64, torch.int32)

# The types of tensors that behave as tensors.
TENSORS = (Tensor, torch.nn.Parameter)
# Kinds of calls that a check keeps; a training set has many lengths.
_MOST_KINDS = 4096
# Sets, because a tuple compares with each of its entries.
_TENSORS, _SEQUENCES = frozenset(TENSORS), frozenset((list, tuple))
_VALUES = frozenset((type(None), int, str, bool, float, torch.dtype))

Found = TypeVar("Found", bound=Hashable)


def once_a_kind(function: Callable[..., Found]) -> Callable[..., Found]:
    """Decorates a function of the shapes, types and devices of tensors, and of numbers and names: its result is kept
    for each kind of arguments. A decoded token has the kind of the one before, and checks would outlast its kernel.

    The arguments come by position: tensors, hashable values, and tuples, lists and dicts of them.
    """
    found: dict[tuple, Found] = {}

    @functools.wraps(function)
    def of_kind(*arguments: Any) -> Found:
        # A compiler runs it while it traces, once in any case; its sizes may be symbols.
        if torch.compiler.is_compiling():
            return function(*arguments)
        kind = _kind(arguments)
        result: Any = found.get(kind, found)
        if result is found:
            result = function(*arguments)
            if len(found) >= _MOST_KINDS:
                found.clear()
            found[kind] = result
        return result

    return of_kind


def _kind(parts: Iterable[Any]) -> tuple:
    kind: list[Hashable] = []
    for x in parts:
        of_x = type(x)
        if of_x in _TENSORS:
            # A device object takes longer than its number; only a CPU and a device without data have the number -1.
            kind += x.shape, x.dtype, x.get_device(), x.is_cpu
        elif of_x in _VALUES:
            kind += (x,)
        elif of_x in _SEQUENCES or isinstance(x, tuple):
            kind += (_kind(x),)
        elif isinstance(x, Tensor):
            kind += x.shape, x.dtype, x.device
        elif isinstance(x, dict):
            kind += (*x, _kind(x.values()))
        else:
            kind += (x,)
    return tuple(kind)


def check_tensors(floats: Mapping[str, Tensor | None], integers: Mapping[str, Tensor | None] | None = None) -> None:
    """Raise ValueError unless all tensors lie on one device and have types that ops take: float64 mixes with no other
    type, the other floats with each other.

    floats, integers: tensors by their names in errors; None for one that is not given
    """
    integers = integers or {}
    given = {name: x for name, x in {**floats, **integers}.items() if x is not None}
    first, leader = next(iter(given.items()))
    device, dtype = leader.device, leader.dtype
    if not integers and dtype in FLOATS and len({(x.dtype, x.device) for x in given.values()}) == 1:
        # Nearly every call, and so the one that must be fast.
        return
    for name, x in given.items():
        if x.device != device:
            raise ValueError(f"{first} is on {device}, {name} on {x.device}; move them to one device")
        if x.dtype not in (INTEGERS if name in integers else FLOATS):
            known = "int64 or int32" if name in integers else "float64, float32, float16 or bfloat16"
            raise ValueError(f"{name} is {_name(x.dtype)}; give {known}")
    wide = {name: x.dtype == torch.float64 for name, x in given.items() if name not in integers}
    if any(wide.values()) and not all(wide.values()):
        one, other = (next(name for name in wide if wide[name] is value) for value in (True, False))
        raise ValueError(f"{one} is float64, {other} {_name(given[other].dtype)}; give all of them in float64 or none")


def named(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{i}]": x for i, x in enumerate(tensors)}


def check_sizes(name: str, x: Tensor) -> None:
    """Raise ValueError if x [B, T, H, K] has no heads or channels."""
    if x.numel() == 0 and 0 in x.shape[2:]:
        raise ValueError(f"{name} {list(x.shape)} has no elements; give every size behind B and T at least 1")


def check_range(name: str, index: Tensor, low: int | None, high: int | None) -> None:
    """Raise ValueError unless index holds numbers from low to high - 1 (None: no bound). Checked if ``readable``."""
    if readable(index) and index.numel():
        least, most = (number(x) for x in index.aminmax())
        if (high is not None and most >= high) or (low is not None and least < low):
            limits = [f"{low} or more" if low is not None else "", f"less than {high}" if high is not None else ""]
            wanted = " and ".join(filter(None, limits))
            raise ValueError(f"{name} has numbers from {least} to {most}; give numbers of {wanted}")


def check_ascending(name: str, x: Tensor) -> None:
    """Raise ValueError if a number is below an earlier one along the last dimension. Negative numbers are skipped.
    Checked if ``readable``.
    """
    if readable(x) and x.numel() and number(((x >= 0) & (x < x.cummax(-1).values)).any()):
        raise ValueError(f"{name} decreases along a row; give ascending numbers")


def segments_within(name: str, cu: Tensor, length: int) -> Tensor:
    """cu [B, S + 1], the ends of segments in rows of ``length`` tokens: checked if ``readable``, else clamped."""
    if readable(cu):
        check_range(name, cu, 0, length + 1)
        check_ascending(name, cu)
        return cu
    return cu.clamp(0, length).cummax(1).values


def in_one_type(*tensors: Tensor | None) -> list[Any]:
    """The tensors in their widest type, so that they can be multiplied; None stays None."""
    types = {x.dtype for x in tensors if x is not None}
    if len(types) == 1:
        return list(tensors)
    dtype = functools.reduce(torch.promote_types, types)
    return [None if x is None else x.to(dtype) for x in tensors]


def asks_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors has a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def readable(x: Tensor) -> bool:
    """Whether x can be read without waiting: it lies on a CPU, has data, and is not compiled."""
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()


def number(x: Tensor) -> int:
    """The only element of x, which must be ``readable``."""
    found: Any = x.tolist()
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
