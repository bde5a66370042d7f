"""Gradients of what one chunk does; each function pulls back the one of ``chunk`` that it is named for.

For one layer: memory (W, S), next memory (W', S'), inputs a and errors e of the tokens' gradients, x what is read
with and z what is read, c and p the last rows of C and P:

    z  = beta (x W) + f (x S) - (C * x a^T) e
    W' = beta W + f S - a^T (c e)          S' = m S - a^T (p e)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.neural_memory.chunk import Gates, Inner, Memory, Momentum, Plan, Room, add_product, narrows, weighed
from memlm_kernels.neural_memory.losses import squared_error
from memlm_kernels.neural_memory.network import Normalised, Tail


class ReadGradients(NamedTuple):
    """d_W[l] of chunk n is ``to_W[l][0][n]^T to_W[l][1][n]``, d_S likewise: left as factors, for they are large."""

    q: Tensor
    C: Tensor
    beta: Tensor
    f: Tensor | None
    inputs: list[Tensor]
    errors: list[Tensor]
    to_W: list[tuple[Tensor, Tensor]]
    to_S: list[tuple[Tensor, Tensor]]


def read_backward(
    plan: Plan,
    d_z: Tensor,
    q: Tensor,
    before: Sequence[Tensor],
    recalled: Sequence[Tensor],
    memories: Room,
    gates: Gates,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
) -> ReadGradients:
    x_of, recalled = [q, *(plan.activation.value(z) for z in before)], list(recalled)
    d_C = torch.zeros_like(gates.C)
    # Of W and, with momentum, of S: what multiplies them, its gradient, and the factors of theirs.
    scales = [gates.beta] if gates.momentum is None else [gates.beta, gates.momentum.f]
    d_scales = [torch.zeros_like(scale) for scale in scales]
    factors: list[list[tuple[Tensor, Tensor]]] = [[] for _ in scales]
    d_inputs: list[Tensor] = []
    d_errors: list[Tensor] = []
    for layer in reversed(range(plan.depth)):
        x, a, e = x_of[layer], inputs[layer], errors[layer]
        scores, d_weights = x @ a.mT, d_z @ e.mT
        d_C -= d_weights * scores
        d_scores = d_weights.mul_(gates.C)
        d_errors.insert(0, ((gates.C * scores).mT @ d_z).neg_())
        d_inputs.insert(0, (d_scores.mT @ x).neg_())
        d_x = x.new_zeros(x.shape)
        of_memories = memories.W[layer], *(memories.S[layer : layer + 1])
        reads = None if narrows(a, e) else [recalled.pop() for _ in scales][::-1]
        for i, (scale, M) in enumerate(zip(scales, of_memories, strict=True)):
            if reads is None:
                back = d_z @ M.mT
                d_scales[i] += (x * back).sum(-1)
                d_x.addcmul_(back, scale[..., None])
            else:
                d_scales[i] += (d_z * reads[i]).sum(-1)
                add_product(d_x, scale[..., None] * d_z, M.mT)
            factors[i].insert(0, weighed(scale, x, d_z))
        add_product(d_x, d_scores, a, -1)
        d_z = d_x if layer == 0 else plan.activation.pull_back(d_x, before[layer - 1])
    d_beta, d_f = d_scales[0], d_scales[1] if len(scales) > 1 else None
    return ReadGradients(d_z, d_C, d_beta, d_f, d_inputs, d_errors, factors[0], factors[1] if len(scales) > 1 else [])


class LeaveGradients(NamedTuple):
    """W, S: of the memory before the chunk; C, P: [G, J], beta, f, m: [G], of the chunk's last slot."""

    W: list[Tensor]
    S: list[Tensor]
    C: Tensor
    beta: Tensor
    momentum: Momentum | None


def leave_backward(
    d_W: Sequence[Tensor],
    d_S: Sequence[Tensor],
    memory: Memory,
    gates: Gates,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    d_inputs: Sequence[Tensor],
    d_errors: Sequence[Tensor],
) -> LeaveGradients:
    """Adds to d_inputs and d_errors in place."""
    beta, c = gates.beta[:, -1], gates.C[:, -1]
    W, S = [], []
    totals: list[list[Tensor]] = []
    for layer, (a, e, g) in enumerate(zip(inputs, errors, d_W, strict=True)):
        d_a, d_e = d_inputs[layer], d_errors[layer]
        of_layer = [_write_backward(c, a, e, g, d_a, d_e), _dot(g, memory.W[layer])]
        W.append(g * beta[:, None, None])
        if gates.momentum is not None:
            h, s, (f, P, m) = d_S[layer], memory.S[layer], gates.momentum
            of_layer += [_dot(g, s), _write_backward(P, a, e, h, d_a, d_e), _dot(h, s)]
            S.append((h * m[:, None, None]).addcmul_(g, f[:, -1, None, None]))
        totals.append(of_layer)
    C, last, *momentum = (sum(x[1:], x[0]) for x in zip(*totals, strict=True))
    return LeaveGradients(W, S, C, last, Momentum(*momentum) if momentum else None)


