"""The choice of chunks in Triton, and its inverse, a radix sort that reads each chunk's number a digit at a time.

The best so far are kept sorted, each as one integer: the score's bits above, in an order that integers have, and the
chunk's number below, counted down, so that of equals the lowest chunk is the best.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, tiled
from memlm_kernels.prefix_window_attention.kernels import NEVER

# Below all scores.
EMPTY = tl.constexpr(-(2**63))
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
    # The best last.
    b_best = tl.full([BT, BJ], EMPTY, tl.int64)
    for n in range(low, high, BN):
        b_k = load_tile(k, (row * N + n) * G + g, i_n * G, i_k, n + i_n < N, K).to(tl.float32)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        # There are two zeros.
        b_bits = tl.where(b_s == 0, 0.0, b_s).to(tl.int32, bitcast=True)
        b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
        b_one = (b_bits.to(tl.int64) << 32) + (NEVER - n - i_n)[None, :]
        seen = (n + i_n >= b_first[:, None]) & (n + i_n < b_end[:, None])
        b_top = tl.topk(tl.where(seen, b_one, EMPTY), BJ)
        # Of an ascending and a descending row the larger of each pair are the best of both.
        b_best = tl.sort(tl.maximum(b_best, b_top))
    number = (NEVER - (b_best & 0x7FFFFFFF)).to(tl.int32)
    place = BJ - 1 - i_j
    to = index + (at * G + g) * J + i_t[:, None] * G * J + place[None, :]
    tl.store(to, tl.where(b_best == EMPTY, -1, number), mask=inside[:, None] & (place < J)[None, :])


@triton.jit
def load_digit(keys, index, at, i, LENGTH, N, T, G: tl.constexpr, J: tl.constexpr, SHIFT: tl.constexpr):
    """Entries i of one row and group: chunk, token, and the chunk's digit; behind the last one the highest digit."""
    real = i < LENGTH
    if keys is None:
        # Straight from the choice [B, T, G, J]; those who chose none come behind all chunks.
        row, g = at // G, at % G
        n = tl.load(index + (row * T * G + g) * J + (i // J).to(tl.int64) * G * J + i % J, mask=real, other=0)
        n = tl.where(n < 0, N, n)
        token = i // J
    else:
        n = tl.load(keys + at * LENGTH + i, mask=real, other=0)
        token = tl.load(index + at * LENGTH + i, mask=real, other=0)
    return n, token, tl.where(real, (n >> SHIFT) & 255, 255)


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
    """How often each digit stands in a tile of W entries; counts: [B, G, 256, TILES]."""
    program = tl.program_id(0).to(tl.int64)
    tile, at = program % TILES, program // TILES
    i = (tile * W).to(tl.int32) + tl.arange(0, W)
    _n, _token, digit = load_digit(keys, index, at, i, LENGTH, N, T, G, J, SHIFT)
    tl.store(counts + (at * 256 + tl.arange(0, 256)) * TILES + tile, tl.histogram(digit, 256))


@tiled([{"num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def place_by_digit(
    keys,
    index,
    shifts,
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
    """Entries in the order of a digit, those with the same one in the order that they have.

    shifts: [B, G, 256, TILES], what leads from a place in the sorted tile to that among all
    """
    program = tl.program_id(0).to(tl.int64)
    tile, at = program % TILES, program // TILES
    i_w = tl.arange(0, W)
    begin = (tile * W).to(tl.int32)
    _n, _token, digit = load_digit(keys, index, at, begin + i_w, LENGTH, N, T, G, J, SHIFT)
    b_sorted = tl.sort(digit * W + i_w)
    i = begin + b_sorted % W
    n, token, digit = load_digit(keys, index, at, i, LENGTH, N, T, G, J, SHIFT)
    real = i < LENGTH
    place = tl.load(shifts + (at * 256 + digit) * TILES + tile, mask=real, other=0) + i_w
    tl.store(new_keys + at * LENGTH + place, n, mask=real)
    tl.store(new_tokens + at * LENGTH + place, token, mask=real)
