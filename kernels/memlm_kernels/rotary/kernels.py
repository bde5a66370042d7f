"""The rotation in Triton. A program has some tokens, with all heads of queries and keys.

N tokens, TC tokens with angles, HQ and HK heads, HALF pairs of a head.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import tiled

_TILES = [
    {"BT": 16, "num_warps": 4, "num_stages": 1},
    {"BT": 32, "num_warps": 4, "num_stages": 1},
    {"BT": 8, "num_warps": 2, "num_stages": 1},
]


@triton.jit
def turn(x, y, t, i_t, i, inside, b_c1, b_c2, b_s1, b_s2, H: tl.constexpr, HALF: tl.constexpr):
    """Rotate the heads of tokens t + i_t, one after the other."""
    for h in range(H):
        base = (t * H + h) * (2 * HALF)
        place = i_t[:, None] * (2 * HALF * H) + i[None, :]
        b_1 = tl.load(x + base + place, mask=inside, other=0.0).to(tl.float32)
        b_2 = tl.load(x + base + HALF + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + base + place, (b_1 * b_c1 + b_2 * b_s1).to(y.dtype.element_ty), mask=inside)
        tl.store(y + base + HALF + place, (b_2 * b_c2 + b_1 * b_s2).to(y.dtype.element_ty), mask=inside)


@tiled(_TILES)
@triton.jit(do_not_specialize=["N", "TC"])
def rotate(
    q,
    k,
    cos,
    sin,
    turned_q,
    turned_k,
    N,
    TC,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
):
    """BACK: by the transpose, the negative angles."""
    t = tl.program_id(0).to(tl.int64) * BT
    i_t, i = tl.arange(0, BT), tl.arange(0, BH)
    inside = (t + i_t < N)[:, None] & (i < HALF)[None, :]
    angle = ((t + i_t) % TC)[:, None] * (2 * HALF) + i[None, :]
    b_c1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    b_c2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    # The transpose swaps them.
    b_s1 = tl.load(sin + angle + (HALF if BACK else 0), mask=inside, other=0.0).to(tl.float32)
    b_s2 = tl.load(sin + angle + (0 if BACK else HALF), mask=inside, other=0.0).to(tl.float32)
    turn(q, turned_q, t, i_t, i, inside, b_c1, b_c2, b_s1, b_s2, HQ, HALF)
    turn(k, turned_k, t, i_t, i, inside, b_c1, b_c2, b_s1, b_s2, HK, HALF)
