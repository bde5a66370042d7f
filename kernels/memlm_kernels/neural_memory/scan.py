"""The loop over chunks as one differentiable function.

Forward keeps each token's activations and, for every group of chunks, the memory before the group. Backward computes
the memories of the group's other chunks again, from the same outer products.

The size of a group follows from three aims. The kept memory takes no more bytes than the group's activations, so the
kept bytes grow with the tokens, however large the memory and however short the chunks. A group is no larger than that,
so that its tensors stay in a CPU's cache. And it has at most sqrt(N) chunks: all memories of a group exist at
once, and the bytes of N / size kept memories and of one group's memories are together smallest there.

Without gradients nothing is kept, and a group is short.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm_kernels.loops import Loop, Tensors
from memlm_kernels.neural_memory.chunk import (
    Flags,
    Inner,
    Layers,
    Places,
    Plan,
    Reads,
    Writes,
    gradient_norm,
    inner,
    lay_out,
    leave,
    maps,
    narrow_first,
    read,
    set_anchor,
    spread,
    start_documents,
    take_apart,
)
from memlm_kernels.neural_memory.chunk_backward import (
    enter_backward,
    inner_backward,
    leave_backward,
    memory_backward,
    read_backward,
    writes_backward,
)
from memlm_kernels.neural_memory.network import Tail
from memlm_kernels.neural_memory.rates import Rates, groups

# Groups whose memories have at most so many numbers are not cut.
_FEW = 2**18


class _Given(NamedTuple):
    """The arguments of ``scan`` after q, k, v, sorted; memories: W and, with momentum, S, for each layer."""

    rates: Rates
    tail: Tail | None
    flags: Flags | None
    memories: list[tuple[Tensor, ...]]
    anchor: Layers
    initial: Layers


def _sort(depth: int, arguments: Sequence[Any]) -> _Given:
    C, reads, writes, carries, gain, bias, opens_document, opens_chunk, *weights = arguments
    parts = [weights[i : i + depth] for i in range(0, len(weights), depth)]
    memories = list(zip(*parts[: reads.shape[-1]], strict=True))
    anchor, initial = parts[-2:] if opens_document is not None else (parts[0], [])
    tail = None if gain is None else Tail(gain, bias)
    flags = None if opens_document is None else Flags(opens_document, opens_chunk)
    return _Given(Rates(C, reads, writes, carries), tail, flags, memories, anchor, initial)


def scan(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rates: Rates, *rest: Tensor | None) -> tuple[Any, ...]:
    """The loop over chunks.

    q: [N, G, C, K], k: [N, G, J, K], v: [N, G, J, V]; rates: ``Rates`` of minus lr
    rest: gain, bias, opens_document, opens_chunk, *W, *S, *anchor, *initial. S only with momentum; gain, bias only
        with a tail; the flags, anchor and initial only if rows are ragged. An absent argument is None, or missing from
        the lists.

    Returns the MLP's reads before the tail [N, G, C, V]; surprise [N, G, J], the norm of each token's gradient (not
    differentiable; None if the plan has none); and W, S, anchor after the last chunk.
    """
    out, surprise, *after = SCAN(plan, q, k, v, *rates, *rest)
    return out, None if surprise is None else surprise.detach(), *after


def _outputs(plan: Plan, tensors: Tensors) -> Tensors:
    q, k, v, *rest = tensors
    assert q is not None and k is not None and v is not None
    memories = _sort(plan.depth, rest).memories
    surprise = k.new_empty(k.shape[:3]) if plan.surprise else None
    after = [x for part in zip(*memories, strict=True) for x in part]
    return [q.new_empty(*q.shape[:3], v.shape[-1]), surprise, *after, *(of_layer[0] for of_layer in memories)]


def _forward(plan: Plan, keep: bool, tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    q, k, v, *rest = tensors
    assert q is not None and k is not None and v is not None
    rates, tail, flags, memories, given, initial = _sort(plan.depth, rest)
    (chunks, rows), s = q.shape[:2], len(memories[0])
    size, kept_whole = group_size(memories, k, keep)
    fresh = _fresh(memories, initial)
    by_keys = k.shape[-1] <= memories[0][0].shape[-1]
    anchor: Layers = [lay_out(w) for w in given]
    M = [lay_out(*x) for x in memories]
    room: list[Tensor] = []
    out, surprise, kept = [], [], []
    parts = zip(*(groups(x, size) for x in (q, k, v)), rates.split(size), strict=True)
    for start, (q_group, k_group, v_group, of_group) in zip(range(0, chunks, size), parts, strict=True):
        count, at_once = len(q_group), of_group.at_once()
        if kept_whole or not start:
            room = _room(memories, count + 1)
        places = _places(room, s, count + 1)
        _enter(places, 0, M)
        if keep:
            entered = room if kept_whole else M
            kept.append([*entered, *(anchor if _goes_on(start, plan, flags) else ())])
        passed, inputs, errors = [], [], []
        k_n, v_n, carry_n = (x.unbind() for x in (k_group, v_group, of_group.carries))
        # The narrow side of the first layer, if it is the keys, which are known before the loop.
        to_M_n = spread(k_group, of_group.writes).mT.unbind() if by_keys else ()
        for i in range(count):
            if flags is not None:
                start_documents([x.M[i] for x in places], flags, fresh, start + i)
            anchor = set_anchor(anchor, [x.W[i] for x in places], plan, flags, start + i)
            tokens, a, e = inner(plan, k_n[i], v_n[i], maps(anchor, k), tail)
            for layer, of_layer in enumerate(places):
                narrow, wide = narrow_first(a[layer], e[layer])
                to_M = to_M_n[i] if by_keys and layer == 0 else spread(narrow, of_group.writes[i]).mT
                leave(of_layer, i, carry_n[i], to_M, wide)
            passed.append([*tokens.hidden, *tokens.behind, tokens.f])
            inputs.append(a[1:])
            errors.append(e)
        all_inputs, all_errors = [k_group.flatten(0, 1), *_join(inputs)], _join(errors)
        entered = [x.all[:count].flatten(0, 1) for x in places]
        z, reads = read(plan, q_group.flatten(0, 1), entered, at_once, all_inputs, all_errors)
        out.append(z)
        if plan.surprise:
            surprise.append(gradient_norm(all_inputs, all_errors))
        if keep:
            kept[-1] += [*_join(passed), *reads.before, *reads.scores, *reads.recalled]
        M = [x.M[count] for x in places]
        if not kept_whole:
            # The next group uses the same buffers.
            M = [x.clone() for x in M]
            if _goes_on(start + count, plan, flags):
                anchor = [x.clone() for x in anchor]
    surprises = _join_up(surprise).unflatten(0, (chunks, rows)) if plan.surprise else None
    # Copies: a view would keep all memories of a group alive.
    apart = [[x.clone() for x in take_apart(r, like)] for r, like in zip(M, memories, strict=True)]
    anchors = [take_apart(w, like)[0].clone() for w, like in zip(anchor, memories, strict=True)]
    after = [x for part in zip(*apart, strict=True) for x in part]
    outputs = [_join_up(out).unflatten(0, (chunks, rows)), surprises, *after, *anchors]
    return outputs, [x for of_group in kept for x in of_group]


def _backward(plan: Plan, tensors: Tensors, saved: list[Tensor], d_outputs: Tensors) -> Tensors:
    q, k, v, *rest = tensors
    assert q is not None and k is not None and v is not None
    d_out, _, *d_after = d_outputs
    depth = plan.depth
    rates, tail, flags, memories, _anchor, initial = _sort(depth, rest)
    (chunks, rows), s = q.shape[:2], len(memories[0])
    if d_out is None:
        d_out = q.new_zeros(*q.shape[:3], v.shape[-1])
    size, kept_whole = group_size(memories, k, keep=True)
    fresh = _fresh(memories, initial)
    # A group keeps equally many tensors, and its anchor if it may start inside a chunk.
    anchors_kept = [depth * _goes_on(start, plan, flags) for start in range(0, chunks, size)]
    of_group_kept = (len(saved) - sum(anchors_kept)) // len(anchors_kept)
    *d_parts, d_anchors = (d_after[i : i + depth] for i in range(0, len(d_after), depth))
    most, span = min(size, chunks), _span(memories)
    room, d_room = [] if kept_whole else _room(memories, most), _room(memories, min(most, span) + 1)
    # A span of chunks leaves the gradient of the memory before it in the first place.
    for x, given, like in zip(d_room, zip(*d_parts, strict=True), memories, strict=True):
        _lay_gradient(x[0], given, like)
    # Whether each block is its own anchor.
    own = flags is None and plan.blocks == 1
    d_anchor: list[Tensor] = []
    if not own or any(x is not None for x in d_anchors):
        d_anchor = [x[0] for x in _room([like[:1] for like in memories], 1)]
    for x, of_layer, like in zip(d_anchor, d_anchors, memories, strict=False):
        _lay_gradient(x, [of_layer], like)
    d_initial = [torch.zeros_like(x) for x in d_anchor] if flags else []
    d_tail = None if tail is None else Tail(*(torch.zeros_like(x) for x in tail))
    d_q, d_k, d_v, d_rates = ([] for _ in range(4))
    parts = zip(*(groups(x, size) for x in (q, k, v, d_out)), rates.split(size), strict=True)
    for start, group in reversed([*zip(range(0, chunks, size), parts, strict=True)]):
        q_group, k_group, v_group, d_group, of_group = group
        count, of_saved = len(q_group), _pop(saved, -of_group_kept - anchors_kept.pop())
        M = _pop(of_saved, depth)
        # If the group starts a chunk, ``d_anchor`` only gives the shapes.
        anchor: Layers = _pop(of_saved, depth) if _goes_on(start, plan, flags) else d_anchor
        tokens = Inner(_pop(of_saved, depth - 1), _pop(of_saved, depth - 1), of_saved.pop(0))
        kept = Reads(_pop(of_saved, depth - 1), _pop(of_saved, depth), of_saved)
        tails = None if tail is None else Tail(*(x.repeat(count, 1, 1) for x in tail))
        k_once, at_once = k_group.flatten(0, 1), of_group.at_once()
        again = tokens.again(plan, k_once, v_group.flatten(0, 1), tails)
        writes = [
            Writes.of(a, e, k_once, at_once.writes, rows) for a, e in zip(again.inputs, again.errors, strict=True)
        ]
        places, anchors = _places(M if kept_whole else room, s, count + kept_whole), []
        if not kept_whole:
            _enter(places, 0, M)
        for i, carry in enumerate(of_group.carries.unbind()):
            if not kept_whole and flags is not None:
                start_documents([x.M[i] for x in places], flags, fresh, start + i)
            anchor = set_anchor(anchor, [x.W[i] for x in places], plan, flags, start + i)
            anchors.append(anchor)
            if not kept_whole and i + 1 < count:
                for place, written in zip(places, writes, strict=True):
                    leave(place, i, carry, written.to_M[i], written.wide[i])
        entered = [x.all[:count].flatten(0, 1) for x in places]
        d = read_backward(plan, d_group.flatten(0, 1), q_group.flatten(0, 1), kept, entered, at_once, again)
        d_inputs, d_errors = _split(d.inputs, rows), _split(d.errors, rows)
        each, keys = again.split(rows), k_group.mT.unbind()
        carries, values = of_group.carries.mT.unbind(), v_group.unbind()
        of_keys = again.errors[0] if writes[0].of_keys else None
        backs: list[list[Tensor]] = []
        of_k: list[Tensor] = []
        of_v: list[Tensor] = []
        d_keys: list[Tensor] = []
        d_carries: list[Tensor] = []
        for first in reversed(range(0, count, span)):
            length = min(span, count - first)
            part = slice(first * rows, (first + length) * rows) if length < count else None
            d_places = _places(d_room, s, length + 1)
            for place, (narrow, wide) in zip(d_places, d.to_M, strict=True):
                place.M[length].copy_(place.M[0])
                torch.bmm(_cut(narrow, part), _cut(wide, part), out=place.all[:length].flatten(0, 1))
            if own and d_anchor and start + first + length == chunks:
                for place, of_anchor in zip(d_places, d_anchor, strict=True):
                    place.W[length - 1].add_(of_anchor)
            for at in reversed(range(length)):
                i = first + at
                backs.append(
                    leave_backward(d_places, at, i, carries[i], of_group.writes, writes, d_inputs[i], d_errors[i])
                )
                to_anchor = [x.W[at] for x in d_places] if own else d_anchor
                back = inner_backward(
                    plan, d_inputs[i], d_errors[i], values[i], keys[i], anchors[i], tail, each[i], to_anchor
                )
                of_k += [] if back.k is None else [back.k]
                of_v += [] if back.v is None else [back.v]
                if d_tail is not None and back.tail is not None:
                    d_tail = Tail(d_tail.gain + back.tail.gain, d_tail.bias + back.tail.bias)
                if flags is not None:
                    new, opened = flags.opens_document[start + i], flags.opens_chunk[start + i]
                    enter_backward(d_places, d_anchor, d_initial, new, opened, at)
                elif not own and (start + i) % plan.blocks == 0:
                    for place, of_anchor in zip(d_places, d_anchor, strict=True):
                        place.W[at].add_(of_anchor)
                        of_anchor.zero_()
            d_left = [x.all[1:].flatten(0, 1) for x in d_places]
            wide_keys = None if of_keys is None else _cut(of_keys, part)
            of_span = memory_backward(d_left, [_cut(x, part) for x in entered], wide_keys, s)
            d_keys += [] if of_span[0] is None else [of_span[0]]
            d_carries.append(of_span[1])
        joined = [
            _join_up(x[::-1]) for x in ([d_keys] if d_keys else []) + [list(x) for x in zip(*backs, strict=True)]
        ]
        of_writes = writes_backward(writes, joined, at_once.writes, d.inputs[0])
        of_carries = _join_up(d_carries[::-1])
        W = entered[0][:, : min(memories[0][0].shape[1:])] if own else torch.cat([x[0] for x in anchors])
        d_k.append(d.inputs[0].baddbmm_(d.errors[0], maps([W], k)[0].mT))
        if of_k:
            d_k[-1].add_(torch.cat(of_k[::-1]))
        d_v.append(torch.cat(of_v[::-1]) if of_v else d.errors[-1].neg())
        d_q.append(d.q)
        d_rates.append(Rates(d.C, d.reads, of_writes, of_carries))
    d_scalars = (_in_order(x, chunks) for x in zip(*d_rates, strict=True))
    d_memories = zip(*(take_apart(x[0].clone(), like) for x, like in zip(d_room, memories, strict=True)), strict=True)
    at_start = [
        take_apart(x, like)[0]
        for part in ((d_anchor, d_initial) if flags else ())
        for x, like in zip(part, memories, strict=True)
    ]
    d_tokens = (_in_order(x, chunks) for x in (d_q, d_k, d_v))
    weights = [*(x for part in d_memories for x in part), *at_start]
    return *d_tokens, *d_scalars, *(d_tail or (None, None)), None, None, *weights


SCAN = Loop(_forward, _backward, _outputs)


def group_size(memories: Sequence[Sequence[Tensor]], k: Tensor, keep: bool) -> tuple[int, bool]:
    """The number of blocks of a group, and whether the memory of every block is kept.

    A group has so many blocks that its kept memory is no larger than its kept activations, and at least 256 tokens,
    because small products are slow. Large memories have at most sqrt(N) blocks per group, or 8 without gradients.
    Groups whose memories have up to ``_FEW`` numbers are never cut. Every memory is kept if it is no larger than its
    block's activations.
    """
    of_memory = sum(x.numel() for of_layer in memories for x in of_layer)
    hidden = sum(of_layer[0].shape[-1] for of_layer in memories[:-1])
    of_token = 3 * hidden + 2 * k.shape[-1] + 2 * memories[-1][0].shape[-1]
    chunks, rows, slots = k.shape[:3]
    blocks_worth = of_memory / (of_token * rows * slots)
    size = math.ceil(max(blocks_worth, 256 / (rows * slots)))
    if blocks_worth > 1:
        size = min(size, math.isqrt(chunks - 1) + 1 if keep else 8)
    return max(size, _FEW // of_memory), keep and blocks_worth <= 1


def _span(memories: Sequence[Sequence[Tensor]]) -> int:
    """Blocks whose memories' gradients exist at once: of large memories few, so that they stay in a CPU's cache."""
    return max(1, _FEW // sum(x.numel() for of_layer in memories for x in of_layer))


def _cut(x: Tensor, part: slice | None) -> Tensor:
    return x if part is None else x[part]


def _goes_on(start: int, plan: Plan, flags: Flags | None) -> bool:
    """Whether a group may start inside a chunk, and its anchor is kept."""
    return flags is not None or start % plan.blocks > 0


def _fresh(memories: Sequence[Sequence[Tensor]], initial: Sequence[Tensor]) -> list[Tensor]:
    """The memory at the start of a document: without momentum."""
    return [
        lay_out(w, *(torch.zeros_like(s) for s in of_layer[1:]))
        for w, of_layer in zip(initial, memories, strict=False)
    ]


def _room(memories: Sequence[Sequence[Tensor]], size: int) -> list[Tensor]:
    """Buffers for each layer's memories in ``size`` places, in the layout of ``lay_out``."""
    sides = ((W, min(W.shape[1:]), max(W.shape[1:]), 1 + len(S)) for W, *S in memories)
    return [W.new_empty(size, len(W), parts * narrow, wide) for W, narrow, wide, parts in sides]


