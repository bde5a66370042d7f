"""The loop over chunks with Triton's kernels. They compute all but the products, which are torch's.

The memory of a head is one tensor, W = (W_1^T, W_3^T, W_2), [3 F, P], and so are D and S. In a chunk

    (A, B) = K (W_1, W_3)    E = V W_2^T    U = L * grad phi(A, B, E), phi = silu(A) B E    D = U^T X, X = (K, K, V)

and its write is that of ``chunks``. Products take the type of v if that is bf16, and fp32 otherwise: rates times fp16
may be too small for fp16. The memory itself is fp32, and has a copy for products.

G rows and heads; N chunks of C slots; K and V as in the op, P the larger of both, to which the smaller is padded with
zeros; F hidden; L = 2 F + P lines, that is rows of W_1^T and W_3^T and columns of W_2. Groups of chunks are those of
``chunks``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.large_chunk_memory import triton
from memlm_kernels.large_chunk_memory.chunks import (
    ChunkMemory,
    Orthogonal,
    WritePlan,
    groups_of,
    inverse,
    orthogonal,
    orthogonal_backward,
    plus,
    popped,
)
from memlm_kernels.large_chunk_memory.kernels import CLOSES, OPENS
from memlm_kernels.large_chunk_memory.reference import ChunkTokens, Parts
from memlm_kernels.loops import Loop, Tensors

Pair = tuple[Tensor, Tensor]


class _Laid(NamedTuple):
    """q, k: [N, G, C, K], v: [N, G, C, V], of one type; lr: [N, G, C, 3], for W_1, W_2, W_3; momentum: its mean over
    each chunk, [N, G], or None; borders: [N, G] int32, whether each chunk closes, or a document opens behind it; None
    if all close, the last one only if the plan has it ``whole``
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    borders: Tensor | None


class _Chunk(NamedTuple):
    """before: the memory that a chunk finds, and its weights in the tokens' type; ab, e: A, B and E; after: the memory
    behind it; sizes: norms of the moved lines, None if the host knows that the chunk goes on; step: Muon's
    """

    before: ChunkMemory
    narrow: Tensor
    ab: Tensor
    e: Tensor
    after: ChunkMemory
    narrow_after: Tensor
    sizes: Tensor | None = None
    step: Orthogonal | None = None


