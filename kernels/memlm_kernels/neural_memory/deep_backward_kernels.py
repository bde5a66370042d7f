"""Gradients of the writes of ``deep_kernels``, which has the shapes. The gradients of memories lie in rooms too."""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled
from memlm_kernels.neural_memory.deep_kernels import (
    TILES,
    WIDE,
    activate,
    curvature,
    load_columns,
    load_slots,
    output_error_backward,
    slope,
    store_columns,
)


@triton.jit
def load_after(d_M, after, new, rows, columns, height: tl.constexpr, width: tl.constexpr):
    """The gradient of some columns of the memory after a chunk; 0 behind a document's end."""
    return load_tile(d_M, after * height, rows, columns, rows < tl.where(new, 0, height), width)


@triton.jit
def add_tile(x, value, base, rows, columns, mask, width: tl.constexpr):
    store_tile(x, load_tile(x, base, rows, columns, mask, width) + value, base, rows, columns, mask, width)


@triton.jit
def add_tail(x, value, g, i_v, V: tl.constexpr):
    """Add the sums over tokens of [V, C]."""
    place = x + g * V + i_v
    tl.store(place, tl.load(place, mask=i_v < V, other=0.0) + tl.sum(value, 1), mask=i_v < V)


@triton.jit
def of_scalars(W, S, d_W, d_S, new, base, after, rows, columns, height: tl.constexpr, width: tl.constexpr):
    """Gradients of beta, f and m, by which the memory of room ``base`` was scaled into the next room."""
    inside, there = rows < height, rows < tl.where(new, 0, height)
    b_dW = load_tile(d_W, after * height, rows, columns, there, width)
    of_beta = tl.sum(b_dW * load_tile(W, base * height, rows, columns, inside, width))
    of_f = 0.0
    of_m = 0.0
    if S is not None:
        b_S = load_tile(S, base * height, rows, columns, inside, width)
        of_f += tl.sum(b_dW * b_S)
        of_m += tl.sum(load_tile(d_S, after * height, rows, columns, there, width) * b_S)
    return of_beta, of_f, of_m


@triton.jit
def load_new(opens_document, chunk, N, G, g):
    """Whether the next chunk starts a document."""
    new = False
    if opens_document is not None:
        new = tl.load(opens_document + (chunk + 1) * G + g, mask=chunk + 1 < N, other=0) != 0
    return new


