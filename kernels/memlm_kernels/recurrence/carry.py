"""The loop that carries a state from chunk to chunk; all other work is done for all chunks at once. A chunk takes few
operations, and the backward is written by hand, because autograd's bookkeeping would take longer than the products.

N chunks, B rows, S segments of a row, H heads, Z = B * H, C slots of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.segments import ChunkedRows


def carry(
    segments: ChunkedRows, state: Tensor, U: Tensor, W: Tensor | None, writes: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The states M at the start of the chunks, and the values d that the chunks write; d depends on M if W is given::

        d = U - W M        M' = keep M + writes^T d

    state: [B, S, H, K, V], before each segment; U: [N * Z, C, V]; W, writes: [N * Z, C, K]; keep: [N * Z, 1 or K, 1],
    None: 1

    Returns M [N * Z, K, V], d, and the state after each segment.
    """
    count, (rows, _, heads) = segments.grid.count, state.shape[:3]
    opens = None if segments.enters is None else segments.enters.mT.repeat_interleave(heads, 1)[..., None, None]
    initial = segments.before_chunks(state).flatten(1, 2)
    chunks = (None if x is None else x.unflatten(0, (count, rows * heads)) for x in (U, W, writes, keep))
    M, after, d = _Carry.apply(*chunks, initial, opens)
    after = segments.after_segments(after.unflatten(1, (rows, heads)), state)
    return M.flatten(0, 1), U if d is None else d.flatten(0, 1), after


class _Carry(torch.autograd.Function):
    """The loop on tensors [N, Z, ...]. A chunk where ``opens`` is set starts with its own ``initial``. If opens is
    None, only the first chunk does, and only the state after the last chunk is returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        U: Tensor,
        W: Tensor | None,
        writes: Tensor,
        keep: Tensor | None,
        initial: Tensor,
        opens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        M, after = _before_and_after(initial, len(U), opens)
        d = U if W is None else torch.empty_like(U, memory_format=torch.contiguous_format)
        M_n, after_n, d_n, to_memory_n = (x.unbind() for x in (M, after, d, writes.mT))
        U_n, W_n, keep_n, opens_n = (() if x is None else x.unbind() for x in (U, W, keep, opens))
        initial_n = initial.unbind()
        M_n[0].copy_(initial_n[0])
        for n in range(len(U)):
            if opens_n and n:
                torch.where(opens_n[n], initial_n[n], after_n[n - 1], out=M_n[n])
            if W is not None:
                torch.baddbmm(U_n[n], W_n[n], M_n[n], alpha=-1, out=d_n[n])
            if keep is None:
                torch.baddbmm(M_n[n], to_memory_n[n], d_n[n], out=after_n[n])
            else:
                torch.mul(M_n[n], keep_n[n], out=after_n[n]).baddbmm_(to_memory_n[n], d_n[n])
        ctx.save_for_backward(W, writes, keep, opens, M, d)
        # A copy: a view would keep the states of all chunks.
        return M, after[-1:].clone() if opens is None else after, None if W is None else d

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, of_M: Tensor, of_after: Tensor, of_d: Tensor | None) -> tuple[Tensor | None, ...]:
        W, writes, keep, opens, M, d = ctx.saved_tensors
        count, goes_on_n = len(M), () if opens is None else (~opens).to(M.dtype).unbind()
        d_M, d_after = _before_and_after(of_M, count, opens)
        d_M_n, d_after_n = d_M.unbind(), d_after.unbind()
        of_after_n = of_after.unbind()
        d_after_n[-1].copy_(of_after_n[-1])
        of_M_n, writes_n, keep_n = (() if x is None else x.unbind() for x in (of_M, writes, keep))
        if W is not None and of_d is not None:
            d_d, to_M_n, of_d_n = torch.empty_like(d), W.mT.unbind(), of_d.unbind()
            d_d_n = d_d.unbind()
        for n in reversed(range(count)):
            if goes_on_n and n + 1 < count:
                torch.addcmul(of_after_n[n], d_M_n[n + 1], goes_on_n[n + 1], out=d_after_n[n])
            if keep is None:
                torch.add(of_M_n[n], d_after_n[n], out=d_M_n[n])
            else:
                torch.addcmul(of_M_n[n], d_after_n[n], keep_n[n], out=d_M_n[n])
            if W is not None:
                torch.baddbmm(of_d_n[n], writes_n[n], d_after_n[n], out=d_d_n[n])
                d_M_n[n].baddbmm_(to_M_n[n], d_d_n[n], alpha=-1)
        of_chunks = d_after.flatten(0, 1)
        if W is None:
            d_d, d_W = torch.bmm(writes.flatten(0, 1), of_chunks).view(d.shape), None
        else:
            d_W = torch.bmm(d_d.flatten(0, 1), M.flatten(0, 1).mT).neg_().view(W.shape)
        d_writes = torch.bmm(d.flatten(0, 1), of_chunks.mT).view(writes.shape)
        d_keep = None
        if keep is not None:
            d_keep = torch.linalg.vecdot(d_after, M)[..., None]
            d_keep = d_keep if keep.shape[2] > 1 else d_keep.sum(2, keepdim=True)
        return d_d, d_W, d_writes, d_keep, d_M[:1] if opens is None else d_M.masked_fill(~opens, 0.0), None


def _before_and_after(like: Tensor, count: int, opens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Buffers for the states before and after each chunk. They overlap unless some chunks open a segment: the state
    after a chunk is then the one before the next.
    """
    if opens is None:
        states = like.new_empty(count + 1, *like.shape[1:])
        return states[:-1], states[1:]
    return torch.empty_like(like), torch.empty_like(like)
