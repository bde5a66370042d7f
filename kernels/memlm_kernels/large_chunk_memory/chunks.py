"""The loop over chunks, and its backward, written by hand.

The three matrices are one tensor: the inputs X = (K, K, V) and W = (W_1, W_3, W_2^T) are one batched product. In a
chunk

    Z = (A, B, E) = X W      U = grad phi(Z), phi(Z) = silu(A) B E      D = (L X)^T U
    S' = mean S + D          M = W + muon(S')                           W' = M n / |M|, for each column of W_j

So the backward of the ascent only needs phi's second derivative: dZ = phi''(Z) dU. The reads of all chunks,
o = (silu(Q W_1) * (Q W_3)) W_2, are products outside of the loop, and so are the gradients of tokens.

G rows and heads; N chunks of C slots; P the larger of K and V, the smaller is padded with zeros; F hidden. Chunks run
in groups of sqrt(N): a group keeps the memory before it, and backward computes the memories inside the group again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.loops import Loop, Tensors

# Coefficients of x, x^3, x^5 in each Newton-Schulz step, as in the paper's released code.
MUON = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# A column whose norm is below it counts as zero, and for Muon a matrix.
EPS, _EPS_MUON = 1e-5, 1e-7

_silu_backward = torch.ops.aten.silu_backward


class WritePlan(NamedTuple):
    """whole: whether the last chunk is complete at its end; the others are. Not used if ``Borders`` are given."""

    whole: bool
    muon_steps: int


class Borders(NamedTuple):
    """[N, 3 G, 1, 1], whether a document starts with a chunk, and whether the chunk is complete at its end; both None
    if no document starts, and ``WritePlan`` has the rest.
    """

    opens: Tensor | None
    closes: Tensor | None

    def of_chunks(self, plan: WritePlan, count: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """Both for each chunk, as tensors [3 G, 1, 1] or as bools."""
        if self.opens is None or self.closes is None:
            return [False] * count, [True] * (count - 1) + [plan.whole]
        return self.opens.unbind(), self.closes.unbind()


class Laid(NamedTuple):
    """q, k, v: [N, G, C, P]; lr: [N, 3, G, C, 1], for W_1, W_3, W_2; momentum: its mean over each chunk,
    [N, 3 G, 1, 1], or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None


class ChunkMemory(NamedTuple):
    """weights W, gradient D of the open chunk, momentum S: [3 G, P, F] each; D and S None: zeros."""

    weights: Any
    gradient: Any
    momentum: Any


class _Given(NamedTuple):
    laid: Laid
    borders: Borders
    initial: Tensor
    memory: ChunkMemory


def _sort(tensors: Sequence[Any]) -> _Given:
    return _Given(Laid(*tensors[:5]), Borders(*tensors[5:7]), tensors[7], ChunkMemory(*tensors[8:]))


def _outputs(plan: WritePlan, tensors: Tensors) -> Tensors:
    laid, borders, initial, memory = _sort(tensors)
    closed, written = borders.opens is None and plan.whole, borders.opens is not None or plan.whole or len(laid.q) > 1
    momentum = memory.momentum is not None if not written else laid.momentum is not None
    return [laid.q, initial, None if closed else initial, initial if momentum else None]


