"""Gradients of the short convolution in Triton. A program computes the pre-activations of a tile's tokens and of the
W - 1 tokens after it again, so each tensor moves once; gradients of weights are sums per program, which torch adds up.

Names are those of ``kernels``.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import tiled
from memlm_kernels.short_convolution.kernels import TILES, places, seen, sums, tap


@triton.jit
def d_sums(
    x,
    state,
    weight,
    positions,
    d_y,
    row,
    t,
    i_t,
    i_c,
    of_c,
    T,
    C: tl.constexpr,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    ALL: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """[BT, BC]: the gradient of the convolution before SiLU, 0 outside the row."""
    inside = ((t + i_t >= 0) & (t + i_t < T))[:, None] & of_c[None, :]
    b_d = tl.load(d_y + (row * T + t) * C + (i_t[:, None] * C + i_c[None, :]), mask=inside, other=0.0).to(tl.float32)
    if FACTOR != 1.0:
        b_d = b_d * FACTOR
    if SILU or UNIT:
        b_p = places(positions, row, t, i_t, T, W)
        b_a = sums(x, state, weight, b_p, row, t, i_t, i_c, of_c, T, S, FIRST, ALL, W)
        b_s = b_a
        if SILU:
            b_s = b_a * tl.sigmoid(b_a)
        if UNIT:
            b_r = tl.rsqrt(tl.maximum(tl.sum(b_s * b_s, 1) + EPS, 1e-24))[:, None]
            b_u = b_s * b_r
            b_d = b_r * (b_d - b_u * tl.sum(b_u * b_d, 1)[:, None])
        if SILU:
            b_open = tl.sigmoid(b_a)
            b_d = b_d * b_open * (1.0 + b_a * (1.0 - b_open))
    return b_d


@triton.jit
def of_part_backward(
    x,
    state,
    weight,
    positions,
    d_y,
    d_x,
    d_state,
    d_weight,
    row,
    begin,
    end,
    part,
    tile,
    T,
    C: tl.constexpr,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    ALL: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    STEP: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    i_t, i, i_w = tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, BW)
    i_c = tile * STEP + i
    of_c = (i < STEP) & (i_c < C)
    b_dw = tl.zeros([BW, BC], tl.float32)
    for t in range(begin, end, BT):
        b_d = d_sums(
            x, state, weight, positions, d_y, row, t, i_t, i_c, of_c, T, C, S, FIRST, ALL, W, SILU, UNIT, EPS, FACTOR
        )
        b_dx = b_d * tap(weight, i_c, of_c, 0, FIRST, W)[None, :]
        b_p = places(positions, row, t, i_t, T, W)
        # Tokens of the next program are not this one's.
        b_d = tl.where((t + i_t < end)[:, None], b_d, 0.0)
        for back in range(W):
            b_x = seen(x, state, b_p, row, t, i_t, i_c, of_c, back, T, S, FIRST, ALL, W)
            b_dw += tl.where((i_w == W - 1 - back)[:, None], tl.sum(b_d * b_x, 0)[None, :], 0.0)
        # Not unrolled: each step needs many registers.
        for j in range(1, W):
            b_d = d_sums(
                x,
                state,
                weight,
                positions,
                d_y,
                row,
                t + j,
                i_t,
                i_c,
                of_c,
                T,
                C,
                S,
                FIRST,
                ALL,
                W,
                SILU,
                UNIT,
                EPS,
                FACTOR,
            )
            b_p = places(positions, row, t + j, i_t, T, W)
            b_dx += tl.where((b_p >= j)[:, None], b_d, 0.0) * tap(weight, i_c, of_c, j, FIRST, W)[None, :]
        mine = t + i_t < end
        inside = (mine & (t + i_t >= 0))[:, None] & of_c[None, :]
        place = d_x + (row * T + t) * C + (i_t[:, None] * C + i_c[None, :])
        tl.store(place, b_dx.to(d_x.dtype.element_ty), mask=inside)
        if d_state is not None:
            before = (mine & (t + i_t < 0))[:, None] & of_c[None, :]
            place = d_state + (row * (W - 1) + t + W - 1) * ALL + FIRST + (i_t[:, None] * ALL + i_c[None, :])
            tl.store(place, b_dx.to(d_state.dtype.element_ty), mask=before)
    place = d_weight + (part * ALL + FIRST + i_c[None, :]) * W + i_w[:, None]
    tl.store(place, b_dw, mask=(i_w < W)[:, None] & of_c[None, :])


# More tokens or fewer warps spill on sm_100.
@tiled(TILES, sm_100=[{"BT": 8, "num_warps": 8, "num_stages": 1}])
@triton.jit(do_not_specialize=["T", "FIRST", "SPAN"])
def convolve_backward(
    x0,
    x1,
    x2,
    state,
    weight,
    positions,
    d_y0,
    d_y1,
    d_y2,
    d_x0,
    d_x1,
    d_x2,
    d_state,
    d_weight,
    T,
    FIRST,
    SPAN,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """Gradients of SPAN tokens, and their sum for weight; FIRST: the first token, negative for tokens of the state."""
    program = tl.program_id(0).to(tl.int64)
    step0: tl.constexpr = K if UNIT > 0 else BC
    step1: tl.constexpr = K if UNIT > 1 else BC
    step2: tl.constexpr = K if UNIT > 2 else BC
    end0: tl.constexpr = (C0 + step0 - 1) // step0
    end1: tl.constexpr = end0 + (C1 + step1 - 1) // step1
    tiles: tl.constexpr = end1 + (C2 + step2 - 1) // step2
    ALL: tl.constexpr = C0 + C1 + C2
    tile, part = (program % tiles).to(tl.int32), program // tiles
    blocks = (T - FIRST + SPAN - 1) // SPAN
    begin, row = (FIRST + part % blocks * SPAN).to(tl.int32), part // blocks
    end = tl.minimum(begin + SPAN, T)
    if tile < end0:
        of_part_backward(
            x0,
            state,
            weight,
            positions,
            d_y0,
            d_x0,
            d_state,
            d_weight,
            row,
            begin,
            end,
            part,
            tile,
            T,
            C0,
            S0,
            0,
            ALL,
            W,
            SILU,
            UNIT > 0,
            EPS,
            FACTOR,
            step0,
            BW,
            BC,
            BT,
        )
    if C1 > 0:  # noqa: SIM102
        if (tile >= end0) & (tile < end1):
            of_part_backward(
                x1,
                state,
                weight,
                positions,
                d_y1,
                d_x1,
                d_state,
                d_weight,
                row,
                begin,
                end,
                part,
                tile - end0,
                T,
                C1,
                S1,
                C0,
                ALL,
                W,
                SILU,
                UNIT > 1,
                EPS,
                1.0,
                step1,
                BW,
                BC,
                BT,
            )
    if C2 > 0:  # noqa: SIM102
        if tile >= end1:
            of_part_backward(
                x2,
                state,
                weight,
                positions,
                d_y2,
                d_x2,
                d_state,
                d_weight,
                row,
                begin,
                end,
                part,
                tile - end1,
                T,
                C2,
                S2,
                C0 + C1,
                ALL,
                W,
                SILU,
                UNIT > 2,
                EPS,
                1.0,
                step2,
                BW,
                BC,
                BT,
            )
