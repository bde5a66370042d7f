"""Gradients of the steps in ``chunk``; each function is the backward of the function with its name there.

For one layer: memory M, next memory M', inputs a and errors e of the tokens' gradients, a read's input x and output z.
``(r x)`` is ``spread(x, r)``, with r and w the scalars of reads and of writes. If the output is the narrower side, r
and w multiply the output of the read and the errors instead:

    z = (r x) M + (C * x a^T) e        M' = carry M + (w a)^T e
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.neural_memory.chunk import (
    Again,
    Layers,
    Places,
    Plan,
    Reads,
    Writes,
    by_part,
    collect,
    dots,
    maps,
    narrow_first,
    narrows,
    spread,
)
from memlm_kernels.neural_memory.network import Tail
from memlm_kernels.neural_memory.rates import Rates


class ReadGradients(NamedTuple):
    """to_M: for each layer two factors of the gradient of M in every chunk, which is large."""

    q: Tensor
    C: Tensor
    reads: Tensor
    inputs: list[Tensor]
    errors: list[Tensor]
    to_M: list[tuple[Tensor, Tensor]]


def read_backward(
    plan: Plan, d_z: Tensor, q: Tensor, kept: Reads, M: Layers, rates: Rates, tokens: Again
) -> ReadGradients:
    x_of, recalled = [q, *(plan.activation.value(z) for z in kept.before)], list(kept.recalled)
    of_C, of_reads = [], []
    d_inputs: list[Tensor] = []
    d_errors: list[Tensor] = []
    to_M: list[tuple[Tensor, Tensor]] = []
    for layer in reversed(range(plan.depth)):
        x, a, e, scores = x_of[layer], tokens.inputs[layer], tokens.errors[layer], kept.scores[layer]
        d_errors.insert(0, torch.bmm((rates.C * scores).mT, d_z))
        d_scores = torch.bmm(d_z, e.mT)
        of_C.append(d_scores * scores)
        d_scores.mul_(rates.C)
        d_inputs.insert(0, torch.bmm(d_scores.mT, x))
        if narrows(a, e):
            back = torch.bmm(d_z, M[layer].mT)
            of_reads.append(dots(back, x))
            d_x = collect(back, rates.reads)
            to_M.insert(0, (spread(x, rates.reads).mT, d_z))
        else:
            of_reads.append(dots(recalled.pop(), d_z))
            scaled = spread(d_z, rates.reads)
            to_M.insert(0, (scaled.mT, x))
            d_x = torch.bmm(scaled, M[layer])
        d_x.baddbmm_(d_scores, a)
        d_z = plan.activation.pull_back(d_x, kept.before[layer - 1]) if layer else d_x
    return ReadGradients(d_z, sum(of_C[1:], of_C[0]), sum(of_reads[1:], of_reads[0]), d_inputs, d_errors, to_M)


def leave_backward(
    d_places: Sequence[Places],
    place: int,
    i: int,
    carry: Tensor,
    scales: Tensor,
    writes: Sequence[Writes],
    d_inputs: Layers,
    d_errors: Layers,
) -> list[Tensor]:
    """The backward of chunk i, in place: adds to the gradients in ``d_places`` before the chunk, from those after it,
    and to d_inputs and d_errors. The gradient of keys is left to ``writes_backward``, because no other chunk needs it.

    place: of the chunk in ``d_places``; carry: ``rates.carries``, transposed; scales: ``rates.writes``

    Returns the gradients of the scaled narrow sides, without those of keys.
    """
    backs = []
    for of_layer, x, d_a, d_e in zip(d_places, writes, d_inputs, d_errors, strict=True):
        d_narrow, d_wide = narrow_first(d_a, d_e)
        d_wide.baddbmm_(x.scaled[i], of_layer.M[place + 1])
        if not x.of_keys:
            backs.append(torch.bmm(x.wide[i], of_layer.M[place + 1].mT))
            collect(backs[-1], scales[i], d_narrow)
        of_layer.parts[place].baddbmm_(carry, of_layer.parts[place + 1])
    return backs


def memory_backward(d_after: Layers, M: Layers, wide: Tensor | None, s: int) -> tuple[Tensor | None, Tensor]:
    """For several chunks at once, the gradients of the first layer's scaled keys, and of ``rates.carries``.

    wide: the other factor of these keys' writes, None if the keys are not the narrow side
    """
    d_carries = [torch.bmm(by_part(g, s), by_part(memory, s).mT) for g, memory in zip(d_after, M, strict=True)]
    d_keys = None if wide is None else torch.bmm(wide, d_after[0].mT)
    return d_keys, sum(d_carries[1:], d_carries[0])


def writes_backward(writes: Sequence[Writes], backs: Layers, scales: Tensor, d_k: Tensor) -> Tensor:
    """The gradient of ``rates.writes`` for a group of chunks at once; adds to the keys' gradient in place.

    backs: the gradient of each layer's scaled sides; scales: ``rates.writes``
    """
    if writes[0].of_keys:
        collect(backs[0], scales, d_k)
    d_writes = [dots(back, x.narrow) for back, x in zip(backs, writes, strict=True)]
    return sum(d_writes[1:], d_writes[0])


class InnerGradients(NamedTuple):
    """k: None without a tail; v: None if it is minus the gradient of the last layer's output."""

    k: Tensor | None
    v: Tensor | None
    tail: Tail | None


def inner_backward(
    plan: Plan,
    d_inputs: Layers,
    d_errors: Layers,
    v: Tensor,
    keys: Tensor,
    anchor: Layers,
    tail: Tail | None,
    tokens: Again,
    d_anchor: Layers,
) -> InnerGradients:
    """The backward of ``inner`` for one chunk. Adds to d_inputs and d_anchor in place; afterwards ``d_errors[0]`` is
    the gradient of the first layer's output. keys: [G, K, J]
    """
    inputs, errors, slopes, bends, output = tokens
    weights = maps(anchor, inputs[0]) if plan.depth > 1 else []

    def to_anchor(layer: int, a: Tensor, e: Tensor) -> None:
        narrow, wide = narrow_first(a, e)
        d_anchor[layer].baddbmm_(narrow.mT if layer or narrow is not a else keys, wide)

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
        if layer:
            d_in = d_inputs[layer].baddbmm_(d_out, weights[layer].mT)
            d_out = d_hidden[layer - 1].addcmul_(d_in, slopes[layer - 1])
    if d_out is not d_errors[0]:
        d_errors[0].copy_(d_out)
    return InnerGradients(d_k, d_v, d_tail)


def enter_backward(
    d_places: Sequence[Places], d_anchor: Layers, d_initial: Layers, new: Tensor, opened: Tensor, i: int
) -> None:
    """The backward of ``start_documents`` and ``set_anchor`` for chunk i, in place, with the gradient of ``initial``.

    new, opened: [G, 1, 1], whether the block starts a document, or a chunk
    """
    for place, a, initial in zip(d_places, d_anchor, d_initial, strict=True):
        W = place.W[i]
        W += a.masked_fill(~opened, 0.0)
        a.masked_fill_(opened, 0.0)
        initial += W.masked_fill(~new, 0.0)
        place.M[i].masked_fill_(new, 0.0)
