"""Copies of tokens to their places, and sums over these places, in Triton. A program has some tokens and all of their
places. A place belongs to one token, so no two programs write to the same place.

T tokens of a row, J choices of a token, F features of a token.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

_TILES = [
    {"BT": 8, "BF": 256, "num_warps": 4, "num_stages": 1},
    {"BT": 4, "BF": 512, "num_warps": 4, "num_stages": 1},
    {"BT": 16, "BF": 128, "num_warps": 4, "num_stages": 1},
]


@tiled(_TILES)
@triton.jit(do_not_specialize=["T"])
def spread(
    x,
    place,
    weight,
    o,
    rows,
    d_weight,
    T,
    J: tl.constexpr,
    F: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """Copy each token, times its weights, to its places; with o, also dot products of the token with the rows of o."""
    program = tl.program_id(0).to(tl.int64)
    tiles_t = (T + BT - 1) // BT
    t, row = program % tiles_t * BT, program // tiles_t
    i_t, i_j, i_f = tl.arange(0, BT), tl.arange(0, BJ), tl.arange(0, BF)
    real = t + i_t < T
    choice = (row * T + t + i_t) * J
    b_dot = tl.zeros([BT, BJ], tl.float32)
    for f in range(0, F, BF):
        b_x = load_tile(x, row * T + t, i_t, f + i_f, real, F)
        inside = real[:, None] & (f + i_f < F)[None, :]
        for j in range(J):
            b_place = tl.load(place + choice + j, mask=real, other=0)
            b_there = inside & ((b_place >= 0) & (b_place < T * J))[:, None]
            at = (row * T * J + b_place)[:, None] * F + (f + i_f)[None, :]
            if weight is None:
                tl.store(rows + at, b_x, mask=b_there)
            else:
                b_w = tl.load(weight + choice + j, mask=real, other=0.0).to(tl.float32)
                tl.store(rows + at, (b_x.to(tl.float32) * b_w[:, None]).to(rows.dtype.element_ty), mask=b_there)
            if o is not None:
                b_o = tl.load(o + at, mask=b_there, other=0.0).to(tl.float32)
                b_product = tl.sum(b_x.to(tl.float32) * b_o, 1)
                b_dot += tl.where(i_j[None, :] == j, b_product[:, None], 0.0)
    if o is not None:
        store_tile(d_weight, b_dot, row * T + t, i_t, i_j, real, J)


@tiled(_TILES)
@triton.jit(do_not_specialize=["T"])
def collect(
    rows,
    place,
    weight,
    more,
    y,
    T,
    J: tl.constexpr,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """The sum of the rows at a token's places, times its weights, and of ``more``."""
    program = tl.program_id(0).to(tl.int64)
    tiles_f: tl.constexpr = (F + BF - 1) // BF
    tiles_t = (T + BT - 1) // BT
    tile, t, row = program % tiles_f, program // tiles_f % tiles_t * BT, program // tiles_f // tiles_t
    i_t, i_f = tl.arange(0, BT), (tile * BF).to(tl.int32) + tl.arange(0, BF)
    real = t + i_t < T
    inside = real[:, None] & (i_f < F)[None, :]
    choice = (row * T + t + i_t) * J
    b_y = tl.zeros([BT, BF], tl.float32)
    if more is not None:
        b_y += load_tile(more, row * T + t, i_t, i_f, real, F).to(tl.float32)
    for j in range(J):
        b_place = tl.load(place + choice + j, mask=real, other=0)
        b_there = inside & ((b_place >= 0) & (b_place < T * J))[:, None]
        at = (row * T * J + b_place)[:, None] * F + i_f[None, :]
        b_rows = tl.load(rows + at, mask=b_there, other=0.0).to(tl.float32)
        if weight is None:
            b_y += b_rows
        else:
            b_y += b_rows * tl.load(weight + choice + j, mask=real, other=0.0).to(tl.float32)[:, None]
    store_tile(y, b_y, row * T + t, i_t, i_f, real, F)
