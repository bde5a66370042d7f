"""The gradients of ``block_kernels``, in Triton. With D the gradient of d, and g that of V - beta_a K W - f_a K S::

    D = R^T dO + c (K dW') + p (K dS')     dW = beta dW' + Q^T (beta dO) - Y^T D
    g = X^T D                              dS = m dS' + f dW' + Q^T (f dO) - Z^T D
    dR = dO d^T                            dN = -g d^T

First R^T dO of all blocks at once; then, along each segment from its end, dW, dS and D; then, for all blocks at once,
g, which is dV, the gradients through memories, and those through the pairs of a block's tokens and its scalars.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, part_of, store_tile, tiled
from memlm_kernels.neural_memory.block_kernels import (
    RATES,
    SIZES,
    anchors,
    block_at,
    load_at_anchors,
    load_rate,
    load_rows,
    load_writes,
    of_document,
    places_of_anchors,
)


# Half as wide on sm_100, where fp32 spills otherwise.
@tiled([{"BV": 64, "num_warps": 4, "num_stages": 1}], sm_100=[{"BV": 32, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_reads_backward(
    R,
    table,
    d_o,
    d_local,
    T,
    N,
    H: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """d_local = R^T dO, some columns: the gradient of d through its own block's reads."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, n, row = part_of(program, tiles, H, N)
    start, end, _opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t, i_v = tl.arange(0, BT), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_R = load_tile(R, ((row * N + n) * H + h) * BT, i_t, i_t, i_t < BT, BT)
    b_o = load_tile(d_o, base, rows, i_v, inside, V)
    store_tile(d_local, tl.dot(tl.trans(b_R), b_o, input_precision=PRECISION), base, rows, i_v, inside, V)


