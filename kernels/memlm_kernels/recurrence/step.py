"""A few tokens without gradients, one after the other: a decode step reads and writes each state once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.checks import asks_gradient
from memlm_kernels.launch import at_least_16, cdiv, laid, load_tile, part_of, segment_span, store_tile, tiled
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import segments_of

# Above this number of tokens, chunks are faster.
MOST = 16


@tiled([{"BV": 16, "num_warps": 4, "num_stages": 1}, {"BV": 32, "num_warps": 8, "num_stages": 1}])
@triton.jit(do_not_specialize=["T", "S"])
def tokens_forward(
    q,
    k,
    v,
    beta,
    log_decay,
    cu,
    initial,
    o,
    d,
    final,
    T,
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Carry some columns of a segment's state from token to token; beta: None for linear attention; d: None, or the
    written values.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, s, row = part_of(program, tiles, H, S)
    i_k, i_v = tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    begin, end, _n = segment_span(cu, None, row, s, S, T)
    at = ((row * S + s) * H + h) * K
    b_state = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        b_state += load_tile(initial, at, i_k, i_v, i_k < K, V)
    for t in range(begin, end):
        base = (row * T + t) * H + h
        b_q = tl.load(q + base * K + i_k, mask=i_k < K, other=0.0).to(tl.float32)
        b_k = tl.load(k + base * K + i_k, mask=i_k < K, other=0.0).to(tl.float32)
        b_v = tl.load(v + base * V + i_v, mask=i_v < V, other=0.0).to(tl.float32)
        if log_decay is not None:
            if CHANNELS:
                b_g = tl.load(log_decay + base * K + i_k, mask=i_k < K, other=0.0).to(tl.float32)
                b_state *= tl.exp(b_g)[:, None]
            else:
                b_state *= tl.exp(tl.load(log_decay + base).to(tl.float32))
        if beta is not None:
            b_v = (b_v - tl.sum(b_k[:, None] * b_state, 0)) * tl.load(beta + base).to(tl.float32)
        if d is not None:
            tl.store(d + base * V + i_v, b_v.to(d.dtype.element_ty), mask=i_v < V)
        b_state += b_k[:, None] * b_v[None, :]
        b_o = tl.sum(b_q[:, None] * b_state, 0)
        tl.store(o + base * V + i_v, b_o.to(o.dtype.element_ty), mask=i_v < V)
    store_tile(final, b_state, at, i_k, i_v, i_k < K, V)


@kernel_op("recurrence_step")
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    told: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the state after each segment, and the written values [B, T, H, V], empty unless ``told``; not
    differentiable.
    """
    q, k, v, beta, log_decay, cu_seqlens, state = laid(q, k, v, beta, log_decay, cu_seqlens, state)
    batch, length, heads, keys = q.shape
    values, segments = v.shape[-1], segments_of(cu_seqlens)
    make = torch.empty_like if cu_seqlens is None else torch.zeros_like
    o, d = make(v), make(v, dtype=torch.float32) if told else None
    final = q.new_empty(batch, segments, heads, keys, values, dtype=torch.float32)
    tokens_forward(
        lambda tiles: batch * segments * heads * cdiv(values, tiles["BV"]),
        {"BV": at_least_16(values)},
        **{"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "cu": cu_seqlens, "initial": state},
        **{"o": o, "d": d, "final": final, "T": length, "S": segments, "H": heads, "K": keys, "V": values},
        **{"CHANNELS": log_decay is not None and log_decay.ndim == 4, "BK": at_least_16(keys)},
    )
    return o, final, q.new_empty(0) if d is None else d


@step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    told: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    final = q.new_empty(len(q), segments_of(cu_seqlens), *q.shape[2:], v.shape[-1], dtype=torch.float32)
    return v.new_empty(v.shape), final, v.new_empty(v.shape if told else 0, dtype=torch.float32)


@register_flop_formula(torch.ops.memlm.recurrence_step)
def _flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], beta: tuple[int, ...] | None, *_: Any, **__: Any
) -> int:
    return 2 * (2 if beta is None else 3) * q[0] * q[1] * q[2] * q[3] * v[-1]


def is_step(*tensors: Tensor | None) -> bool:
    """Whether a call is short and needs no gradient; the first tensor is q."""
    q = tensors[0]
    assert q is not None
    return q.shape[1] <= MOST and q.shape[-1] <= 256 and not asks_gradient(*tensors)
