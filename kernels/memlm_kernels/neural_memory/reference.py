"""The dual form in plain PyTorch: matrix products inside chunks, a short loop over chunks.

Let r be a token's place in its chunk, g_i the gradient of token i at the chunk's anchor, and W, S the memory and the
momentum before the chunk. Unrolling the two recurrences gives, with scalar coefficients,

    M_r = beta_r W + f_r S - sum_i C[r, i] g_i             S_r = m_r S - sum_i P[r, i] g_i
    P[r, i] = sum_l E[r, l] lr_l U[l, i]                   E[r, l] = prod_{l<j<=r} momentum_j
    C = L P,  f = L m,  m_r = prod_{j<=r} momentum_j       L[r, l] = prod_{l<j<=r} (1 - decay_j)
    beta_r = prod_{j<=r} (1 - decay_j)

where U[l, i] is the weight of token i in the loss of step l: the identity, or a band for the Omega rule. Every product
is at most 1 and nothing is divided, so nothing overflows. In each layer g_i is an outer product a_i^T e_i, of input
and backpropagated error. So M_r(q) needs no M_r: it is ``q W`` and ``q S``, scaled, minus masked attention from q to a
with values e.

A long chunk is cut into blocks: W, S and r are then those of the block, and the anchor remains that of the chunk. A
slot without a token has lr 0, momentum 1, decay 0 and ``write`` 0, and changes nothing. ``write`` multiplies the S
that enters M, because momentum would otherwise move M on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.grid import from_rows, keep_last, pick, row_flags, to_rows
from memlm_kernels.neural_memory.block_rates import block_rates
from memlm_kernels.neural_memory.blocks import BlockPlan, block_width, in_blocks, solve
from memlm_kernels.neural_memory.chunk import Plan, by_part, gradient_norm
from memlm_kernels.neural_memory.losses import InnerLoss, squared_error
from memlm_kernels.neural_memory.network import ACTIVATIONS, Tail
from memlm_kernels.neural_memory.rates import scalar_recurrences
from memlm_kernels.neural_memory.scan import scan as scan_in_torch
from memlm_kernels.neural_memory.step import Sources, StepMemory, step
from memlm_kernels.segments import ChunkedRows, lay_out, next_position, whole_rows

# The error of a chunk_size that would be one block of more than 64, see ``block_size``.
BLOCKS = "must be at most 64, or a multiple of a number from 16 to 64"

# The type of ``scan_in_torch``.
LoopOverChunks = Callable[..., tuple[Any, ...]]
Blocks = Callable[..., tuple[Tensor, "NeuralMemoryState", Tensor | None]]


class NeuralMemoryState(NamedTuple):
    """The state after each row's last real token. The open chunk is the one that is not complete yet.

    weights M, momentum S (empty without momentum), anchor (M before the open chunk): fp32 [B, H, in, out] per layer
    position: [B] int64, the number of tokens of the current document so far
    recent: k, v and weight of the last window - 1 tokens, [B, window - 1, H, ...]; empty for window 1
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    position: Tensor
    recent: tuple[Tensor, ...] = ()


