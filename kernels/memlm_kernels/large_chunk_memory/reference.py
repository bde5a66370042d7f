"""The layout of tokens and states for the loop over chunks, and the step of one token, in plain PyTorch.

With W the memory before a chunk, every token of the chunk reads, and adds to the chunk's ascent on f(k) . v,

    o = f(q; W),    f(x; W) = (silu(x W1) * (x W3)) W2,    D_j += lr_j d(f(k; W) . v) / dW_j

and the chunk's last token writes, with n_j the norm of each column (the inputs of one output) of the learned W_j:

    S_j <- mean(momentum) S_j + D_j,    W_j <- n_j normalize(W_j + orthogonal(S_j)),    D_j <- 0

A slot without a token has k, v, lr and momentum 0, and adds nothing.

B rows, T tokens, H heads, G = B H; N, C as in ``grid``; K, V and P, the larger of both.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.large_chunk_memory.chunks import WRITE_CHUNKS, Borders, ChunkMemory, WritePlan
from memlm_kernels.segments import lay_out, next_position, whole_rows


class LargeChunkMemoryState(NamedTuple):
    """The state after each row's last real token. The open chunk is the one that is not complete yet.

    weights W, gradient D of the open chunk, momentum S (empty without momentum): three fp32 [B, H, in, out] each
    momentum_sum: one fp32 [B, H, 1, 1], the sum of momentum over the open chunk's tokens; empty without momentum
    position: [B] int64, the number of tokens of the current document so far
    """

    weights: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    momentum_sum: tuple[Tensor, ...]
    position: Tensor


class LargeChunkTokens(NamedTuple):
    """q, k, v: [B, T, H, ...]; lr: [B, T, H, 3]; momentum: [B, T, H] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None

    def to(self, dtype: torch.dtype) -> "LargeChunkTokens":
        return LargeChunkTokens(*(None if x is None else x.to(dtype) for x in self))  # type: ignore[arg-type]


# W_1, W_2 and W_3 of all rows, [B, H, in, out] each.
Parts = tuple[Tensor, ...]


class ChunkTokens(NamedTuple):
    """Tokens and their layout; momentum: its mean over each chunk, [N, G], or None; muon_steps: of each write."""

    layout: "ChunkLayout"
    tokens: LargeChunkTokens
    means: Tensor | None
    muon_steps: int


