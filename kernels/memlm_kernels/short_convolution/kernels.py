"""The short convolution in Triton. A program has some channels of one part: one head where heads get unit length.

T tokens of a row, W taps, C0, C1, C2 channels of the parts, ALL of all together, S0, S1, S2 the distance between
tokens in the inputs of the parts, K channels of a head, UNIT parts with unit length, FACTOR of the first part.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import tiled

TILES = [
    {"BT": 32, "num_warps": 4, "num_stages": 1},
    {"BT": 64, "num_warps": 4, "num_stages": 1},
    {"BT": 16, "num_warps": 4, "num_stages": 1},
]


@triton.jit
def seen(
    x,
    state,
    b_p,
    row,
    t,
    i_t,
    i_c,
    of_c,
    back,
    T,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    ALL: tl.constexpr,
    W: tl.constexpr,
):
    """[BT, BC] in fp32: the inputs ``back`` places before tokens t + i_t, 0 where the document has none."""
    b_s = t + i_t - back
    there = (t + i_t >= 0) & (t + i_t < T) & (b_p >= back)
    i = i_t[:, None]
    inside = (there & (b_s >= 0))[:, None] & of_c[None, :]
    b_x = tl.load(x + (row * T + t - back) * S + (i * S + i_c[None, :]), mask=inside, other=0.0).to(tl.float32)
    if state is not None:
        before = (there & (b_s < 0))[:, None] & of_c[None, :]
        place = state + (row * (W - 1) + t - back + W - 1) * ALL + FIRST
        b_x += tl.load(place + (i * ALL + i_c[None, :]), mask=before, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def places(positions, row, t, i_t, T, W: tl.constexpr):
    """Positions of tokens t + i_t in their documents; without positions, all are far from the start."""
    b_p = i_t * 0 + W
    if positions is not None:
        inside = (t + i_t >= 0) & (t + i_t < T)
        b_p = tl.minimum(tl.load(positions + row * T + t + i_t, mask=inside, other=0), W).to(tl.int32)
    return b_p


@triton.jit
def tap(weight, i_c, of_c, back, FIRST: tl.constexpr, W: tl.constexpr):
    return tl.load(weight + (FIRST + i_c) * W + (W - 1 - back), mask=of_c, other=0.0).to(tl.float32)


@triton.jit
def sums(
    x,
    state,
    weight,
    b_p,
    row,
    t,
    i_t,
    i_c,
    of_c,
    T,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    ALL: tl.constexpr,
    W: tl.constexpr,
):
    """[BT, BC]: the convolution before SiLU."""
    b_a = seen(x, state, b_p, row, t, i_t, i_c, of_c, 0, T, S, FIRST, ALL, W) * tap(weight, i_c, of_c, 0, FIRST, W)
    for back in tl.static_range(1, W):
        b_x = seen(x, state, b_p, row, t, i_t, i_c, of_c, back, T, S, FIRST, ALL, W)
        b_a += b_x * tap(weight, i_c, of_c, back, FIRST, W)[None, :]
    return b_a


@triton.jit
def of_part(
    x,
    state,
    weight,
    positions,
    y,
    last,
    row,
    t,
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
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    i_t, i = tl.arange(0, BT), tl.arange(0, BC)
    i_c = tile * STEP + i
    of_c = (i < STEP) & (i_c < C)
    b_p = places(positions, row, t, i_t, T, W)
    b_y = sums(x, state, weight, b_p, row, t, i_t, i_c, of_c, T, S, FIRST, ALL, W)
    if SILU:
        b_y = b_y * tl.sigmoid(b_y)
    if UNIT:
        b_y = b_y * tl.rsqrt(tl.maximum(tl.sum(b_y * b_y, 1) + EPS, 1e-24))[:, None]
    if FACTOR != 1.0:
        b_y = b_y * FACTOR
    place = y + (row * T + t) * C + (i_t[:, None] * C + i_c[None, :])
    tl.store(place, b_y.to(y.dtype.element_ty), mask=(t + i_t < T)[:, None] & of_c[None, :])
    if last is not None:
        for j in tl.static_range(0, W - 1):
            # The j-th of the last inputs, counted from the first token of the call.
            b_s = i * 0 + (T - (W - 1) + j)
            b_x = tl.load(x + (row * T + b_s) * S + i_c, mask=of_c & (b_s >= 0), other=0.0).to(last.dtype.element_ty)
            before = state + (row * (W - 1) + b_s + W - 1) * ALL + FIRST + i_c
            b_x += tl.load(before, mask=of_c & (b_s < 0), other=0.0).to(last.dtype.element_ty)
            tl.store(last + (row * (W - 1) + j) * ALL + FIRST + i_c, b_x, mask=of_c & (i * 0 + t == 0))


@tiled(TILES)
@triton.jit(do_not_specialize=["T"])
def convolve(
    x0,
    x1,
    x2,
    state,
    weight,
    positions,
    y0,
    y1,
    y2,
    last,
    T,
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
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """The parts y of BT tokens. last: [B, W - 1, ALL], the inputs before the next call's first token; None: not
    stored
    """
    program = tl.program_id(0).to(tl.int64)
    step0: tl.constexpr = K if UNIT > 0 else BC
    step1: tl.constexpr = K if UNIT > 1 else BC
    step2: tl.constexpr = K if UNIT > 2 else BC
    end0: tl.constexpr = (C0 + step0 - 1) // step0
    end1: tl.constexpr = end0 + (C1 + step1 - 1) // step1
    tiles: tl.constexpr = end1 + (C2 + step2 - 1) // step2
    ALL: tl.constexpr = C0 + C1 + C2
    tile, part = (program % tiles).to(tl.int32), program // tiles
    blocks = (T + BT - 1) // BT
    t, row = (part % blocks * BT).to(tl.int32), part // blocks
    if tile < end0:
        of_part(
            x0,
            state,
            weight,
            positions,
            y0,
            last,
            row,
            t,
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
            BC,
            BT,
        )
    if C1 > 0:  # noqa: SIM102
        if (tile >= end0) & (tile < end1):
            of_part(
                x1,
                state,
                weight,
                positions,
                y1,
                last,
                row,
                t,
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
                BC,
                BT,
            )
    if C2 > 0:  # noqa: SIM102
        if tile >= end1:
            of_part(
                x2,
                state,
                weight,
                positions,
                y2,
                last,
                row,
                t,
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
                BC,
                BT,
            )
