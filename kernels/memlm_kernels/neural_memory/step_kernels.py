"""Decoding in Triton: one token of each row and head in one kernel, for memories of one layer and of two.

A token needs no matrix product and no scalars of a chunk: it is the op's recurrence itself. A program reads its part
of the memory once (twice for two layers), computes in fp32, and writes it once. B rows, G rows and heads, H heads, K
key dim, X hidden dim, V value dim.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled
from memlm_kernels.neural_memory.deep_kernels import activate, load_tail, normalised, output_error, slope

_SIZES = ["H", "of_keys", "of_values", "of_gates", "of_memory", "chunk_size"]
TILES, TILES_HIP = [{"num_warps": 4, "num_stages": 2}], [{"num_warps": 4, "num_stages": 1}]


@triton.jit
def load_vector(x, place, i, size: tl.constexpr):
    """[size, 1], in fp32"""
    return tl.load(x + place + i, mask=i < size, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_gates(lr, momentum, decay, place):
    """lr, momentum and 1 - decay; without momentum that is not used."""
    b_lr = tl.load(lr + place).to(tl.float32)
    b_momentum = b_lr
    b_keep = b_lr * 0.0 + 1.0
    if momentum is not None:
        b_momentum = tl.load(momentum + place).to(tl.float32)
    if decay is not None:
        b_keep -= tl.load(decay + place).to(tl.float32)
    return b_lr, b_momentum, b_keep


@triton.jit
def place_of(position, after, real, initial, first, row, chunk_size, TOLD: tl.constexpr):
    """Whether a row's token starts at ``initial``, whether it opens a chunk, and whether it is one, not padding.
    The ``first`` program of a row stores the position after it.
    """
    new = False
    opens = False
    there = True
    at = tl.load(position + row)
    if not TOLD:
        opens = at % chunk_size == 0
        if initial is not None:
            new = at == 0
    if real is not None:
        there = tl.load(real + row) != 0
        new = new & there
        opens = opens & there
    tl.store(after + row, tl.where(there, at + 1, at), mask=first)
    return new, opens, there


@tiled(TILES, TILES_HIP)
@triton.jit(do_not_specialize=_SIZES)
def memory_step(
    q,
    k,
    v,
    lr,
    momentum,
    decay,
    position,
    real,
    W,
    S,
    A,
    initial,
    out,
    after,
    squares,
    last_W,
    last_S,
    last_A,
    H,
    of_keys,
    of_values,
    of_gates,
    of_memory,
    chunk_size,
    TOLD: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One token of a row and head, and some columns of its memory.

    position: [B]; at 0 the memory is ``initial`` [H, K, V], if given. TOLD: the token continues a document, and opens
        a chunk if A is None. real: [B], 0 for padding; None: all are real
    after: [B], the position after the token
    of_keys, of_values, of_gates: elements from a row of q and k, of v, and of the gates to the next; of_memory:
        matrices from a row of W, S and A to the next
    squares: [G, tiles of V], squares of the gradient's norm
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, g = program % tiles, program // tiles
    row, h = g // H, g % H
    m = row * of_memory + h
    i_k, i_v = tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    first = (tile == 0) & (h == 0)
    new, opens, there = place_of(position, after, real, initial, first, row, chunk_size, TOLD)
    b_k = load_vector(k, row * of_keys + h * K, i_k, K)
    b_W, b_A = entered(W, A, initial, new, opens, m, h, i_k, i_v, K, V)
    store_tile(last_A, b_A, m * K, i_k, i_v, i_k < K, V)
    b_e = tl.sum(b_A * b_k, 0)[None, :] - tl.trans(load_vector(v, row * of_values + h * V, i_v, V))
    if squares is not None:
        tl.store(squares + program, tl.where(there, tl.sum(b_e * b_e) * tl.sum(b_k * b_k), 0.0))
    b_lr, b_momentum, b_keep = load_gates(lr, momentum, decay, row * of_gates + h)
    b_W = stepped(b_W, S, last_W, last_S, b_k * b_e, b_lr, b_momentum, b_keep, new, there, m, i_k, i_v, K, V)
    b_o = tl.sum(b_W * load_vector(q, row * of_keys + h * K, i_k, K), 0)
    tl.store(out + g * V + i_v, tl.where(there, b_o, 0.0).to(out.dtype.element_ty), mask=i_v < V)


@tiled(TILES, TILES_HIP)
@triton.jit(do_not_specialize=_SIZES)
def deep_step(
    q,
    k,
    v,
    lr,
    momentum,
    decay,
    position,
    real,
    gain,
    bias,
    W_1,
    S_1,
    A_1,
    W_2,
    S_2,
    A_2,
    initial_1,
    initial_2,
    out,
    after,
    squares,
    last_W_1,
    last_S_1,
    last_A_1,
    last_W_2,
    last_S_2,
    last_A_2,
    H,
    of_keys,
    of_values,
    of_gates,
    of_memory,
    chunk_size,
    TOLD: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """One token of a row and head, and both layers; the arguments are as in ``memory_step``."""
    g = tl.program_id(0).to(tl.int64)
    row, h = g // H, g % H
    m = row * of_memory + h
    i_k, i_v = tl.arange(0, BK), tl.arange(0, BV)
    keys = i_k < K
    new, opens, there = place_of(position, after, real, initial_1, h == 0, row, chunk_size, TOLD)
    at = row * of_keys + h * K
    b_q, b_k = load_vector(q, at, i_k, K), load_vector(k, at, i_k, K)
    b_v = load_vector(v, row * of_values + h * V, i_v, V)
    b_lr, b_momentum, b_keep = load_gates(lr, momentum, decay, row * of_gates + h)
    b_made = tl.zeros([BV, 1], tl.float32)
    for j in range((X + BX - 1) // BX):
        i_x = j * BX + tl.arange(0, BX)
        b_A = entered(W_1, A_1, initial_1, new, opens, m, h, i_k, i_x, K, X)[1]
        b_h = tl.sum(b_A * b_k, 0)[:, None]
        b_A = entered(W_2, A_2, initial_2, new, opens, m, h, i_x, i_v, X, V)[1]
        b_made += tl.sum(b_A * activate(b_h, SILU), 0)[:, None]
    b_e = output_error(b_made, b_k, b_v, gain, bias, h, i_v, V, EPS)
    b_out = tl.zeros([BV, 1], tl.float32)
    b_squares = 0.0
    for j in range((X + BX - 1) // BX):
        i_x = j * BX + tl.arange(0, BX)
        b_W, b_A = entered(W_1, A_1, initial_1, new, opens, m, h, i_k, i_x, K, X)
        b_h = tl.sum(b_A * b_k, 0)[:, None]
        store_tile(last_A_1, b_A, m * K, i_k, i_x, keys, X)
        b_W2, b_A = entered(W_2, A_2, initial_2, new, opens, m, h, i_x, i_v, X, V)
        store_tile(last_A_2, b_A, m * X, i_x, i_v, i_x < X, V)
        b_a = activate(b_h, SILU)
        b_e1 = tl.sum(b_A * tl.trans(b_e), 1)[:, None] * slope(b_h, SILU)
        b_squares += tl.sum(b_k * b_k) * tl.sum(b_e1 * b_e1) + tl.sum(b_a * b_a) * tl.sum(b_e * b_e)
        b_g = b_k * tl.trans(b_e1)
        b_W = stepped(b_W, S_1, last_W_1, last_S_1, b_g, b_lr, b_momentum, b_keep, new, there, m, i_k, i_x, K, X)
        b_g = b_a * tl.trans(b_e)
        b_W2 = stepped(b_W2, S_2, last_W_2, last_S_2, b_g, b_lr, b_momentum, b_keep, new, there, m, i_x, i_v, X, V)
        b_x = activate(tl.sum(b_W * b_q, 0)[:, None], SILU)
        b_out += tl.sum(b_W2 * b_x, 0)[:, None]
    if gain is not None:
        # K equals V, so the tiles of both are equal.
        b_out = b_q + normalised(b_out, i_v, V, EPS)[0] * load_tail(gain, h, i_v, V) + load_tail(bias, h, i_v, V)
    b_out = tl.where(there, b_out, 0.0)
    store_tile(out, tl.trans(b_out), g, tl.arange(0, 1), i_v, tl.arange(0, 1) < 1, V)
    if squares is not None:
        tl.store(squares + g, tl.where(there, b_squares, 0.0))


@triton.jit
def entered(W, A, initial, new, opens, m, h, rows, columns, height: tl.constexpr, width: tl.constexpr):
    """Some columns of a layer's memory and anchor before a token."""
    b_W = load_tile(W, m * height, rows, columns, rows < tl.where(new, 0, height), width)
    if initial is not None:
        b_W += load_tile(initial, h * height, rows, columns, rows < tl.where(new, height, 0), width)
    b_A = b_W
    if A is not None:
        b_A = load_tile(A, m * height, rows, columns, rows < tl.where(opens, 0, height), width)
        b_A = tl.where(opens, b_W, b_A)
    return b_W, b_A


@triton.jit
def stepped(
    b_W,
    S,
    last_W,
    last_S,
    b_gradient,
    b_lr,
    b_momentum,
    b_keep,
    new,
    there,
    m,
    rows,
    columns,
    height: tl.constexpr,
    width: tl.constexpr,
):
    """Store and return some columns of a layer after the token."""
    inside = rows < height
    b_new = b_W * b_keep - b_gradient * b_lr
    if S is not None:
        b_S = load_tile(S, m * height, rows, columns, rows < tl.where(new, 0, height), width)
        b_new += b_S * b_momentum
        b_S = tl.where(there, b_S * b_momentum - b_gradient * b_lr, b_S)
        store_tile(last_S, b_S, m * height, rows, columns, inside, width)
    b_W = tl.where(there, b_new, b_W)
    store_tile(last_W, b_W, m * height, rows, columns, inside, width)
    return b_W
