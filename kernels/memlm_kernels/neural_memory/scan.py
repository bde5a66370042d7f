"""The loop over chunks as one differentiable function.

Forward keeps each token's activations and, for every group of chunks, the memory at its start. Backward makes those of
the group's other chunks again with the outer products that made them. A group is so large that its memory weighs no
more than its activations: what is kept grows with the tokens, however large the memory and however short the chunks.
Nor is it larger than that: what a group works on is to stay in a CPU's cache. Nor larger than sqrt(N) chunks, for all
memories of a group are there at once, and what is kept of N / size groups and what is there of one weigh least then.

Without gradients nothing is kept, and a group is short.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.neural_memory.chunk import (
    Flags,
    Gates,
    Inner,
    Layers,
    Momentum,
    Plan,
    Rates,
    Reads,
    gradient_norm,
    inner,
    lay_out,
    leave,
    maps,
    read,
    set_anchor,
    start_documents,
    take_apart,
    writes_of,
)
from memlm_kernels.neural_memory.chunk_backward import inner_backward, leave_backward, read_backward
from memlm_kernels.neural_memory.network import Tail


class _Given(NamedTuple):
    """Arguments of ``Scan`` after q, k, v, sorted; memories: W and, with momentum, S, for each layer."""

    gates: Gates
    tail: Tail | None
    flags: Flags | None
    memories: list[tuple[Tensor, ...]]
    anchor: Layers
    initial: Layers


def _sort(depth: int, arguments: Sequence[Any]) -> _Given:
    C, beta, f, P, m, gain, bias, opens_document, opens_chunk, *weights = arguments
    parts = [weights[i : i + depth] for i in range(0, len(weights), depth)]
    momentum = None if f is None else Momentum(f, P, m)
    memories = list(zip(*parts[: 1 if f is None else 2], strict=True))
    anchor, initial = parts[-2:] if opens_document is not None else (parts[0], [])
    tail = None if gain is None else Tail(gain, bias)
    flags = None if opens_document is None else Flags(opens_document, opens_chunk)
    return _Given(Gates(C, beta, momentum), tail, flags, memories, anchor, initial)


# A compiler would unroll the loop over chunks: minutes of work for a graph that runs no faster.
@torch.compiler.disable
def scan(plan: Plan, *tensors: Tensor | None) -> tuple[Any, ...]:
    """As ``Scan.apply``, which keeps what backward needs only where there will be one."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return Scan.apply(plan, keep, *tensors)


