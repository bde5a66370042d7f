"""The linear neural memory over segments: many memories in a row of tokens, each written by its own tokens.

As ``neural_memory`` with one layer, no norm and the squared error, except for who holds the states; see there, and
``reference`` for the equations.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.backend import as_autocast, choose, with_triton
from memlm_kernels.neural_memory import keys_limit, most_slots
from memlm_kernels.neural_memory.reference import Tokens, block_size, scalar_recurrences
from memlm_kernels.segments import check_recurrence, chunk_width, exact, lay_out


class SegmentedMemoryState(NamedTuple):
    """memory: [B, S, 3, H, K, V], M, the momentum and the anchor of each segment; 2 without momentum
    position: [B, S] int64, tokens that each memory has written
    """

    memory: Tensor
    position: Tensor


def segmented_neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    *,
    chunk_size: int,
    state: SegmentedMemoryState,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SegmentedMemoryState]:
    """Titans' linear memory (arXiv:2501.00663, eqs. 9-15), one for each segment.

    q, k: [B, T, H, K]   v: [B, T, H, V]   lr, momentum, decay: [B, T, H], as for ``neural_memory``
    chunk_size: tokens of one memory whose gradients are taken at the same weights
    cu_seqlens: [B, S + 1] integers, 0 first; segment s of row b is its tokens cu_seqlens[b, s:s + 2], end excluded;
        what lies behind the last is padding. None: each row is one segment
    state: before each segment's first token

    Returns o [B, T, H, V] in v's dtype, zeros at padding, and the state after each segment's last token.
    """
    check_recurrence(q, k, v, cu_seqlens, state.memory[:, :, 0])
    for name, gate in (("lr", lr), ("momentum", momentum), ("decay", decay)):
        if gate is not None and gate.shape != q.shape[:3]:
            raise ValueError(f"{name} {list(gate.shape)} must be [B, T, H] = {list(q.shape[:3])}")
    q, k, v = as_autocast(q, k, v)
    by_triton = choose("segmented_neural_memory", backend, *with_triton(q, keys_limit(q))) == "triton"
    batch, length, heads, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        memory, position = exact(state.memory), state.position
        if length == 0:
            return torch.zeros_like(v), SegmentedMemoryState(memory, position)
        momentum, decay = (None if x is None else exact(x) for x in (momentum, decay))
        given, dtype = v.dtype, torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = (x.to(dtype) if by_triton else exact(x) for x in (q, k, v))
        tokens = Tokens(q, k, v, exact(lr), momentum, decay, None)
        if cu_seqlens is None:
            cu_seqlens = position.new_tensor([0, length]).expand(batch, 2)
        # Blocks divide chunks, so that none reaches over a chunk's end.
        most = most_slots(q, 1) if by_triton else 64
        width = math.gcd(block_size(chunk_size, most), chunk_width(length, cu_seqlens, most))
        segments = lay_out(cu_seqlens, length, width, position % width)
        assert segments.segment is not None and segments.index is not None
        block = (position // width).gather(1, segments.segment) + segments.index
        inside = (segments.index == 0) & ((position % width).gather(1, segments.segment) > 0)
        opens = (block % (chunk_size // width) == 0) & ~inside
        gates = scalar_recurrences(tokens, segments.grid, None)
        q_c, k_c, v_c = (segments.lay(x) for x in (q, k, v))
        position = position + cu_seqlens.long().diff(dim=1)
        if by_triton:
            from memlm_kernels.neural_memory.triton import segments_triton

            out, memory = segments_triton((q_c, k_c, v_c), gates, opens, segments, memory)
            return segments.take(out).to(given), SegmentedMemoryState(memory, position)
        opens = opens.mT.reshape(-1, batch, 1, 1, 1)
        C, beta = (x.unflatten(1, (batch, heads)) for x in (gates.C, gates.beta))
        f, P, m = (x.unflatten(1, (batch, heads)) for x in gates.momentum) if gates.momentum else (None, None, None)
        # Unbound, for the gradient of an index is a tensor as large as all chunks.
        keys, values, to_W = k_c.unbind(), v_c.unbind(), (k_c * C[..., -1, :, None]).mT.unbind()
        keep, errors = beta[..., -1, None, None].unbind(), []
        of_S = None
        if f is not None and P is not None and m is not None:
            of_S = [x.unbind() for x in ((k_c * P[..., None]).mT, f[..., -1, None, None], m[..., None, None])]

        def step(n: int, memory: Tensor) -> Tensor:
            W, *S, anchor = memory.unbind(1)
            anchor = torch.where(opens[n], W, anchor)
            errors.append(keys[n] @ anchor - values[n])
            new = keep[n] * W - to_W[n] @ errors[-1]
            if of_S is None:
                return torch.stack([new, anchor], 1)
            to_S, enters, momentum = (x[n] for x in of_S)
            return torch.stack([new + enters * S[0], momentum * S[0] - to_S @ errors[-1], anchor], 1)

        starts, memory = segments.scan(memory, step)
        out = beta[..., None] * (q_c @ starts[:, :, 0]) - (C * (q_c @ k_c.mT)) @ torch.stack(errors)
        if f is not None:
            out = out + f[..., None] * (q_c @ starts[:, :, 1])
        return segments.take(out).to(given), SegmentedMemoryState(memory, position)
