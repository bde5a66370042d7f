"""The choice of chunks in Triton, and its inverse, a radix sort that reads each chunk's number a digit at a time.

The best so far are kept as integers, in any order. The high bits hold the score, in an order that integers have. The
low bits hold the chunk's number, counted down, so that among equal scores the lowest chunk is the best and all
integers differ.
"""

import triton
import triton.language as tl

from memlm_kernels.attention.kernels import NEVER
from memlm_kernels.launch import load_tile, tiled

# Below all scores, with room for a few numbers behind it.
EMPTY = tl.constexpr(-(2**63))
# Above all scores.
FULL = tl.constexpr(2**63 - 1)
_SIZES = ["T", "N", "TILES", "LENGTH"]


@tiled([{"BT": 32, "num_warps": 4, "num_stages": 1}, {"BT": 16, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def best_chunks(
    q,
    k,
    first,
    end,
    index,
    T,
    N,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    PRECISION: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    """The J best chunks of each token of a tile, for one group; first, end: [B, T], None: all; index: [B, T, G, J]."""
    R: tl.constexpr = H // G
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(T, BT)
    tile, g, row = program % tiles, program // tiles % G, program // tiles // G
    i_t, i_k, i_n, i_j = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BN), tl.arange(0, BJ)
    at = row * T + tile * BT
    inside = tile * BT + i_t < T
    # The sum over heads is linear.
    b_q = tl.zeros([BT, BK], tl.float32)
    for r in range(R):
        b_q += load_tile(q, at * H + g * R + r, i_t * H, i_k, inside, K).to(tl.float32)
    if first is None:
        b_first, b_end = i_t * 0, tl.where(inside, N, 0)
    else:
        b_first = tl.maximum(tl.load(first + at + i_t, mask=inside, other=0), 0)
        b_end = tl.minimum(tl.load(end + at + i_t, mask=inside, other=0), N)
    some = b_first < b_end
    low, high = tl.min(tl.where(some, b_first, NEVER)), tl.max(tl.where(some, b_end, 0))
    b_best = tl.where(i_j < J, EMPTY + i_j.to(tl.int64), FULL)[None, :] + tl.zeros([BT, BJ], tl.int64)
    for n in range(low, high, BN):
        b_k = load_tile(k, (row * N + n) * G + g, i_n * G, i_k, n + i_n < N, K).to(tl.float32)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        # Floats have two zeros.
        b_bits = tl.where(b_s == 0, 0.0, b_s).to(tl.int32, bitcast=True)
        b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
        # The interpreter cannot subtract a tensor from a constant.
        b_number = -(n + i_n) + NEVER
        b_new = b_bits.to(tl.int64) * (1 << 32) + b_number[None, :]
        seen = (n + i_n >= b_first[:, None]) & (n + i_n < b_end[:, None])
        b_new = tl.where(seen, b_new, EMPTY)
        # The best new chunk replaces the worst, until no token gains.
        b_top, b_worst = tl.max(b_new, 1), tl.min(b_best, 1)
        while tl.max((b_top > b_worst).to(tl.int32)) > 0:
            gains = (b_top > b_worst)[:, None]
            b_best = tl.where(gains & (b_best == b_worst[:, None]), b_top[:, None], b_best)
            b_new = tl.where(b_new == b_top[:, None], EMPTY, b_new)
            b_top, b_worst = tl.max(b_new, 1), tl.min(b_best, 1)
    b_best = tl.where(i_j < J, b_best, EMPTY)
    for j in range(J):
        b_top = tl.max(b_best, 1)
        number = (-(b_top & 0x7FFFFFFF) + NEVER).to(tl.int32)
        tl.store(index + ((at + i_t) * G + g) * J + j, tl.where(b_top < EMPTY + J, -1, number), mask=inside)
        b_best = tl.where(b_best == b_top[:, None], EMPTY, b_best)


@triton.jit
def load_digit(keys, index, at, i, LENGTH, N, T, G: tl.constexpr, J: tl.constexpr, SHIFT: tl.constexpr):
    """Entries i of one row and group: chunk, token, and the chunk's digit; behind the last one the highest digit."""
    real = i < LENGTH
    if keys is None:
        # Read from the choice [B, T, G, J]; entries without a chunk come behind all chunks.
        row, g = at // G, at % G
        n = tl.load(index + (row * T * G + g) * J + (i // J).to(tl.int64) * G * J + i % J, mask=real, other=0)
        n = tl.where((n < 0) | (n > N), N, n)
        token = i // J
    else:
        n = tl.load(keys + at * LENGTH + i, mask=real, other=0)
        token = tl.load(index + at * LENGTH + i, mask=real, other=0)
    return n, token, tl.where(real, (n >> SHIFT) & 15, 15)


@tiled([{"num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def count_digits(
    keys,
    index,
    counts,
    T,
    N,
    LENGTH,
    TILES,
    G: tl.constexpr,
    J: tl.constexpr,
    SHIFT: tl.constexpr,
    W: tl.constexpr,
):
    """Count each digit in a tile of W entries; counts: [B, G, 16, TILES]."""
    program = tl.program_id(0).to(tl.int64)
    tile, at = program % TILES, program // TILES
    i = (tile * W).to(tl.int32) + tl.arange(0, W)
    _n, _token, digit = load_digit(keys, index, at, i, LENGTH, N, T, G, J, SHIFT)
    i_d = tl.arange(0, 16)
    tl.store(counts + (at * 16 + i_d) * TILES + tile, tl.sum((digit[:, None] == i_d).to(tl.int32), 0))


@tiled([{"num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def place_by_digit(
    keys,
    index,
    before,
    new_keys,
    new_tokens,
    T,
    N,
    LENGTH,
    TILES,
    G: tl.constexpr,
    J: tl.constexpr,
    SHIFT: tl.constexpr,
    W: tl.constexpr,
):
    """Sort entries stably by a digit; before: [B, G, 16, TILES], the number of entries before those of a tile with
    that digit.
    """
    program = tl.program_id(0).to(tl.int64)
    tile, at = program % TILES, program // TILES
    i = (tile * W).to(tl.int32) + tl.arange(0, W)
    n, token, digit = load_digit(keys, index, at, i, LENGTH, N, T, G, J, SHIFT)
    i_d = tl.arange(0, 16)
    b_has = (digit[:, None] == i_d).to(tl.int32)
    b_place = tl.cumsum(b_has, 0) - 1 + tl.load(before + (at * 16 + i_d) * TILES + tile)[None, :]
    place = tl.sum(b_has * b_place, 1)
    tl.store(new_keys + at * LENGTH + place, n, mask=i < LENGTH)
    tl.store(new_tokens + at * LENGTH + place, token, mask=i < LENGTH)