@tiled(WIDE, hip=TILES)
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
    W_2,
    hidden,
    outputs,
    errors_2,
    d_hidden,
    d_errors_1,
    d_errors_2,
    d_W_1,
    d_S_1,
    d_W_2,
    d_S_2,
    d_v,
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
    """The gradients of ``deep_write``, from the last chunk to the first. Adds to the rooms of d_W and d_S, to d_hidden
    and, as sums over the chunks, to d_gain and d_bias.
    """
    g = tl.program_id(0).to(tl.int64)
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    real = i_c < W_C
    # Values that are the same for all chunks would occupy registers all the time.
    for back in tl.range(end - begin, disable_licm=True):
        i = end - begin - 1 - back
        at, here = (begin + i) * G + g, i * G + g
        room, after = here + G, here + 2 * G
        anchor = tl.load(anchors + here) * G + g
        new = load_new(opens_document, begin + i, N, G, g)
        b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)[None, :]
        b_beta = tl.load(beta + at * W_C + W_C - 1)
        b_p = b_c
        b_f = b_beta
        b_m = b_beta
        if f is not None:
            b_p = load_slots(P, at * W_C, i_c, W_C)[None, :]
            b_f = tl.load(f + at * W_C + W_C - 1)
            b_m = tl.load(m + at)
        b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
        b_de = load_columns(d_errors_2, here * W_C, i_c, i_v, real, V)
        for j in tl.range((X + BX - 1) // BX, disable_licm=True):
            i_x = j * BX + tl.arange(0, BX)
            b_de1 = load_columns(d_errors_1, here * W_C, i_c, i_x, real, X)
            b_dW = load_after(d_W_1, after, new, i_k, i_x, K, X)
            b_de1 = tl.dot(tl.trans(b_dW), -b_k * b_c, acc=b_de1, input_precision=PRECISION)
            if f is not None:
                b_dS = load_after(d_S_1, after, new, i_k, i_x, K, X)
                b_de1 = tl.dot(tl.trans(b_dS), -b_k * b_p, acc=b_de1, input_precision=PRECISION)
                add_tile(d_S_1, b_dS * b_m + b_dW * b_f, room * K, i_k, i_x, i_k < K, X)
            add_tile(d_W_1, b_dW * b_beta, room * K, i_k, i_x, i_k < K, X)
            b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_dh = load_columns(d_hidden, here * W_C, i_c, i_x, real, X)
            b_A = load_tile(W_2, anchor * X, i_x, i_v, i_x < X, V)
            # The first layer's error is the second's, pulled back through the anchor and the slope.
            b_dh += b_de1 * tl.dot(b_A, b_e, input_precision=PRECISION) * curvature(b_h, SILU)
            store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
            b_behind = b_de1 * slope(b_h, SILU)
            store_columns(d_errors_1, b_behind, here * W_C, i_c, i_x, real, X)
            b_de = tl.dot(tl.trans(b_A), b_behind, acc=b_de, input_precision=PRECISION)
        # Other threads than those that store gradients read them.
        tl.debug_barrier()
        for j in tl.range((X + BX - 1) // BX, disable_licm=True):
            i_x = j * BX + tl.arange(0, BX)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
            b_a = activate(b_h, SILU)
            b_dW = load_after(d_W_2, after, new, i_x, i_v, X, V)
            b_de = tl.dot(tl.trans(b_dW), -b_a * b_c, acc=b_de, input_precision=PRECISION)
            b_da = tl.dot(b_dW, -b_e * b_c, input_precision=PRECISION)
            if f is not None:
                b_dS = load_after(d_S_2, after, new, i_x, i_v, X, V)
                b_de = tl.dot(tl.trans(b_dS), -b_a * b_p, acc=b_de, input_precision=PRECISION)
                b_da = tl.dot(b_dS, -b_e * b_p, acc=b_da, input_precision=PRECISION)
                add_tile(d_S_2, b_dS * b_m + b_dW * b_f, room * X, i_x, i_v, i_x < X, V)
            add_tile(d_W_2, b_dW * b_beta, room * X, i_x, i_v, i_x < X, V)
            b_dh = load_columns(d_hidden, here * W_C, i_c, i_x, real, X) + b_da * slope(b_h, SILU)
            store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
        tl.debug_barrier()
        b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
        b_out = load_columns(outputs, here * W_C, i_c, i_v, real, V)
        b_v = load_columns(v, at * W_C, i_c, i_v, real, V)
        b_do, b_dr, b_share = output_error_backward(b_de, b_out, b_k, b_v, gain, bias, g, i_v, V, EPS)
        store_columns(d_v, -b_dr, at * W_C, i_c, i_v, real, V)
        if gain is not None:
            add_tail(d_gain, b_share, g, i_v, V)
            add_tail(d_bias, b_dr, g, i_v, V)
        for j in tl.range((X + BX - 1) // BX, disable_licm=True):
            i_x = j * BX + tl.arange(0, BX)
            b_A = load_tile(W_2, anchor * X, i_x, i_v, i_x < X, V)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_dh = load_columns(d_hidden, here * W_C, i_c, i_x, real, X)
            b_dA = load_tile(d_W_1, anchor * K, i_k, i_x, i_k < K, X)
            b_dh += tl.dot(b_A, b_do, input_precision=PRECISION) * slope(b_h, SILU)
            store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
            b_dA = tl.dot(b_k, tl.trans(b_dh), acc=b_dA, input_precision=PRECISION)
            store_tile(d_W_1, b_dA, anchor * K, i_k, i_x, i_k < K, X)
        tl.debug_barrier()
        b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
        for j in tl.range((X + BX - 1) // BX, disable_licm=True):
            i_x = j * BX + tl.arange(0, BX)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_behind = load_columns(d_errors_1, here * W_C, i_c, i_x, real, X)
            b_dA = load_tile(d_W_2, anchor * X, i_x, i_v, i_x < X, V)
            b_dA = tl.dot(activate(b_h, SILU), tl.trans(b_do), acc=b_dA, input_precision=PRECISION)
            b_dA = tl.dot(b_behind, tl.trans(b_e), acc=b_dA, input_precision=PRECISION)
            store_tile(d_W_2, b_dA, anchor * X, i_x, i_v, i_x < X, V)
        tl.debug_barrier()


@tiled(WIDE, hip=TILES)
@triton.jit(do_not_specialize=["begin", "N", "G"])
def deep_tokens_backward(
    k,
    C,
    f,
    P,
    gain,
    opens_document,
    anchors,
    W_1,
    S_1,
    W_2,
    S_2,
    hidden,
    errors_1,
    errors_2,
    d_hidden,
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
    """The gradients that can be computed for all chunks at once, after ``deep_write_backward``. Adds to d_k.

    d_c, d_P: [N, G, C], gradients of the last rows of C and P through the writes   d_beta, d_f, d_m: [N, G], those of
        the last slots' scalars
    """
    here = tl.program_id(0).to(tl.int64)
    at, room, after, g = begin * G + here, G + here, 2 * G + here, here % G
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    real = i_c < W_C
    anchor = tl.load(anchors + here) * G + g
    new = load_new(opens_document, begin + here // G, N, G, g)
    b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
    b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)
    b_p = b_c
    if f is not None:
        b_p = load_slots(P, at * W_C, i_c, W_C)
    b_dk = load_columns(d_k, at * W_C, i_c, i_k, real, K)
    if gain is not None:
        # M(k) contains k itself.
        b_dk -= load_columns(d_v, at * W_C, i_c, i_k, real, K)
    b_dc = tl.zeros([BT], tl.float32)
    b_dp = tl.zeros([BT], tl.float32)
    b_e2 = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
    of_beta = 0.0
    of_f = 0.0
    of_m = 0.0
    for j in tl.range((X + BX - 1) // BX, disable_licm=True):
        i_x = j * BX + tl.arange(0, BX)
        b_e = load_columns(errors_1, here * W_C, i_c, i_x, real, X)
        b_a = activate(load_columns(hidden, here * W_C, i_c, i_x, real, X), SILU)
        b_back = tl.dot(load_after(d_W_1, after, new, i_k, i_x, K, X), b_e, input_precision=PRECISION)
        b_dk -= b_back * b_c[None, :]
        b_dc -= tl.sum(b_back * b_k, 0)
        b_back = tl.dot(load_after(d_W_2, after, new, i_x, i_v, X, V), b_e2, input_precision=PRECISION)
        b_dc -= tl.sum(b_back * b_a, 0)
        if f is not None:
            b_back = tl.dot(load_after(d_S_1, after, new, i_k, i_x, K, X), b_e, input_precision=PRECISION)
            b_dk -= b_back * b_p[None, :]
            b_dp -= tl.sum(b_back * b_k, 0)
            b_back = tl.dot(load_after(d_S_2, after, new, i_x, i_v, X, V), b_e2, input_precision=PRECISION)
            b_dp -= tl.sum(b_back * b_a, 0)
        b_dh = load_columns(d_hidden, here * W_C, i_c, i_x, real, X)
        b_A = load_tile(W_1, anchor * K, i_k, i_x, i_k < K, X)
        b_dk += tl.dot(b_A, b_dh, input_precision=PRECISION)
        at_beta, at_f, at_m = of_scalars(W_1, S_1, d_W_1, d_S_1, new, room, after, i_k, i_x, K, X)
        of_beta, of_f, of_m = of_beta + at_beta, of_f + at_f, of_m + at_m
        at_beta, at_f, at_m = of_scalars(W_2, S_2, d_W_2, d_S_2, new, room, after, i_x, i_v, X, V)
        of_beta, of_f, of_m = of_beta + at_beta, of_f + at_f, of_m + at_m
    store_columns(d_k, b_dk, at * W_C, i_c, i_k, real, K)
    tl.store(d_c + at * W_C + i_c, b_dc, mask=real)
    tl.store(d_beta + at, of_beta)
    if f is not None:
        tl.store(d_P + at * W_C + i_c, b_dp, mask=real)
        tl.store(d_f + at, of_f)
        tl.store(d_m + at, of_m)
