"""One token of rows that continue, as in decoding: the op's two recurrences themselves, without a chunk around them.

B batch, H heads, G rows and heads, J tokens on whose losses the step descends, the last of which is its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.neural_memory.chunk import Plan, gradient_norm, inner
from memlm_kernels.neural_memory.network import Tail


class Sources(NamedTuple):
    """k: [B, J, H, K], v: [B, J, H, V], weight: [B, J, H], of each loss (None: 1)."""

    k: Tensor
    v: Tensor
    weight: Tensor | None


class StepMemory(NamedTuple):
    """[B, H, in, out] for each layer; momentum: None for a memory without momentum."""

    weights: Sequence[Tensor]
    momentum: Sequence[Tensor] | None
    anchor: Sequence[Tensor]


def step(
    plan: Plan,
    q: Tensor,
    sources: Sources,
    gates: tuple[Tensor, Tensor | None, Tensor | None],
    memory: StepMemory,
    tail: Tail | None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """q: [B, 1, H, K]; gates: lr, momentum, decay [B, 1, H]; memory: the memory before the token, and its anchor.

    Returns o [B, 1, H, V], weights and momentum after the token, and the norm of its gradient [B, 1, H], if requested.
    """
    batch, _, heads, _ = q.shape
    lr = gates[0].reshape(-1, 1, 1)
    momentum, decay = (None if x is None else x.reshape(-1, 1, 1) for x in gates[1:])
    k, v = _of_rows(sources.k), _of_rows(sources.v)
    rate = lr if sources.weight is None else lr * _of_rows(sources.weight)[..., None]
    inputs, errors = inner(plan, k, v, [w.flatten(0, 1) for w in memory.anchor], tail)[1:]
    x = start = _of_rows(q)
    weights, momenta = [], []
    for layer, (a, e) in enumerate(zip(inputs, errors, strict=True)):
        W, rated = memory.weights[layer].flatten(0, 1), e * rate
        kept = W if decay is None else torch.addcmul(W, W, decay, value=-1)
        if momentum is None or memory.momentum is None:
            new = torch.baddbmm(kept, a.mT, rated, alpha=-1)
        else:
            S = torch.baddbmm(memory.momentum[layer].flatten(0, 1) * momentum, a.mT, rated, alpha=-1)
            new = kept + S
            momenta.append(S.unflatten(0, (batch, heads)))
        x = torch.bmm(plan.activation.value(x) if layer else x, new)
        weights.append(new.unflatten(0, (batch, heads)))
    if tail is not None:
        x = tail.read(start, x)
    surprise = None
    if plan.surprise:
        own = ([x[:, -1:].detach() for x in part] for part in (inputs, errors))
        surprise = gradient_norm(*own).view(batch, 1, heads)
    return x.view(batch, 1, heads, x.shape[-1]), weights, momenta, surprise


def _of_rows(x: Tensor) -> Tensor:
    """[B, J, H, ...] -> [G, J, ...]"""
    if x.shape[1] == 1:
        return x.reshape(-1, 1, *x.shape[3:])
    return x.transpose(1, 2).flatten(0, 1)
