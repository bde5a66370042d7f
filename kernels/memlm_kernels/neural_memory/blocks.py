"""A memory of one layer under the squared error, solved in blocks of tokens, whatever the chunk size.

C, beta and f, and c, p and m of the last token, are those of ``reference`` over a whole block. Let a(i) be the last
token before the chunk of token i. The error e_i is taken at the memory after token a(i), so the errors of a block are
the solution of a triangular system, and the chunk size is only its mask:

    (I + N) e = beta_a K W + f_a K S - V          N[i, l] = C[a(i), l] (k_i . k_l) for l <= a(i)
    o = beta Q W + f Q S - (C * Q K^T) e          W' = beta W + f S - K^T (c * e)        S' = m S - K^T (p * e)

If the chunk of token i opened in an earlier block, row i has K A on the right, with A the anchor, and N[i] is 0. A is
then a third part of the memory, beside W and S. With all parts in one matrix M [s K, V], and ``spread(x, r)`` for x
times the scalar of each part,

    e = X r     r = spread(K, anchors) M - V     X = (I + N)^-1     M' = carry M - spread(K, writes)^T e

Backward goes along the blocks for the gradients of M, e and r, and then takes all blocks at once:

    d_e = -(C * Q K^T)^T d_o - spread(K, writes) d_M'      d_r = X^T d_e      d_v = -d_r      d_N = -d_r e^T
    d_M = carry^T d_M' + spread(Q, reads)^T d_o + spread(K, anchors)^T d_r

X comes from substitution, which does the same as the chunks one after the other, and is as stable.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm_kernels.loops import Loop, Tensors
from memlm_kernels.neural_memory.block_rates import BlockRates
from memlm_kernels.neural_memory.chunk import by_part, collect, dots, spread
from memlm_kernels.neural_memory.rates import groups
from memlm_kernels.neural_memory.scan import group_size
from memlm_kernels.segments import chunk_width


class BlockPlan(NamedTuple):
    """chunks: the most chunks of which a block has tokens."""

    chunks: int


class _Given(NamedTuple):
    """The arguments of ``solve``."""

    q: Tensor
    k: Tensor
    v: Tensor
    rates: BlockRates
    memory: Tensor
    opens_document: Tensor | None
    initial: Tensor | None

    @staticmethod
    def of(tensors: Any) -> "_Given":
        q, k, v, *rest = tensors
        return _Given(q, k, v, BlockRates(*rest[:6]), *rest[6:])

    def enter(self, M: Tensor, n: int) -> None:
        """In place: if block n starts a document, its memory becomes the initial one."""
        if self.opens_document is not None and self.initial is not None:
            torch.where(self.opens_document[n], self.initial, M, out=M)

    def groups(self, plan: BlockPlan, size: int) -> list["_Group"]:
        tensors = (self.q, self.k, *self.rates)
        parts = zip(*(groups(x, size) for x in tensors), strict=True)
        return [_Group(plan, size * i, q, k, BlockRates(*rates)) for i, (q, k, *rates) in enumerate(parts)]


class _Group:
    """The blocks ``start`` to ``end - 1``, at once: [n G, ...].

    gram: K K^T; scores: Q K^T; X: the inverse; anchors, writes: spread(K, anchors), spread(K, writes)
    X_n, anchors_n, writes_n, carries_n: for each block
    read_rows: rows of a memory that are read, those of W and S
    """

    def __init__(self, plan: BlockPlan, start: int, q: Tensor, k: Tensor, rates: BlockRates) -> None:
        self.start, self.end, heads = start, start + len(q), q.shape[1]
        self.q, self.k = q.flatten(0, 1), k.flatten(0, 1)
        self.rates = BlockRates(*(x.flatten(0, 1) for x in rates))
        self.gram, self.scores = torch.bmm(self.k, self.k.mT), torch.bmm(self.q, self.k.mT)
        N = self.gram * self.rates.inner
        eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        # N^2 = 0 with two chunks.
        self.X = (
            eye - N if plan.chunks <= 2 else torch.linalg.solve_triangular(N, eye, upper=False, unitriangular=True)
        )
        self.anchors, self.writes = spread(self.k, self.rates.anchors), spread(self.k, self.rates.writes)
        self.X_n, self.anchors_n, self.writes_n = (x.split(heads) for x in (self.X, self.anchors, self.writes))
        self.carries_n = rates.carries.unbind()
        self.read_rows = self.rates.reads.shape[-1] * k.shape[-1]

    @property
    def count(self) -> int:
        return self.end - self.start

    def leave(self, M: Sequence[Tensor], i: int, e: Tensor) -> None:
        """The memory of place i + 1 from that of place i."""
        carry = self.carries_n[i]
        torch.bmm(carry, by_part(M[i], carry.shape[-1]), out=by_part(M[i + 1], carry.shape[-1]))
        M[i + 1].baddbmm_(self.writes_n[i].mT, e, alpha=-1)


def in_blocks(chunk_size: int) -> bool:
    """Whether blocks are faster than the loop over chunks, on a CPU: measured with 1 to 16 heads of 16 to 384."""
    return chunk_size <= 4


def block_width(length: int, cu_seqlens: Tensor | None) -> int:
    return chunk_width(length, cu_seqlens, 32)


def solve(
    plan: BlockPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: BlockRates,
    memory: Tensor,
    opens_document: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k: [N, G, C, K]   v: [N, G, C, V]   memory: [G, s K, V]

    opens_document: [N, G, 1, 1], the blocks at whose start the memory becomes ``initial``; both None: no block

    Returns o and the errors e [N, G, C, V], and the memory before and after the last block.
    """
    return SOLVE(plan, q, k, v, *rates, memory, opens_document, initial)


