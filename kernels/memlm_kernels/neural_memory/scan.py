"""The loop over chunks as one differentiable function.

Forward keeps each token's activations and, for every group of chunks, W and S at its start. Backward makes those of
the group's other chunks again with the outer products that made them. A group is so large that its memory weighs no
more than its activations: what is kept grows with the tokens, however large the memory and however short the chunks.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.neural_memory.chunk import (
    Flags,
    Gates,
    Inner,
    Memory,
    Momentum,
    Plan,
    Room,
    inner,
    leave,
    read,
    set_anchor,
    start_documents,
)
from memlm_kernels.neural_memory.chunk_backward import inner_backward, leave_backward, read_backward
from memlm_kernels.neural_memory.network import Tail


class _Given(NamedTuple):
    """Arguments of ``Scan`` after q, k, v, sorted."""

    gates: Gates
    tail: Tail | None
    flags: Flags | None
    memory: Memory
    initial: tuple[Tensor, ...]


def _sort(depth: int, arguments: Sequence[Any]) -> _Given:
    C, beta, f, P, m, gain, bias, opens_document, opens_chunk, *weights = arguments
    parts: list[tuple[Tensor, ...]] = [tuple(weights[i : i + depth]) for i in range(0, len(weights), depth)]
    momentum = None if f is None else Momentum(f, P, m)
    W = parts.pop(0)
    S = parts.pop(0) if f is not None else ()
    anchor, initial = parts or (W, ())
    tail = None if gain is None else Tail(gain, bias)
    flags = None if opens_document is None else Flags(opens_document, opens_chunk)
    return _Given(Gates(C, beta, momentum), tail, flags, Memory(W, S, anchor), initial)


class Scan(torch.autograd.Function):
    """apply(plan, q, k, v, C, beta, f, P, m, gain, bias, opens_document, opens_chunk, *W, *S, *anchor, *initial)

    q: [N, G, C, K], k: [N, G, J, K], v: [N, G, J, V]; f, P, m, S only with momentum; gain, bias only with a tail;
    the flags, anchor and initial only where rows are ragged. What is absent is None, or missing from the lists.
    Returns the MLP's reads before the tail [N, G, C, V]; surprise [N, G, J], the norm of each token's gradient, not
    differentiable; and W, S, anchor after the last chunk.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        gates, tail, flags, memory, initial = _sort(plan.depth, rest)
        chunks = len(q)
        size, kept_whole = _groups(memory, k, plan.blocks)
        out, surprise, kept = [], [], []
        for start in range(0, chunks, size):
            group = slice(start, start + size)
            passed, inputs, errors = [], [], []
            room = Room.of(memory, len(q[group]))
            W, S = room if kept_whole else memory[:2]
            kept.append([*W, *S, *(memory.anchor if flags else ())])
            memory = room.move_in(memory)
            of_chunks = gates.of(group)
            for i, (k_n, v_n, gates_n) in enumerate(zip(k[group], v[group], of_chunks.unbind(), strict=True)):
                if flags is not None:
                    start_documents(memory, flags, initial, start + i)
                memory = set_anchor(memory, plan, flags, start + i)
                tokens, a, e = inner(plan, k_n, v_n, memory.anchor, tail)
                passed.append([*tokens.hidden, *tokens.behind, tokens.f])
                inputs.append(a)
                errors.append(e)
                memory = leave(memory, gates_n, a, e, room, i + 1)
            a, e, states = (_stack(x) for x in (inputs, errors, passed))
            z, before, recalled = read(plan, q[group], room, of_chunks, a, e)
            out.append(z)
            surprise.append(_gradient_norm(a, e))
            kept[-1] += [*states, *before, *recalled]
        ctx.plan, ctx.size, ctx.kept_whole, ctx.present = plan, size, kept_whole, [x is not None for x in rest]
        ctx.save_for_backward(q, k, v, *[x for x in rest if x is not None], *(x for of in kept for x in of))
        surprises = torch.cat(surprise)
        ctx.mark_non_differentiable(surprises)
        # The last anchor may be a tensor that came in.
        return torch.cat(out), surprises, *memory.W, *memory.S, *(w.clone() for w in memory.anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor, *d_memory: Tensor) -> tuple[Tensor | None, ...]:
        plan, depth, chunks = ctx.plan, ctx.plan.depth, len(d_out)
        q, k, v, *saved = ctx.saved_tensors
        arguments = [saved.pop(0) if present else None for present in ctx.present]
        gates, tail, flags, memory, initial = _sort(depth, arguments)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        d_C, d_beta = torch.empty_like(gates.C), torch.empty_like(gates.beta)
        d_momentum = None if gates.momentum is None else Momentum(*(torch.empty_like(x) for x in gates.momentum))
        d_tail = None if tail is None else Tail(*(torch.zeros_like(x) for x in tail))
        d_initial = [torch.zeros_like(x) for x in initial]
        d_after = [d_memory[i : i + depth] for i in range(0, len(d_memory), depth)]
        d_W, d_S = list(d_after.pop(0)), list(d_after.pop(0)) if memory.S else []
        d_anchor = [x.clone() for x in d_after.pop(0)]
        # Every block's anchor is the memory it enters with.
        at_once = flags is None and plan.blocks == 1
        per_group = len(saved) // -(-chunks // ctx.size)
        for start in reversed(range(0, chunks, ctx.size)):
            group = slice(start, min(start + ctx.size, chunks))
            of_group = saved[start // ctx.size * per_group :][:per_group]
            current = Memory(
                _pop(of_group, depth), _pop(of_group, len(memory.S)), _pop(of_group, depth if flags else 0)
            )
            tokens = Inner(_pop(of_group, depth - 1), _pop(of_group, depth - 1), of_group.pop(0))
            inputs, errors, slopes = tokens.gradients(plan, k[group], v[group], tail)
            curvatures = [plan.activation.curvature(h) for h in tokens.hidden]
            size = group.stop - start
            room = Room(*current[:2]) if ctx.kept_whole else Room.of(current, size)
            if not ctx.kept_whole:
                current = room.move_in(current)
            of_chunks = gates.of(group)
            gates_of, a_of, e_of = of_chunks.unbind(), _unstack(inputs, size), _unstack(errors, size)
            entered = []
            for i in range(size):
                if ctx.kept_whole:
                    current = Memory(*room.at(i), current.anchor)
                elif flags is not None:
                    start_documents(current, flags, initial, start + i)
                current = set_anchor(current, plan, flags, start + i)
                entered.append(current)
                if i + 1 < size and not ctx.kept_whole:
                    current = leave(current, gates_of[i], a_of[i], e_of[i], room, i + 1)
            before, recalled = of_group[: depth - 1], of_group[depth - 1 :]
            reads = read_backward(plan, d_out[group], q[group], before, recalled, room, of_chunks, inputs, errors)
            d_q[group], d_C[group], d_beta[group] = reads.q, reads.C, reads.beta
            if d_momentum is not None and reads.f is not None:
                d_momentum.f[group] = reads.f
            hidden, behind, slope, curvature, d_a, d_e = (
                _unstack(part, size)
                for part in (tokens.hidden, tokens.behind, slopes, curvatures, reads.inputs, reads.errors)
            )
            for i in reversed(range(size)):
                n = start + i
                left = leave_backward(d_W, d_S, entered[i], gates_of[i], a_of[i], e_of[i], d_a[i], d_e[i])
                d_C[n, :, -1] += left.C
                d_beta[n, :, -1] += left.beta
                if d_momentum is not None and left.momentum is not None:
                    d_momentum.f[n, :, -1] += left.momentum.f
                    d_momentum.P[n], d_momentum.m[n] = left.momentum.P, left.momentum.m
                d_W, d_S = left.W, left.S
                for d_old, (x, d_z) in zip((*d_W, *d_S), (*reads.to_W, *reads.to_S), strict=True):
                    d_old.baddbmm_(x[i].mT, d_z[i])
                if at_once:
                    # What follows the call may have asked for the last anchor.
                    for d_old, last in zip(d_W, d_anchor, strict=False):
                        d_old += last
                    d_anchor = []
                back = inner_backward(
                    plan,
                    d_a[i],
                    d_e[i],
                    k[n],
                    v[n],
                    entered[i].anchor,
                    tail,
                    Inner(hidden[i], behind[i], tokens.f[i]),
                    slope[i],
                    curvature[i],
                    a_of[i],
                    e_of[i],
                    d_W if at_once else d_anchor,
                )
                d_k[n], d_v[n] = back.k, back.v
                if d_tail is not None and back.tail is not None:
                    d_tail = Tail(d_tail.gain + back.tail.gain, d_tail.bias + back.tail.bias)
                if flags is not None:
                    d_W, d_S, d_anchor = _enter_backward(d_W, d_S, d_anchor, flags, d_initial, n)
                elif not at_once and n % plan.blocks == 0:
                    for d_old, of_anchor in zip(d_W, d_anchor, strict=True):
                        d_old += of_anchor
                        of_anchor.zero_()
        weights = [*d_W, *d_S, *(d_anchor if flags else ()), *d_initial]
        of_rest = [d_C, d_beta, *(d_momentum or (None, None, None)), *(d_tail or (None, None)), None, None, *weights]
        return None, d_q, d_k, d_v, *of_rest


def _groups(memory: Memory, k: Tensor, blocks: int) -> tuple[int, bool]:
    """Blocks of a group: as many as make the memory kept for it no larger than the activations kept for its tokens;
    eight at least, for small products are slow one by one; and whole chunks, so that a group starts with its anchor.
    And whether the memory is kept for every block: where it is no larger than the block's own activations.
    """
    of_memory = sum(w.numel() for w in (*memory.W, *memory.S))
    hidden = sum(w.shape[-1] for w in memory.W[:-1])
    of_token = 3 * hidden + 2 * k.shape[-1] + 2 * memory.W[-1].shape[-1]
    blocks_worth = of_memory / (of_token * k.shape[1] * k.shape[2])
    size = max(8, math.ceil(blocks_worth))
    return math.ceil(size / blocks) * blocks, blocks_worth <= 1


def _enter_backward(
    d_W: list[Tensor], d_S: list[Tensor], d_anchor: list[Tensor], flags: Flags, d_initial: list[Tensor], n: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of W, S, anchor before chunk n entered; what belongs to ``initial`` is added to it in place."""
    new, opened = flags.opens_document[n], flags.opens_chunk[n]
    d_W = [w + a.masked_fill(~opened, 0.0) for w, a in zip(d_W, d_anchor, strict=True)]
    for i, w in zip(d_initial, d_W, strict=True):
        i += w.masked_fill(~new, 0.0)
    d_W, d_S = ([x.masked_fill(new, 0.0) for x in d] for d in (d_W, d_S))
    return d_W, d_S, [a.masked_fill(opened, 0.0) for a in d_anchor]


def _gradient_norm(inputs: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
    """Norm of each token's gradient over all layers; that of an outer product is the product of the norms."""
    norms = [
        torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(e, dim=-1)
        for a, e in zip(inputs, errors, strict=True)
    ]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _stack(of_chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(x) for x in zip(*of_chunks, strict=True)]


def _unstack(tensors: Sequence[Tensor], size: int) -> list[tuple[Tensor, ...]]:
    """For each of ``size`` chunks its part of every tensor."""
    return list(zip(*(x.unbind() for x in tensors), strict=True)) if tensors else [()] * size


def _pop(tensors: list[Tensor], count: int) -> tuple[Tensor, ...]:
    """The first ``count``, taken out."""
    taken = tuple(tensors[:count])
    del tensors[:count]
    return taken