@tiled([{"BV": 32, "num_warps": 8, "num_stages": 1}], [{"BV": 32, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_states_backward(
    q,
    k,
    Y,
    Z,
    rates,
    table,
    first,
    cu,
    position,
    d_o,
    d_local,
    d_last_W,
    d_last_S,
    d_last_anchor,
    d_next_W,
    d_next_S,
    d_d,
    d_W,
    d_S,
    d_anchor,
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
    """Gradients of some columns of a segment's memory, and d_d: [B, T, H, V], all of the gradient of d.

    d_next_*: [B, N, H, K, V], of the memory after each block; d_initial: [B, S, H, K, V], of a document's first memory
    Without ``d_anchor`` each block begins with a chunk.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, s, row = part_of(program, tiles, H, S)
    i_t, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    n = tl.load(first + row * (S + 1) + s)
    count = tl.load(first + row * (S + 1) + s + 1) - n
    at, own, closes, goes_on = ((row * S + s) * H + h) * K, i_k < K, i_k < K, 1.0
    if d_initial is not None:
        fresh, closing = of_document(cu, position, row, s, S)
        at = (row * H + h) * K
        own, closes = i_k < tl.where(s > 0, 0, K), i_k < tl.where(closing, K, 0)
        goes_on = 1.0 - fresh.to(tl.float32)
    b_dW = load_tile(d_last_W, at, i_k, i_v, closes, V)
    b_dS = tl.zeros([BK, BV], tl.float32)
    b_dA = b_dS
    if Z is not None:
        b_dS += load_tile(d_last_S, at, i_k, i_v, closes, V)
    if d_anchor is not None:
        b_dA += load_tile(d_last_anchor, at, i_k, i_v, closes, V)
    start, end, opener = block_at(table, row, n + count - 1, N, count > 0)
    b_k = load_rows(k, row, start, end, i_t, i_k, T, h, H, K)
    b_d = load_rows(d_local, row, start, end, i_t, i_v, T, h, H, V)
    b_Y = load_rows(Y, row, start, end, i_t, i_k, T, h, H, K)
    b_Z = b_Y
    if Z is not None:
        b_Z = load_rows(Z, row, start, end, i_t, i_k, T, h, H, K)
    b_q = load_rows(q, row, start, end, i_t, i_k, T, h, H, K)
    b_o = load_rows(d_o, row, start, end, i_t, i_v, T, h, H, V)
    b_c, b_p, beta, f, m = load_writes(rates, row, start, end, i_t, T, h, H)
    for back in range(count):
        i = n + count - 1 - back
        kept = ((row * N + i) * H + h) * K
        store_tile(d_next_W, b_dW, kept, i_k, i_v, i_k < K, V)
        base, inside, opens = (row * T + start) * H + h, start + i_t < end, (opener == i).to(tl.float32)
        b_beta, b_f = load_rate(rates, base, i_t * H, 0, inside), load_rate(rates, base, i_t * H, 1, inside)
        # A tile of the next block is loaded as soon as that of this block is used.
        start, end, opener = block_at(table, row, i - 1, N, back + 1 < count)
        b_d = b_d + tl.dot(b_k, b_dW.to(b_k.dtype), input_precision=PRECISION) * b_c[:, None]
        if Z is not None:
            store_tile(d_next_S, b_dS, kept, i_k, i_v, i_k < K, V)
            b_d += tl.dot(b_k, b_dS.to(b_k.dtype), input_precision=PRECISION) * b_p[:, None]
        store_tile(d_d, b_d, base, i_t * H, i_v, inside, V)
        b_D = b_d.to(b_k.dtype)
        b_qt = tl.trans(b_q)
        if Z is not None:
            b_dS = b_dS * m + b_dW * f - tl.dot(tl.trans(b_Z), b_D, input_precision=PRECISION)
            b_dS += tl.dot(b_qt, (b_o * b_f[:, None]).to(b_q.dtype), input_precision=PRECISION)
            b_Z = load_rows(Z, row, start, end, i_t, i_k, T, h, H, K)
        b_anchor = tl.dot(tl.trans(b_Y), b_D, input_precision=PRECISION)
        b_k = load_rows(k, row, start, end, i_t, i_k, T, h, H, K)
        b_Y = load_rows(Y, row, start, end, i_t, i_k, T, h, H, K)
        b_dW = b_dW * beta + tl.dot(b_qt, (b_o * b_beta[:, None]).to(b_q.dtype), input_precision=PRECISION)
        b_q = load_rows(q, row, start, end, i_t, i_k, T, h, H, K)
        b_o = load_rows(d_o, row, start, end, i_t, i_v, T, h, H, V)
        b_d = load_rows(d_local, row, start, end, i_t, i_v, T, h, H, V)
        b_c, b_p, beta, f, m = load_writes(rates, row, start, end, i_t, T, h, H)
        if d_anchor is None:
            b_dW -= b_anchor
            # The last block begins with the last chunk.
            if back == 0:
                b_dW += load_tile(d_last_anchor, at, i_k, i_v, i_k < K, V)
        else:
            # Products, because Triton 3.9 fails on ``where`` between values in tensor memory (sm_100).
            b_dA -= b_anchor
            b_dW += b_dA * opens
            b_dA *= 1.0 - opens
    store_tile(d_W, b_dW * goes_on, at, i_k, i_v, own, V)
    if Z is not None:
        store_tile(d_S, b_dS * goes_on, at, i_k, i_v, own, V)
    if d_anchor is not None:
        store_tile(d_anchor, b_dA * goes_on, at, i_k, i_v, own, V)
    if d_initial is not None:
        store_tile(d_initial, (b_dW + b_dA) * (1.0 - goes_on), ((row * S + s) * H + h) * K, i_k, i_v, i_k < K, V)


@triton.jit
def through(
    x,
    states,
    base,
    rows,
    inside,
    at,
    i_k,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """[BT, BK]: x M^T, with the memory M at ``at``."""
    b_out = tl.zeros([BT, BK], tl.float32)
    for i in range((V + BV - 1) // BV):
        i_v = i * BV + tl.arange(0, BV)
        b_x = load_tile(x, base, rows, i_v, inside, V)
        b_M = load_tile(states, at * K, i_k, i_v, i_k < K, V).to(b_x.dtype)
        b_out += tl.dot(b_x, tl.trans(b_M), input_precision=PRECISION)
    return b_out


@triton.jit
def shared(x, y, at, i_k, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """The sum of the products of the entries of two memories."""
    b_sum = tl.zeros(i_k.shape, tl.float32)
    for i in range((V + BV - 1) // BV):
        i_v = i * BV + tl.arange(0, BV)
        b_x = load_tile(x, at * K, i_k, i_v, i_k < K, V).to(tl.float32)
        b_sum += tl.sum(b_x * load_tile(y, at * K, i_k, i_v, i_k < K, V).to(tl.float32), 1)
    return tl.sum(b_sum)


@tiled(
    [{"BK": 32, "BV": 64, "num_warps": 8, "num_stages": 1}], [{"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}]
)
@triton.jit(do_not_specialize=SIZES)
def block_memory_backward(
    q,
    k,
    rates,
    table,
    before_anchor,
    states_W,
    states_S,
    d_next_W,
    d_next_S,
    d_o,
    d,
    g,
    d_q,
    d_k,
    d_rates,
    T,
    N,
    F,
    CHUNK,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """The parts of the gradients of q and k that come through the memories before and after a block, and the
    gradients of its ``rates``. before_anchor: [B, F, H, K, V], of chunks that an earlier call began, or None.
    """
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end, opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_reads = tl.zeros([BT], tl.float32)
    b_writes, b_anchors, b_reads_S, b_writes_S, b_anchors_S = b_reads, b_reads, b_reads, b_reads, b_reads
    beta, f, m = 0.0, 0.0, 0.0
    b_at_beta, b_at_f = load_at_anchors(rates, base, inside, opener, n, CHUNK, H, BT)
    for j in range((K + BK - 1) // BK):
        i_k = j * BK + tl.arange(0, BK)
        b_q = load_tile(q, base, rows, i_k, inside, K)
        b_x = through(d_o, states_W, base, rows, inside, program, i_k, K, V, PRECISION, BT, BK, BV)
        b_reads += tl.sum(b_x * b_q, 1)
        b_dx = b_x * load_rate(rates, base, rows, 0, inside)[:, None]
        if states_S is not None:
            b_x = through(d_o, states_S, base, rows, inside, program, i_k, K, V, PRECISION, BT, BK, BV)
            b_reads_S += tl.sum(b_x * b_q, 1)
            b_dx += b_x * load_rate(rates, base, rows, 1, inside)[:, None]
        store_tile(d_q, b_dx, base, rows, i_k, inside, K)
        b_k = load_tile(k, base, rows, i_k, inside, K)
        b_x = through(d, d_next_W, base, rows, inside, program, i_k, K, V, PRECISION, BT, BK, BV)
        b_writes += tl.sum(b_x * b_k, 1)
        b_dx = b_x * load_rate(rates, base, rows, 3, inside)[:, None]
        if before_anchor is None:
            b_x = through(g, states_W, base, rows, inside, program, i_k, K, V, PRECISION, BT, BK, BV)
        elif opener < 0:
            at = (row * F + tl.load(table + (row * N + n) * 4 + 3)) * H + h
            b_x = through(g, before_anchor, base, rows, inside, at, i_k, K, V, PRECISION, BT, BK, BV)
        else:
            at = (row * N + opener) * H + h
            b_x = through(g, states_W, base, rows, inside, at, i_k, K, V, PRECISION, BT, BK, BV)
        b_anchors -= tl.sum(b_x * b_k, 1)
        b_dx -= b_x * b_at_beta[:, None]
        if states_S is not None:
            b_x = through(d, d_next_S, base, rows, inside, program, i_k, K, V, PRECISION, BT, BK, BV)
            b_writes_S += tl.sum(b_x * b_k, 1)
            b_dx += b_x * load_rate(rates, base, rows, 4, inside)[:, None]
            b_x = through(g, states_S, base, rows, inside, program, i_k, K, V, PRECISION, BT, BK, BV)
            b_anchors_S -= tl.sum(b_x * b_k, 1)
            b_dx -= b_x * b_at_f[:, None]
        store_tile(d_k, b_dx, base, rows, i_k, inside, K)
        beta += shared(states_W, d_next_W, program, i_k, K, V, BV)
        if states_S is not None:
            f += shared(states_S, d_next_W, program, i_k, K, V, BV)
            m += shared(states_S, d_next_S, program, i_k, K, V, BV)
    last = i_t == end - start - 1
    place = d_rates + (base + rows) * RATES
    tl.store(place, b_reads + tl.where(last, beta, 0.0), mask=inside)
    tl.store(place + 3, b_writes, mask=inside)
    tl.store(place + 5, b_anchors, mask=inside)
    if states_S is not None:
        tl.store(place + 1, b_reads_S + tl.where(last, f, 0.0), mask=inside)
        tl.store(place + 2, tl.where(last, m, 0.0), mask=inside)
        tl.store(place + 4, b_writes_S, mask=inside)
        tl.store(place + 6, b_anchors_S, mask=inside)


@triton.jit
def pairs(x, y, base, rows, inside, width: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """[BT, BT]: x y^T, of a block's rows."""
    b_out = tl.zeros([BT, BT], tl.float32)
    for i in range((width + BW - 1) // BW):
        i_w = i * BW + tl.arange(0, BW)
        b_x, b_y = load_tile(x, base, rows, i_w, inside, width), load_tile(y, base, rows, i_w, inside, width)
        b_out += tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
    return b_out


@tiled(
    [{"BK": 32, "BV": 64, "num_warps": 8, "num_stages": 1}], [{"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}]
)
@triton.jit(do_not_specialize=SIZES)
def block_pairs_backward(
    q,
    k,
    C,
    table,
    d_o,
    d,
    g,
    d_q,
    d_k,
    d_C,
    T,
    N,
    CHUNK,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Adds to d_q and d_k the parts that come through the pairs of a block's tokens. d_C: [B, N, H, BT, BT]"""
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end, opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_dC = tl.zeros([BT, BT], tl.float32)
    # The pairs of keys first, so that as few products as possible are held at once.
    if CHUNKS > 1:
        i_a = places_of_anchors(opener, n, CHUNK, BT)
        b_pairs = -pairs(g, d, base, rows, inside, V, PRECISION, BT, BV)
        b_of_kk = (b_pairs * load_tile(C, program * BT, i_a, i_t, i_a >= 0, BT)).to(k.dtype.element_ty)
        b_pairs *= pairs(k, k, base, rows, inside, K, PRECISION, BT, BK)
        b_at = anchors(opener, n, CHUNK, BT).to(tl.float32)
        b_dC += tl.dot(tl.trans(b_at), b_pairs, input_precision=PRECISION)
    b_pairs = pairs(d_o, d, base, rows, inside, V, PRECISION, BT, BV)
    b_of_qk = (b_pairs * load_tile(C, program * BT, i_t, i_t, i_t < BT, BT)).to(q.dtype.element_ty)
    b_dC += b_pairs * pairs(q, k, base, rows, inside, K, PRECISION, BT, BK)
    store_tile(d_C, b_dC, program * BT, i_t, i_t, i_t < BT, BT)
    for i in range((K + BK - 1) // BK):
        i_k = i * BK + tl.arange(0, BK)
        b_q = load_tile(q, base, rows, i_k, inside, K)
        b_k = load_tile(k, base, rows, i_k, inside, K)
        b_dq = tl.dot(b_of_qk, b_k, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_of_qk), b_q, input_precision=PRECISION)
        if CHUNKS > 1:
            b_dk += tl.dot(b_of_kk, b_k, input_precision=PRECISION)
            b_dk += tl.dot(tl.trans(b_of_kk), b_k, input_precision=PRECISION)
        store_tile(d_q, b_dq + load_tile(d_q, base, rows, i_k, inside, K), base, rows, i_k, inside, K)
        store_tile(d_k, b_dk + load_tile(d_k, base, rows, i_k, inside, K), base, rows, i_k, inside, K)