class Scan(torch.autograd.Function):
    """apply(plan, keep, q, k, v, C, beta, f, P, m, gain, bias, opens_document, opens_chunk, *W, *S, *anchor, *initial)

    q: [N, G, C, K], k: [N, G, J, K], v: [N, G, J, V]; f, P, m, S only with momentum; gain, bias only with a tail;
    the flags, anchor and initial only where rows are ragged. What is absent is None, or missing from the lists.
    keep: whether there will be a backward pass.
    Returns the MLP's reads before the tail [N, G, C, V]; surprise [N, G, J], the norm of each token's gradient, not
    differentiable, None if the plan has none; and W, S, anchor after the last chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, keep: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None
    ) -> tuple[Any, ...]:
        gates, tail, flags, memories, given, initial = _sort(plan.depth, rest)
        anchor: Layers
        chunks, rows = q.shape[:2]
        size, kept_whole = _groups(memories, k, keep)
        rates, fresh = Rates.of(gates), _fresh(memories, initial)
        anchor, M = [lay_out(w) for w in given], [lay_out(*x) for x in memories]
        room = _room(M, min(size, chunks))
        for place, x in zip(room, M, strict=True):
            place[:rows] = x
        out, surprise, kept = [], [], []
        for start in range(0, chunks, size):
            group = slice(start, min(start + size, chunks))
            room = [x[: (group.stop - start) * rows] for x in room]
            following = _room(M, max(1, min(size, chunks - group.stop)) if kept_whole else 1)
            places = [*_split(room, rows), _split(following, rows)[0]]
            if keep:
                entered = room if kept_whole else [x.clone() for x in places[0]]
                kept.append([*entered, *(anchor if _goes_on(start, plan, flags) else ())])
            of_group = rates.at(group)
            passed, inputs, errors = [], [], []
            for i, of_chunk in enumerate(of_group.split(rows)):
                n = start + i
                if flags is not None:
                    start_documents(places[i], flags, fresh, n)
                anchor = set_anchor(anchor, places[i], plan, flags, n)
                tokens, a, e = inner(plan, k[n], v[n], maps(anchor, k), tail)
                if keep:
                    passed.append([*tokens.hidden, *tokens.behind, tokens.f])
                inputs.append(a)
                errors.append(e)
                leave(places[i], of_chunk, writes_of(of_chunk, a, e), places[i + 1])
            all_inputs, all_errors = _join(inputs), _join(errors)
            z, reads = read(plan, q[group].flatten(0, 1), room, of_group, all_inputs, all_errors)
            out.append(z)
            if plan.surprise:
                surprise.append(gradient_norm(all_inputs, all_errors))
            if keep:
                kept[-1] += [*_join(passed), *reads.before, *reads.scores, *reads.recalled]
            if kept_whole:
                room = following
            else:
                # The next group stands where this one stood.
                anchor = [x.clone() for x in anchor]
                for place, x in zip(room, following, strict=True):
                    place[:rows] = x
        ctx.plan, ctx.present, ctx.counts = plan, [x is not None for x in rest], [len(of) for of in kept]
        if keep:
            ctx.save_for_backward(q, k, v, *[x for x in rest if x is not None], *(x for of in kept for x in of))
        surprises = None
        if plan.surprise:
            surprises = torch.cat(surprise).unflatten(0, (chunks, rows))
            ctx.mark_non_differentiable(surprises)
        # Copies: a view would keep M and S and all of a group's alive.
        apart = [[x.clone() for x in take_apart(r[:rows], like)] for r, like in zip(room, memories, strict=True)]
        anchors = [take_apart(w, like)[0].clone() for w, like in zip(anchor, memories, strict=True)]
        after = [x for part in zip(*apart, strict=True) for x in part]
        return torch.cat(out).unflatten(0, (chunks, rows)), surprises, *after, *anchors

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor, *d_after: Tensor) -> tuple[Tensor | None, ...]:
        plan, depth = ctx.plan, ctx.plan.depth
        q, k, v, *saved = ctx.saved_tensors
        arguments = [saved.pop(0) if present else None for present in ctx.present]
        gates, tail, flags, memories, _anchor, initial = _sort(depth, arguments)
        chunks, rows = q.shape[:2]
        size, kept_whole = _groups(memories, k, keep=True)
        rates, fresh, counts = Rates.of(gates), _fresh(memories, initial), list(ctx.counts)
        *d_parts, d_anchors = (d_after[i : i + depth] for i in range(0, len(d_after), depth))
        d_M = [lay_out(*x).clone() for x in zip(*d_parts, strict=True)]
        room = [] if kept_whole else _room(d_M, min(size, chunks))
        d_anchor = [lay_out(w).clone() for w in d_anchors]
        d_initial = [torch.zeros_like(x) for x in d_anchor] if flags else []
        d_tail = None if tail is None else Tail(*(torch.zeros_like(x) for x in tail))
        d_q, d_k, d_v, d_C, d_reads, d_writes, d_carries = ([] for _ in range(7))
        for start in reversed(range(0, chunks, size)):
            group = slice(start, min(start + size, chunks))
            count, of_group = group.stop - start, _pop(saved, -counts.pop())
            M = _pop(of_group, depth)
            # Where the group opens a chunk, for their shapes.
            anchor: Layers = _pop(of_group, depth) if _goes_on(start, plan, flags) else d_anchor
            tokens = Inner(_pop(of_group, depth - 1), _pop(of_group, depth - 1), of_group.pop(0))
            kept = Reads(_pop(of_group, depth - 1), _pop(of_group, depth), of_group)
            k_group, v_group, of_group_rates = k[group].flatten(0, 1), v[group].flatten(0, 1), rates.at(group)
            tails = None if tail is None else Tail(*(x.repeat(count, 1, 1) for x in tail))
            again = tokens.again(plan, k_group, v_group, tails)
            each, of_chunk = again.split(rows), of_group_rates.split(rows)
            writes = [writes_of(r, x.inputs, x.errors) for r, x in zip(of_chunk, each, strict=True)]
            if not kept_whole:
                first, M = M, [x[: count * rows] for x in room]
                for place, x in zip(M, first, strict=True):
                    place[:rows] = x
            entered, anchors = _split(M, rows), []
            for i in range(count):
                n = start + i
                if not kept_whole and flags is not None:
                    start_documents(entered[i], flags, fresh, n)
                anchor = set_anchor(anchor, entered[i], plan, flags, n)
                anchors.append(anchor)
                if not kept_whole and i + 1 < count:
                    leave(entered[i], of_chunk[i], writes[i], entered[i + 1])
            d_z = d_out[group].flatten(0, 1)
            reads = read_backward(
                plan, d_z, q[group].flatten(0, 1), kept, M, of_group_rates, again.inputs, again.errors
            )
            d_q.append(reads.q)
            d_C.append(reads.C)
            d_reads.append(reads.reads)
            d_inputs, d_errors = _split(reads.inputs, rows), _split(reads.errors, rows)
            factors = _split([x for pair in reads.to_M for x in pair], rows)
            for i in reversed(range(count)):
                n = start + i
                left = leave_backward(d_M, entered[i], of_chunk[i], each[i], writes[i], d_inputs[i], d_errors[i])
                d_writes.append(left[0])
                d_carries.append(left[1])
                for layer, d_old in enumerate(d_M):
                    narrow, wide = factors[i][2 * layer : 2 * layer + 2]
                    d_old.baddbmm_(narrow.mT, wide)
                back = inner_backward(plan, d_inputs[i], d_errors[i], v[n], anchors[i], tail, each[i], d_anchor)
                d_k.append(back.k)
                d_v.append(back.v)
                if d_tail is not None and back.tail is not None:
                    d_tail = Tail(d_tail.gain + back.tail.gain, d_tail.bias + back.tail.bias)
                if flags is not None:
                    _enter_backward(d_M, d_anchor, d_initial, flags, n)
                elif n % plan.blocks == 0:
                    for d_old, of_anchor in zip(d_M, d_anchor, strict=True):
                        d_old[:, : of_anchor.shape[1]] += of_anchor
                        of_anchor.zero_()
        d_rates = Rates(*(_in_order(x, chunks) for x in (d_C, d_reads, d_writes, d_carries)))
        d_memories = zip(*(take_apart(x, like) for x, like in zip(d_M, memories, strict=True)), strict=True)
        at_start = [
            take_apart(x, like)[0]
            for part in ((d_anchor, d_initial) if flags else ())
            for x, like in zip(part, memories, strict=True)
        ]
        d_tokens = (_in_order(x, chunks) for x in (d_q, d_k, d_v))
        weights = [*(x for part in d_memories for x in part), *at_start]
        return None, None, *d_tokens, *rates.gradients(d_rates), *(d_tail or (None, None)), None, None, *weights


def _groups(memories: Sequence[Sequence[Tensor]], k: Tensor, keep: bool) -> tuple[int, bool]:
    """Blocks of a group: as many as make the memory kept for it no larger than the activations kept for its tokens,
    256 tokens at least, for small products are slow one by one, and no more than sqrt(N); without gradients 8 at most.
    And whether the memory is kept for every block: where it is no larger than the block's own activations.
    """
    of_memory = sum(x.numel() for of_layer in memories for x in of_layer)
    hidden = sum(of_layer[0].shape[-1] for of_layer in memories[:-1])
    of_token = 3 * hidden + 2 * k.shape[-1] + 2 * memories[-1][0].shape[-1]
    chunks, rows, slots = k.shape[:3]
    blocks_worth = of_memory / (of_token * rows * slots)
    size = math.ceil(max(blocks_worth, 256 / (rows * slots)))
    if blocks_worth <= 1:
        return size, keep
    return min(size, math.isqrt(chunks - 1) + 1 if keep else 8), False


def _goes_on(start: int, plan: Plan, flags: Flags | None) -> bool:
    """Whether a group may start inside a chunk, and its anchor is kept."""
    return flags is not None or start % plan.blocks > 0


def _fresh(memories: Sequence[Sequence[Tensor]], initial: Sequence[Tensor]) -> list[Tensor]:
    """The memory at the start of a document: without momentum."""
    return [
        lay_out(w, *(torch.zeros_like(s) for s in of_layer[1:]))
        for w, of_layer in zip(initial, memories, strict=False)
    ]


def _room(like: Sequence[Tensor], size: int) -> list[Tensor]:
    """Where the memories of ``size`` chunks lie."""
    return [x.new_empty(size * len(x), *x.shape[1:]) for x in like]


def _enter_backward(
    d_M: Sequence[Tensor], d_anchor: Sequence[Tensor], d_initial: Sequence[Tensor], flags: Flags, n: int
) -> None:
    """In place: gradients of the memory and the anchor before chunk n entered, and of ``initial``."""
    new, opened = flags.opens_document[n], flags.opens_chunk[n]
    for d, a, i in zip(d_M, d_anchor, d_initial, strict=True):
        W = d[:, : a.shape[1]]
        W += a.masked_fill(~opened, 0.0)
        a.masked_fill_(opened, 0.0)
        i += W.masked_fill(~new, 0.0)
        d.masked_fill_(new, 0.0)


def _join(of_chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [x[0] if len(x) == 1 else torch.cat(x) for x in zip(*of_chunks, strict=True)]


def _split(tensors: Sequence[Tensor], rows: int) -> list[tuple[Tensor, ...]]:
    """For each chunk its part of every tensor."""
    return list(zip(*(x.split(rows) for x in tensors), strict=True))


def _in_order(parts: list[Tensor], chunks: int) -> Tensor:
    """[N, G, ...] from parts of it, the last first."""
    return torch.cat(parts[::-1]).unflatten(0, (chunks, -1))


def _pop(tensors: list[Tensor], count: int) -> list[Tensor]:
    """The first ``count``, or of a negative one the last so many, taken out."""
    part = slice(count) if count >= 0 else slice(count, None)
    taken = tensors[part]
    del tensors[part]
    return taken
