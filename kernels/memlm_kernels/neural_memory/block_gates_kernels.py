"""Triton kernels of the gradients of a memory's gates, in blocks; see ``block_kernels`` for the terms."""

import triton
import triton.language as tl

from memlm_kernels.launch import decay_between, load_tile, part_of, tiled
from memlm_kernels.neural_memory.block_kernels import SIZES, anchors, block_at, load_logs, load_rate, lower_decay


@triton.jit
def of_logs(b_z):
    """The gradient of each logarithm x_j, where b_z[r, i] is the gradient of exp of the sum of x over i < j <= r,
    times itself: the sum of b_z over i < j <= r. Each of these terms has the factor exp x_j, by which the caller
    divides; a difference of other sums would lose all digits where that is near 0.
    """
    i = tl.arange(0, b_z.shape[0])
    return tl.sum(tl.where(i[:, None] > i[None, :], tl.cumsum(b_z, 0, reverse=True), 0.0), 1)


@triton.jit
def through_anchors(
    d_rates, base, rows, which: tl.constexpr, inside, opener, n, CHUNK, CHUNKS: tl.constexpr, BT: tl.constexpr
):
    """The gradient of beta (0) or f (1) of each token, with those of the tokens that have it at their anchor."""
    b_out = load_rate(d_rates, base, rows, which, inside)
    if CHUNKS > 1:
        b_of_anchors = load_rate(d_rates, base, rows, which + 5, inside)
        b_out += tl.sum(tl.where(anchors(opener, n, CHUNK, BT), b_of_anchors[:, None], 0.0), 0)
    return b_out


@triton.jit
def load_dC(d_C, program, d_rates, base, rows, inside, last, BT: tl.constexpr):
    """The gradient of C, with that of its last token's row."""
    i_t = tl.arange(0, BT)
    b_dC = load_tile(d_C, program * BT, i_t, i_t, i_t < BT, BT)
    return b_dC + tl.where(last, load_rate(d_rates, base, rows, 3, inside)[None, :], 0.0)


# Two kernels for the gates: one would hold twice as many tiles in registers.
@tiled([{"num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_gates_backward(
    lr,
    momentum,
    decay,
    rates,
    table,
    d_rates,
    d_C,
    d_lr,
    d_momentum,
    T,
    N,
    CHUNK,
    H: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradients of a block's rates and momenta, from those of C and of ``rates``.

    With L and C below the diagonal alone and G = L^T dC + dC, those of log momentum are sums over the tokens behind of
    m (dm + df + L^T df), and sums over the pairs on both sides of lr E * G.
    """
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end, opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    last = i_t[:, None] == end - start - 1
    b_dC = load_dC(d_C, program, d_rates, base, rows, inside, last, BT)
    _b_m, b_g = load_logs(None, decay, base, rows, inside)
    b_L = lower_decay(b_g, BT)
    if momentum is None:
        tl.store(d_lr + base + rows, tl.sum(tl.where(i_t[:, None] == i_t[None, :], b_dC, b_dC * b_L), 0), mask=inside)
    else:
        b_of_f = through_anchors(d_rates, base, rows, 1, inside, opener, n, CHUNK, CHUNKS, BT)
        b_of_S = load_rate(rates, base, rows, 2, inside)
        b_of_m = (tl.sum(b_L * b_of_f[:, None], 0) + b_of_f + load_rate(d_rates, base, rows, 2, inside)) * b_of_S
        b_G = tl.dot(tl.trans(b_L), b_dC, input_precision=PRECISION) + b_dC
        b_m, _b_g = load_logs(momentum, None, base, rows, inside)
        b_G = (b_G + tl.where(last, load_rate(d_rates, base, rows, 4, inside)[None, :], 0.0)) * decay_between(b_m, BT)
        tl.store(d_lr + base + rows, tl.sum(b_G, 0), mask=inside)
        b_lr = tl.load(lr + base + rows, mask=inside, other=0.0)
        b_of_m = tl.cumsum(b_of_m, 0, reverse=True) + of_logs(b_G * b_lr[None, :])
        tl.store(d_momentum + base + rows, b_of_m * tl.exp(-b_m), mask=inside)


@tiled([{"num_warps": 4, "num_stages": 1}], sm_80=[{"num_warps": 8, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_decay_backward(
    lr,
    momentum,
    decay,
    rates,
    table,
    d_rates,
    d_C,
    d_decay,
    T,
    N,
    CHUNK,
    H: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradients of a block's decays, from those of C and of ``rates``.

    With L and C below the diagonal alone and M = dC (lr E)^T, those of log (1 - decay) are sums over the tokens behind
    of beta d beta, and sums over the pairs on both sides of L * (M + df m^T).
    """
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end, opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    last = i_t[:, None] == end - start - 1
    b_M = load_dC(d_C, program, d_rates, base, rows, inside, last, BT)
    b_m, b_g = load_logs(momentum, decay, base, rows, inside)
    b_lr = tl.load(lr + base + rows, mask=inside, other=0.0)
    if momentum is None:
        b_M *= b_lr[None, :]
    else:
        b_M = tl.dot(b_M, tl.trans(decay_between(b_m, BT) * b_lr[None, :]), input_precision=PRECISION)
        b_of_f = through_anchors(d_rates, base, rows, 1, inside, opener, n, CHUNK, CHUNKS, BT)
        b_M += b_of_f[:, None] * load_rate(rates, base, rows, 2, inside)[None, :]
    b_of_g = of_logs(lower_decay(b_g, BT) * b_M)
    b_of_beta = through_anchors(d_rates, base, rows, 0, inside, opener, n, CHUNK, CHUNKS, BT)
    b_of_g += tl.cumsum(b_of_beta * load_rate(rates, base, rows, 0, inside), 0, reverse=True)
    tl.store(d_decay + base + rows, -b_of_g * tl.exp(-b_g), mask=inside)