class _Call:
    """The tensors of a call, and its steps forward."""

    def __init__(self, plan: WritePlan, tensors: Sequence[Any]) -> None:
        self.plan, self.laid, self.initial = plan, _Laid(*tensors[:6]), tensors[6]
        self.memory = ChunkMemory(*tensors[7:])
        self.keys, self.values, self.dtype = self.laid.k.shape[-1], self.laid.v.shape[-1], self.laid.k.dtype
        rows, columns = _apart(self.initial)
        norms = torch.linalg.vector_norm(rows, dim=2), torch.linalg.vector_norm(columns, dim=1)
        self.norms = torch.cat(norms, 1)

    def outputs(self) -> Tensors:
        whole, borders, means = self.plan.whole, self.laid.borders, self.laid.momentum
        closed, written = borders is None and whole, borders is not None or whole or len(self.laid.q) > 1
        momentum = self.memory.momentum is not None if not written else means is not None
        return [self.laid.v, self.initial, None if closed else self.initial, self.initial if momentum else None]

    def goes_on(self, n: int) -> bool:
        """Whether the host knows that chunk n goes on."""
        return self.laid.borders is None and not self.plan.whole and n == len(self.laid.q) - 1

    def rule(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """The mean momentum of chunk n, and the border behind it."""
        means, borders = self.laid.momentum, self.laid.borders
        return None if means is None else means[n], None if borders is None else borders[n]

    def gate_up(self, x: Tensor) -> Tensor:
        """W_1^T and W_3^T of memories, [..., 2 F, K]"""
        return x[..., : x.shape[-2] // 3 * 2, : self.keys]

    def out(self, x: Tensor) -> Tensor:
        """W_2 of memories, [..., F, V]"""
        return x[..., x.shape[-2] // 3 * 2 :, : self.values]

    def chunks(self, group: slice, memory: ChunkMemory) -> Iterator[_Chunk]:
        """The chunks of a group; memory: the one before them"""
        narrow = memory.weights.to(self.dtype)
        for n in range(group.start, group.stop):
            yield (chunk := self._chunk(n, memory, narrow))
            memory, narrow = chunk.after, chunk.narrow_after

    def _chunk(self, n: int, memory: ChunkMemory, narrow: Tensor) -> _Chunk:
        k, v, lr = self.laid.k[n], self.laid.v[n], self.laid.lr[n]
        ab = torch.bmm(k, self.gate_up(narrow).mT)
        e = torch.bmm(v, self.out(narrow).mT)
        of_gate_up, of_out = _parts(triton.slopes(ab, e, lr))
        products = torch.bmm(of_gate_up.mT, k), torch.bmm(of_out.mT, v)
        chunk = _Chunk(memory, narrow, ab, e, memory, narrow)
        if self.goes_on(n):
            after = memory._replace(gradient=plus(memory.gradient, _joined(products, memory.weights)))
            return chunk._replace(after=after)
        return self._written(chunk, products, *self.rule(n))

    def _written(self, chunk: _Chunk, products: Pair, means: Tensor | None, border: Tensor | None) -> _Chunk:
        weights, gradient, momentum = chunk.before
        step = None
        if self.plan.muon_steps:
            moves = plus(gradient, _joined(products, weights))
            if means is not None and momentum is not None:
                moves = torch.addcmul(moves, means[:, None, None], momentum)
            step = orthogonal(_matrices(moves), self.plan.muon_steps)
        moves = None if step is None else step.out.reshape(weights.shape)
        given = weights, gradient, [*products], momentum, means, moves, self.initial, self.norms, border, self.dtype
        weights, sizes, *found = triton.write(*given)
        narrow = weights if self.dtype == weights.dtype else found.pop(0)
        d = None if border is None else found.pop(0)
        after = ChunkMemory(weights, d, None if means is None else found.pop(0))
        return chunk._replace(after=after, narrow_after=narrow, sizes=sizes, step=step)

    def read(self, group: slice, found: Tensor, o: Tensor) -> None:
        """Write the reads of a group of chunks; found: [n, G, 3 F, P], the weights that each finds."""
        q, found = self.laid.q[group].flatten(0, 1), found.flatten(0, 1)
        h = triton.hidden(torch.bmm(q, self.gate_up(found).mT))
        torch.bmm(h, self.out(found), out=o[group].flatten(0, 1))


def _forward(plan: WritePlan, keep: bool, tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    call = _Call(plan, tensors)
    memory, o, starts = call.memory, call.laid.v.new_empty(call.laid.v.shape), list[Tensor]()
    with torch.autocast(o.device.type, enabled=False):
        for group in groups_of(len(o)):
            if group.start:
                starts += [x for x in memory if x is not None]
            found = []
            for chunk in call.chunks(group, memory):
                found.append(chunk.narrow)
                memory = chunk.after
            call.read(group, torch.stack(found), o)
    return [o, *memory], starts if keep else []


def _backward(plan: WritePlan, tensors: Tensors, kept: list[Tensor], d_outputs: Tensors) -> Tensors:
    call = _Call(plan, tensors)
    d_o, *d_after = (
        torch.zeros_like(x) if x is not None and d is None else d
        for x, d in zip(call.outputs(), d_outputs, strict=True)
    )
    assert d_o is not None
    back = _Back(call, d_o.contiguous(), ChunkMemory(*d_after))
    # After a complete chunk, D is None if the host knows that it is complete.
    present = (True, call.laid.borders is not None, call.laid.momentum is not None)
    for group in reversed(groups_of(len(d_o))):
        back.group(group, popped(kept, present) if group.start else call.memory)
    # A memory given as None (zeros) has no gradient.
    d_memory = [None if x is None else d.to(x) for x, d in zip(call.memory, back.memory, strict=True)]
    return [*back.tokens(), None, back.initial(), *d_memory]


# (plan, *Laid, initial, *ChunkMemory) -> o [N, G, C, V], and the ChunkMemory after the last chunk. initial:
# [G, 3 F, P], the memory at the start of a document; each write restores its lines' norms.
_WRITE_CHUNKS = Loop(_forward, _backward, lambda plan, tensors: _Call(plan, tensors).outputs())


class _Back:
    """Backward through a call, from its last group of chunks to the first; memory: the gradient of the memory."""

    def __init__(self, call: _Call, d_o: Tensor, memory: ChunkMemory) -> None:
        self.call, self.d_o, self.memory = call, d_o, memory
        self.q, self.k, self.v = (x.new_empty(x.shape) for x in call.laid[:3])
        self.lr, self.sums = list[Tensor](), list[Tensor]()
        self.opened = None if call.laid.borders is None else torch.zeros_like(call.initial)

    def tokens(self) -> list[Tensor | None]:
        """Gradients of q, k, v, lr and the mean momentum."""
        means = None
        if self.call.laid.momentum is not None:
            means = torch.stack([x[1] for x in reversed(self.sums)]).sum(-1)
        return [self.q, self.k, self.v, torch.stack(self.lr[::-1]), means]

    def initial(self) -> Tensor:
        """The gradient of the norms of initial's lines, and of the weights of documents that opened."""
        along = torch.stack([x[0] for x in self.sums]).sum(0) * inverse(self.call.norms.square())
        rows, columns = _apart(self.call.initial)
        of_rows, of_columns = along.split([rows.shape[1], columns.shape[2]], 1)
        return plus(torch.cat([rows * of_rows[:, :, None], columns * of_columns[:, None]], 1), self.opened)

    def group(self, group: slice, memory: ChunkMemory) -> None:
        """memory: the one before the group"""
        chunks = [*self.call.chunks(group, memory)]
        reads, products = self._reads(group, torch.stack([x.narrow for x in chunks])), list[Tensor]()
        for n in reversed(range(group.start, group.stop)):
            at = n - group.start
            products = self._chunk(n, chunks[at], products, [x[at] for x in reads])
        weights = self.memory.weights
        self.memory = self.memory._replace(weights=weights + _joined(products, weights))

    def _reads(self, group: slice, found: Tensor) -> list[Sequence[Tensor]]:
        """Gradients of the weights that each chunk of a group finds: [G, 2 F, K] and [G, F, V] of each."""
        call, found, sizes = self.call, found.flatten(0, 1), found.shape[:2]
        q, d_o = (x[group].flatten(0, 1) for x in (call.laid.q, self.d_o))
        of_gate_up, of_out = call.gate_up(found), call.out(found)
        d_ab, h = triton.hidden_backward(torch.bmm(q, of_gate_up.mT), torch.bmm(d_o, of_out.mT))
        torch.bmm(d_ab, of_gate_up, out=self.q[group].flatten(0, 1))
        return [x.unflatten(0, sizes).unbind() for x in (torch.bmm(d_ab.mT, q), torch.bmm(h.mT, d_o))]

    def _chunk(self, n: int, chunk: _Chunk, products: list[Tensor], read: list[Tensor]) -> list[Tensor]:
        """products: of the gradient of the next chunk's weights, the part that ``memory`` lacks, or none; read: the
        part by this chunk's reads. Returns the part of this chunk's weights.
        """
        call, (k, v, lr) = self.call, (x[n] for x in self.call.laid[1:4])
        if chunk.sizes is None:
            self.memory = self.memory._replace(gradient=self.memory.gradient.to(k))
            self.sums.append(torch.zeros_like(call.norms).expand(2, -1, -1))
        else:
            self._write(chunk, products, *call.rule(n))
        d_gate_up, d_out = call.gate_up(self.memory.gradient), call.out(self.memory.gradient)
        d_u = torch.bmm(k, d_gate_up.mT), torch.bmm(v, d_out.mT)
        d_z, u, d_lr = triton.slopes_backward(chunk.ab, chunk.e, lr, *d_u)
        self.lr.append(d_lr)
        (d_ab, d_e), (u_gate_up, u_out) = _parts(d_z), _parts(u)
        torch.bmm(d_ab, call.gate_up(chunk.narrow), out=self.k[n])
        torch.bmm(d_e, call.out(chunk.narrow), out=self.v[n])
        self.k[n].baddbmm_(u_gate_up, d_gate_up)
        self.v[n].baddbmm_(u_out, d_out)
        return [read[0].baddbmm_(d_ab.mT, k), read[1].baddbmm_(d_e.mT, v)]

    def _write(self, chunk: _Chunk, products: list[Tensor], means: Tensor | None, border: Tensor | None) -> None:
        """From the gradients of the memory behind a chunk to those of the memory before its write."""
        call, (_, _, momentum), (_, d_gradient, d_momentum) = self.call, chunk.before, self.memory
        assert chunk.sizes is not None
        momentum = None if means is None else momentum
        d_after = self.memory.weights, products, None if border is None else d_gradient, d_momentum, self.opened
        rest = call.keys, call.values, call.dtype, chunk.step is not None
        given = chunk.after.weights, chunk.sizes, call.norms, momentum, means, border
        d_weights, sums, *found = triton.write_backward(*given, *d_after, *rest)
        self.opened = None if border is None else found.pop(0)
        if chunk.step is None:
            self.memory = ChunkMemory(d_weights, found.pop(0), None if momentum is None else found.pop(0))
        else:
            self.memory = ChunkMemory(d_weights, *self._step(chunk.step, d_weights, sums, momentum, means, border))
        self.sums.append(sums)

    def _step(
        self,
        step: Orthogonal,
        d_weights: Tensor,
        sums: Tensor,
        momentum: Tensor | None,
        means: Tensor | None,
        border: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of D and S by Muon's step. Fills their part of ``sums``."""
        (_, d_gradient, d_momentum), closes = self.memory, None
        if border is not None:
            closes, on = ((border == x)[:, None, None] for x in (CLOSES.value, 0))
            d_weights = d_weights * closes
        d = orthogonal_backward(_matrices(d_weights), step).reshape(d_weights.shape)
        if d_momentum is not None:
            d = d + (d_momentum if closes is None else d_momentum * closes)
        before = None
        if momentum is not None and means is not None:
            rows, columns = _apart(d * momentum)
            torch.cat([rows.sum(2), columns.sum(1)], 1, out=sums[1])
            before = d * means[:, None, None]
        if closes is not None:
            d = d + d_gradient * on
            before = None if before is None else before + d_momentum * on
        return d.to(self.call.dtype), before


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """[G, C, 3 F] -> [G, C, 2 F] and [G, C, F]"""
    return x.split([x.shape[-1] // 3 * 2, x.shape[-1] // 3], -1)


def _apart(x: Tensor) -> tuple[Tensor, ...]:
    """[G, 3 F, P] -> W_1^T and W_3^T; and W_2."""
    return x.split([x.shape[1] // 3 * 2, x.shape[1] // 3], 1)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """[G, 2 F, K] and [G, F, V] -> [G, 3 F, P], in the type of ``like``."""
    return torch.cat([_padded(x, like.shape[-1]) for x in parts], 1).to(like.dtype)


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _matrices(x: Tensor) -> Tensor:
    """[G, 3 F, P] -> [3 G, F, P]"""
    return x.unflatten(1, (3, -1)).flatten(0, 1)


def write_triton(
    chunks: ChunkTokens, initial: Parts, memory: Sequence[Parts | None] | None
) -> tuple[Tensor, list[Parts | None]]:
    """As ``write_reference``."""
    layout, tokens, means, muon_steps = chunks
    (batch, heads, keys, _), values = initial[0].shape, initial[1].shape[3]

    def join(parts: Parts) -> Tensor:
        gate, out, up = (x.flatten(0, 1) for x in parts)
        return torch.cat([_padded(x, max(keys, values)) for x in (gate.mT, up.mT, out)], 1)

    def apart(x: Tensor) -> Parts:
        gate, up, out = x.unflatten(1, (3, -1)).unflatten(0, (batch, heads)).unbind(2)
        return gate[..., :keys].mT, out[..., :values], up[..., :keys].mT

    def by_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
        return layout.lay(x.to(dtype)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    first = join(initial)
    held = layout.held(first, None if memory is None else ChunkMemory(*(x and join(x) for x in memory)))
    if means is None:
        held = held._replace(momentum=None)
    dtype = torch.bfloat16 if tokens.v.dtype == torch.bfloat16 else first.dtype
    q, k, v = (by_heads(x, dtype) for x in tokens[:3])
    borders = None
    if layout.opens is not None and layout.closes is not None:
        opens = F.pad(layout.opens[1:], (0, 0, 0, 1))
        if memory is not None:
            # No border is before the first chunk.
            new = layout.opens[0, :, None, None]
            rest = (None if x is None else x.masked_fill(new, 0.0) for x in held[1:])
            held = ChunkMemory(torch.where(new, first, held.weights), *rest)
        borders = torch.where(opens, OPENS.value, layout.closes * CLOSES.value).int()
    plan = WritePlan(layout.whole, muon_steps)
    o, *after = _WRITE_CHUNKS(plan, q, k, v, by_heads(tokens.lr, first.dtype), means, borders, first, *held)
    o = layout.take(o.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4))
    return o, [None if x is None else apart(x) for x in after]
