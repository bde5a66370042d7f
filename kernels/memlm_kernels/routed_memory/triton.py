"""Dispatch and combination of routed tokens by Triton kernels, as ops of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.launch import cdiv, laid, no_products, powers_of_two, with_features
from memlm_kernels.ops import kernel_op
from memlm_kernels.routed_memory.kernels import collect, spread


def _spread(x: Tensor, place: Tensor, weight: Tensor | None, o: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows [B, T * J, F], in the type of o if it is given, and then also the gradient of weight (else empty)."""
    x, place, weight, o = laid(x, place, weight, o)
    (batch, length, choices), features = place.shape, x.shape[2]
    rows = x.new_empty(batch, length * choices, features, dtype=x.dtype if o is None else o.dtype)
    d_weight = x.new_empty(0) if o is None else x.new_empty(place.shape, dtype=torch.float32)
    spread(
        lambda tiles: batch * cdiv(length, tiles["BT"]),
        powers_of_two(BT=length, BF=features),
        **{"x": x, "place": place, "weight": weight, "o": o, "rows": rows, "d_weight": d_weight},
        **{"T": length, "J": choices, "F": features, **powers_of_two(BJ=choices)},
    )
    return rows, d_weight


@kernel_op("dispatch_tokens")
def dispatch(x: Tensor, place: Tensor) -> Tensor:
    """x: [B, T, F]"""
    return _spread(x, place, None, None)[0]


@dispatch.register_fake
def _(x: Tensor, place: Tensor) -> Tensor:
    return x.new_empty(len(x), place.shape[1] * place.shape[2], x.shape[2])


@kernel_op("combine_reads")
def combine(o: Tensor, place: Tensor, weight: Tensor | None, shared: Tensor | None) -> Tensor:
    """o: [B, T * J, F]; weight: None for ones"""
    o, place, weight, shared = laid(o, place, weight, shared)
    (batch, length, choices), features = place.shape, o.shape[2]
    y = o.new_empty(batch, length, features)
    collect(
        lambda tiles: batch * cdiv(length, tiles["BT"]) * cdiv(features, tiles["BF"]),
        powers_of_two(BT=length, BF=features),
        **{"rows": o, "place": place, "weight": weight, "more": shared, "y": y},
        **{"T": length, "J": choices, "F": features},
    )
    return y


@combine.register_fake
def _(o: Tensor, place: Tensor, weight: Tensor | None, shared: Tensor | None) -> Tensor:
    return o.new_empty(len(o), place.shape[1], o.shape[2])


@kernel_op("combine_reads_backward")
def combine_backward(d_y: Tensor, o: Tensor, place: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of o and weight."""
    return _spread(d_y, place, weight, o)


@combine_backward.register_fake
def _(d_y: Tensor, o: Tensor, place: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, place = inputs
    ctx.save_for_backward(place)


@outside_autocast
def _backward_dispatch(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
    (place,) = ctx.saved_tensors
    return combine(d_rows, place, None, None), None


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, place, weight, shared = inputs
    ctx.shared = None if shared is None else shared.dtype
    ctx.save_for_backward(place, *(() if weight is None else (o, weight)))


@outside_autocast
def _backward_combine(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    place, *weighted = ctx.saved_tensors
    d_shared = None if ctx.shared is None else d_y.to(ctx.shared)
    if not weighted:
        return dispatch(d_y, place), None, None, d_shared
    o, weight = weighted
    d_o, d_weight = combine_backward(d_y, o, place, weight)
    return d_o, None, d_weight.to(weight.dtype), d_shared


dispatch.register_autograd(_backward_dispatch, setup_context=_setup_dispatch)
combine.register_autograd(_backward_combine, setup_context=_setup_combine)
_OPS = torch.ops.memlm
register_flop_formula([_OPS.dispatch_tokens, _OPS.combine_reads, _OPS.combine_reads_backward])(no_products)


def dispatch_tokens_triton(x: Tensor, place: Tensor) -> Tensor:
    return dispatch(with_features(x), place).view(len(x), -1, *x.shape[2:])


def combine_reads_triton(o: Tensor, place: Tensor, weight: Tensor, shared: Tensor | None) -> Tensor:
    shared = None if shared is None else with_features(shared)
    return combine(with_features(o), place, weight, shared).view(*place.shape[:2], *o.shape[2:])
