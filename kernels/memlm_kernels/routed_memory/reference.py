"""Whole rows are copied and added, one choice at a time. So no tensor is larger than the inputs and the result, and
the order of all sums is fixed. Each of the two functions is the gradient of the other.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import readable
from memlm_kernels.segments import exact


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return _spread(x, place, None)

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return _collect(d_rows, place, None, None), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, place: Tensor, weight: Tensor, shared: Tensor | None) -> Tensor:
        ctx.save_for_backward(o, place, weight)
        ctx.shared = None if shared is None else shared.dtype
        return _collect(o, place, weight, shared)

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
        o, place, weight = ctx.saved_tensors
        features = math.prod(d_y.shape[2:])
        d_weight = [(exact(d_y) * x).reshape(*d_y.shape[:2], features).sum(-1) for x in _choices(o, place)]
        d_shared = None if ctx.shared is None else d_y.to(ctx.shared)
        return _spread(d_y, place, weight, o.dtype), None, torch.stack(d_weight, -1).to(weight.dtype), d_shared


def _spread(x: Tensor, place: Tensor, weight: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Copy each token, times its weights, to its places."""
    batch, length, choices = place.shape
    # One more row takes the tokens that are sent out of range, where that is not checked.
    size = batch * length * choices
    rows = x.new_empty(size if readable(place) else size + 1, *x.shape[2:], dtype=dtype)
    for j, index in enumerate(_flat(place).unbind(-1)):
        of_choice = x if weight is None else _times(exact(x), weight[..., j])
        rows.index_copy_(0, index, of_choice.flatten(0, 1).to(rows.dtype))
    return rows[:size].unflatten(0, (batch, length * choices))


def _collect(rows: Tensor, place: Tensor, weight: Tensor | None, more: Tensor | None) -> Tensor:
    """The sum of the rows at a token's places, times its weights, and of ``more``."""
    y = None if more is None else exact(more).clone()
    for j, x in enumerate(_choices(rows, place)):
        if weight is not None:
            x = _times(x, weight[..., j])
        y = x if y is None else y.add_(x)
    assert y is not None
    return y.to(rows.dtype)


def _choices(rows: Tensor, place: Tensor) -> Iterator[Tensor]:
    """The rows at the place of each token's first choice, [B, T, ...], then of the second, ..."""
    last, known, rows = place.numel() - 1, readable(place), rows.flatten(0, 1)
    for index in _flat(place).unbind(-1):
        x = exact(rows.index_select(0, index if known else index.clamp(max=last))).unflatten(0, place.shape[:2])
        if not known:
            x = x.masked_fill_((index > last).view(*place.shape[:2], *[1] * (x.ndim - 2)), 0.0)
        yield x


def _flat(place: Tensor) -> Tensor:
    """[B, T, J] -> [B * T, J], places in rows one behind the other; one out of range is behind all."""
    batch, length, choices = place.shape
    size, at = length * choices, place
    if batch > 1:
        at = place + size * torch.arange(batch, device=place.device)[:, None, None]
    if not readable(place):
        at = torch.where((place >= 0) & (place < size), at, batch * size)
    return at.flatten(0, 1)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.to(x.dtype).reshape(*weight.shape, *[1] * (x.ndim - weight.ndim))


def dispatch_tokens_reference(x: Tensor, place: Tensor) -> Tensor:
    return _Dispatch.apply(x, place)


def combine_reads_reference(o: Tensor, place: Tensor, weight: Tensor, shared: Tensor | None) -> Tensor:
    return _Combine.apply(o, place, weight, shared)
