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

X comes from substitution. Where N is dense and its entries are above 1, rounding is larger than that of the chunks one
after the other: 4 times at a constant lr of 0.5 and momentum of 0.9 with keys alike, in blocks of 32 and chunks of one
token (2.6e-6 to 6.2e-7). With rates that vary from token to token it is the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm_kernels.loops import Loop, Tensors
from memlm_kernels.neural_memory.block_rates import BlockRates
from memlm_kernels.neural_memory.chunk import by_part, collect, dots, spread
from memlm_kernels.neural_memory.scan import group_size
from memlm_kernels.segments import chunk_width


class BlockPlan(NamedTuple):
    """chunks: the most chunks of which a block has tokens."""

    chunks: int

    @staticmethod
    def of(width: int, chunk_size: int, regular: bool) -> "BlockPlan":
        """regular: whether blocks start with chunks"""
        return BlockPlan(-(-width // chunk_size) + (not regular and width % chunk_size > 0))


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

    def group(self, plan: BlockPlan, start: int, size: int, kept: Sequence[Tensor] = ()) -> "_Group":
        """kept: gram, scores and X, if they are known"""
        part = slice(start, start + size)
        q, k = self.q[part].flatten(0, 1), self.k[part].flatten(0, 1)
        rates = self.rates.at_once(part)
        if not kept:
            gram = torch.bmm(k, k.mT)
            kept = gram, torch.bmm(q, k.mT), inverse(gram * rates.inner, plan)
        gram, scores, X = kept
        return _Group(q, k, rates, gram, scores, X, spread(k, rates.anchors), spread(k, rates.writes))


class _Group(NamedTuple):
    """Some blocks at once, [n G, ...]; only the carries are [n, G, s, s].

    gram: K K^T   scores: Q K^T   anchors, writes: spread(K, anchors), spread(K, writes)
    """

    q: Tensor
    k: Tensor
    rates: BlockRates
    gram: Tensor
    scores: Tensor
    X: Tensor
    anchors: Tensor
    writes: Tensor


def _leave(M: Sequence[Tensor], parts: Sequence[Tensor], i: int, carry: Tensor, to_M: Tensor, e: Tensor) -> None:
    """The memory of place i + 1 from that of place i."""
    torch.bmm(carry, parts[i], out=parts[i + 1])
    M[i + 1].baddbmm_(to_M, e, alpha=-1)


def inverse(N: Tensor, plan: BlockPlan) -> Tensor:
    """(I + N)^-1"""
    eye = torch.eye(N.shape[-1], dtype=N.dtype, device=N.device)
    if plan.chunks <= 2:
        # N^2 = 0
        return eye - N
    return torch.linalg.solve_triangular(N, eye, upper=False, unitriangular=True)


def block_width(chunk_size: int, length: int, cu_seqlens: Tensor | None) -> int:
    """The slots of a block: whole chunks, so that only a row's first block may start inside one."""
    width = chunk_width(length, cu_seqlens, 32)
    return width - width % chunk_size if chunk_size < width else width


def in_blocks(chunk_size: int, width: int, x: Tensor) -> bool:
    """Whether blocks of ``width`` slots are faster than the loop over chunks. x: [B, T, H, *]

    Measured on a CPU. With many rows and heads, chunks of more than four tokens are large enough products themselves;
    in short rows too, beside the work that a call takes once. On a GPU a product costs its launch.
    """
    if x.is_cuda or chunk_size <= 4:
        return 2 * chunk_size <= width
    return 2 * chunk_size <= width and chunk_size**2 * x.shape[0] * x.shape[2] <= min(256, x.shape[1] // 2)


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
    (_, heads, *_), s, v = given.q.shape, given.rates.carries.shape[-1], given.v.unbind()
    before = after = given.memory
    size, kept_whole = group_size([[after]], given.k, keep)
    out, errors = torch.empty_like(given.v), torch.empty_like(given.v)
    e, kept, room = errors.unbind(), [errors], after.new_empty(0)
    for start in range(0, len(v), size):
        group = given.group(plan, start, size)
        rates, count = group.rates, len(group.rates.carries)
        if kept_whole or not start:
            room = after.new_empty(count + 1, *after.shape)
        room[0] = after
        if keep:
            kept += [room if kept_whole else after, group.gram, group.scores, group.X]
        M, parts = room.unbind(), by_part(room, s).unbind()
        X, anchors, to_M = (x.split(heads) for x in (group.X, group.anchors, group.writes.mT))
        for i, carry in enumerate(rates.carries.unbind()):
            n = start + i
            given.enter(M[i], n)
            torch.bmm(X[i], torch.baddbmm(v[n], anchors[i], M[i], beta=-1), out=e[n])
            _leave(M, parts, i, carry, to_M[i], e[n])
        part, read = slice(start, start + count), slice(rates.reads.shape[-1] * group.k.shape[-1])
        o = torch.bmm(spread(group.q, rates.reads), room[:count].flatten(0, 1)[:, read])
        o.baddbmm_(rates.C * group.scores, errors[part].flatten(0, 1), alpha=-1)
        out[part] = o.unflatten(0, (count, heads))
        # Copies: a view would keep all memories of a group.
        before, after = M[count - 1].clone(), M[count].clone()
    return [out, errors, before, after], kept if keep else []


def _backward(plan: BlockPlan, tensors: Tensors, saved: list[Tensor], d_outputs: Tensors) -> Tensors:
    given = _Given.of(tensors)
    memory, (blocks, heads), s = given.memory, given.q.shape[:2], given.rates.carries.shape[-1]
    d_out, d_errors, d_before, d_after = d_outputs
    (errors, *kept), (size, kept_whole) = saved, group_size([[memory]], given.k, True)
    room = memory.new_empty(0 if kept_whole else min(size, blocks), *memory.shape)
    d_room = memory.new_empty(min(size, blocks) + 1, *memory.shape)
    d_M, d_parts = d_room.unbind(), by_part(d_room, s).unbind()
    d_room[0] = 0.0 if d_after is None else d_after
    d_initial = None if given.initial is None else torch.zeros_like(memory)
    d_out = torch.zeros_like(given.v) if d_out is None else d_out
    found = []
    for start in reversed(range(0, blocks, size)):
        *kept, M, gram, scores, X = kept
        group = given.group(plan, start, size, (gram, scores, X))
        q, k, rates, count = group.q, group.k, group.rates, len(group.rates.carries)
        part, read = slice(start, start + count), rates.reads.shape[-1] * k.shape[-1]
        e, d_o = errors[part].flatten(0, 1), d_out[part].flatten(0, 1)
        if kept_whole:
            room = M
        else:
            room[0] = M
            again, parts = room.unbind(), by_part(room, s).unbind()
            each = zip(rates.carries.unbind(), group.writes.mT.split(heads), e.split(heads), strict=True)
            for i, (carry, to_M, e_i) in enumerate(each):
                given.enter(again[i], start + i)
                if i + 1 < count:
                    _leave(again, parts, i, carry, to_M, e_i)
        d_room[count] = d_room[0]
        d_room[:count, :, read:] = 0.0
        d_room[:count, :, :read] = torch.bmm(spread(q, rates.reads).mT, d_o).unflatten(0, (count, heads))
        if d_before is not None and start + count == blocks:
            d_room[count - 1] += d_before
        # Minus the gradient of e, without that of M'.
        d_e, d_r = torch.bmm((rates.C * scores).mT, d_o), torch.empty_like(e)
        if d_errors is not None:
            d_e -= d_errors[part].flatten(0, 1)
        d_e_n, d_r_n, writes, X_n, anchors = (x.split(heads) for x in (d_e, d_r, group.writes, X.mT, group.anchors.mT))
        carries = rates.carries.mT.unbind()
        for i in reversed(range(count)):
            d_e_n[i].baddbmm_(writes[i], d_M[i + 1], beta=-1, alpha=-1)
            torch.bmm(X_n[i], d_e_n[i], out=d_r_n[i])
            d_parts[i].baddbmm_(carries[i], d_parts[i + 1])
            d_M[i].baddbmm_(anchors[i], d_r_n[i])
            if given.opens_document is not None and d_initial is not None:
                opens = given.opens_document[start + i]
                d_initial += d_M[i].masked_fill(~opens, 0.0)
                d_M[i].masked_fill_(opens, 0.0)
        entered, d_left, minus_e = room[:count].flatten(0, 1), d_room[1 : count + 1].flatten(0, 1), e.neg()
        d_N, d_scores = torch.bmm(d_r, minus_e.mT), torch.bmm(d_o, minus_e.mT)
        d_reads = torch.bmm(d_o, entered[:, :read].mT)
        d_anchors, d_writes = torch.bmm(d_r, entered.mT), torch.bmm(minus_e, d_left.mT)
        d_carries = torch.bmm(by_part(d_left, s), by_part(entered, s).mT)
        d_rates = [d_scores * scores, d_N * gram, dots(d_reads, q), dots(d_anchors, k), dots(d_writes, k)]
        d_scores.mul_(rates.C)
        d_gram = d_N.mul_(rates.inner)
        d_q = collect(d_reads, rates.reads).baddbmm_(d_scores, k)
        d_k = collect(d_writes, rates.writes, collect(d_anchors, rates.anchors)).baddbmm_(d_scores.mT, q)
        d_k.baddbmm_(d_gram + d_gram.mT, k)
        found.append([d_q, d_k, d_r.neg_(), *d_rates, d_carries])
    d_tokens = (torch.cat(x[::-1]).unflatten(0, (blocks, heads)) for x in zip(*found, strict=True))
    return *d_tokens, d_room[0].clone(), None, d_initial


SOLVE = Loop(_forward, _backward, _outputs)
