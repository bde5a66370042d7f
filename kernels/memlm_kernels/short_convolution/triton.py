"""The short convolution by Triton kernels, as an op of torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import asks_gradient
from memlm_kernels.grid import keep_last, pick
from memlm_kernels.launch import cdiv, laid, no_products
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import power_of_two
from memlm_kernels.short_convolution.backward_kernels import convolve_backward
from memlm_kernels.short_convolution.kernels import convolve

# Elements of a tile, which its threads hold in registers several times.
_TILE, _TILE_BACKWARD = 2048, 1024


def _sizes(
    x: Sequence[Tensor], weight: Tensor, silu: bool, unit: int, head_dim: int, eps: float, factor: float
) -> dict[str, Any]:
    channels = [part.shape[2] for part in x] + [0] * (3 - len(x))
    strides = [part.stride(1) for part in x] + [0] * (3 - len(x))
    tile = power_of_two(head_dim) if unit else min(64, power_of_two(max(channels)))
    return {
        **{f"C{i}": c for i, c in enumerate(channels)},
        **{f"S{i}": s for i, s in enumerate(strides)},
        **{"W": weight.shape[1], "SILU": silu, "UNIT": unit, "K": head_dim, "EPS": eps, "FACTOR": factor, "BC": tile},
    }


def _tiles(x: Sequence[Tensor], sizes: dict[str, Any]) -> int:
    """Programs that the channels need."""
    steps = [sizes["K"] if i < sizes["UNIT"] else sizes["BC"] for i in range(len(x))]
    return sum(cdiv(part.shape[2], step) for part, step in zip(x, steps, strict=True))


def _parts(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor | None]:
    return {f"{name}{i}": tensors[i] if i < len(tensors) else None for i in range(3)}


@kernel_op("short_convolution")
def forward(
    x0: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    weight: Tensor,
    state: Tensor | None,
    positions: Tensor | None,
    silu: bool,
    unit: int,
    head_dim: int,
    eps: float,
    factor: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    x = _rows(x0, x1, x2)
    y = [_out(part, dtype) for part in x]
    _convolve(x, weight, state, positions, (silu, unit, head_dim, eps, factor), y, None)
    return y


@kernel_op("short_convolution_step")
def step(
    x0: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    weight: Tensor,
    state: Tensor,
    positions: Tensor | None,
    silu: bool,
    unit: int,
    head_dim: int,
    eps: float,
    factor: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The same without gradients, and at last the inputs for the next call, in the type of x."""
    x = _rows(x0, x1, x2)
    y, last = [_out(part, dtype) for part in x], _out(state, x0.dtype)
    _convolve(x, weight, state, positions, (silu, unit, head_dim, eps, factor), y, last)
    return [*y, last]


