"""Gradients of what ``deep_kernels`` does, which has the shapes; of a room's memory they stand in a room like it."""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled
from memlm_kernels.neural_memory.deep_kernels import (
    activate,
    curvature,
    load_columns,
    load_slots,
    output_error_backward,
    read_hidden,
    slope,
    store_columns,
)

_TILES = [{"num_warps": 4, "num_stages": 1}]


@tiled(_TILES)
@triton.jit(do_not_specialize=["begin", "N", "G"])
def deep_read_backward(
    q,
    k,
    C,
    beta,
    f,
    W_1,
    S_1,
    W_2,
    S_2,
    hidden,
    errors_1,
    errors_2,
    before,
    d_out,
    d_q,
    d_k,
    d_C,
    d_beta,
    d_f,
    d_hidden,
    d_errors_1,
    d_errors_2,
    d_W_1,
    d_S_1,
    d_W_2,
    d_S_2,
    begin,
    N,
    G,
    K: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    W_C: tl.constexpr,
    SILU: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """Of ``deep_read``; before: [chunks, G, C, X], what stands before the activation, made here."""
    here = tl.program_id(0).to(tl.int64)
    at, room = begin * G + here, G + here
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    real = i_c < W_C
    b_q = load_columns(q, at * W_C, i_c, i_k, real, K)
    b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
    b_C = load_columns(C, at * W_C, i_c, i_c, real, W_C)
    b_beta = load_slots(beta, at * W_C, i_c, W_C)
    b_f = b_beta
    if f is not None:
        b_f = load_slots(f, at * W_C, i_c, W_C)
    b_s1 = tl.dot(tl.trans(b_k), b_q, input_precision=PRECISION)
    b_s2 = tl.zeros([BT, BT], tl.float32)
    for j in range((X + BX - 1) // BX):
        i_x = j * BX + tl.arange(0, BX)
        b_z = read_hidden(
            b_q, b_C * b_s1, b_beta, b_f, W_1, S_1, errors_1, room, here, i_c, i_k, i_x, K, X, W_C, PRECISION
        )
        store_columns(before, b_z, here * W_C, i_c, i_x, real, X)
        b_a = activate(load_columns(hidden, here * W_C, i_c, i_x, real, X), SILU)
        b_s2 += tl.dot(tl.trans(b_a), activate(b_z, SILU), input_precision=PRECISION)
    # The second layer's weights of pairs; rows are what was written, columns who reads.
    b_o = load_columns(d_out, at * W_C, i_c, i_v, real, V)
    b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
    b_pairs2 = tl.dot(tl.trans(b_e), b_o, input_precision=PRECISION)
    b_de = -tl.dot(b_o, tl.trans(b_C * b_s2), input_precision=PRECISION)
    store_columns(d_errors_2, b_de, here * W_C, i_c, i_v, real, V)
    b_dC = b_s2 * b_pairs2
    b_ds = b_C * b_pairs2
    b_pairs1 = tl.zeros([BT, BT], tl.float32)
    b_dbeta = tl.zeros([BT], tl.float32)
    b_df = tl.zeros([BT], tl.float32)
    b_dq = tl.zeros([BK, BT], tl.float32)
    # ``before`` comes back to other threads than stored it.
    tl.debug_barrier()
    for j in range((X + BX - 1) // BX):
        i_x = j * BX + tl.arange(0, BX)
        b_z = load_columns(before, here * W_C, i_c, i_x, real, X)
        b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
        b_x = activate(b_z, SILU)
        b_dz, b_more = through(b_x, b_o, b_beta, W_2, d_W_2, room, i_x, i_v, X, V, PRECISION)
        b_dbeta += b_more
        if f is not None:
            b_ds2, b_more = through(b_x, b_o, b_f, S_2, d_S_2, room, i_x, i_v, X, V, PRECISION)
            b_dz += b_ds2
            b_df += b_more
        b_dz -= tl.dot(activate(b_h, SILU), b_ds, input_precision=PRECISION)
        b_dz *= slope(b_z, SILU)
        b_dh = -tl.dot(b_x, tl.trans(b_ds), input_precision=PRECISION) * slope(b_h, SILU)
        store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
        b_e1 = load_columns(errors_1, here * W_C, i_c, i_x, real, X)
        b_pairs1 += tl.dot(tl.trans(b_e1), b_dz, input_precision=PRECISION)
        b_de1 = -tl.dot(b_dz, tl.trans(b_C * b_s1), input_precision=PRECISION)
        store_columns(d_errors_1, b_de1, here * W_C, i_c, i_x, real, X)
        b_back, b_more = through(b_q, b_dz, b_beta, W_1, d_W_1, room, i_k, i_x, K, X, PRECISION)
        b_dq += b_back
        b_dbeta += b_more
        if f is not None:
            b_back, b_more = through(b_q, b_dz, b_f, S_1, d_S_1, room, i_k, i_x, K, X, PRECISION)
            b_dq += b_back
            b_df += b_more
    b_dC += b_s1 * b_pairs1
    b_ds = b_C * b_pairs1
    store_columns(d_C, -b_dC, at * W_C, i_c, i_c, real, W_C)
    tl.store(d_beta + at * W_C + i_c, b_dbeta, mask=real)
    if f is not None:
        tl.store(d_f + at * W_C + i_c, b_df, mask=real)
    b_dq -= tl.dot(b_k, b_ds, input_precision=PRECISION)
    store_columns(d_q, b_dq, at * W_C, i_c, i_k, real, K)
    b_dk = -tl.dot(b_q, tl.trans(b_ds), input_precision=PRECISION)
    store_columns(d_k, b_dk, at * W_C, i_c, i_k, real, K)


@triton.jit
def through(
    b_x,
    b_d,
    b_scale,
    M,
    d_M,
    room,
    rows,
    columns,
    height: tl.constexpr,
    width: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of scale (x M), some columns of it: gradients of x and of the scale; that of M is stored."""
    b_M = load_tile(M, room * height, rows, columns, rows < height, width)
    b_back = tl.dot(b_M, b_d, input_precision=PRECISION)
    b_dM = tl.dot(b_x * b_scale[None, :], tl.trans(b_d), input_precision=PRECISION)
    store_tile(d_M, b_dM, room * height, rows, columns, rows < height, width)
    return b_back * b_scale[None, :], tl.sum(b_back * b_x, 0)


@triton.jit
def leave_backward(
    b_a,
    b_e,
    b_gate,
    d_M,
    new,
    i,
    g,
    G,
    rows,
    columns,
    height: tl.constexpr,
    width: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the write -a (gate e) to what room i + 2 holds: that room's gradient, and those of a, e and the gate."""
    there = rows < tl.where(new, 0, height)
    b_d = load_tile(d_M, ((i + 2) * G + g) * height, rows, columns, there, width)
    b_da = -tl.dot(b_d, b_e * b_gate[None, :], input_precision=PRECISION)
    b_back = tl.dot(tl.trans(b_d), b_a, input_precision=PRECISION)
    return b_d, b_da, -b_back * b_gate[None, :], -tl.sum(b_back * b_e, 0)


@triton.jit
def add_tile(x, value, base, rows, columns, mask, width: tl.constexpr):
    store_tile(x, load_tile(x, base, rows, columns, mask, width) + value, base, rows, columns, mask, width)


@triton.jit
def pass_on(
    b_dW,
    b_dS,
    W,
    S,
    d_W,
    d_S,
    b_beta,
    b_f,
    b_m,
    i,
    g,
    G,
    rows,
    columns,
    height: tl.constexpr,
    width: tl.constexpr,
):
    """Adds to the gradients of room i + 1 what room i + 2 has; returns those of the last beta, f, and of m."""
    base, inside = ((i + 1) * G + g) * height, rows < height
    add_tile(d_W, b_dW * b_beta, base, rows, columns, inside, width)
    of_beta = tl.sum(b_dW * load_tile(W, base, rows, columns, inside, width))
    of_f = 0.0
    of_m = 0.0
    if S is not None:
        b_S = load_tile(S, base, rows, columns, inside, width)
        of_f += tl.sum(b_dW * b_S)
        of_m += tl.sum(b_dS * b_S)
        add_tile(d_S, b_dS * b_m + b_dW * b_f, base, rows, columns, inside, width)
    return of_beta, of_f, of_m


@tiled(_TILES)
@triton.jit(do_not_specialize=["begin", "end", "N", "G"])
def deep_write_backward(
    k,
    v,
    C,
    beta,
    f,
    P,
    m,
    gain,
    bias,
    opens_document,
    anchors,
    W_1,
    S_1,
    W_2,
    S_2,
    hidden,
    outputs,
    errors_1,
    errors_2,
    d_hidden,
    d_errors_1,
    d_errors_2,
    d_W_1,
    d_S_1,
    d_W_2,
    d_S_2,
    d_k,
    d_v,
    d_c,
    d_beta,
    d_f,
    d_P,
    d_m,
    d_gain,
    d_bias,
    begin,
    end,
    N,
    G,
    K: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    W_C: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """Of ``deep_write``, which it goes back through; adds to d_k, to the rooms of d_W and d_S and, as sums over its
    chunks, to d_gain and d_bias.

    d_c, d_P: [N, G, C], of the last rows of C and P as what writes; d_beta, d_f, d_m: [N, G], of the last slots
    """
    g = tl.program_id(0).to(tl.int64)
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    real, keys = i_c < W_C, i_k < K
    b_dgain = tl.zeros([BV], tl.float32)
    b_dbias = tl.zeros([BV], tl.float32)
    for back in range(end - begin):
        i = end - begin - 1 - back
        at, here = (begin + i) * G + g, i * G + g
        anchor = tl.load(anchors + here) * G + g
        b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
        b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
        b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)
        b_beta = tl.load(beta + at * W_C + W_C - 1)
        b_p = b_c
        b_f = b_beta
        b_m = b_beta
        if f is not None:
            b_p = load_slots(P, at * W_C, i_c, W_C)
            b_f = tl.load(f + at * W_C + W_C - 1)
            b_m = tl.load(m + at)
        new = False
        if opens_document is not None:
            new = tl.load(opens_document + at + G, mask=begin + i + 1 < N, other=0) != 0
        b_de = load_columns(d_errors_2, here * W_C, i_c, i_v, real, V)
        b_dk = load_columns(d_k, at * W_C, i_c, i_k, real, K)
        b_dc = tl.zeros([BT], tl.float32)
        b_dp = tl.zeros([BT], tl.float32)
        of_beta = 0.0
        of_f = 0.0
        of_m = 0.0
        for j in range((X + BX - 1) // BX):
            i_x = j * BX + tl.arange(0, BX)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_a = activate(b_h, SILU)
            b_dW, b_da, b_more, b_of = leave_backward(b_a, b_e, b_c, d_W_2, new, i, g, G, i_x, i_v, X, V, PRECISION)
            b_de += b_more
            b_dc += b_of
            b_dS = b_dW
            if f is not None:
                b_dS, b_da2, b_more, b_of = leave_backward(
                    b_a, b_e, b_p, d_S_2, new, i, g, G, i_x, i_v, X, V, PRECISION
                )
                b_da += b_da2
                b_de += b_more
                b_dp += b_of
            at_beta, at_f, at_m = pass_on(
                b_dW, b_dS, W_2, S_2, d_W_2, d_S_2, b_beta, b_f, b_m, i, g, G, i_x, i_v, X, V
            )
            of_beta, of_f, of_m = of_beta + at_beta, of_f + at_f, of_m + at_m

            b_e1 = load_columns(errors_1, here * W_C, i_c, i_x, real, X)
            b_dW, b_more, b_de1, b_of = leave_backward(b_k, b_e1, b_c, d_W_1, new, i, g, G, i_k, i_x, K, X, PRECISION)
            b_dk += b_more
            b_dc += b_of
            b_dS = b_dW
            if f is not None:
                b_dS, b_more, b_de2, b_of = leave_backward(
                    b_k, b_e1, b_p, d_S_1, new, i, g, G, i_k, i_x, K, X, PRECISION
                )
                b_dk += b_more
                b_de1 += b_de2
                b_dp += b_of
            at_beta, at_f, at_m = pass_on(
                b_dW, b_dS, W_1, S_1, d_W_1, d_S_1, b_beta, b_f, b_m, i, g, G, i_k, i_x, K, X
            )
            of_beta, of_f, of_m = of_beta + at_beta, of_f + at_f, of_m + at_m

            # The first layer's error is the second's, through the anchor and the slope.
            b_de1 += load_columns(d_errors_1, here * W_C, i_c, i_x, real, X)
            b_A = load_tile(W_2, anchor * X, i_x, i_v, i_x < X, V)
            b_slope = slope(b_h, SILU)
            b_behind = tl.dot(b_A, b_e, input_precision=PRECISION)
            b_dbehind = b_de1 * b_slope
            b_de += tl.dot(tl.trans(b_A), b_dbehind, input_precision=PRECISION)
            store_columns(d_errors_1, b_dbehind, here * W_C, i_c, i_x, real, X)
            b_dh = b_da * b_slope + b_de1 * b_behind * curvature(b_h, SILU)
            b_dh += load_columns(d_hidden, here * W_C, i_c, i_x, real, X)
            store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
        tl.store(d_c + at * W_C + i_c, b_dc, mask=real)
        tl.store(d_beta + at, of_beta)
        if f is not None:
            tl.store(d_P + at * W_C + i_c, b_dp, mask=real)
            tl.store(d_f + at, of_f)
            tl.store(d_m + at, of_m)
        b_out = load_columns(outputs, here * W_C, i_c, i_v, real, V)
        b_v = load_columns(v, at * W_C, i_c, i_v, real, V)
        b_do, b_dr, b_share = output_error_backward(b_de, b_out, b_k, b_v, gain, bias, g, i_v, V, EPS)
        store_columns(d_v, -b_dr, at * W_C, i_c, i_v, real, V)
        if gain is not None:
            b_dk += b_dr
            b_dgain += tl.sum(b_share, 1)
            b_dbias += tl.sum(b_dr, 1)
        # A chunk's own room may be its anchor's, and other threads stored d_hidden and d_errors_1.
        tl.debug_barrier()
        for j in range((X + BX - 1) // BX):
            i_x = j * BX + tl.arange(0, BX)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_A = load_tile(W_2, anchor * X, i_x, i_v, i_x < X, V)
            b_dh = tl.dot(b_A, b_do, input_precision=PRECISION) * slope(b_h, SILU)
            b_dh += load_columns(d_hidden, here * W_C, i_c, i_x, real, X)
            b_dA = tl.dot(activate(b_h, SILU), tl.trans(b_do), input_precision=PRECISION)
            b_dbehind = load_columns(d_errors_1, here * W_C, i_c, i_x, real, X)
            b_dA += tl.dot(b_dbehind, tl.trans(b_e), input_precision=PRECISION)
            add_tile(d_W_2, b_dA, anchor * X, i_x, i_v, i_x < X, V)
            b_A = load_tile(W_1, anchor * K, i_k, i_x, keys, X)
            b_dk += tl.dot(b_A, b_dh, input_precision=PRECISION)
            b_dA = tl.dot(b_k, tl.trans(b_dh), input_precision=PRECISION)
            add_tile(d_W_1, b_dA, anchor * K, i_k, i_x, keys, X)
        store_columns(d_k, b_dk, at * W_C, i_c, i_k, real, K)
        tl.debug_barrier()
    if gain is not None:
        inside = i_v < V
        tl.store(d_gain + g * V + i_v, tl.load(d_gain + g * V + i_v, mask=inside, other=0.0) + b_dgain, mask=inside)
        tl.store(d_bias + g * V + i_v, tl.load(d_bias + g * V + i_v, mask=inside, other=0.0) + b_dbias, mask=inside)