class Tokens(NamedTuple):
    """q, k, v: [B, T, H, ...]; lr, momentum, decay, weight: [B, T, H]; momentum, decay, weight may be None."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    weight: Tensor | None


def neural_memory_reference(
    tokens: Tokens,
    weights: tuple[Tensor, ...],
    chunk_size: int,
    activation: str,
    norm: tuple[Tensor, Tensor] | None,
    loss: InnerLoss,
    window: int,
    state: NeuralMemoryState | None,
    cu_seqlens: Tensor | None,
    start: int | None,
    with_surprise: bool,
    scan: LoopOverChunks | None,
    widest: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
    """o, the new state, and the norm of each token's gradient [B, T, H], if requested; see ``neural_memory``.

    scan: a loop over chunks that replaces the one in PyTorch; it gets the tokens in their own type
    widest: the most slots that it takes at once
    blocks: ``_blocks`` by other means; it gets the tokens in their own type too
    """
    q, v = tokens.q, tokens.v
    batch, length, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        gates = (None if x is None else x.to(dtype) for x in tokens[3:])
        tokens = Tokens(*(x.to(dtype) if scan is None else x for x in tokens[:3]), *gates)
        # A view of a parameter asks for gradients under no_grad too, and would stay in the state.
        weights = weights if torch.is_grad_enabled() else tuple(w.detach() for w in weights)
        initial = tuple(w.to(dtype).expand(batch, *w.shape) for w in weights)
        if start == 0 or state is None:
            state, start = _fresh(tokens, initial, window), 0 if cu_seqlens is None else None
        if q.numel() == 0:
            return v.clone(), state, torch.zeros_like(tokens.lr) if with_surprise else None
        if window == 1 and tokens.weight is not None:
            # The weight of a token's only loss scales its learning rate.
            tokens = tokens._replace(lr=tokens.lr * tokens.weight, weight=None)
        width, aligned = block_size(chunk_size, widest), start is not None and start % chunk_size == 0
        small = len(weights) == 1 and max(q.shape[-1], v.shape[-1]) <= 64
        if scan is None and small and chunk_size % 32 == 0 and (aligned or batch * heads > 1):
            # Beside a small memory, masked products and rates are most of the work of a wider block.
            width = 32
        plan = Plan(len(weights), chunk_size // width, ACTIVATIONS[activation], loss, with_surprise)
        tail = None if norm is None else Tail(*(n.to(dtype).repeat(batch, 1)[:, None] for n in norm))
        if length == 1 and cu_seqlens is None and scan is None:
            o, state, surprise = _step(plan, tokens, state, initial, chunk_size, window, start, tail)
            return o.to(v.dtype), state, surprise
        affine = len(weights) == 1 and norm is None and loss is squared_error and window == 1
        short = in_blocks(chunk_size, block_width(chunk_size, length, cu_seqlens), q)
        if affine and (blocks is not None or (scan is None and short)):
            o, state, surprise = (blocks or _blocks)(
                tokens, state, initial[0], chunk_size, cu_seqlens, start, with_surprise
            )
            return o.to(v.dtype), state, surprise
        if aligned:
            chunks = lay_out(None, length, width)
        else:
            documents = whole_rows(q) if cu_seqlens is None else cu_seqlens
            chunks = lay_out(documents, length, width, state.position[:, None])
        grid, opens = chunks.grid, (None if chunks.start is None else chunks.start == 0, chunks.opens(chunk_size))
        lengths = None if cu_seqlens is None else cu_seqlens[:, -1]
        sources, U, recent = _sources(tokens, chunks, lengths, window, state)
        # The loop in PyTorch adds gradients, with negative learning rates; Triton's kernels subtract them.
        lr = tokens.lr if scan else -tokens.lr
        rates = scalar_recurrences(lr, tokens.momentum, tokens.decay, grid, U)
        q_grid = to_rows(grid.lay(tokens.q))
        out, surprise, *memory = (scan or scan_in_torch)(
            plan,
            q_grid,
            *sources,
            rates,
            *(tail or (None, None)),
            *(None if x is None else row_flags(x, heads) for x in opens),
            *(x.to(dtype).flatten(0, 1) for part in (state.weights, state.momentum) for x in part),
            *(() if aligned else (x.to(dtype).flatten(0, 1) for part in (state.anchor, initial) for x in part)),
        )
        if tail is not None:
            out = tail.read(q_grid, out)
        out = grid.take(from_rows(out, heads))
        if surprise is not None:
            surprise = grid.take(from_rows(surprise[..., window - 1 :], heads))
    parts = [tuple(x.unflatten(0, (batch, heads)) for x in part) for part in _split(memory, len(weights))]
    momentum = parts[1] if tokens.momentum is not None else ()
    position = state.position + length if cu_seqlens is None else next_position(cu_seqlens, state.position)
    return out.to(v.dtype), NeuralMemoryState(parts[0], momentum, parts[-1], position, recent), surprise


def _blocks(
    tokens: Tokens,
    state: NeuralMemoryState,
    initial: Tensor,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    start: int | None,
    with_surprise: bool,
) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
    """A memory of one layer under the squared error, see ``blocks``."""
    q = tokens.q
    batch, length, heads, keys = q.shape
    width = block_width(chunk_size, length, cu_seqlens)
    # Whether blocks start with chunks, so that none reads the anchor of an earlier block.
    regular = start is not None and start % chunk_size == 0 and (length <= width or width % chunk_size == 0)
    if regular:
        rows = lay_out(None, length, width)
    else:
        rows = lay_out(whole_rows(q) if cu_seqlens is None else cu_seqlens, length, width, state.position[:, None])
    grid = rows.grid
    rates = block_rates(scalar_recurrences(tokens.lr, tokens.momentum, tokens.decay, grid), rows, chunk_size)
    # Contiguous: otherwise each group of blocks would copy it, forward and backward.
    q, k, v = (to_rows(grid.lay(x)).contiguous() for x in tokens[:3])
    parts = [*state.weights, *state.momentum, *(() if regular else state.anchor)]
    memory = torch.cat([x.to(q.dtype).flatten(0, 1) for x in parts], 1)
    plan = BlockPlan.of(grid.width, chunk_size, regular)
    documents = []
    if rows.start is not None:
        of_documents = F.pad(initial.flatten(0, 1), (0, 0, 0, memory.shape[1] - keys))
        documents = [row_flags(rows.start == 0, heads), of_documents]
    out, errors, before, last = solve(plan, q, k, v, rates, memory, *documents)
    # Copies: each part of a state is a tensor of its own.
    after = [x.unflatten(0, (batch, heads)).clone() for x in last.split(keys, 1)]
    surprise = None
    if with_surprise:
        surprise = grid.take(from_rows(gradient_norm([k.detach()], [errors.detach()]), heads))
    if regular:
        slot = (length - 1) % grid.width
        of_M, inner = rates.anchors[-1, :, None, slot], rates.inner[-1, :, slot, :, None]
        anchor = torch.bmm(of_M, by_part(before, len(parts))).view(len(before), keys, -1)
        after.append(torch.baddbmm(anchor, (inner * k[-1]).mT, errors[-1], alpha=-1).unflatten(0, (batch, heads)))
    position = state.position + length if cu_seqlens is None else next_position(cu_seqlens, state.position)
    W, *S, anchor = after
    return grid.take(from_rows(out, heads)), NeuralMemoryState((W,), tuple(S), (anchor,), position), surprise


def _step(
    plan: Plan,
    tokens: Tokens,
    state: NeuralMemoryState,
    initial: tuple[Tensor, ...],
    chunk_size: int,
    window: int,
    start: int | None,
    tail: Tail | None,
) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
    """One token of rows that continue, or start at ``initial``."""
    weights, momentum, anchor = ([x.to(tokens.lr.dtype) for x in part] for part in state[:3])
    if start is None:
        new = (state.position == 0)[:, None, None, None]
        weights = [torch.where(new, i, w) for i, w in zip(initial, weights, strict=True)]
        momentum = [x.masked_fill(new, 0.0) for x in momentum]
        opens = (state.position % chunk_size == 0)[:, None, None, None]
        anchor = [torch.where(opens, w, a) for w, a in zip(weights, anchor, strict=True)]
    elif start % chunk_size == 0:
        anchor = weights
    sources = Sources(tokens.k, tokens.v, tokens.weight)
    recent: tuple[Tensor, ...] = ()
    if window > 1:
        stream = _stream(tokens, state)
        recent = tuple(keep_last(x, window - 1, 1, None) for x in stream)
        if start is None:
            distance = torch.arange(window, device=state.position.device).flip(0)
            stream[2] = stream[2].masked_fill((distance > state.position[:, None])[..., None], 0.0)
        elif start < window - 1:
            stream = [x[:, window - 1 - start :] for x in stream]
        sources = Sources(*stream)
    o, weights, momentum, surprise = step(
        plan, tokens.q, sources, tokens[3:6], StepMemory(weights, momentum or None, anchor), tail
    )
    state = NeuralMemoryState(tuple(weights), tuple(momentum), tuple(anchor), state.position + 1, recent)
    return o, state, surprise


def block_size(chunk_size: int, most: int = 64) -> int:
    """The number of slots of a block. The cost of masked products grows with its square, so a long chunk is cut into
    blocks with one anchor. The result is above ``most`` if the chunk cannot be cut.
    """
    divisors = [size for size in range(16, most + 1) if chunk_size % size == 0]
    return max(divisors) if chunk_size > most and divisors else chunk_size


def _split(tensors: list[Tensor], size: int) -> list[list[Tensor]]:
    return [tensors[i : i + size] for i in range(0, len(tensors), size)]


def _fresh(tokens: Tokens, initial: tuple[Tensor, ...], window: int) -> NeuralMemoryState:
    """The state before a document's first token."""
    batch, _, heads, _ = tokens.q.shape
    momentum = () if tokens.momentum is None else tuple(torch.zeros_like(w) for w in initial)
    shapes = ((heads, tokens.k.shape[-1]), (heads, tokens.v.shape[-1]), (heads,)) if window > 1 else ()
    recent = tuple(tokens.k.new_zeros(batch, window - 1, *shape) for shape in shapes)
    return NeuralMemoryState(initial, momentum, initial, tokens.q.new_zeros(batch, dtype=torch.int64), recent)


