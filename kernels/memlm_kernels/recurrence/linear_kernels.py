"""The chunked form of ``linear_reference`` in Triton; ``channel_kernels`` has the parts for a decay of each channel.

Forward has two passes: first, along each segment, the states before its chunks; then all chunks at once. Backward is
the reverse: first, along each segment, the gradients of the states after its chunks; then all chunks at once. States
between chunks are kept for backward in the type of q, in which products take them; the states after segments are fp32.
``delta_rule`` uses these kernels too, with its corrections in place of v.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import (
    chunk_span,
    decay_behind,
    decay_between,
    load_tile,
    lower,
    part_of,
    segment_span,
    store_tile,
    tiled,
)

_SIZES = ["B", "T", "N", "S"]
_WIDE = [
    {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
    {"BK": 64, "BV": 32, "num_warps": 8, "num_stages": 2},
    {"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1},
]
_WIDE_HIP = [
    {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 1},
    {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},
]
# Sixteen tiles are alive at once: larger ones would spill.
_NARROW = [
    {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2},
    {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},
]
# Each tile of keys reads v and d_o again; elsewhere wider ones spill.
_NARROW_90 = [{"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2}, *_NARROW]
_NARROW_HIP = [{"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}]


@tiled(_WIDE, _WIDE_HIP)
@triton.jit(do_not_specialize=_SIZES)
def states_forward(
    k,
    v,
    log_decay,
    kept,
    cu,
    first,
    initial,
    states,
    final,
    T,
    N,
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """A tile of a segment's state, from chunk to chunk; states: [B, N, H, K, V], final: [B, S, H, K, V].

    With a decay per channel, k already has it, and ``kept`` has the share of the state that a chunk keeps.
    """
    program = tl.program_id(0).to(tl.int64)
    across: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = (K + BK - 1) // BK * across
    tile, h, s, row = part_of(program, tiles, H, S)
    i_k, i_v = (
        (tile // across * BK).to(tl.int32) + tl.arange(0, BK),
        (tile % across * BV).to(tl.int32) + tl.arange(0, BV),
    )
    begin, end, n = segment_span(cu, first, row, s, S, T)
    at = (row * S + s) * H + h
    b_state = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        b_state += load_tile(initial, at * K, i_k, i_v, i_k < K, V)
    for i in range(tl.cdiv(end - begin, BT)):
        t = begin + i * BT + tl.arange(0, BT)
        inside = t < end
        base, rows = (row * T + begin + i * BT) * H + h, tl.arange(0, BT) * H
        store_tile(states, b_state, ((row * N + n + i) * H + h) * K, i_k, i_v, i_k < K, V)
        b_k = load_tile(k, base, rows, i_k, inside, K)
        b_v = load_tile(v, base, rows, i_v, inside, V)
        if kept is not None:
            b_state *= tl.load(kept + ((row * N + n + i) * H + h) * K + i_k, mask=i_k < K, other=0.0)[:, None]
        elif log_decay is not None:
            b_after = decay_behind(log_decay, base, begin + i * BT, end, H, BT)
            b_keep = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
            b_k = (b_k * tl.exp(b_after)[:, None]).to(b_v.dtype)
            b_state *= tl.exp(tl.sum(b_keep))
        b_state += tl.dot(tl.trans(b_k), b_v, input_precision=PRECISION)
    store_tile(final, b_state, at * K, i_k, i_v, i_k < K, V)


@tiled(_WIDE, _WIDE_HIP)
@triton.jit(do_not_specialize=_SIZES)
def outputs_forward(
    q,
    k,
    v,
    log_decay,
    scores,
    chunks,
    states,
    o,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Some value channels of a chunk's reads; scores: [B, N, H, BT, BT] with a decay per channel, which q then has."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, n, row = part_of(program, tiles, H, N)
    i_v = (tile * BV).to(tl.int32) + tl.arange(0, BV)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    t = start + tl.arange(0, BT)
    inside = t < end
    base, rows = (row * T + start) * H + h, tl.arange(0, BT) * H
    at = (row * N + n) * H + h
    b_o = tl.zeros([BT, BV], tl.float32)
    b_scores = tl.zeros([BT, BT], tl.float32)
    for i in range((K + BK - 1) // BK):
        i_k = i * BK + tl.arange(0, BK)
        b_q = load_tile(q, base, rows, i_k, inside, K)
        if scores is None:
            b_k = load_tile(k, base, rows, i_k, inside, K)
            b_scores += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_state = load_tile(states, at * K, i_k, i_v, i_k < K, V)
        b_o += tl.dot(b_q, b_state, input_precision=PRECISION)
    if scores is not None:
        i_t = tl.arange(0, BT)
        b_scores += load_tile(scores, at * BT, i_t, i_t, i_t < BT, BT)
    elif log_decay is not None:
        b_g = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
        b_o *= tl.exp(tl.cumsum(b_g, 0))[:, None]
        b_scores *= decay_between(b_g, BT)
    else:
        b_scores *= lower(BT)
    b_v = load_tile(v, base, rows, i_v, inside, V)
    b_o += tl.dot(b_scores.to(b_v.dtype), b_v, input_precision=PRECISION)
    store_tile(o, b_o, base, rows, i_v, inside, V)


@tiled(_WIDE, _WIDE_HIP)
@triton.jit(do_not_specialize=_SIZES)
def states_backward(
    q,
    d_o,
    log_decay,
    kept,
    cu,
    first,
    d_final,
    d_states,
    d_initial,
    T,
    N,
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of a tile of the states after the chunks, from the last to the first; q and ``kept`` as in forward."""
    program = tl.program_id(0).to(tl.int64)
    across: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = (K + BK - 1) // BK * across
    tile, h, s, row = part_of(program, tiles, H, S)
    i_k, i_v = (
        (tile // across * BK).to(tl.int32) + tl.arange(0, BK),
        (tile % across * BV).to(tl.int32) + tl.arange(0, BV),
    )
    begin, end, n = segment_span(cu, first, row, s, S, T)
    at = (row * S + s) * H + h
    b_state = tl.zeros([BK, BV], tl.float32)
    if d_final is not None:
        b_state += load_tile(d_final, at * K, i_k, i_v, i_k < K, V)
    count = tl.cdiv(end - begin, BT)
    for back in range(count):
        i = count - 1 - back
        t = begin + i * BT + tl.arange(0, BT)
        inside = t < end
        base, rows = (row * T + begin + i * BT) * H + h, tl.arange(0, BT) * H
        store_tile(d_states, b_state, ((row * N + n + i) * H + h) * K, i_k, i_v, i_k < K, V)
        b_q = load_tile(q, base, rows, i_k, inside, K)
        b_o = load_tile(d_o, base, rows, i_v, inside, V)
        if kept is not None:
            b_state *= tl.load(kept + ((row * N + n + i) * H + h) * K + i_k, mask=i_k < K, other=0.0)[:, None]
        elif log_decay is not None:
            b_g = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
            b_q = (b_q * tl.exp(tl.cumsum(b_g, 0))[:, None]).to(b_o.dtype)
            b_state *= tl.exp(tl.sum(b_g))
        b_state += tl.dot(tl.trans(b_q), b_o, input_precision=PRECISION)
    store_tile(d_initial, b_state, at * K, i_k, i_v, i_k < K, V)


@tiled(_WIDE, _WIDE_HIP)
@triton.jit(do_not_specialize=_SIZES)
def values_backward(
    q,
    k,
    log_decay,
    scores,
    chunks,
    d_o,
    d_states,
    d_v,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of some value channels of a chunk; d_states: None leaves out the part through the state.

    scores: as in forward; k then has the decays behind it
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, n, row = part_of(program, tiles, H, N)
    i_v = (tile * BV).to(tl.int32) + tl.arange(0, BV)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    t = start + tl.arange(0, BT)
    inside = t < end
    base, rows = (row * T + start) * H + h, tl.arange(0, BT) * H
    at = (row * N + n) * H + h
    b_v = tl.zeros([BT, BV], tl.float32)
    b_scores = tl.zeros([BT, BT], tl.float32)
    for i in range((K + BK - 1) // BK):
        i_k = i * BK + tl.arange(0, BK)
        b_k = load_tile(k, base, rows, i_k, inside, K)
        if scores is None:
            b_q = load_tile(q, base, rows, i_k, inside, K)
            b_scores += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if d_states is not None:
            b_state = load_tile(d_states, at * K, i_k, i_v, i_k < K, V)
            b_v += tl.dot(b_k, b_state, input_precision=PRECISION)
    if scores is not None:
        i_t = tl.arange(0, BT)
        b_scores += load_tile(scores, at * BT, i_t, i_t, i_t < BT, BT)
    elif log_decay is not None:
        b_g = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
        b_scores *= decay_between(b_g, BT)
        b_v *= tl.exp(decay_behind(log_decay, base, start, end, H, BT))[:, None]
    else:
        b_scores *= lower(BT)
    b_o = load_tile(d_o, base, rows, i_v, inside, V)
    b_v += tl.dot(tl.trans(b_scores).to(b_o.dtype), b_o, input_precision=PRECISION)
    store_tile(d_v, b_v, base, rows, i_v, inside, V)


@tiled(_NARROW, _NARROW_HIP, sm_90=_NARROW_90)
@triton.jit(do_not_specialize=_SIZES)
def keys_backward(
    q,
    k,
    v,
    log_decay,
    chunks,
    states,
    d_o,
    d_states,
    d_q,
    d_k,
    d_decay,
    B,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of some channels of a chunk's q and k, and the part of the decay's gradient from these channels.

    d_decay: [K tiles, B, T, H]
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (K + BK - 1) // BK
    tile, h, n, row = part_of(program, tiles, H, N)
    i_k = (tile * BK).to(tl.int32) + tl.arange(0, BK)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    t = start + tl.arange(0, BT)
    inside = t < end
    base, rows = (row * T + start) * H + h, tl.arange(0, BT) * H
    at = (row * N + n) * H + h
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_scores = tl.zeros([BT, BT], tl.float32)
    b_kept = tl.zeros([BK], tl.float32)
    for i in range((V + BV - 1) // BV):
        i_v = i * BV + tl.arange(0, BV)
        b_v = load_tile(v, base, rows, i_v, inside, V)
        b_o = load_tile(d_o, base, rows, i_v, inside, V)
        b_state = load_tile(states, at * K, i_k, i_v, i_k < K, V)
        b_dstate = load_tile(d_states, at * K, i_k, i_v, i_k < K, V)
        b_scores += tl.dot(b_o, tl.trans(b_v), input_precision=PRECISION)
        b_dq += tl.dot(b_o, tl.trans(b_state), input_precision=PRECISION)
        b_dk += tl.dot(b_v, tl.trans(b_dstate), input_precision=PRECISION)
        if log_decay is not None:
            b_kept += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1)
    if log_decay is not None:
        b_g = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
        b_scores *= decay_between(b_g, BT)
        b_dq *= tl.exp(tl.cumsum(b_g, 0))[:, None]
        b_dk *= tl.exp(decay_behind(log_decay, base, start, end, H, BT))[:, None]
    else:
        b_scores *= lower(BT)
    # Not above, where registers are short.
    b_q, b_k = load_tile(q, base, rows, i_k, inside, K), load_tile(k, base, rows, i_k, inside, K)
    if log_decay is not None:
        # The decays of a score (i, j) are those of j < l <= i, of a read of the state those up to the token, of a
        # write those behind it, and of the kept state all of them.
        b_pairs = b_scores * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_up_to = tl.sum(b_pairs, 1) - tl.sum(b_pairs, 0) + tl.sum(b_dq * b_q, 1)
        b_behind = tl.sum(b_dk * b_k, 1)
        b_g = (
            tl.cumsum(b_up_to, 0, reverse=True)
            + tl.cumsum(b_behind, 0)
            - b_behind
            + (tl.sum(b_kept) * tl.exp(tl.sum(b_g)))
        )
        tl.store(d_decay + tile * B * T * H + base + rows, b_g, mask=inside)
    b_scores = b_scores.to(b_k.dtype)
    b_dq += tl.dot(b_scores, b_k, input_precision=PRECISION)
    b_dk += tl.dot(tl.trans(b_scores), b_q, input_precision=PRECISION)
    store_tile(d_q, b_dq, base, rows, i_k, inside, K)
    store_tile(d_k, b_dk, base, rows, i_k, inside, K)
