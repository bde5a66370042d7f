"""Means of segments in Triton. Forward has a program for each segment, backward one for some tokens; each token's
gradient is written once.

B rows, T tokens, S segments, F features of a token.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

_SIZES = ["T", "S", "LONGEST"]
_TILES = [
    {"BT": 16, "BF": 256, "num_warps": 4, "num_stages": 1},
    {"BT": 32, "BF": 128, "num_warps": 4, "num_stages": 1},
]


@tiled(_TILES)
@triton.jit(do_not_specialize=_SIZES)
def pool(x, cu, mean, T, S, LONGEST, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """Some features of the mean of a segment's first LONGEST entries; 0 if it is empty."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (F + BF - 1) // BF
    tile, s, row = program % tiles, program // tiles % S, program // tiles // S
    i_t, i_f = tl.arange(0, BT), (tile * BF).to(tl.int32) + tl.arange(0, BF)
    begin = tl.load(cu + row * (S + 1) + s).to(tl.int64)
    end = tl.minimum(tl.load(cu + row * (S + 1) + s + 1).to(tl.int64), begin + LONGEST)
    b_sum = tl.zeros([BF], tl.float32)
    for t in range(begin, end, BT):
        b_sum += tl.sum(load_tile(x, row * T + t, i_t, i_f, t + i_t < end, F).to(tl.float32), 0)
    b_mean = b_sum / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(mean + (row * S + s) * F + i_f, b_mean, mask=i_f < F)


@tiled(_TILES)
@triton.jit(do_not_specialize=_SIZES)
def pool_backward(d_mean, cu, owner, d_x, T, S, LONGEST, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """owner: [B, T], the segment of each token, S if it has none"""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (F + BF - 1) // BF
    tiles_t = (T + BT - 1) // BT
    tile, t, row = program % tiles, program // tiles % tiles_t * BT, program // tiles // tiles_t
    i_t, i_f = tl.arange(0, BT), (tile * BF).to(tl.int32) + tl.arange(0, BF)
    real = t + i_t < T
    b_owner = tl.load(owner + row * T + t + i_t, mask=real, other=0)
    inside = real & (b_owner < S)
    begin = tl.load(cu + row * (S + 1) + b_owner, mask=inside, other=0)
    end = tl.load(cu + row * (S + 1) + b_owner + 1, mask=inside, other=1)
    of_features = (i_f < F)[None, :]
    place = d_mean + (row * S + b_owner)[:, None] * F + i_f[None, :]
    size = tl.minimum(end - begin, LONGEST).to(tl.float32)
    b_d = tl.load(place, mask=inside[:, None] & of_features, other=0.0) / size[:, None]
    store_tile(d_x, b_d, row * T + t, i_t, i_f, real, F)