def _sources(
    tokens: Tokens,
    chunks: ChunkedRows,
    lengths: Tensor | None,
    window: int,
    state: NeuralMemoryState,
) -> tuple[tuple[Tensor, Tensor], Tensor | None, tuple[Tensor, ...]]:
    """k and v of the tokens whose gradients act in each chunk, [N, B * H, J, ...]; their weights in the loss of each
    slot, U: [N, B * H, C, J] (None: the identity); and the window - 1 last tokens of the call.
    """
    grid, heads = chunks.grid, tokens.k.shape[2]
    if window == 1:
        k, v = (to_rows(grid.lay(x)) for x in (tokens.k, tokens.v))
        return (k, v), None, ()
    token = torch.arange(grid.length, device=tokens.k.device)
    if lengths is not None:
        # Zeros, because a mask is not enough: 0 times the content of padding may be NaN.
        padding = token >= lengths[:, None]
        hidden = padding[..., None]
        weight = None if tokens.weight is None else tokens.weight.masked_fill(hidden, 0.0)
        k, v = (x.masked_fill(hidden[..., None], 0.0) for x in (tokens.k, tokens.v))
        tokens = tokens._replace(k=k, v=v, weight=weight)
    stream = _stream(tokens, state)
    recent = tuple(keep_last(x, window - 1, grid.length, lengths) for x in stream)
    # Slots of a chunk hold successive tokens: source j of a chunk is entry ``first + j`` of the stream.
    positions = state.position[:, None] + token if chunks.positions is None else chunks.positions
    token = token.expand_as(positions)
    place = token % grid.width if grid.slots is None else grid.slots % grid.width
    first = grid.lay(token - place, fill=-grid.width).amax(-1)
    reach = torch.arange(grid.width + window - 1, device=positions.device)
    index = (first[..., None] + reach).clamp(0, stream[0].shape[1] - 1).flatten(1)
    k, v, weight = (to_rows(pick(x, index).unflatten(1, (grid.count, -1))) for x in stream)
    distance = torch.arange(grid.width, device=positions.device)[:, None] + window - 1 - reach
    # A token's distance to its document's start is its position.
    band = (distance >= 0) & (distance < window) & (distance <= grid.lay(positions)[..., None])
    return (k, v), band.movedim(1, 0).repeat_interleave(heads, 1) * weight[:, :, None], recent


def _stream(tokens: Tokens, state: NeuralMemoryState) -> list[Tensor]:
    """k, v and weight of the recent tokens, followed by those of the call."""
    new = (tokens.k, tokens.v, torch.ones_like(tokens.lr) if tokens.weight is None else tokens.weight)
    return [torch.cat([old.to(x.dtype), x], 1) for old, x in zip(state.recent, new, strict=True)]
