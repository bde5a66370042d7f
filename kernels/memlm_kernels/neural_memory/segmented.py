"""The linear neural memory over segments: many memories in a row of tokens, each written by its own tokens.

It is ``neural_memory`` with one layer, no norm and the squared error, but with a state for each segment. ``naive`` and
``blocks`` have the equations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.backend import as_autocast, pick
from memlm_kernels.checks import asks_gradient, check_tensors, in_one_type, once_a_kind
from memlm_kernels.neural_memory.block_rates import block_rates
from memlm_kernels.neural_memory.blocks import BlockPlan, block_width, in_blocks, inverse
from memlm_kernels.neural_memory.chunk import Plan, spread
from memlm_kernels.neural_memory.limits import keys_limit
from memlm_kernels.neural_memory.losses import squared_error
from memlm_kernels.neural_memory.network import ACTIVATIONS
from memlm_kernels.neural_memory.rates import scalar_recurrences
from memlm_kernels.neural_memory.reference import Tokens
from memlm_kernels.neural_memory.step import Sources, StepMemory, step
from memlm_kernels.segments import check_recurrence, chunk_width, exact, lay_out, whole_rows


class SegmentedMemoryState(NamedTuple):
    """memory: [B, S, 3, H, K, V]: M, the momentum and the anchor of each segment; 2 without momentum
    position: [B, S] int64, the number of tokens that each memory has taken so far
    """

    memory: Tensor
    position: Tensor


class SegmentedMemoryOutput(NamedTuple):
    """o: [B, T, H, V] in v's dtype, zeros at padding; state: after each segment's last token."""

    o: Tensor
    state: SegmentedMemoryState


def segmented_neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    state: SegmentedMemoryState,
    backend: str = "auto",
) -> SegmentedMemoryOutput:
    """Titans' linear memory (arXiv:2501.00663, eqs. 9-15), one for each segment::

        S_t = momentum_t S_{t-1} - lr_t k_t^T (k_t A - v_t)
        M_t = (1 - decay_t) M_{t-1} + S_t
        o_t = q_t M_t

    where the anchor A is M at the start of the token's chunk.

    q, k: [B, T, H, K]   v: [B, T, H, V]   lr, momentum, decay: [B, T, H], as in ``neural_memory``
    chunk_size: tokens of one memory whose gradients are taken at the same weights
    cu_seqlens: [B, S + 1] integers from 0 to T, as in ``linear_attention``; None: each row is one segment
    state: before each segment's first token: memory [B, S, 3, H, K, V] (M, the momentum and the anchor; without
        momentum 2, M and the anchor) and position [B, S] integers; see ``SegmentedMemoryState``

    Returns o [B, T, H, V] in v's dtype, zeros at padding, and the state after each segment's last token. Accumulates
    in fp32 (fp64 for fp64 inputs). Raises ValueError if chunk_size < 1, shapes, types or devices disagree, cu_seqlens
    are out of range, or the backend cannot run. ``naive`` derives the chunked form.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    _check_state(state, momentum)
    gates_of = {"lr": lr, "momentum": momentum, "decay": decay}
    cu_seqlens = check_recurrence(q, k, v, gates_of, cu_seqlens, state.memory[:, :, 0])
    q, k, v = as_autocast(q, k, v)
    by_triton = pick("segmented_neural_memory", backend, q, keys_limit(q), v, cu_seqlens) == "triton"
    length = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        memory, position = exact(state.memory), state.position
        if length == 0:
            return SegmentedMemoryOutput(v.clone(), SegmentedMemoryState(memory, position))
        momentum, decay = (None if x is None else exact(x) for x in (momentum, decay))
        given = v.dtype
        q, k, v = in_one_type(q, k, v) if by_triton else map(exact, (q, k, v))
        tokens = Tokens(q, k, v, exact(lr), momentum, decay, None)
        if length == 1 and cu_seqlens is None and not by_triton:
            o, memory = _one_token(tokens, memory, position % chunk_size == 0)
            return SegmentedMemoryOutput(o.to(given), SegmentedMemoryState(memory, position + 1))
        if length == 1 and cu_seqlens is None and not asks_gradient(*tokens, memory):
            from memlm_kernels.neural_memory.step_triton import of_segments

            o, last, after = of_segments(*tokens[:6], position, memory[:, 0], chunk_size)
            return SegmentedMemoryOutput(o.to(given), SegmentedMemoryState(last[:, None], after))
        if by_triton:
            from memlm_kernels.neural_memory.triton import segments_triton

            o, memory = segments_triton(tokens, chunk_size, cu_seqlens, memory, position)
            position = position + (length if cu_seqlens is None else cu_seqlens.long().diff(dim=1))
            return SegmentedMemoryOutput(o.to(given), SegmentedMemoryState(memory, position))
        if cu_seqlens is None:
            cu_seqlens = whole_rows(q)
        loop = _blocks if in_blocks(chunk_size, block_width(chunk_size, length, cu_seqlens), q) else _chunks
        o, memory = loop(tokens, chunk_size, cu_seqlens, memory, position)
        position = position + cu_seqlens.long().diff(dim=1)
        return SegmentedMemoryOutput(o.to(given), SegmentedMemoryState(memory, position))