def _write_backward(gate: Tensor, a: Tensor, e: Tensor, d_new: Tensor, d_a: Tensor, d_e: Tensor) -> Tensor:
    """Of -a^T (gate e): adds to d_a and d_e in place, and returns the gate's gradient, [G, J]."""
    kept, written = weighed(gate, a, e)
    if narrows(a, e):
        back = e @ d_new.mT
        d_a.addcmul_(back, gate[..., None], value=-1)
        d_e.baddbmm_(kept, d_new, alpha=-1)
        return -(a * back).sum(-1)
    back = a @ d_new
    d_e.addcmul_(back, gate[..., None], value=-1)
    d_a.baddbmm_(written, d_new.mT, alpha=-1)
    return -(e * back).sum(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """[G, in, out] twice -> [G]"""
    return (x * y).sum((-2, -1))


class InnerGradients(NamedTuple):
    k: Tensor
    v: Tensor
    tail: Tail | None


def inner_backward(
    plan: Plan,
    d_inputs: Sequence[Tensor],
    d_errors: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    anchor: Sequence[Tensor],
    tail: Tail | None,
    tokens: Inner,
    slopes: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    d_anchor: Sequence[Tensor],
) -> InnerGradients:
    """Adds to d_anchor in place; slopes, curvatures: derivatives of the activation at ``tokens.hidden``."""
    d_hidden = []
    d_error = d_errors[0]
    for layer in range(plan.depth - 1):
        # errors[layer] = (errors[layer + 1] anchor[layer + 1]^T) * slope
        d_hidden.append(d_error * tokens.behind[layer] * curvatures[layer])
        d_behind = d_error * slopes[layer]
        d_anchor[layer + 1].baddbmm_(d_behind.mT, errors[layer + 1])
        d_error = torch.baddbmm(d_errors[layer + 1], d_behind, anchor[layer + 1])
    d_f, d_k, d_v, d_tail = _output_error_backward(plan, d_error, tokens.f, k, v, tail)
    d_out = d_f
    for layer in reversed(range(plan.depth)):
        d_anchor[layer].baddbmm_(inputs[layer].mT, d_out)
        d_in = torch.baddbmm(d_inputs[layer], d_out, anchor[layer].mT)
        if layer:
            d_out = d_hidden[layer - 1].addcmul_(d_in, slopes[layer - 1])
    return InnerGradients(d_in if d_k is None else d_in + d_k, d_v, d_tail)


def _output_error_backward(
    plan: Plan, d_error: Tensor, f: Tensor, k: Tensor, v: Tensor, tail: Tail | None
) -> tuple[Tensor, Tensor | None, Tensor, Tail | None]:
    """Gradients of f, k (None: none), v and the tail. What ``output_error`` did, which this pulls back:

    y = normalised(f)   r = k + y gain + bias   u = loss(r, v) gain   error = scale (u - mean(u) - y mean(u y))
    """
    if tail is None:
        d_f, d_v = _loss_backward(plan, d_error, f, v)
        return d_f, None, d_v, None
    norm = Normalised.of(f)
    r = torch.addcmul(k + tail.bias, norm.y, tail.gain)
    loss = plan.loss(r, v)
    u = loss * tail.gain
    d_u = norm.pull_back(d_error)
    d_r, d_v = _loss_backward(plan, d_u * tail.gain, r, v)
    # The error holds y twice, and scale; d_error . error is the gradient of log(scale).
    of_y = d_error * _mean(u * norm.y) + u * _mean(d_error * norm.y)
    d_y = torch.addcmul(d_r * tail.gain, norm.scale, of_y, value=-1)
    error = norm.pull_back(u)
    d_f = torch.addcmul(norm.pull_back(d_y), norm.y, norm.scale * _mean(d_error * error), value=-1)
    d_gain = torch.addcmul(d_u * loss, d_r, norm.y).sum(-2, keepdim=True)
    return d_f, d_r, d_v, Tail(d_gain, d_r.sum(-2, keepdim=True))


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _loss_backward(plan: Plan, d: Tensor, f: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if plan.loss is squared_error:
        # The common case without the cost of tracing.
        return d, -d
    return torch.func.vjp(plan.loss, f, v)[1](d)