class ChunkLayout(NamedTuple):
    """The places of tokens in chunks.

    lay: [B, T, ...] -> [B, N, C, ...], zeros where there is no token; take: the inverse
    chunks: N
    opens, closes: [N, G], whether a document starts with a chunk, and whether the chunk is complete at its end; None
        if the host knows: then no document starts, and all chunks are complete, the last one only if ``whole``
    goes_on: whether the first chunk may have tokens of earlier calls
    """

    lay: Callable[[Tensor], Tensor]
    take: Callable[[Tensor], Tensor]
    chunks: int
    opens: Tensor | None = None
    closes: Tensor | None = None
    whole: bool = False
    goes_on: bool = True

    @staticmethod
    def known(start: int, length: int, chunk_size: int) -> "ChunkLayout":
        """The layout of rows with ``start`` tokens before the call, whose tokens are real and of one document."""
        before, end = start % chunk_size, start % chunk_size + length
        count = -(-end // chunk_size)
        width, pad = (chunk_size, (before, -end % chunk_size)) if count > 1 else (length, (0, 0))

        def lay(x: Tensor) -> Tensor:
            x = F.pad(x, (*(0, 0) * (x.ndim - 2), *pad)) if any(pad) else x
            return x.unflatten(1, (count, width))

        def take(x: Tensor) -> Tensor:
            return x.flatten(1, 2)[:, pad[0] : pad[0] + length]

        return ChunkLayout(lay, take, count, whole=not end % chunk_size, goes_on=before > 0)

    @staticmethod
    def looked_up(
        cu_seqlens: Tensor, length: int, before: Tensor | None, chunk_size: int, heads: int
    ) -> "ChunkLayout":
        chunks = lay_out(cu_seqlens, length, chunk_size, before)
        assert chunks.positions is not None and chunks.start is not None
        closes = chunks.grid.lay((chunks.positions + 1) % chunk_size == 0).any(-1)
        opens, closes = (x.mT.repeat_interleave(heads, 1) for x in (chunks.start == 0, closes))
        return ChunkLayout(chunks.grid.lay, chunks.grid.take, chunks.grid.count, opens, closes)

    def held(self, initial: Tensor, memory: ChunkMemory | None) -> ChunkMemory:
        """The memory before the first chunk; memory: None for that of a start, ``initial``."""
        if memory is None:
            zeros = None if self.opens is None else torch.zeros_like(initial)
            return ChunkMemory(initial, zeros, zeros)
        return memory if self.goes_on else memory._replace(gradient=None)

    def momentum(self, x: Tensor, before: Tensor | None, chunk_size: int) -> tuple[Tensor, Tensor]:
        """The mean momentum of each chunk, [N, G], and the sum over the open one, [G].

        x: [B, T, H]; before: the sum over the first chunk's tokens of earlier calls, [G]
        """
        sums = self.lay(x).sum(2).movedim(1, 0).flatten(1)
        if before is not None and self.goes_on:
            if self.opens is not None:
                before = before.masked_fill(self.opens[0], 0.0)
            sums = sums + F.pad(before[None], (0, 0, 0, self.chunks - 1))
        means = sums / chunk_size
        if self.opens is None or self.closes is None:
            return means, torch.zeros_like(sums[-1]) if self.whole else sums[-1]
        # Sums end at a chunk's end and at a document's start.
        ends = self.closes + F.pad(self.opens[1:], (0, 0, 0, 1))
        over = ends.flip(0).cumsum(0).flip(0) > 0
        return means, sums.masked_fill(over, 0.0).sum(0)


def write_reference(
    chunks: ChunkTokens, initial: Parts, memory: Sequence[Parts | None] | None
) -> tuple[Tensor, list[Parts | None]]:
    """o [B, T, H, V] and the memory after the last chunk: weights, gradient and momentum, None for zeros.

    initial: the weights at a document's start; memory: the one before the call, as the result, or None for a start
    """
    layout, tokens, means, muon_steps = chunks
    tokens, (batch, heads, keys, _), values = tokens.to(initial[0].dtype), initial[0].shape, initial[1].shape[3]
    first = _joined(initial)
    held = layout.held(first, None if memory is None else ChunkMemory(*(x and _joined(x) for x in memory)))
    q, k, v = (layout.lay(x).permute(1, 0, 3, 2, 4).flatten(1, 2) for x in tokens[:3])
    widest = max(keys, values)
    q, k, v = (F.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in (q, k, v))
    of_gate, of_out, of_up = tokens.lr.unbind(-1)
    lr = layout.lay(torch.stack([of_gate, of_up, of_out], 2)).permute(1, 3, 0, 4, 2).flatten(2, 3)[..., None]
    means, *flags = (None if x is None else x.repeat(1, 3)[..., None, None] for x in (means, *layout[3:5]))
    o, *after = WRITE_CHUNKS(WritePlan(layout.whole, muon_steps), q, k, v, lr, means, *Borders(*flags), first, *held)

    def parts(x: Tensor) -> Parts:
        gate, up, out = x.unflatten(0, (3, -1, heads)).unbind()
        return gate[..., :keys, :], out[..., :values, :].mT, up[..., :keys, :]

    o = layout.take(o[..., :values].unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4))
    return o, [None if x is None else parts(x) for x in after]


