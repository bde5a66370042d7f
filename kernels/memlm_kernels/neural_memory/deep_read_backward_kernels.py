"""Gradients of the reads of ``deep_kernels``, layer by layer, because registers cannot hold both layers; see
``deep_backward_kernels``.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled
from memlm_kernels.neural_memory.deep_kernels import (
    TILES,
    activate,
    load_columns,
    load_slots,
    pairs,
    read_hidden,
    slope,
    store_columns,
)


@tiled(TILES)
@triton.jit(do_not_specialize=["begin", "N", "G"])
def deep_read_backward_2(
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
    d_out,
    d_C,
    d_beta,
    d_f,
    d_before,
    d_hidden,
    d_errors_2,
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
    """Gradients of the second layer. d_before: [chunks, G, C, X], the gradient of the hidden values before the
    activation; the values themselves are stored there first.
    """
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
    b_s1 = pairs(b_k, b_q, PRECISION)
    b_s2 = tl.zeros([BT, BT], tl.float32)
    for j in tl.range((X + BX - 1) // BX, disable_licm=True):
        i_x = j * BX + tl.arange(0, BX)
        b_z = read_hidden(
            b_q, b_C * b_s1, b_beta, b_f, W_1, S_1, errors_1, room, here, i_c, i_k, i_x, K, X, W_C, PRECISION
        )
        store_columns(d_before, b_z, here * W_C, i_c, i_x, real, X)
        b_a = activate(load_columns(hidden, here * W_C, i_c, i_x, real, X), SILU)
        b_s2 += pairs(b_a, activate(b_z, SILU), PRECISION)
    # Weights of pairs; rows are written tokens, columns reading tokens.
    b_o = load_columns(d_out, at * W_C, i_c, i_v, real, V)
    b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
    b_pairs2 = pairs(b_e, b_o, PRECISION)
    b_de = -tl.dot(b_o, tl.trans(b_C * b_s2), input_precision=PRECISION)
    store_columns(d_errors_2, b_de, here * W_C, i_c, i_v, real, V)
    store_columns(d_C, -b_s2 * b_pairs2, at * W_C, i_c, i_c, real, W_C)
    b_ds = b_C * b_pairs2
    b_dbeta = tl.zeros([BT], tl.float32)
    b_df = tl.zeros([BT], tl.float32)
    # Other threads than those that stored d_before read it.
    tl.debug_barrier()
    for j in tl.range((X + BX - 1) // BX, disable_licm=True):
        i_x = j * BX + tl.arange(0, BX)
        b_x = activate(load_columns(d_before, here * W_C, i_c, i_x, real, X), SILU)
        store_product(d_W_2, b_x * b_beta[None, :], b_o, room, i_x, i_v, X, V, PRECISION)
        if f is not None:
            store_product(d_S_2, b_x * b_f[None, :], b_o, room, i_x, i_v, X, V, PRECISION)
    tl.debug_barrier()
    for j in tl.range((X + BX - 1) // BX, disable_licm=True):
        i_x = j * BX + tl.arange(0, BX)
        b_z = load_columns(d_before, here * W_C, i_c, i_x, real, X)
        b_x = activate(b_z, SILU)
        b_dz, b_more = through(W_2, b_x, b_o, b_beta, room, i_x, i_v, X, V, PRECISION)
        b_dbeta += b_more
        if f is not None:
            b_ds2, b_more = through(S_2, b_x, b_o, b_f, room, i_x, i_v, X, V, PRECISION)
            b_dz += b_ds2
            b_df += b_more
        b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
        b_dz -= tl.dot(activate(b_h, SILU), b_ds, input_precision=PRECISION)
        store_columns(d_before, b_dz * slope(b_z, SILU), here * W_C, i_c, i_x, real, X)
        b_dh = -tl.dot(b_x, tl.trans(b_ds), input_precision=PRECISION) * slope(b_h, SILU)
        store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
    tl.store(d_beta + at * W_C + i_c, b_dbeta, mask=real)
    if f is not None:
        tl.store(d_f + at * W_C + i_c, b_df, mask=real)


@tiled(TILES)
@triton.jit(do_not_specialize=["begin", "N", "G"])
def deep_read_backward_1(
    q,
    k,
    C,
    beta,
    f,
    W_1,
    S_1,
    errors_1,
    d_before,
    d_q,
    d_k,
    d_C,
    d_beta,
    d_f,
    d_errors_1,
    d_W_1,
    d_S_1,
    begin,
    N,
    G,
    K: tl.constexpr,
    X: tl.constexpr,
    W_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
):
    """Gradients of the first layer; adds to d_C, d_beta and d_f of the second."""
    here = tl.program_id(0).to(tl.int64)
    at, room = begin * G + here, G + here
    i_c, i_k = tl.arange(0, BT), tl.arange(0, BK)
    real = i_c < W_C
    b_q = load_columns(q, at * W_C, i_c, i_k, real, K)
    b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
    b_C = load_columns(C, at * W_C, i_c, i_c, real, W_C)
    b_beta = load_slots(beta, at * W_C, i_c, W_C)
    b_f = b_beta
    if f is not None:
        b_f = load_slots(f, at * W_C, i_c, W_C)
    b_s = pairs(b_k, b_q, PRECISION)
    b_pairs = tl.zeros([BT, BT], tl.float32)
    b_dq = tl.zeros([BK, BT], tl.float32)
    b_dbeta = load_slots(d_beta, at * W_C, i_c, W_C)
    b_df = tl.zeros([BT], tl.float32)
    for j in tl.range((X + BX - 1) // BX, disable_licm=True):
        i_x = j * BX + tl.arange(0, BX)
        b_dz = load_columns(d_before, here * W_C, i_c, i_x, real, X)
        b_e = load_columns(errors_1, here * W_C, i_c, i_x, real, X)
        b_pairs += pairs(b_e, b_dz, PRECISION)
        b_de = -tl.dot(b_dz, tl.trans(b_C * b_s), input_precision=PRECISION)
        store_columns(d_errors_1, b_de, here * W_C, i_c, i_x, real, X)
        store_product(d_W_1, b_q * b_beta[None, :], b_dz, room, i_k, i_x, K, X, PRECISION)
        b_back, b_more = through(W_1, b_q, b_dz, b_beta, room, i_k, i_x, K, X, PRECISION)
        b_dq += b_back
        b_dbeta += b_more
        if f is not None:
            store_product(d_S_1, b_q * b_f[None, :], b_dz, room, i_k, i_x, K, X, PRECISION)
            b_back, b_more = through(S_1, b_q, b_dz, b_f, room, i_k, i_x, K, X, PRECISION)
            b_dq += b_back
            b_df += b_more
    tl.store(d_beta + at * W_C + i_c, b_dbeta, mask=real)
    if f is not None:
        tl.store(d_f + at * W_C + i_c, b_df + load_slots(d_f, at * W_C, i_c, W_C), mask=real)
    b_dC = load_columns(d_C, at * W_C, i_c, i_c, real, W_C) - b_s * b_pairs
    store_columns(d_C, b_dC, at * W_C, i_c, i_c, real, W_C)
    b_ds = b_C * b_pairs
    b_dq -= tl.dot(b_k, b_ds, input_precision=PRECISION)
    store_columns(d_q, b_dq, at * W_C, i_c, i_k, real, K)
    b_dk = -tl.dot(b_q, tl.trans(b_ds), input_precision=PRECISION)
    store_columns(d_k, b_dk, at * W_C, i_c, i_k, real, K)


@triton.jit
def through(
    M, b_x, b_d, b_scale, room, rows, columns, height: tl.constexpr, width: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of x and of the scale through some columns of scale (x M)."""
    b_M = load_tile(M, room * height, rows, columns, rows < height, width)
    b_back = tl.dot(b_M, b_d, input_precision=PRECISION)
    return b_back * b_scale[None, :], tl.sum(b_back * b_x, 0)


@triton.jit
def store_product(
    d_M, b_x, b_d, room, rows, columns, height: tl.constexpr, width: tl.constexpr, PRECISION: tl.constexpr
):
    """Store the gradient of M, for an x that is already scaled."""
    b_dM = tl.dot(b_x, tl.trans(b_d), input_precision=PRECISION)
    store_tile(d_M, b_dM, room * height, rows, columns, rows < height, width)