def _lay_gradient(room: Tensor, d: Sequence[Tensor | None], like: Sequence[Tensor]) -> None:
    """Write the gradients of a layer's W and S into a place; either may be None."""
    if all(x is None for x in d):
        room.zero_()
    else:
        room.copy_(lay_out(*(torch.zeros_like(y) if x is None else x for x, y in zip(d, like, strict=False))))


def _places(room: Sequence[Tensor], s: int, count: int) -> list[Places]:
    """The first ``count`` places of each layer."""
    return [Places.of(x if len(x) == count else x[:count], s) for x in room]


def _enter(places: Sequence[Places], i: int, M: Sequence[Tensor]) -> None:
    for place, x in zip(places, M, strict=True):
        place.M[i].copy_(x)


def _join(of_chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [_join_up(x) for x in zip(*of_chunks, strict=True)]


def _join_up(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _split(tensors: Sequence[Tensor], rows: int) -> list[tuple[Tensor, ...]]:
    """The part of every tensor for each chunk."""
    return list(zip(*(x.split(rows) for x in tensors), strict=True))


def _in_order(parts: Sequence[Tensor], chunks: int) -> Tensor:
    """[N, G, ...] from its parts, which come in reverse order."""
    return _join_up(parts[::-1]).unflatten(0, (chunks, -1))


def _pop(tensors: list[Tensor], count: int) -> list[Tensor]:
    """Take out and return the first ``count`` tensors, or the last ``-count``."""
    part = slice(count) if count >= 0 else slice(count, None)
    taken = tensors[part]
    del tensors[part]
    return taken
