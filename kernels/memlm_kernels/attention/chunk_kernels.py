"""The kernels that chosen chunks need beside ``kernels``: the union of a tile's choices, and the gradients of chunks'
keys from the tokens that chose them.

A chunk's readers are cut into parts of at most PER, because all tokens may choose the same chunk. Each part is summed
on its own, and then the parts of a chunk in their order.
"""

import triton
import triton.language as tl

from memlm_kernels.attention.kernels import LOG2E, NEVER, key_gradients
from memlm_kernels.launch import load_tile, store_tile, tiled

_SIZES = ["T", "L", "N", "U", "PARTS", "PER", "window"]


@tiled([{"num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def unite_chunks(index, united, count, T, N, U, G: tl.constexpr, J: tl.constexpr, BT: tl.constexpr, W: tl.constexpr):
    """The chunks that the tokens of a tile chose, ascending, each once; united: [B, tiles, G, U]."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(T, BT)
    g, tile, row = program % G, program // G % tiles, program // G // tiles
    i = tl.arange(0, W)
    real = (i < BT * J) & (tile * BT + i // J < T)
    b_index = tl.load(index + (row * T + tile * BT) * G * J + (i // J * G + g) * J + i % J, mask=real, other=-1)
    b_index = tl.where((b_index >= 0) & (b_index < N), b_index, NEVER)
    n = tl.min(b_index)
    found = n * 0
    while n != NEVER:
        tl.store(united + program * U + found, n)
        found += 1
        n = tl.min(tl.where(b_index > n, b_index, NEVER))
    tl.store(count + program, found)


@tiled(
    [{"BM": 32, "num_warps": 4, "num_stages": 2}, {"BM": 32, "num_warps": 4, "num_stages": 1}],
    [{"BM": 64, "num_warps": 4, "num_stages": 1}, {"BM": 32, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def chunks_backward(
    q,
    k,
    v,
    lse,
    delta,
    d_o,
    starts,
    readers,
    offsets,
    owner,
    first,
    d_k,
    d_v,
    scale,
    factor,
    window,
    T,
    L,
    N,
    PARTS,
    PER,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    RP: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
):
    """Gradients of a tile of a chunk's keys from a part of its readers; d_k, d_v: [B, G, PARTS, C, K or V].

    readers: [B, G, T J], offsets: [B, G, N + 1], see ``ChunkReaders``; owner: [B, G, PARTS], a part's chunk; first:
    [B, G, N + 1], a chunk's first part, and how many there are
    """
    BT: tl.constexpr = BM // RP
    R: tl.constexpr = H // G
    tiles: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0).to(tl.int64)
    tile, part, at = program % tiles, program // tiles % PARTS, program // tiles // PARTS
    g, row = at % G, at // G
    if part >= tl.load(first + at * (N + 1) + N):
        return
    n = tl.load(owner + at * PARTS + part)
    begin = tl.load(offsets + at * (N + 1) + n) + (part - tl.load(first + at * (N + 1) + n)) * PER
    stop = tl.minimum(begin + PER, tl.load(offsets + at * (N + 1) + n + 1))
    start = tl.load(starts + row * N + n).to(tl.int64) + tile * BC
    i_k, i_v, i_c, i_m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BC), tl.arange(0, BM)
    of_chunk = tile * BC + i_c < C
    real = of_chunk & (start + i_c >= 0) & (start + i_c < L)
    b_k = load_tile(k, (row * L + start) * G + g, i_c * G, i_k, real, K)
    b_v = load_tile(v, (row * L + start) * G + g, i_c * G, i_v, real, V)
    b_dk = tl.zeros([BC, BK], tl.float32)
    b_dv = tl.zeros([BC, BV], tl.float32)
    for i in range(begin, stop, BT):
        inside = (i + i_m // RP < stop) & (i_m % RP < R)
        token = tl.load(readers + at * T * J + i + i_m // RP, mask=inside, other=0)
        # Tokens may lie anywhere in the row: their offsets may exceed int32.
        rows = token.to(tl.int64) * H + g * R + i_m % RP
        b_q = load_tile(q, row * T * H, rows, i_k, inside, K)
        b_do = load_tile(d_o, row * T * H, rows, i_v, inside, V)
        b_lse = tl.load(lse + row * T * H + rows, mask=inside, other=0.0) * LOG2E
        b_delta = tl.load(delta + row * T * H + rows, mask=inside, other=0.0)
        before = i_c[:, None] <= (L - T - window - start + token).to(tl.int32)[None, :]
        seen = real[:, None] & inside[None, :] & before
        b_dk, b_dv = key_gradients(b_dk, b_dv, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION)
    to = (at * PARTS + part) * C + tile * BC
    store_tile(d_k, b_dk * factor, to, i_c, i_k, of_chunk, K)
    store_tile(d_v, b_dv, to, i_c, i_v, of_chunk, V)


@tiled([{"num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def add_parts(
    parts,
    starts,
    first,
    d_x,
    L,
    N,
    PARTS,
    G: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Add the parts of a tile of a chunk's keys to the gradients d_x, [B, L, G, K]: chunks share no keys."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0).to(tl.int64)
    tile, n, at = program % tiles, program // tiles % N, program // tiles // N
    g, row = at % G, at // G
    low = tl.load(first + at * (N + 1) + n)
    high = tl.load(first + at * (N + 1) + n + 1)
    if low == high:
        return
    start = tl.load(starts + row * N + n).to(tl.int64) + tile * BC
    i_c, i_k = tl.arange(0, BC), tl.arange(0, BK)
    real = (tile * BC + i_c < C) & (start + i_c >= 0) & (start + i_c < L)
    b_x = load_tile(d_x, (row * L + start) * G + g, i_c * G, i_k, real, K)
    for part in range(low, high):
        b_x += load_tile(parts, (at * PARTS + part) * C + tile * BC, i_c, i_k, real, K)
    store_tile(d_x, b_x, (row * L + start) * G + g, i_c * G, i_k, real, K)