def _outputs(plan: BlockPlan, tensors: Tensors) -> Tensors:
    given = _Given.of(tensors)
    return [torch.empty_like(x) for x in (given.v, given.v, given.memory, given.memory)]


def _forward(plan: BlockPlan, keep: bool, tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    given = _Given.of(tensors)
    size, kept_whole = group_size([[given.memory]], given.k, keep)
    out, errors = torch.empty_like(given.v), torch.empty_like(given.v)
    v, e = given.v.unbind(), errors.unbind()
    before = after = given.memory
    kept, room = [], after.new_empty(0)
    for group in given.groups(plan, size):
        count, part = group.count, slice(group.start, group.end)
        if kept_whole or not group.start:
            room = after.new_empty(count + 1, *after.shape)
        room[0] = after
        kept.append(room if kept_whole else after)
        M = room.unbind()
        for i, n in enumerate(range(group.start, group.end)):
            given.enter(M[i], n)
            torch.bmm(group.X_n[i], torch.baddbmm(v[n], group.anchors_n[i], M[i], beta=-1), out=e[n])
            group.leave(M, i, e[n])
        o = torch.bmm(spread(group.q, group.rates.reads), room[:count].flatten(0, 1)[:, : group.read_rows])
        o.baddbmm_(group.rates.C * group.scores, errors[part].flatten(0, 1), alpha=-1)
        out[part] = o.view_as(out[part])
        # Copies: a view would keep the memories of all blocks.
        before, after = M[count - 1].clone(), M[count].clone()
    return [out, errors, before, after], [errors, *kept] if keep else []


def _backward(plan: BlockPlan, tensors: Tensors, saved: list[Tensor], d_outputs: Tensors) -> Tensors:
    given = _Given.of(tensors)
    memory, heads = given.memory, len(given.memory)
    d_out, d_errors, d_before, d_after = d_outputs
    (errors, *kept), s = saved, given.rates.carries.shape[-1]
    size, kept_whole = group_size([[memory]], given.k, True)
    most = min(size, len(given.q))
    room = memory.new_empty(0 if kept_whole else most, *memory.shape)
    d_room = memory.new_empty(most + 1, *memory.shape)
    d_room[0] = 0.0 if d_after is None else d_after
    d_initial = None if given.initial is None else torch.zeros_like(memory)
    if d_out is None:
        d_out = torch.zeros_like(given.v)
    found = []
    for group in reversed(given.groups(plan, size)):
        count, part, rates = group.count, slice(group.start, group.end), group.rates
        e, d_o = errors[part].flatten(0, 1), d_out[part].flatten(0, 1)
        M = kept.pop()
        if kept_whole:
            room = M
        else:
            room[0] = M
            again = room.unbind()
            for i, e_i in enumerate(e.split(heads)):
                given.enter(again[i], group.start + i)
                if i + 1 < count:
                    group.leave(again, i, e_i)
        entered, read = room[:count].flatten(0, 1), slice(group.read_rows)
        d_e = torch.bmm((rates.C * group.scores).mT, d_o).neg_()
        if d_errors is not None:
            d_e += d_errors[part].flatten(0, 1)
        d_room[count] = d_room[0]
        d_M = d_room[:count].flatten(0, 1)
        d_M[:, group.read_rows :] = 0.0
        d_M[:, read] = torch.bmm(spread(group.q, rates.reads).mT, d_o)
        if d_before is not None and group.end == len(given.q):
            d_room[count - 1] += d_before
        d_r = torch.empty_like(d_e)
        places, d_e_n, d_r_n = d_room.unbind(), d_e.split(heads), d_r.split(heads)
        for i in reversed(range(count)):
            d_e_n[i].baddbmm_(group.writes_n[i], places[i + 1], alpha=-1)
            torch.bmm(group.X_n[i].mT, d_e_n[i], out=d_r_n[i])
            by_part(places[i], s).baddbmm_(group.carries_n[i].mT, by_part(places[i + 1], s))
            places[i].baddbmm_(group.anchors_n[i].mT, d_r_n[i])
            if given.opens_document is not None and d_initial is not None:
                opens = given.opens_document[group.start + i]
                d_initial += places[i].masked_fill(~opens, 0.0)
                places[i].masked_fill_(opens, 0.0)
        d_left = d_room[1 : count + 1].flatten(0, 1)
        d_N, d_scores = torch.bmm(d_r, e.mT).neg_(), torch.bmm(d_o, e.mT).neg_()
        back = [torch.bmm(d_o, entered[:, read].mT), torch.bmm(d_r, entered.mT), torch.bmm(e, d_left.mT).neg_()]
        d_rates = BlockRates(
            d_scores * group.scores,
            d_N * group.gram,
            dots(back[0], group.q),
            dots(back[1], group.k),
            dots(back[2], group.k),
            torch.bmm(by_part(d_left, s), by_part(entered, s).mT),
        )
        d_scores, d_gram = d_scores.mul_(rates.C), d_N.mul_(rates.inner)
        d_q = collect(back[0], rates.reads).baddbmm_(d_scores, group.k)
        d_k = collect(back[2], rates.writes, collect(back[1], rates.anchors)).baddbmm_(d_scores.mT, group.q)
        d_k.baddbmm_(d_gram + d_gram.mT, group.k)
        found.append([d_q, d_k, d_r.neg_(), *d_rates])
    d_tokens = (torch.cat(x[::-1]).unflatten(0, (-1, heads)) for x in zip(*found, strict=True))
    return *d_tokens, d_room[0].clone(), None, d_initial


SOLVE = Loop(_forward, _backward, _outputs)