def _forward(plan: WritePlan, keep: bool, tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    laid, borders, initial, memory = _sort(tensors)
    out, starts = [], list[Tensor]()
    with torch.autocast(initial.device.type, enabled=False):
        norms = _column_norms(initial)
        for group in groups_of(len(laid.q)):
            if group.start:
                starts += [x for x in memory if x is not None]
            run = _Run(plan, group, laid, borders, initial, norms, memory)
            memory = run.after
            out.append(_read(run.laid.q, _stacked(run.found)))
    return [torch.cat(out), *memory], starts if keep else []


def _backward(plan: WritePlan, tensors: Tensors, kept: list[Tensor], d_outputs: Tensors) -> Tensors:
    laid, borders, initial, memory = _sort(tensors)
    norms, d_initial = _column_norms(initial), torch.zeros_like(initial)
    d_out, *d_after = (
        torch.zeros_like(x) if x is not None and d is None else d
        for x, d in zip(_outputs(plan, tensors), d_outputs, strict=True)
    )
    assert d_out is not None
    d_memory, parts = ChunkMemory(*d_after), []
    # After a complete chunk, D is None if the host knows that it is complete.
    present = (True, borders.opens is not None, laid.momentum is not None)
    for group in reversed(groups_of(len(laid.q))):
        before = popped(kept, present) if group.start else memory
        run = _Run(plan, group, laid, borders, initial, norms, before)
        d_laid, d_memory, d_opened = run.backward(d_out[group], d_memory)
        d_initial = d_initial + d_opened
        parts.append(d_laid)
    d_laid = Laid(*(None if x[0] is None else torch.cat(x) for x in zip(*reversed(parts), strict=True)))  # type: ignore[arg-type]
    return [*d_laid, None, None, d_initial, *d_memory]


# (plan, *Laid, *Borders, initial, *ChunkMemory) -> o [N, G, C, P], and the ChunkMemory after the last chunk. initial:
# [3 G, P, F], the memory at the start of a document; each write restores its columns' norms.
WRITE_CHUNKS = Loop(_forward, _backward, _outputs)


def popped(kept: list[Tensor], present: Sequence[bool]) -> ChunkMemory:
    return ChunkMemory(*reversed([kept.pop() if there else None for there in reversed(present)]))


def groups_of(count: int) -> list[slice]:
    size = math.isqrt(count - 1) + 1
    return [slice(n, min(n + size, count)) for n in range(0, count, size)]


class Orthogonal(NamedTuple):
    """The result of Newton-Schulz on x; y, y y^T and its polynomial of each iterate; and |x|, by which x is scaled."""

    out: Tensor
    iterates: list[tuple[Tensor, Tensor, Tensor]]
    norm: Any


class _Write(NamedTuple):
    """The orthogonalised S', the momentum S before it, W', and, for W_1 with W_3 and for W_2, |M| of each column and
    n / |M|.
    """

    step: Orthogonal
    momentum: Any
    written: Tensor
    sizes: list[Tensor]
    ratios: list[Tensor]


class _Run:
    """One pass over the chunks of a group, with the tensors that its backward needs.

    after: the memory after the group; found: the weights that each chunk reads; z, u: [3, G, C, F] of each chunk;
    writes: one for each chunk that may be complete; only the last chunk may be known as incomplete
    """

    def __init__(
        self,
        plan: WritePlan,
        group: slice,
        laid: Laid,
        borders: Borders,
        initial: Tensor,
        norms: list[Tensor],
        memory: ChunkMemory,
    ) -> None:
        self.laid = Laid(*(None if x is None else x[group] for x in laid))  # type: ignore[arg-type]
        self.initial, self.norms, self.muon_steps = initial, norms, plan.muon_steps
        self.opens, self.closes = (x[group] for x in borders.of_chunks(plan, len(laid.q)))
        k, v = self.laid.k, self.laid.v
        x = torch.stack([k, k, v], 1)
        self.x, self.weighted = (t.flatten(1, 2).unbind() for t in (x, x * self.laid.lr))
        self.momentum = [None] * len(x) if self.laid.momentum is None else self.laid.momentum.unbind()
        self.start, self.writes = memory, list[_Write]()
        self.found, self.z, self.u = list[Tensor](), list[Tensor](), list[Tensor]()
        for n in range(len(x)):
            memory = self._chunk(n, memory)
        self.after = memory

    def _chunk(self, n: int, memory: ChunkMemory) -> ChunkMemory:
        opened, closed = self.opens[n], self.closes[n]
        weights, gradient, momentum = memory
        if opened is not False:
            weights = torch.where(opened, self.initial, weights)
            gradient, momentum = _without(opened, gradient), _without(opened, momentum)
        z = torch.bmm(self.x[n], weights).unflatten(0, (3, -1))
        u = _slopes(z)
        for kept, x in ((self.found, weights), (self.z, z), (self.u, u)):
            kept.append(x)
        gradient = plus(gradient, torch.bmm(self.weighted[n].mT, u.flatten(0, 1)))
        if closed is False:
            return ChunkMemory(weights, gradient, momentum)
        step, mean = gradient, self.momentum[n]
        if mean is not None and momentum is not None:
            step = torch.addcmul(gradient, mean, momentum)
        write = _write(weights, step, momentum, self.norms, self.muon_steps)
        self.writes.append(write)
        if closed is True:
            return ChunkMemory(write.written, None, None if mean is None else step)
        weights = torch.where(closed, write.written, weights)
        momentum = None if mean is None else torch.where(closed, step, momentum)
        return ChunkMemory(weights, _without(closed, gradient), momentum)

    def backward(self, d_out: Tensor, d_memory: ChunkMemory) -> tuple[Laid, ChunkMemory, Tensor]:
        """Gradients of the group's tokens, of the memory before it, and of ``initial``."""
        q, k, v, lr, means = self.laid
        found = _stacked(self.found)
        d_q, d_read = _read_backward(d_out, q, found)
        curvature = _curvature(_stacked(self.z)).unbind(2)
        inverses = [inverse(norm.square()) for norm in self.norms]
        # A column that counts as zero was not normalised.
        sizes = zip(*(write.sizes for write in self.writes), strict=True)
        shares = [((torch.stack(x) > EPS) * i).unbind() for x, i in zip(sizes, inverses, strict=False)]
        d_initial = torch.zeros_like(self.initial)
        d_z, d_gradients, d_means, along = list[Tensor](), list[Tensor](), list[Any](), list[list[Tensor]]()
        for n in reversed(range(len(self.found))):
            closed, d_mean = self.closes[n], None
            if closed is not False:
                kept = None if closed is True else ChunkMemory(*(_without(closed, x) for x in d_memory))
                if kept is not None:
                    d_memory = ChunkMemory(*(_without(~closed, x) for x in d_memory))
                d_memory, d_mean, sums = self._write_backward(n, d_memory, [x[n] for x in shares])
                along.append(sums)
                if kept is not None:
                    d_memory = ChunkMemory(*map(plus, d_memory, kept))
            d_weights, d_gradient, d_momentum = d_memory
            d_u = torch.bmm(self.weighted[n], d_gradient).unflatten(0, (3, -1))
            d_z.append((curvature[n] * d_u).sum(1))
            d_weights = torch.baddbmm(d_weights + d_read[n], self.x[n].mT, d_z[-1].flatten(0, 1))
            d_gradients.append(d_gradient)
            d_means.append(d_mean)
            opened = self.opens[n]
            if opened is not False:
                d_initial = d_initial + _without(~opened, d_weights)
                d_weights, d_gradient, d_momentum = (_without(opened, x) for x in (d_weights, d_gradient, d_momentum))
            d_memory = ChunkMemory(d_weights, d_gradient, d_momentum)
        if along:
            # The gradient of n, the norms of initial's columns.
            totals = [torch.stack(x).sum(0) * i for x, i in zip(zip(*along, strict=True), inverses, strict=True)]
            d_initial += torch.cat([w * x for w, x in zip(_apart(self.initial), totals, strict=True)])
        d_weighted = torch.bmm(_stacked(self.u).flatten(0, 2), _stacked(d_gradients[::-1]).flatten(0, 2).mT)
        d_x = torch.bmm(_stacked(d_z[::-1]).flatten(0, 2), found.flatten(0, 2).mT)
        d_weighted, d_x = (x.view(3, *k.shape) for x in (d_weighted, d_x))
        d_lr = (d_weighted * torch.stack([k, k, v])).sum(-1, keepdim=True).movedim(0, 1)
        d_gate, d_up, d_v = d_x.addcmul_(d_weighted, lr.movedim(1, 0)).unbind()
        if means is not None:
            means = torch.stack([torch.zeros_like(means[0]) if x is None else x for x in d_means[::-1]])
        # A memory given as None (zeros) has no gradient.
        d_memory = ChunkMemory(*(None if x is None else d for x, d in zip(self.start, d_memory, strict=True)))
        return Laid(d_q, d_gate + d_up, d_v, d_lr, means), d_memory, d_initial

    def _write_backward(
        self, n: int, d_after: ChunkMemory, shares: list[Tensor]
    ) -> tuple[ChunkMemory, Tensor | None, list[Tensor]]:
        """Gradients of the memory before the write and of the mean momentum, and for each column the sum of
        W' times its gradient. shares: 1 / n^2 of each column that was normalised.
        """
        write, mean = self.writes[n], self.momentum[n]
        products = _apart(write.written * d_after.weights)
        sums = [x.sum(dim, keepdim=True) for x, dim in zip(products, _COLUMNS, strict=True)]
        parts = zip(_apart(d_after.weights), _apart(write.written), sums, shares, write.ratios, strict=True)
        d_weights = torch.cat([torch.addcmul(d, w, x * i, value=-1).mul_(r) for d, w, x, i, r in parts])
        d_step = plus(orthogonal_backward(d_weights, write.step), d_after.momentum)
        if mean is None or write.momentum is None:
            return ChunkMemory(d_weights, d_step, None), None, sums
        d_mean = (d_step * write.momentum).sum((-2, -1), keepdim=True)
        return ChunkMemory(d_weights, d_step, d_step * mean), d_mean, sums


def plus(x: Any, y: Any) -> Any:
    """The sum; None stands for zeros."""
    return y if x is None else x if y is None else x + y


def _without(flag: Tensor, x: Any) -> Any:
    return None if x is None else x.masked_fill(flag, 0.0)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[3 G, ...] or [3, G, ...] of each chunk -> [3, N, G, ...]"""
    return torch.stack([x.view(3, -1, *x.shape[-2:]) for x in tensors], 1)


# The dimension along which a column lies in W_1 and W_3, and in W_2^T.
_COLUMNS = (-2, -1)


def _apart(x: Tensor) -> tuple[Tensor, ...]:
    """[3 G, P, F] -> W_1 and W_3; and W_2^T."""
    return x.split([len(x) // 3 * 2, len(x) // 3])


def _column_norms(x: Tensor) -> list[Tensor]:
    return [torch.linalg.vector_norm(w, dim=dim, keepdim=True) for w, dim in zip(_apart(x), _COLUMNS, strict=True)]


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return x.reciprocal().masked_fill_(x == 0, 0.0)


def _write(weights: Tensor, step: Tensor, momentum: Any, norms: list[Tensor], muon_steps: int) -> _Write:
    made = orthogonal(step, muon_steps)
    moved = weights + made.out
    sizes = [x.clamp_(min=EPS) for x in _column_norms(moved)]
    ratios = [n / x for n, x in zip(norms, sizes, strict=True)]
    written = torch.cat([w * x for w, x in zip(_apart(moved), ratios, strict=True)])
    return _Write(made, momentum, written, sizes, ratios)


def _slopes(z: Tensor) -> Tensor:
    """The gradient of phi = silu(A) B E; z: A, B, E."""
    a, b, e = z.unbind()
    h = F.silu(a)
    return torch.stack([_silu_backward(b * e, a), h * e, h * b])


def _curvature(z: Tensor) -> Tensor:
    """The second derivatives of phi, [3, 3, ...]."""
    a, b, e = z.unbind()
    share = a.sigmoid()
    h = a * share
    rest = 1 - share
    slope = torch.addcmul(share, h, rest)
    bend = share * rest * torch.addcmul(2 - h, a, rest)
    by_up, by_out, zero = slope * e, slope * b, torch.zeros_like(a)
    return torch.stack([bend * b * e, by_up, by_out, by_up, zero, h, by_out, h, zero]).unflatten(0, (3, 3))


def _read(q: Tensor, weights: Tensor) -> Tensor:
    """o of all chunks; q: [N, G, C, P], weights: [3, N, G, P, F]"""
    gate, up, out = weights.flatten(1, 2).unbind()
    flat = q.flatten(0, 1)
    return torch.bmm(F.silu(torch.bmm(flat, gate)) * torch.bmm(flat, up), out.mT).view(q.shape)


def _read_backward(d_o: Tensor, q: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of q, and of each chunk's weights, [3 G, P, F]."""
    gate, up, out = weights.flatten(1, 2).unbind()
    flat, d_o = q.flatten(0, 1), d_o.flatten(0, 1)
    a, b = torch.bmm(flat, gate), torch.bmm(flat, up)
    h, d_hidden = F.silu(a), torch.bmm(d_o, out)
    d_a, d_b = _silu_backward(d_hidden * b, a), d_hidden * h
    d_q = torch.baddbmm(torch.bmm(d_a, gate.mT), d_b, up.mT).view(q.shape)
    products = (torch.bmm(flat.mT, d_a), torch.bmm(flat.mT, d_b), torch.bmm(d_o.mT, h * b))
    d_weights = torch.stack([x.unflatten(0, q.shape[:2]) for x in products], 1)
    return d_q, d_weights.flatten(1, 2).unbind()


def orthogonal(x: Tensor, steps: int) -> Orthogonal:
    """Newton-Schulz: move the singular values of each matrix towards 1 (Muon); 0 steps leave it as it is."""
    if steps == 0:
        return Orthogonal(x, [], None)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=_EPS_MUON)
    y, iterates = _turned(x, x) / norm, []
    for a, b, c in MUON[:steps]:
        square = torch.bmm(y, y.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        iterates.append((y, square, polynomial))
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return Orthogonal(_turned(x, y), iterates, norm)


def _turned(like: Tensor, x: Tensor) -> Tensor:
    """x, or its transpose if ``like`` has more rows than columns: Newton-Schulz squares the smaller side."""
    return x.mT if like.shape[-2] > like.shape[-1] else x


def orthogonal_backward(d_out: Tensor, made: Orthogonal) -> Tensor:
    if not made.iterates:
        return d_out
    d = _turned(made.out, d_out)
    steps = zip(MUON[: len(made.iterates)], made.iterates, strict=True)
    for (a, b, c), (y, square, polynomial) in reversed(list(steps)):
        d_polynomial = torch.bmm(d, y.mT)
        d_square = torch.baddbmm(torch.bmm(d_polynomial, square), square, d_polynomial).mul_(c)
        d_square.add_(d_polynomial, alpha=b)
        d = torch.baddbmm(torch.bmm(polynomial, d), d_square + d_square.mT, y).add_(d, alpha=a)
    first = made.iterates[0][0]
    along = (d * first).sum((-2, -1), keepdim=True) * (made.norm > _EPS_MUON)
    return _turned(made.out, torch.addcmul(d, first, along, value=-1) / made.norm)
