"""Gradients of what one chunk does; each function pulls back the one of ``chunk`` that it is named for.

For one layer: memory M, next memory M', inputs a and errors e of the tokens' gradients, x what is read with and z what
is read. ``(r x)`` is ``spread(x, r)``, r and w the scalars of reads and of writes; where the output is the narrower
side, r and w multiply what is read and the errors instead:

    z = (r x) M - (C * x a^T) e        M' = carry M + (w a)^T e
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.neural_memory.chunk import (
    Again,
    Layers,
    Plan,
    Rates,
    Reads,
    collect,
    dots,
    maps,
    narrow_first,
    narrows,
    spread,
)
from memlm_kernels.neural_memory.network import Tail


class ReadGradients(NamedTuple):
    """d_M[l] of chunk n is ``to_M[l][0][n]^T to_M[l][1][n]``: left as factors, for it is large."""

    q: Tensor
    C: Tensor
    reads: Tensor
    inputs: list[Tensor]
    errors: list[Tensor]
    to_M: list[tuple[Tensor, Tensor]]


def read_backward(
    plan: Plan, d_z: Tensor, q: Tensor, kept: Reads, M: Layers, rates: Rates, inputs: Layers, errors: Layers
) -> ReadGradients:
    x_of, recalled = [q, *(plan.activation.value(z) for z in kept.before)], list(kept.recalled)
    d_C, d_reads = torch.zeros_like(rates.C), torch.zeros_like(rates.reads)
    d_inputs: list[Tensor] = []
    d_errors: list[Tensor] = []
    factors: list[tuple[Tensor, Tensor]] = []
    weights = -rates.C
    for layer in reversed(range(plan.depth)):
        x, a, e, scores = x_of[layer], inputs[layer], errors[layer], kept.scores[layer]
        d_errors.insert(0, torch.bmm((weights * scores).mT, d_z))
        d_scores = torch.bmm(d_z, e.mT)
        d_C.addcmul_(d_scores, scores, value=-1)
        d_scores.mul_(weights)
        d_inputs.insert(0, torch.bmm(d_scores.mT, x))
        if narrows(a, e):
            back = torch.bmm(d_z, M[layer].mT)
            d_reads += dots(back, x)
            d_x = collect(back, rates.reads)
            factors.insert(0, (spread(x, rates.reads), d_z))
        else:
            d_reads += dots(recalled.pop(), d_z)
            factors.insert(0, (spread(d_z, rates.reads), x))
            d_x = torch.bmm(factors[0][0], M[layer])
        d_x.baddbmm_(d_scores, a)
        d_z = plan.activation.pull_back(d_x, kept.before[layer - 1]) if layer else d_x
    return ReadGradients(d_z, d_C, d_reads, d_inputs, d_errors, factors)


def leave_backward(
    d_M: Layers,
    M: Layers,
    rates: Rates,
    tokens: Again,
    writes: Sequence[tuple[Tensor, Tensor]],
    d_inputs: Layers,
    d_errors: Layers,
) -> tuple[Tensor, Tensor]:
    """Turns d_M, of the memory after the chunk, into that before it, and adds to d_inputs and d_errors, in place.
    Returns the gradients of ``rates.writes`` and ``rates.carries``.
    """
    d_writes, d_carries = torch.zeros_like(rates.writes), torch.zeros_like(rates.carries[..., 0, 0])
    for layer, (g, (scaled, wide)) in enumerate(zip(d_M, writes, strict=True)):
        a, e, d_a, d_e = tokens.inputs[layer], tokens.errors[layer], d_inputs[layer], d_errors[layer]
        narrow, d_narrow, d_wide = (a, d_a, d_e) if narrows(a, e) else (e, d_e, d_a)
        back = torch.bmm(wide, g.mT)
        collect(back, rates.writes, d_narrow)
        d_writes += dots(back, narrow)
        d_wide.baddbmm_(scaled, g)
        by_memory = (d_carries.shape[1], -1)
        d_carries.baddbmm_(g.unflatten(1, by_memory).flatten(2), M[layer].unflatten(1, by_memory).flatten(2).mT)
        W, *S = g.chunk(d_carries.shape[1], 1)
        for s in S:
            s.mul_(rates.carries[:, 1, 1]).addcmul_(W, rates.carries[:, 0, 1])
        W.mul_(rates.carries[:, 0, 0])
    return d_writes, d_carries[..., None, None]


class InnerGradients(NamedTuple):
    k: Tensor
    v: Tensor
    tail: Tail | None


def inner_backward(
    plan: Plan,
    d_inputs: Layers,
    d_errors: Layers,
    v: Tensor,
    anchor: Layers,
    tail: Tail | None,
    tokens: Again,
    d_anchor: Layers,
) -> InnerGradients:
    """Adds to d_inputs, d_errors and d_anchor in place."""
    inputs, errors, slopes, bends, output = tokens
    weights = maps(anchor, inputs[0])

    def to_anchor(layer: int, a: Tensor, e: Tensor) -> None:
        narrow, wide = narrow_first(a, e)
        d_anchor[layer].baddbmm_(narrow.mT, wide)

    d_hidden = []
    d_error = d_errors[0]
    for layer in range(plan.depth - 1):
        # errors[layer] = (errors[layer + 1] anchor[layer + 1]^T) * slope
        d_hidden.append(d_error * bends[layer])
        d_behind = d_error * slopes[layer]
        to_anchor(layer + 1, d_behind, errors[layer + 1])
        d_error = d_errors[layer + 1].baddbmm_(d_behind, weights[layer + 1])
    d_out, d_k, d_v, d_tail = output.backward(plan.loss, d_error, v, tail)
    for layer in reversed(range(plan.depth)):
        to_anchor(layer, inputs[layer], d_out)
        d_in = d_inputs[layer].baddbmm_(d_out, weights[layer].mT)
        if layer:
            d_out = d_hidden[layer - 1].addcmul_(d_in, slopes[layer - 1])
    return InnerGradients(d_in if d_k is None else d_in.add_(d_k), d_v, d_tail)
