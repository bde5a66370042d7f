"""Triton: a tile of rows has one group, so its product reads that group's matrix as it is.

N rows, G groups; a matrix maps X channels to Y channels, or D to OUT.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

# 64 rows: a warp has 16 of them.
_ROWS = [
    [{"BX": 64, "BY": 128, "num_warps": 4, "num_stages": 3}, {"BX": 32, "BY": 64, "num_warps": 4, "num_stages": 3}],
    [{"BX": 32, "BY": 128, "num_warps": 4, "num_stages": 2}, {"BX": 32, "BY": 64, "num_warps": 4, "num_stages": 2}],
]
# Tiles of a matrix that few rows meet: small, so that a small matrix fills a GPU, and loaded ahead.
_MAPS = [
    [{"BO": 16, "BD": 128, "num_warps": 4, "num_stages": 3}, {"BO": 32, "BD": 64, "num_warps": 4, "num_stages": 3}],
    [{"BO": 16, "BD": 128, "num_warps": 4, "num_stages": 2}, {"BO": 32, "BD": 64, "num_warps": 4, "num_stages": 2}],
]
_WEIGHTS = [
    [
        {"BX": 128, "BY": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
        {"BX": 64, "BY": 64, "BN": 32, "num_warps": 4, "num_stages": 3},
    ],
    [
        {"BX": 128, "BY": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
        {"BX": 64, "BY": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
    ],
]


@tiled(*_ROWS)
@triton.jit
def rows_forward(
    x,
    weight,
    tiles,
    groups,
    y,
    X: tl.constexpr,
    Y: tl.constexpr,
    OF_X: tl.constexpr,
    OF_Y: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
):
    """Some channels of y, for a tile of rows.

    tiles: [tiles, 2], the first row of each and the end of its group; groups: [tiles]
    OF_X, OF_Y: elements of a matrix from one channel of x, of y, to the next
    """
    program = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = (Y + BY - 1) // BY
    part, n = program % parts, program // parts
    start, end = tl.load(tiles + 2 * n), tl.load(tiles + 2 * n + 1)
    matrix = weight + tl.load(groups + n).to(tl.int64) * (X * Y)
    i_n, i_x = tl.arange(0, BN), tl.arange(0, BX)
    i_y = (part * BY).to(tl.int32) + tl.arange(0, BY)
    live = start + i_n < end
    b_y = tl.zeros([BN, BY], tl.float32)
    for _ in range((X + BX - 1) // BX):
        b_x = load_tile(x, start, i_n, i_x, live, X)
        inside = (i_x < X)[:, None] & (i_y < Y)[None, :]
        b_w = tl.load(matrix + (i_x[:, None] * OF_X + i_y[None, :] * OF_Y), mask=inside, other=0.0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
        i_x += BX
    store_tile(y, b_y, start, i_n, i_y, live, Y)


@triton.jit
def map_part(
    x, weight, bias, y, start, part, N, OUT: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some channels of y = x weight^T + bias, for BN rows."""
    i_n, i_d = tl.arange(0, BN), tl.arange(0, BD)
    i_o = part * BO + tl.arange(0, BO)
    live, of_o = start + i_n < N, i_o < OUT
    b_y = tl.zeros([BN, BO], tl.float32)
    for _ in range((D + BD - 1) // BD):
        b_x = load_tile(x, start, i_n, i_d, live, D)
        b_w = load_tile(weight, start * 0, i_o, i_d, of_o, D)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
        i_d += BD
    if bias is not None:
        b_y += tl.load(bias + i_o, mask=of_o, other=0.0).to(tl.float32)[None, :]
    store_tile(y, b_y, start, i_n, i_o, live, OUT)


@tiled(*_MAPS)
@triton.jit(do_not_specialize=["N"])
def maps_forward(
    x, weight0, weight1, weight2, weight3, bias0, bias1, bias2, bias3, y0, y1, y2, y3, N,
    O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, O3: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The outputs of up to four maps; a matrix that is not given has no channels."""
    end0: tl.constexpr = (O0 + BO - 1) // BO
    end1: tl.constexpr = end0 + (O1 + BO - 1) // BO
    end2: tl.constexpr = end1 + (O2 + BO - 1) // BO
    parts: tl.constexpr = end2 + (O3 + BO - 1) // BO
    program = tl.program_id(0)
    part, start = program % parts, (program // parts).to(tl.int64) * BN
    if part < end0:
        map_part(x, weight0, bias0, y0, start, part, N, O0, D, BN, BO, BD, PRECISION)
    if O1 > 0:  # noqa: SIM102
        if (part >= end0) & (part < end1):
            map_part(x, weight1, bias1, y1, start, part - end0, N, O1, D, BN, BO, BD, PRECISION)
    if O2 > 0:  # noqa: SIM102
        if (part >= end1) & (part < end2):
            map_part(x, weight2, bias2, y2, start, part - end1, N, O2, D, BN, BO, BD, PRECISION)
    if O3 > 0:  # noqa: SIM102
        if part >= end2:
            map_part(x, weight3, bias3, y3, start, part - end2, N, O3, D, BN, BO, BD, PRECISION)


@tiled(*_WEIGHTS)
@triton.jit
def weights_backward(
    d_y,
    x,
    ends,
    d_weight,
    X: tl.constexpr,
    Y: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of some channels of a group's matrix [Y, X], a sum over the group's rows in their order."""
    program = tl.program_id(0).to(tl.int64)
    of_x: tl.constexpr = (X + BX - 1) // BX
    of_y: tl.constexpr = (Y + BY - 1) // BY
    g = program // (of_x * of_y)
    i_n = tl.arange(0, BN)
    i_x = (program % of_x * BX).to(tl.int32) + tl.arange(0, BX)
    i_y = (program // of_x % of_y * BY).to(tl.int32) + tl.arange(0, BY)
    end = tl.load(ends + g)
    start = end * 0
    if g > 0:
        start += tl.load(ends + g - 1)
    b_w = tl.zeros([BY, BX], tl.float32)
    for n in range(start, end, BN):
        live = n + i_n < end
        b_d = load_tile(d_y, n, i_n, i_y, live, Y)
        b_x = load_tile(x, n, i_n, i_x, live, X)
        b_w = tl.dot(tl.trans(b_d), b_x, b_w, input_precision=PRECISION)
    store_tile(d_weight, b_w, g * Y, i_y, i_x, i_y < Y, X)
