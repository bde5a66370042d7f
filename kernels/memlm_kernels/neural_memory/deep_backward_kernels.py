"""Gradients of the writes of ``deep_kernels``, which has the shapes. The gradients of memories lie in rooms too."""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled
from memlm_kernels.neural_memory.deep_kernels import (
    TILES,
    TILES_HIP,
    activate,
    curvature,
    load_columns,
    load_slots,
    output_error_backward,
    slope,
    store_columns,
)

# With four warps it spills on sm_80 if the hidden layer is wider than the keys.


@triton.jit
def leave_backward(
    d_M, b_a, b_e, b_gate, new, room, rows, columns, height: tl.constexpr, width: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of a, e and the gate through the write -a (gate e) to the memory of ``room``."""
    b_d = load_tile(d_M, room * height, rows, columns, rows < tl.where(new, 0, height), width)
    b_da = tl.dot(b_d, b_e, input_precision=PRECISION)
    b_de = tl.dot(tl.trans(b_d), b_a, input_precision=PRECISION)
    return -b_da * b_gate[None, :], -b_de * b_gate[None, :], -tl.sum(b_da * b_a, 0)


@triton.jit
def add_tile(x, value, base, rows, columns, mask, width: tl.constexpr):
    store_tile(x, load_tile(x, base, rows, columns, mask, width) + value, base, rows, columns, mask, width)


@triton.jit
def pass_on(d_W, d_S, b_beta, b_f, b_m, new, base, after, rows, columns, height: tl.constexpr, width: tl.constexpr):
    """Add to the gradients of room ``base`` the part from the next room, ``after``."""
    inside, there = rows < height, rows < tl.where(new, 0, height)
    b_dW = load_tile(d_W, after * height, rows, columns, there, width)
    add_tile(d_W, b_dW * b_beta, base * height, rows, columns, inside, width)
    if d_S is not None:
        b_dS = load_tile(d_S, after * height, rows, columns, there, width)
        add_tile(d_S, b_dS * b_m + b_dW * b_f, base * height, rows, columns, inside, width)


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


@tiled(TILES, TILES_HIP)
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
    errors_1,
    errors_2,
    d_hidden,
    d_errors_1,
    d_errors_2,
    d_W_1,
    d_S_1,
    d_W_2,
    d_S_2,
    d_v,
    d_c,
    d_P,
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

    d_c, d_P: [N, G, C], the second layer's part of the gradients of the last rows of C and P through the writes
    """
    g = tl.program_id(0).to(tl.int64)
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    real, keys = i_c < W_C, i_k < K
    b_dgain = tl.zeros([BV], tl.float32)
    b_dbias = tl.zeros([BV], tl.float32)
    # Values that are the same for all chunks would occupy registers all the time.
    for back in tl.range(end - begin, disable_licm=True):
        i = end - begin - 1 - back
        at, here, after = (begin + i) * G + g, i * G + g, (i + 2) * G + g
        anchor = tl.load(anchors + here) * G + g
        new = load_new(opens_document, begin + i, N, G, g)
        b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
        b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)
        b_p = b_c
        if f is not None:
            b_p = load_slots(P, at * W_C, i_c, W_C)
        for j in range((X + BX - 1) // BX):
            i_x = j * BX + tl.arange(0, BX)
            b_e = load_columns(errors_1, here * W_C, i_c, i_x, real, X)
            b_de = leave_backward(d_W_1, b_k, b_e, b_c, new, after, i_k, i_x, K, X, PRECISION)[1]
            if f is not None:
                b_de += leave_backward(d_S_1, b_k, b_e, b_p, new, after, i_k, i_x, K, X, PRECISION)[1]
            b_de += load_columns(d_errors_1, here * W_C, i_c, i_x, real, X)
            store_columns(d_errors_1, b_de, here * W_C, i_c, i_x, real, X)
        b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
        b_de = load_columns(d_errors_2, here * W_C, i_c, i_v, real, V)
        b_dc = tl.zeros([BT], tl.float32)
        b_dp = tl.zeros([BT], tl.float32)
        for j in range((X + BX - 1) // BX):
            i_x = j * BX + tl.arange(0, BX)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_a = activate(b_h, SILU)
            b_da, b_more, b_of = leave_backward(d_W_2, b_a, b_e, b_c, new, after, i_x, i_v, X, V, PRECISION)
            b_de += b_more
            b_dc += b_of
            if f is not None:
                b_da2, b_more, b_of = leave_backward(d_S_2, b_a, b_e, b_p, new, after, i_x, i_v, X, V, PRECISION)
                b_da += b_da2
                b_de += b_more
                b_dp += b_of
            b_dh = b_da * slope(b_h, SILU) + load_columns(d_hidden, here * W_C, i_c, i_x, real, X)
            store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
        tl.store(d_c + at * W_C + i_c, b_dc, mask=real)
        if f is not None:
            tl.store(d_P + at * W_C + i_c, b_dp, mask=real)
        # Other threads than those that stored d_hidden and d_errors_1 read them.
        tl.debug_barrier()
        for j in range((X + BX - 1) // BX):
            i_x = j * BX + tl.arange(0, BX)
            # The first layer's error is the second's, pulled back through the anchor and the slope.
            b_de1 = load_columns(d_errors_1, here * W_C, i_c, i_x, real, X)
            b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_dbehind = b_de1 * slope(b_h, SILU)
            store_columns(d_errors_1, b_dbehind, here * W_C, i_c, i_x, real, X)
            b_A = load_tile(W_2, anchor * X, i_x, i_v, i_x < X, V)
            b_de += tl.dot(tl.trans(b_A), b_dbehind, input_precision=PRECISION)
            b_dh = b_de1 * tl.dot(b_A, b_e, input_precision=PRECISION) * curvature(b_h, SILU)
            b_dh += load_columns(d_hidden, here * W_C, i_c, i_x, real, X)
            store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
        b_beta = tl.load(beta + at * W_C + W_C - 1)
        b_f = b_beta
        b_m = b_beta
        if f is not None:
            b_f = tl.load(f + at * W_C + W_C - 1)
            b_m = tl.load(m + at)
        for j in range((X + BX - 1) // BX):
            i_x = j * BX + tl.arange(0, BX)
            pass_on(d_W_1, d_S_1, b_beta, b_f, b_m, new, after - G, after, i_k, i_x, K, X)
            pass_on(d_W_2, d_S_2, b_beta, b_f, b_m, new, after - G, after, i_x, i_v, X, V)
        b_out = load_columns(outputs, here * W_C, i_c, i_v, real, V)
        b_v = load_columns(v, at * W_C, i_c, i_v, real, V)
        b_do, b_dr, b_share = output_error_backward(b_de, b_out, b_k, b_v, gain, bias, g, i_v, V, EPS)
        store_columns(d_v, -b_dr, at * W_C, i_c, i_v, real, V)
        if gain is not None:
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
            store_columns(d_hidden, b_dh, here * W_C, i_c, i_x, real, X)
            b_dA = tl.dot(b_k, tl.trans(b_dh), input_precision=PRECISION)
            add_tile(d_W_1, b_dA, anchor * K, i_k, i_x, keys, X)
        for j in range((X + BX - 1) // BX):
            i_x = j * BX + tl.arange(0, BX)
            b_a = activate(load_columns(hidden, here * W_C, i_c, i_x, real, X), SILU)
            b_dA = tl.dot(b_a, tl.trans(b_do), input_precision=PRECISION)
            b_dbehind = load_columns(d_errors_1, here * W_C, i_c, i_x, real, X)
            b_dA += tl.dot(b_dbehind, tl.trans(b_e), input_precision=PRECISION)
            add_tile(d_W_2, b_dA, anchor * X, i_x, i_v, i_x < X, V)
        tl.debug_barrier()
    if gain is not None:
        inside = i_v < V
        tl.store(d_gain + g * V + i_v, tl.load(d_gain + g * V + i_v, mask=inside, other=0.0) + b_dgain, mask=inside)
        tl.store(d_bias + g * V + i_v, tl.load(d_bias + g * V + i_v, mask=inside, other=0.0) + b_dbias, mask=inside)


@tiled(TILES, TILES_HIP)
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
    errors_1,
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
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """The gradients that can be computed for all chunks at once, after ``deep_write_backward``. Adds to d_k, d_c, d_P.

    d_beta, d_f, d_m: [N, G], gradients of the last slots' scalars
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
    b_dc = load_slots(d_c, at * W_C, i_c, W_C)
    b_dp = tl.zeros([BT], tl.float32)
    of_beta = 0.0
    of_f = 0.0
    of_m = 0.0
    for j in range((X + BX - 1) // BX):
        i_x = j * BX + tl.arange(0, BX)
        b_e = load_columns(errors_1, here * W_C, i_c, i_x, real, X)
        b_more, _, b_of = leave_backward(d_W_1, b_k, b_e, b_c, new, after, i_k, i_x, K, X, PRECISION)
        b_dk += b_more
        b_dc += b_of
        if f is not None:
            b_more, _, b_of = leave_backward(d_S_1, b_k, b_e, b_p, new, after, i_k, i_x, K, X, PRECISION)
            b_dk += b_more
            b_dp += b_of
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
        tl.store(d_P + at * W_C + i_c, b_dp + load_slots(d_P, at * W_C, i_c, W_C), mask=real)
        tl.store(d_f + at, of_f)
        tl.store(d_m + at, of_m)
