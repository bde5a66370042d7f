"""Triton: a tile of rows has one group, so its product reads that group's matrix as it is.

N rows, G groups; a matrix maps X channels to Y channels.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

# 64 rows: a warp has 16 of them.
_ROWS = [
    [{"BX": 64, "BY": 128, "num_warps": 4, "num_stages": 3}, {"BX": 32, "BY": 64, "num_warps": 4, "num_stages": 3}],
    [{"BX": 32, "BY": 128, "num_warps": 4, "num_stages": 2}, {"BX": 32, "BY": 64, "num_warps": 4, "num_stages": 2}],
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