def large_chunk_memory_reference(
    tokens: LargeChunkTokens,
    weights: tuple[Tensor, ...],
    chunk_size: int,
    muon_steps: int,
    state: LargeChunkMemoryState | None,
    cu_seqlens: Tensor | None,
    start: int | None,
    write: Callable[..., tuple[Tensor, list[Parts | None]]] = write_reference,
) -> tuple[Tensor, LargeChunkMemoryState]:
    """o and the new state; see ``large_chunk_memory``. write: ``write_reference``, or the same by kernels"""
    given, (batch, length, heads, _) = tokens.v.dtype, tokens.q.shape
    dtype = torch.float64 if tokens.q.dtype == torch.float64 else torch.float32
    place = tokens.q.new_zeros(batch, dtype=torch.int64) if state is None else state.position
    if state is None and cu_seqlens is None:
        start = 0
    if length == 1 and state is not None and start and (start + 1) % chunk_size:
        with torch.autocast(tokens.q.device.type, enabled=False):
            o, after = _step(tokens.to(dtype), state)
        return o.to(given), after
    initial = tuple(w.to(dtype).expand(batch, -1, -1, -1) for w in weights)
    memory, before = None, None
    if state is not None and start != 0:
        memory = [tuple(x.to(dtype) for x in part) or None for part in state[:3]]
        before = state.momentum_sum[0].to(dtype).flatten() if state.momentum_sum else None
    means = None
    total = before
    if tokens.momentum is not None and before is None:
        total = initial[0].new_zeros(batch * heads)
    if length == 0:
        return tokens.v.to(given, copy=True), _state(memory or [initial, None, None], total, place)
    if start is not None:
        layout, place = ChunkLayout.known(start, length, chunk_size), place + length
    else:
        documents = whole_rows(tokens.q) if cu_seqlens is None else cu_seqlens
        layout = ChunkLayout.looked_up(documents, length, None if state is None else place[:, None], chunk_size, heads)
        place = next_position(documents, place)
    if tokens.momentum is not None:
        means, total = layout.momentum(tokens.momentum.to(dtype), before, chunk_size)
    o, parts = write(ChunkTokens(layout, tokens, means, muon_steps), initial, memory)
    return o.to(given), _state(parts, total, place)


def _joined(parts: Parts) -> Tensor:
    """[B, H, K, F], [B, H, F, V] and [B, H, K, F] -> [3 G, P, F]; the second one is transposed and comes last."""
    gate, out, up = parts
    joined = [x.flatten(0, 1) for x in (gate, up, out.mT)]
    widest = max(x.shape[1] for x in joined)
    return torch.cat([F.pad(x, (0, 0, 0, widest - x.shape[1])) if x.shape[1] < widest else x for x in joined])


def _state(memory: Sequence[Parts | None], momentum_sum: Tensor | None, position: Tensor) -> LargeChunkMemoryState:
    weights, *_ = memory
    assert weights is not None
    copied, gradient, momentum = (_copies(x, weights) for x in memory)
    if momentum_sum is None:
        return LargeChunkMemoryState(copied, gradient, (), (), position)
    sums = momentum_sum.clone().view(-1, weights[0].shape[1], 1, 1)
    return LargeChunkMemoryState(copied, gradient, momentum, (sums,), position)


def _copies(x: Parts | None, like: Parts) -> Parts:
    """Zeros for None. A view would keep all three."""
    if x is None:
        return tuple(torch.zeros_like(w, memory_format=torch.contiguous_format) for w in like)
    return tuple(w.clone(memory_format=torch.contiguous_format) for w in x)


def _step(tokens: LargeChunkTokens, state: LargeChunkMemoryState) -> tuple[Tensor, LargeChunkMemoryState]:
    """One token that does not end a chunk: it reads, and adds to the gradient."""
    gate, out, up = (w.to(tokens.q.dtype).flatten(0, 1) for w in state.weights)
    # A token's query and key side by side.
    x = torch.cat([tokens.q, tokens.k], 1).transpose(1, 2)
    flat, v = x.flatten(0, 1), tokens.v.reshape(-1, 1, tokens.v.shape[-1])
    a, b = torch.bmm(flat, gate), torch.bmm(flat, up)
    share = torch.sigmoid(a)
    h = a * share
    product = h * b
    o = torch.bmm(product[:, :1], out).view(tokens.v.shape)
    d_hidden = torch.bmm(v, out.mT)
    slope = torch.addcmul(share, h, 1 - share)
    d_gate = d_hidden * (b * slope)[:, 1:]
    rates = tokens.lr.reshape(-1, 3, 1, 1).unbind(1)
    of_rows = zip((d_gate, v, d_hidden * h[:, 1:]), rates, strict=True)
    rows = [(r * t).unflatten(0, x.shape[:2]) for t, r in of_rows]
    k = x[:, :, 1:].mT
    columns = (k, product[:, 1:].view(*x.shape[:2], product.shape[-1], 1), k)
    gradient = tuple(torch.addcmul(d, c, r) for d, c, r in zip(state.gradient, columns, rows, strict=True))
    state = state._replace(gradient=gradient, position=state.position + 1)
    if tokens.momentum is not None:
        total = state.momentum_sum[0]
        state = state._replace(momentum_sum=(total + tokens.momentum.view(total.shape),))
    return o, state
