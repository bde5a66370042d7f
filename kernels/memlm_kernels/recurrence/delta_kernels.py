"""The parts of ``delta_reference``'s chunked form in Triton that ``linear_kernels`` does not have.

With Y = (I + A)^-1 for each chunk, U = Y (beta v) and W = Y (beta exp(g) k), a chunk's corrections are d = U - W M.
Its reads and writes are those of linear attention with d in place of v. Backward needs no gradient of Y: the gradient
of A is -(Y^T dU) U^T - (Y^T dW) W^T below the diagonal.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import (
    chunk_span,
    decay_behind,
    decay_between,
    invert,
    load_tile,
    part_of,
    segment_span,
    store_tile,
    tiled,
)

_SIZES = ["T", "N", "S"]


@tiled(
    [{"BK": 64, "num_warps": 4, "num_stages": 2}, {"BK": 64, "num_warps": 8, "num_stages": 1}],
    [{"BK": 32, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def inverses(
    k,
    beta,
    log_decay,
    pairs,
    chunks,
    Y,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Y: [B, N, H, BT, BT]; pairs: alike, k k^T with a decay per channel, or None"""
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_A = tl.zeros([BT, BT], tl.float32)
    if pairs is not None:
        b_A += load_tile(pairs, program * BT, i_t, i_t, i_t < BT, BT)
    else:
        for i in range((K + BK - 1) // BK):
            b_k = load_tile(k, base, rows, i * BK + tl.arange(0, BK), inside, K)
            b_A += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_A *= tl.load(beta + base + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    if log_decay is not None:
        b_A *= decay_between(tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32), BT)
    b_A = tl.where(i_t[:, None] > i_t[None, :], b_A, 0.0)
    store_tile(Y, invert(b_A, BT, PRECISION), program * BT, i_t, i_t, i_t < BT, BT)


@tiled(
    [{"BX": 64, "num_warps": 4, "num_stages": 1}, {"BX": 64, "num_warps": 8, "num_stages": 1}],
    [{"BX": 64, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def solutions(
    x,
    beta,
    log_decay,
    chunks,
    Y,
    out,
    T,
    N,
    H: tl.constexpr,
    X: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BX: tl.constexpr,
):
    """out = Y (beta exp(g) x), some columns; log_decay: None for Y (beta x)."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (X + BX - 1) // BX
    tile, h, n, row = part_of(program, tiles, H, N)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    i_t, i_x = tl.arange(0, BT), (tile * BX).to(tl.int32) + tl.arange(0, BX)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_weight = tl.load(beta + base + rows, mask=inside, other=0.0).to(tl.float32)
    if log_decay is not None:
        b_weight *= tl.exp(tl.cumsum(tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32), 0))
    b_x = load_tile(x, base, rows, i_x, inside, X)
    b_x = (b_x * b_weight[:, None]).to(b_x.dtype)
    b_Y = load_tile(Y, ((row * N + n) * H + h) * BT, i_t, i_t, i_t < BT, BT)
    store_tile(out, tl.dot(b_Y, b_x, input_precision=PRECISION), base, rows, i_x, inside, X)


@tiled(
    [{"BV": 32, "num_warps": 4, "num_stages": 2}, {"BV": 16, "num_warps": 4, "num_stages": 1}],
    [{"BV": 32, "num_warps": 4, "num_stages": 1}, {"BV": 16, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def delta_states_forward(
    k,
    W,
    U,
    log_decay,
    kept,
    cu,
    first,
    initial,
    states,
    final,
    d,
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
    """Some columns of a segment's state, from chunk to chunk, and the corrections d: [B, T, H, V].

    With a decay per channel, k already has it, and ``kept`` has the share of the state that a chunk keeps.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, s, row = part_of(program, tiles, H, S)
    i_k, i_v = tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
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
        b_W = load_tile(W, base, rows, i_k, inside, K)
        b_k = load_tile(k, base, rows, i_k, inside, K)
        b_d = load_tile(U, base, rows, i_v, inside, V).to(tl.float32)
        b_d -= tl.dot(b_W, b_state.to(b_W.dtype), input_precision=PRECISION)
        store_tile(d, b_d, base, rows, i_v, inside, V)
        if kept is not None:
            b_state *= tl.load(kept + ((row * N + n + i) * H + h) * K + i_k, mask=i_k < K, other=0.0)[:, None]
        elif log_decay is not None:
            b_keep = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
            b_d *= tl.exp(decay_behind(log_decay, base, begin + i * BT, end, H, BT))[:, None]
            b_state *= tl.exp(tl.sum(b_keep))
        b_state += tl.dot(tl.trans(b_k), b_d.to(b_k.dtype), input_precision=PRECISION)
    store_tile(final, b_state, at * K, i_k, i_v, i_k < K, V)


@tiled(
    [{"BV": 16, "num_warps": 8, "num_stages": 2}],
    [{"BV": 32, "num_warps": 4, "num_stages": 1}, {"BV": 16, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def delta_states_backward(
    q,
    k,
    W,
    log_decay,
    kept,
    cu,
    first,
    d_o,
    d_final,
    d_states,
    d_initial,
    d_local,
    d_d,
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
    """Gradients of some columns of the states that chunks end with, and of d.

    d_local: the gradient of d through its own chunk's reads; d_d: all of it; kept: as in forward, q and k then have
    their decays
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, s, row = part_of(program, tiles, H, S)
    i_k, i_v = tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
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
        b_k = load_tile(k, base, rows, i_k, inside, K)
        b_o = load_tile(d_o, base, rows, i_v, inside, V)
        b_d = tl.dot(b_k, b_state.to(b_k.dtype), input_precision=PRECISION)
        if kept is not None:
            b_state *= tl.load(kept + ((row * N + n + i) * H + h) * K + i_k, mask=i_k < K, other=0.0)[:, None]
        elif log_decay is not None:
            b_g = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
            b_d *= tl.exp(decay_behind(log_decay, base, begin + i * BT, end, H, BT))[:, None]
            b_state *= tl.exp(tl.sum(b_g))
            b_o = (b_o * tl.exp(tl.cumsum(b_g, 0))[:, None]).to(b_k.dtype)
        b_d += load_tile(d_local, base, rows, i_v, inside, V)
        store_tile(d_d, b_d, base, rows, i_v, inside, V)
        b_q = load_tile(q, base, rows, i_k, inside, K)
        b_state += tl.dot(tl.trans(b_q), b_o, input_precision=PRECISION)
        b_W = load_tile(W, base, rows, i_k, inside, K)
        b_state -= tl.dot(tl.trans(b_W), b_d.to(b_W.dtype), input_precision=PRECISION)
    store_tile(d_initial, b_state, at * K, i_k, i_v, i_k < K, V)


@tiled(
    [{"BK": 16, "BV": 32, "num_warps": 4, "num_stages": 2}, {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 1}],
    [{"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def solutions_backward(
    k,
    v,
    beta,
    log_decay,
    pairs,
    chunks,
    Y,
    W,
    U,
    states,
    d_d,
    d_k,
    d_v,
    d_beta,
    d_decay,
    d_pairs,
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
    """Gradients of the inputs of a chunk's U and W, from those of d = U - W M.

    d_k: through beta exp(g) k alone; d_decay: through U and W; d_pairs: [B, N, H, BT, BT], of the products k k^T
    pairs: as in ``inverses``; k then has its decays from the chunk's start on, and log_decay is None
    """
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_beta = tl.load(beta + base + rows, mask=inside, other=0.0).to(tl.float32)
    b_weight = b_beta
    if log_decay is not None:
        b_g = tl.load(log_decay + base + rows, mask=inside, other=0.0).to(tl.float32)
        b_weight *= tl.exp(tl.cumsum(b_g, 0))
    b_Yt = tl.trans(load_tile(Y, program * BT, i_t, i_t, i_t < BT, BT))
    b_dA = tl.zeros([BT, BT], tl.float32)
    b_of_v = tl.zeros([BT], tl.float32)
    b_of_k = tl.zeros([BT], tl.float32)
    for i in range((V + BV - 1) // BV):
        i_v = i * BV + tl.arange(0, BV)
        b_P = tl.dot(b_Yt, load_tile(d_d, base, rows, i_v, inside, V), input_precision=PRECISION)
        b_U = load_tile(U, base, rows, i_v, inside, V)
        b_dA -= tl.dot(b_P.to(b_U.dtype), tl.trans(b_U), input_precision=PRECISION)
        b_of_v += tl.sum(b_P * load_tile(v, base, rows, i_v, inside, V), 1)
        store_tile(d_v, b_P * b_beta[:, None], base, rows, i_v, inside, V)
    for j in range((K + BK - 1) // BK):
        i_k = j * BK + tl.arange(0, BK)
        b_k = load_tile(k, base, rows, i_k, inside, K)
        b_dW = tl.zeros([BT, BK], tl.float32)
        for i in range((V + BV - 1) // BV):
            i_v = i * BV + tl.arange(0, BV)
            b_state = load_tile(states, program * K, i_k, i_v, i_k < K, V)
            b_dW -= tl.dot(load_tile(d_d, base, rows, i_v, inside, V), tl.trans(b_state), input_precision=PRECISION)
        b_P = tl.dot(b_Yt, b_dW.to(b_k.dtype), input_precision=PRECISION)
        b_W = load_tile(W, base, rows, i_k, inside, K)
        b_dA -= tl.dot(b_P.to(b_W.dtype), tl.trans(b_W), input_precision=PRECISION)
        b_of_k += tl.sum(b_P * b_k, 1)
        store_tile(d_k, b_P * b_weight[:, None], base, rows, i_k, inside, K)
    # Not above, where registers are short.
    b_pairs = tl.zeros([BT, BT], tl.float32)
    if pairs is not None:
        b_pairs += load_tile(pairs, program * BT, i_t, i_t, i_t < BT, BT)
    else:
        for j in range((K + BK - 1) // BK):
            b_k = load_tile(k, base, rows, j * BK + tl.arange(0, BK), inside, K)
            b_pairs += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_dA = tl.where(i_t[:, None] > i_t[None, :], b_dA, 0.0)
    if log_decay is not None:
        b_dA *= decay_between(b_g, BT)
    b_of_A = tl.sum(b_dA * b_pairs, 1)
    if log_decay is not None:
        b_up_to = b_of_A * b_beta - tl.sum(b_dA * b_pairs * b_beta[:, None], 0) + b_of_k * b_weight
        tl.store(d_decay + base + rows, tl.cumsum(b_up_to, 0, reverse=True), mask=inside)
        b_of_k *= tl.exp(tl.cumsum(b_g, 0))
    tl.store(d_beta + base + rows, b_of_v + b_of_k + b_of_A, mask=inside)
    store_tile(d_pairs, b_dA * b_beta[:, None], program * BT, i_t, i_t, i_t < BT, BT)


@tiled(
    [{"BK": 64, "num_warps": 4, "num_stages": 1}, {"BK": 64, "num_warps": 8, "num_stages": 1}],
    [{"BK": 64, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def pairs_backward(
    k,
    chunks,
    d_pairs,
    of_reads,
    of_solutions,
    d_k,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums the gradient of some channels of k: through k k^T, and the parts ``of_reads`` and ``of_solutions``."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (K + BK - 1) // BK
    tile, h, n, row = part_of(program, tiles, H, N)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    i_t, i_k = tl.arange(0, BT), (tile * BK).to(tl.int32) + tl.arange(0, BK)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_k = load_tile(k, base, rows, i_k, inside, K)
    b_pairs = load_tile(d_pairs, ((row * N + n) * H + h) * BT, i_t, i_t, i_t < BT, BT)
    b_pairs = (b_pairs + tl.trans(b_pairs)).to(b_k.dtype)
    b_dk = tl.dot(b_pairs, b_k, input_precision=PRECISION)
    b_dk += load_tile(of_reads, base, rows, i_k, inside, K) + load_tile(of_solutions, base, rows, i_k, inside, K)
    store_tile(d_k, b_dk, base, rows, i_k, inside, K)