def _convolve(
    x: list[Tensor],
    weight: Tensor,
    state: Tensor | None,
    positions: Tensor | None,
    options: tuple[bool, int, int, float, float],
    y: list[Tensor],
    last: Tensor | None,
) -> None:
    weight, state, positions = laid(weight, state, positions)
    batch, length = x[0].shape[:2]
    sizes = _sizes(x, weight, *options)
    count = _tiles(x, sizes)
    convolve(
        lambda tiles: batch * cdiv(length, tiles["BT"]) * count,
        {"BT": min(power_of_two(length), max(1, _TILE // sizes["BC"]))},
        **_parts("x", x),
        **{"state": state, "weight": weight, "positions": positions},
        **_parts("y", y),
        **{"last": last, "T": length, **sizes},
    )


def _rows(*x: Tensor | None) -> list[Tensor]:
    """The parts, with tokens at one distance; a part of the channels of a larger tensor may stay where it is."""
    rows = []
    for part in x:
        if part is not None:
            regular = part.stride(2) == 1 and (len(part) == 1 or part.stride(0) == part.shape[1] * part.stride(1))
            rows.append(part if regular else part.contiguous())
    return rows


def _out(part: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(part.shape, device=part.device, dtype=dtype)


@forward.register_fake
def _(x0, x1, x2, weight, state, positions, silu, unit, head_dim, eps, factor, dtype):  # type: ignore[no-untyped-def]
    return [_out(part, dtype) for part in (x0, x1, x2) if part is not None]


@step.register_fake
def _(x0, x1, x2, weight, state, positions, silu, unit, head_dim, eps, factor, dtype):  # type: ignore[no-untyped-def]
    return [*(_out(part, dtype) for part in (x0, x1, x2) if part is not None), _out(state, x0.dtype)]


@kernel_op("short_convolution_backward")
def backward(
    d_y: list[Tensor],
    x0: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    weight: Tensor,
    state: Tensor | None,
    positions: Tensor | None,
    silu: bool,
    unit: int,
    head_dim: int,
    eps: float,
    factor: float,
    of_state: bool,
) -> list[Tensor]:
    """Gradients of the parts, of weight, and of state if ``of_state``."""
    x = _rows(x0, x1, x2)
    weight, state, positions = laid(weight, state, positions)
    batch, length = x0.shape[:2]
    d_x = [_out(part, part.dtype) for part in x]
    d_state = None if state is None or not of_state else torch.empty_like(state)
    sizes = _sizes(x, weight, silu, unit, head_dim, eps, factor)
    first, count = 0 if d_state is None else 1 - weight.shape[1], _tiles(x, sizes)
    # As few sums for weight as leave enough programs.
    span = 64 * max(1, min(16, batch * length * count // (64 * 2048)))
    sums = weight.new_empty(batch * cdiv(length - first, span), *weight.shape, dtype=torch.float32)
    convolve_backward(
        lambda tiles: len(sums) * count,
        {"BT": min(power_of_two(length - first), max(1, _TILE_BACKWARD // sizes["BC"]))},
        **_parts("x", x),
        **{"state": state, "weight": weight, "positions": positions},
        **_parts("d_y", laid(*d_y)),
        **_parts("d_x", d_x),
        **{"d_state": d_state, "d_weight": sums, "T": length, "FIRST": first, "SPAN": span},
        **{**sizes, "BW": power_of_two(weight.shape[1])},
    )
    return [*d_x, sums.sum(0).to(weight.dtype), *([] if d_state is None else [d_state])]


@backward.register_fake
def _(d_y, x0, x1, x2, weight, state, positions, silu, unit, head_dim, eps, factor, of_state):  # type: ignore[no-untyped-def]
    d_x = [_out(part, part.dtype) for part in (x0, x1, x2) if part is not None]
    return [*d_x, torch.empty_like(weight), *([torch.empty_like(state)] if of_state else [])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.silu, ctx.unit, ctx.head_dim, ctx.eps, ctx.factor, _ = inputs
    state = tensors[4]
    ctx.of_state = state is not None and state.requires_grad
    ctx.save_for_backward(*tensors)


@outside_autocast
def _backward(ctx: Any, d_y: list[Tensor]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = backward(d_y, *tensors, ctx.silu, ctx.unit, ctx.head_dim, ctx.eps, ctx.factor, ctx.of_state)
    d_x, (d_weight, *d_state) = found[: len(d_y)], found[len(d_y) :]
    none = [None] * (3 - len(d_x))
    return *d_x, *none, d_weight, d_state[0] if d_state else None, *[None] * 7


forward.register_autograd(_backward, setup_context=_setup)
_OPS = torch.ops.memlm
register_flop_formula([_OPS.short_convolution, _OPS.short_convolution_step, _OPS.short_convolution_backward])(
    no_products
)


def short_convolution_triton(
    x: Sequence[Tensor],
    weight: Tensor,
    sizes: Sequence[int],
    silu: bool,
    unit: int,
    head_dim: int,
    eps: float,
    factor: float,
    dtype: torch.dtype | None,
    lengths: Tensor | None,
    positions: Tensor | None,
    state: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The parts, and the last inputs."""
    parts, spare = list(x), weight.shape[1] - 1
    if [part.shape[2] for part in x] != list(sizes):
        parts = list((parts[0] if len(x) == 1 else torch.cat(parts, -1)).split(list(sizes), -1))
    held = state if spare else None
    given = [*parts, *[None] * (3 - len(parts))]
    options = (silu, unit, head_dim, eps, factor, dtype or x[0].dtype)
    alike = len({part.dtype for part in x}) == 1
    last = None
    if state is not None and spare and lengths is None and alike and not asks_gradient(*x, weight, state):
        *o, last = step(*given, weight, state, positions, *options)
    else:
        o = forward(*given, weight, held, positions, *options)
    o = [part.unflatten(-1, (-1, head_dim)) if i < unit else part for i, part in enumerate(o)]
    if state is None:
        return tuple(part[:, spare:] for part in o), _last(x, x[0][:, :0], lengths, spare)
    return tuple(o), _last(x, state, lengths, spare) if last is None else last


def _last(x: Sequence[Tensor], state: Tensor, lengths: Tensor | None, spare: int) -> Tensor:
    """The last ``spare`` inputs, of which ``state`` holds those before x."""
    length = x[0].shape[1]
    if length > spare and lengths is None:
        ends = [part[:, length - spare :] for part in x]
        return ends[0].clone() if len(ends) == 1 else torch.cat(ends, -1)
    joined = x[0] if len(x) == 1 else torch.cat(list(x), -1)
    if length <= spare or lengths is None or spare == 0:
        past = torch.cat([state.to(joined.dtype), joined], 1)
        return keep_last(past, spare, length, lengths)
    # Counted from the first input of the state.
    index = torch.arange(spare, device=joined.device) + lengths[:, None]
    old, new = pick(state, index.clamp(0, spare - 1)), pick(joined, (index - spare).clamp(0, length - 1))
    return torch.where((index < spare)[..., None], old.to(new.dtype), new)