def _chunks(
    tokens: Tokens, chunk_size: int, cu_seqlens: Tensor, memory: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """A step for each chunk, or for parts of it."""
    q, k, v, lr, momentum, decay, _ = tokens
    batch, length, heads, _ = q.shape
    # Blocks divide chunks, so no block crosses a chunk's end.
    widest = chunk_width(length, cu_seqlens, 64)
    width = max(size for size in range(1, widest + 1) if chunk_size % size == 0)
    segments = lay_out(cu_seqlens, length, width, position)
    opens = segments.opens(chunk_size)
    assert opens is not None
    rates = scalar_recurrences(lr, momentum, decay, segments.grid)
    q_c, k_c, v_c = (segments.lay(x) for x in (q, k, v))
    opens = opens.mT[:, :, None, None, None]
    C, beta, f, P, m = (None if x is None else x.unflatten(1, (batch, heads)) for x in rates.apart())
    assert C is not None and beta is not None
    # Unbound, because the gradient of an index is a tensor as large as all chunks.
    keys, values, to_W = k_c.unbind(), v_c.unbind(), (k_c * C[..., -1, :, None]).mT.unbind()
    keep, errors = beta[..., -1, None, None].unbind(), []
    of_S = None
    if f is not None and P is not None and m is not None:
        of_S = [x.unbind() for x in ((k_c * P[..., None]).mT, f[..., -1, None, None], m[..., None, None])]

    def write(n: int, memory: Tensor) -> Tensor:
        W, *S, anchor = memory.unbind(1)
        anchor = torch.where(opens[n], W, anchor)
        errors.append(keys[n] @ anchor - values[n])
        new = keep[n] * W - to_W[n] @ errors[-1]
        if of_S is None:
            return torch.stack([new, anchor], 1)
        to_S, enters, passes = (x[n] for x in of_S)
        return torch.stack([new + enters * S[0], passes * S[0] - to_S @ errors[-1], anchor], 1)

    starts, memory = segments.scan(memory, write)
    out = beta[..., None] * (q_c @ starts[:, :, 0]) - (C * (q_c @ k_c.mT)) @ torch.stack(errors)
    if f is not None:
        out = out + f[..., None] * (q_c @ starts[:, :, 1])
    return segments.take(out), memory


def _blocks(
    tokens: Tokens, chunk_size: int, cu_seqlens: Tensor, memory: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """A step for each block of chunks, see ``blocks``."""
    q, k, v, lr, momentum, decay, _ = tokens
    batch, length, heads, _ = q.shape
    segments = lay_out(cu_seqlens, length, block_width(chunk_size, length, cu_seqlens), position)
    rates = block_rates(scalar_recurrences(lr, momentum, decay, segments.grid), segments, chunk_size)
    C, inner, reads, anchors, writes, carries = (x.unflatten(1, (batch, heads)) for x in rates)
    q_c, k_c, v_c = (segments.lay(x) for x in (q, k, v))
    # Unbound, because the gradient of an index is a tensor as large as all blocks.
    X = inverse(k_c @ k_c.mT * inner, BlockPlan.of(segments.grid.width, chunk_size, False)).unbind()
    at_anchors, to_M = spread(k_c, anchors).unbind(), spread(k_c, writes).mT.unbind()
    values, carry, errors = v_c.unbind(), carries.unbind(), []

    def write(n: int, M: Tensor) -> Tensor:
        errors.append(X[n] @ (at_anchors[n] @ M - values[n]))
        return (carry[n] @ M.unflatten(2, (carries.shape[-1], -1)).flatten(3)).view_as(M) - to_M[n] @ errors[-1]

    # The parts of a head's memory are one matrix.
    starts, after = segments.scan(memory.transpose(2, 3).flatten(3, 4), write)
    entered = starts[..., : reads.shape[-1] * q.shape[-1], :]
    out = spread(q_c, reads) @ entered - (C * (q_c @ k_c.mT)) @ torch.stack(errors)
    memory = after.unflatten(3, memory.shape[2:5:2]).transpose(2, 3).contiguous()
    return segments.take(out), memory


def _one_token(tokens: Tokens, memory: Tensor, opens: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row of one segment. opens: [B, 1], whether it starts a chunk of its memory."""
    W, *S, anchor = memory[:, 0].unbind(1)
    anchor = torch.where(opens[..., None, None], W, anchor)
    plan = Plan(1, 1, ACTIVATIONS["silu"], squared_error, False)
    sources, before = Sources(tokens.k, tokens.v, None), StepMemory([W], S or None, [anchor])
    o, W_after, S_after, _ = step(plan, tokens.q, sources, tokens[3:6], before, None)
    return o, torch.stack([*W_after, *S_after, anchor], 1)[:, None]


@once_a_kind
def _check_state(state: SegmentedMemoryState, momentum: Tensor | None) -> None:
    parts = 2 if momentum is None else 3
    memory, position = state.memory, state.position
    if memory.ndim != 6 or memory.shape[2] != parts:
        raise ValueError(
            f"state.memory {list(memory.shape)} must be [B, S, {parts}, H, K, V], "
            f"{'without' if momentum is None else 'with'} momentum"
        )
    if position.shape != memory.shape[:2]:
        raise ValueError(f"state.position {list(position.shape)} must be [B, S] = {list(memory.shape[:2])}")
    check_tensors({"state.memory": memory}, {"state.position": position})
