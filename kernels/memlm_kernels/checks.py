"""What every op asks of its tensors, whatever its backend, and of numbers that say where something stands.

On a CPU those numbers are looked at, and a wrong one raises ValueError. Elsewhere looking would stop the device, and
an error inside a kernel ends the program: there an op ignores what lies outside, as its docstring says, and touches no
memory but its own.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Narrower ones overflow where kernels count with them.
INTEGERS = (torch.int64, torch.int32)


def check_tensors(floats: Mapping[str, Tensor | None], integers: Mapping[str, Tensor | None] | None = None) -> None:
    """Raise ValueError unless all, by name, lie on one device, and have types that ops take: float64 mixes with none,
    the other floats with each other. None: not given
    """
    integers = integers or {}
    given = {name: x for name, x in {**floats, **integers}.items() if x is not None}
    first = next(iter(given))
    for name, x in given.items():
        if x.device != given[first].device:
            raise ValueError(f"{first} is on {given[first].device}, {name} on {x.device}; move them to one device")
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
    if 0 in x.shape[2:]:
        raise ValueError(f"{name} {list(x.shape)} has no elements; give every size behind B and T at least 1")


def check_range(name: str, index: Tensor, low: int | None, high: int | None) -> None:
    """Raise ValueError, where index can be looked at, unless it has numbers from low to high - 1 (None: any)."""
    if readable(index) and index.numel():
        least, most = (number(x) for x in index.aminmax())
        if (high is not None and most >= high) or (low is not None and least < low):
            limits = [f"{low} or more" if low is not None else "", f"less than {high}" if high is not None else ""]
            wanted = " and ".join(filter(None, limits))
            raise ValueError(f"{name} has numbers from {least} to {most}; give such of {wanted}")


def check_ascending(name: str, x: Tensor) -> None:
    """Raise ValueError, where x can be looked at, if a number along its last dimension is below one before. Negative
    ones do not count.
    """
    if readable(x) and x.numel() and number(((x >= 0) & (x < x.cummax(-1).values)).any()):
        raise ValueError(f"{name} decreases along a row; give ascending numbers")


def segments_within(name: str, cu: Tensor, length: int) -> Tensor:
    """cu [B, S + 1], the ends of segments in rows of ``length`` tokens, checked, or cut to segments that are there."""
    if readable(cu):
        check_range(name, cu, 0, length + 1)
        check_ascending(name, cu)
        return cu
    return cu.clamp(0, length).cummax(1).values


def in_one_type(*tensors: Tensor | None) -> list[Any]:
    """In the widest type of them, which products take; None stays None."""
    types = {x.dtype for x in tensors if x is not None}
    if len(types) == 1:
        return list(tensors)
    dtype = functools.reduce(torch.promote_types, types)
    return [None if x is None else x.to(dtype) for x in tensors]


def readable(x: Tensor) -> bool:
    """Whether reading x waits for nothing: on a CPU, unless it has no data or is compiled."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def number(x: Tensor) -> int:
    """The only element of x, which can be looked at."""
    found: Any = x.tolist()
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
