"""Decoding in Triton: one token of each row and head in one kernel, for memories of one layer and of two.

A token needs no matrix product. A program reads its part of the memory once (twice for two layers), computes in fp32,
and writes it once. G rows and heads, K key dim, X hidden dim, V value dim. See ``reference``.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled
from memlm_kernels.neural_memory.deep_kernels import TILES, activate, output_error, slope


@triton.jit
def load_vector(x, g, i, size: tl.constexpr):
    """[size, 1], in fp32"""
    return tl.load(x + g * size + i, mask=i < size, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_scalars(C, beta, f, P, m, g):
    """c, p, beta, f and m of a chunk of one token; without momentum p, f and m are not used."""
    b_c, b_beta = tl.load(C + g), tl.load(beta + g)
    b_p = b_c
    b_f = b_beta
    b_m = b_beta
    if f is not None:
        b_p, b_f, b_m = tl.load(P + g), tl.load(f + g), tl.load(m + g)
    return b_c, b_p, b_beta, b_f, b_m


@tiled(TILES)
@triton.jit(do_not_specialize=["G"])
def memory_step(
    q,
    k,
    v,
    C,
    beta,
    f,
    P,
    m,
    opens_document,
    opens_chunk,
    W,
    S,
    anchor,
    initial,
    out,
    squares,
    last_W,
    last_S,
    last_anchor,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """squares: [tiles of V, G]; anchor: None if the token starts a chunk in a document that continues"""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, g = program % tiles, program // tiles
    i_k, i_v = tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    new = False
    opened = False
    if opens_document is not None:
        new = tl.load(opens_document + g) != 0
        opened = tl.load(opens_chunk + g) != 0
    b_k = load_vector(k, g, i_k, K)
    b_W, b_A = entered(W, anchor, initial, new, opened, g, i_k, i_v, K, V)
    store_tile(last_anchor, b_A, g * K, i_k, i_v, i_k < K, V)
    b_e = tl.sum(b_A * b_k, 0)[None, :] - tl.trans(load_vector(v, g, i_v, V))
    tl.store(squares + tile * G + g, tl.sum(b_e * b_e))
    b_c, b_p, b_beta, b_f, b_m = load_scalars(C, beta, f, P, m, g)
    b_W = stepped(b_W, S, last_W, last_S, b_k * b_e, b_c, b_p, b_beta, b_f, b_m, new, g, i_k, i_v, K, V)
    b_o = tl.sum(b_W * load_vector(q, g, i_k, K), 0)
    tl.store(out + g * V + i_v, b_o, mask=i_v < V)


@tiled(TILES)
@triton.jit(do_not_specialize=["G"])
def deep_step(
    q,
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
    opens_chunk,
    W_1,
    S_1,
    A_1,
    W_2,
    S_2,
    A_2,
    initial_1,
    initial_2,
    out,
    surprise,
    last_W_1,
    last_S_1,
    last_A_1,
    last_W_2,
    last_S_2,
    last_A_2,
    G,
    K: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """One token of each row and head; A_*: None if the token starts a chunk in a document that continues."""
    g = tl.program_id(0).to(tl.int64)
    i_k, i_v = tl.arange(0, BK), tl.arange(0, BV)
    keys = i_k < K
    new = False
    opened = False
    if opens_document is not None:
        new = tl.load(opens_document + g) != 0
        opened = tl.load(opens_chunk + g) != 0
    b_q, b_k, b_v = load_vector(q, g, i_k, K), load_vector(k, g, i_k, K), load_vector(v, g, i_v, V)
    b_c, b_p, b_beta, b_f, b_m = load_scalars(C, beta, f, P, m, g)
    b_made = tl.zeros([BV, 1], tl.float32)
    for j in range((X + BX - 1) // BX):
        i_x = j * BX + tl.arange(0, BX)
        b_A = entered(W_1, A_1, initial_1, new, opened, g, i_k, i_x, K, X)[1]
        b_h = tl.sum(b_A * b_k, 0)[:, None]
        b_A = entered(W_2, A_2, initial_2, new, opened, g, i_x, i_v, X, V)[1]
        b_made += tl.sum(b_A * activate(b_h, SILU), 0)[:, None]
    b_e = output_error(b_made, b_k, b_v, gain, bias, g, i_v, V, EPS)
    b_out = tl.zeros([BV, 1], tl.float32)
    squares = 0.0
    for j in range((X + BX - 1) // BX):
        i_x = j * BX + tl.arange(0, BX)
        b_W, b_A = entered(W_1, A_1, initial_1, new, opened, g, i_k, i_x, K, X)
        b_h = tl.sum(b_A * b_k, 0)[:, None]
        store_tile(last_A_1, b_A, g * K, i_k, i_x, keys, X)
        b_W2, b_A = entered(W_2, A_2, initial_2, new, opened, g, i_x, i_v, X, V)
        store_tile(last_A_2, b_A, g * X, i_x, i_v, i_x < X, V)
        b_a = activate(b_h, SILU)
        b_e1 = tl.sum(b_A * tl.trans(b_e), 1)[:, None] * slope(b_h, SILU)
        squares += tl.sum(b_k * b_k) * tl.sum(b_e1 * b_e1) + tl.sum(b_a * b_a) * tl.sum(b_e * b_e)
        b_W = stepped(
            b_W, S_1, last_W_1, last_S_1, b_k * tl.trans(b_e1), b_c, b_p, b_beta, b_f, b_m, new, g, i_k, i_x, K, X
        )
        b_W2 = stepped(
            b_W2, S_2, last_W_2, last_S_2, b_a * tl.trans(b_e), b_c, b_p, b_beta, b_f, b_m, new, g, i_x, i_v, X, V
        )
        b_x = activate(tl.sum(b_W * b_q, 0)[:, None], SILU)
        b_out += tl.sum(b_W2 * b_x, 0)[:, None]
    store_tile(out, tl.trans(b_out), g, tl.arange(0, 1), i_v, tl.arange(0, 1) < 1, V)
    tl.store(surprise + g, tl.sqrt(squares))


@triton.jit
def entered(W, A, initial, new, opened, g, rows, columns, height: tl.constexpr, width: tl.constexpr):
    """Some columns of a layer's memory and anchor before a token."""
    b_W = load_tile(W, g * height, rows, columns, rows < height, width)
    b_A = b_W
    if A is not None:
        b_initial = load_tile(initial, g * height, rows, columns, rows < tl.where(new, height, 0), width)
        b_W = tl.where(new, b_initial, b_W)
        b_A = load_tile(A, g * height, rows, columns, rows < tl.where(opened, 0, height), width)
        b_A = tl.where(opened, b_W, b_A)
    return b_W, b_A


@triton.jit
def stepped(
    b_W,
    S,
    last_W,
    last_S,
    b_gradient,
    b_c,
    b_p,
    b_beta,
    b_f,
    b_m,
    new,
    g,
    rows,
    columns,
    height: tl.constexpr,
    width: tl.constexpr,
):
    """Store and return some columns of a layer after the token."""
    inside = rows < height
    b_W = b_W * b_beta - b_gradient * b_c
    if S is not None:
        b_S = load_tile(S, g * height, rows, columns, rows < tl.where(new, 0, height), width)
        b_W += b_S * b_f
        store_tile(last_S, b_S * b_m - b_gradient * b_p, g * height, rows, columns, inside, width)
    store_tile(last_W, b_W, g * height, rows, columns, inside, width)
    return b_W
