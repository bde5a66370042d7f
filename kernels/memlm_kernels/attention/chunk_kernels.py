"""The kernels that chosen chunks need beside ``kernels``: the union of a tile's choices, and a chunk's reads by the
tokens that chose it, with gradients.

A chunk's readers are cut into parts of at most PER, because all tokens may choose the same chunk. Reads and gradients
of queries are partial results, [J tiles, B, T, H, V or K], of each choice and tile of a chunk's keys; ``join_parts``
makes one of them. Each part of the gradients of keys is summed on its own, and then the parts of a chunk in their
order.
"""

import triton
import triton.language as tl

from memlm_kernels.attention.kernels import LN2, LOG2E, NEVER, key_gradients, query_gradient
from memlm_kernels.launch import load_tile, store_tile, tiled

_SIZES = ["B", "T", "L", "N", "U", "S", "START", "PARTS", "PER", "CLASSES", "FROM", "TO", "window"]


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


@triton.jit
def part_span(offsets, owner, first, at, part, N, PARTS, PER, CLASSES, FROM, TO):
    """The chunk of a part, and the first and the end of its readers, which are of the classes FROM to TO - 1."""
    n = tl.load(owner + at * PARTS + part)
    of_chunk = offsets + at * (N * CLASSES + 1) + n * CLASSES
    begin = tl.load(of_chunk + FROM) + (part - tl.load(first + at * (N + 1) + n)) * PER
    return n, begin, tl.minimum(begin + PER, tl.load(of_chunk + TO))


@triton.jit
def place_of(index, n, row, token, g, inside, T, G: tl.constexpr, J: tl.constexpr, BJ: tl.constexpr):
    """The number of chunk n among the choices of each token that made it."""
    i_j = tl.arange(0, BJ)
    b_index = load_tile(index, row * T * G + g, token.to(tl.int64) * G, i_j, inside, J)
    return tl.max(tl.where((b_index == n) & (i_j < J)[None, :], i_j[None, :], 0), 1).to(tl.int64)


@tiled(
    [{"BM": 64, "num_warps": 4, "num_stages": 2}, {"BM": 32, "num_warps": 4, "num_stages": 2}],
    [{"BM": 64, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def chunks_forward(
    q,
    k,
    v,
    index,
    starts,
    readers,
    offsets,
    owner,
    first,
    parts,
    lse_parts,
    scale,
    window,
    B,
    T,
    L,
    N,
    S,
    START,
    PARTS,
    PER,
    CLASSES,
    FROM,
    TO,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    RP: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
):
    """Reads of a tile of a chunk's keys by a part of its readers, and their lse; see ``chunks_backward``. The readers
    are among the S tokens from START on.
    """
    BT: tl.constexpr = BM // RP
    R: tl.constexpr = H // G
    tiles: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0).to(tl.int64)
    tile, part, at = program % tiles, program // tiles % PARTS, program // tiles // PARTS
    g, row = at % G, at // G
    if part >= tl.load(first + at * (N + 1) + N):
        return
    n, begin, stop = part_span(offsets, owner, first, at, part, N, PARTS, PER, CLASSES, FROM, TO)
    start = tl.load(starts + row * N + n).to(tl.int64) + tile * BC
    i_k, i_v, i_c, i_m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BC), tl.arange(0, BM)
    real = (tile * BC + i_c < C) & (start + i_c >= 0) & (start + i_c < L)
    b_k = load_tile(k, (row * L + start) * G + g, i_c * G, i_k, real, K)
    b_v = load_tile(v, (row * L + start) * G + g, i_c * G, i_v, real, V)
    for i in range(begin, stop, BT):
        inside = (i + i_m // RP < stop) & (i_m % RP < R)
        token = tl.load(readers + at * T * J + i + i_m // RP, mask=inside, other=0)
        rows = token.to(tl.int64) * H + g * R + i_m % RP
        b_q = load_tile(q, row * T * H, rows, i_k, inside, K)
        before = (start + i_c)[None, :] <= (L - T + token - window)[:, None]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where(real[None, :] & inside[:, None] & before, b_s, float("-inf"))
        b_max = tl.max(b_s, 1)
        some = b_max > float("-inf")
        b_w = tl.exp2(b_s - tl.where(some, b_max, 0.0)[:, None])
        b_sum = tl.where(some, tl.sum(b_w, 1), 1.0)
        b_o = tl.dot(b_w.to(b_v.dtype), b_v, input_precision=PRECISION) / b_sum[:, None]
        b_place = place_of(index, n, row, token, g, inside, T, G, J, BJ)
        to = ((b_place * tiles + tile) * B + row) * S * H + rows - START * H
        store_tile(parts, b_o, 0, to, i_v, inside, V)
        tl.store(lse_parts + to, tl.where(some, (b_max + tl.log2(b_sum)) * LN2, float("-inf")), mask=inside)


@tiled(
    [{"BM": 64, "num_warps": 4, "num_stages": 2}, {"BM": 32, "num_warps": 4, "num_stages": 2}],
    [{"BM": 64, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def chunk_queries_backward(
    q,
    k,
    v,
    index,
    starts,
    readers,
    offsets,
    owner,
    first,
    lse,
    delta,
    d_o,
    parts,
    scale,
    factor,
    window,
    B,
    T,
    L,
    N,
    S,
    START,
    PARTS,
    PER,
    CLASSES,
    FROM,
    TO,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    RP: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
):
    """Gradients of a part of a chunk's readers from a tile of its keys; see ``chunks_backward``."""
    BT: tl.constexpr = BM // RP
    R: tl.constexpr = H // G
    tiles: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0).to(tl.int64)
    tile, part, at = program % tiles, program // tiles % PARTS, program // tiles // PARTS
    g, row = at % G, at // G
    if part >= tl.load(first + at * (N + 1) + N):
        return
    n, begin, stop = part_span(offsets, owner, first, at, part, N, PARTS, PER, CLASSES, FROM, TO)
    start = tl.load(starts + row * N + n).to(tl.int64) + tile * BC
    i_k, i_v, i_c, i_m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BC), tl.arange(0, BM)
    real = (tile * BC + i_c < C) & (start + i_c >= 0) & (start + i_c < L)
    b_k = load_tile(k, (row * L + start) * G + g, i_c * G, i_k, real, K)
    b_v = load_tile(v, (row * L + start) * G + g, i_c * G, i_v, real, V)
    for i in range(begin, stop, BT):
        inside = (i + i_m // RP < stop) & (i_m % RP < R)
        token = tl.load(readers + at * T * J + i + i_m // RP, mask=inside, other=0)
        rows = token.to(tl.int64) * H + g * R + i_m % RP
        b_q = load_tile(q, row * T * H, rows, i_k, inside, K)
        b_do = load_tile(d_o, row * T * H, rows, i_v, inside, V)
        b_lse = tl.load(lse + row * T * H + rows, mask=inside, other=0.0) * LOG2E
        b_delta = tl.load(delta + row * T * H + rows, mask=inside, other=0.0)
        before = (start + i_c)[None, :] <= (L - T + token - window)[:, None]
        seen = real[None, :] & inside[:, None] & before
        b_dq = tl.zeros([BM, BK], tl.float32)
        b_dq = query_gradient(b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION)
        b_place = place_of(index, n, row, token, g, inside, T, G, J, BJ)
        to = ((b_place * tiles + tile) * B + row) * S * H + rows - START * H
        store_tile(parts, b_dq * factor, 0, to, i_k, inside, K)


@tiled([{"BM": 16, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def join_parts(
    parts,
    lse_parts,
    index,
    x,
    lse,
    B,
    T,
    S,
    START,
    H: tl.constexpr,
    G: tl.constexpr,
    J: tl.constexpr,
    TILES: tl.constexpr,
    V: tl.constexpr,
    BJ: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
):
    """Add the partial results of S tokens from START on to their x, in one softmax with its lse; lse None: as a sum.

    parts: [J TILES, B, S, H, V], of each choice in index, [B, T, G, J]
    """
    tiles = tl.cdiv(S * H, BM)
    program = tl.program_id(0)
    row, tile = (program // tiles).to(tl.int64), program % tiles
    i_m, i_j, i_v = tl.arange(0, BM), tl.arange(0, BJ), tl.arange(0, BV)
    m = tile * BM + i_m
    inside = m < S * H
    chosen = index + ((row * T + START + m // H) * G + m % H // (H // G)) * J
    b_index = tl.load(chosen[:, None] + i_j[None, :], mask=inside[:, None] & (i_j < J)[None, :], other=-1)
    if tl.max(b_index) < 0:
        return
    base = (row * T + START) * H + tile * BM
    b_x = load_tile(x, base, i_m, i_v, inside, V).to(tl.float32)
    if lse is not None:
        b_max = tl.load(lse + base + i_m, mask=inside, other=float("-inf"))
        b_sum = tl.where(b_max > float("-inf"), 1.0, 0.0)
    for slot in range(J * TILES):
        at = (slot * B + row) * S * H + tile * BM
        has = inside & (tl.load(chosen + slot // TILES, mask=inside, other=-1) >= 0)
        if lse is None:
            b_x += load_tile(parts, at, i_m, i_v, has, V).to(tl.float32)
        else:
            b_lse = tl.load(lse_parts + at + i_m, mask=has, other=float("-inf"))
            b_new = tl.maximum(b_max, b_lse)
            b_top = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_kept, b_w = tl.exp(b_max - b_top), tl.exp(b_lse - b_top)
            b_x = b_x * b_kept[:, None] + load_tile(parts, at, i_m, i_v, has, V).to(tl.float32) * b_w[:, None]
            b_sum = b_sum * b_kept + b_w
            b_max = b_new
    if lse is not None:
        some = b_sum > 0
        b_sum = tl.where(some, b_sum, 1.0)
        b_x = b_x / b_sum[:, None]
        tl.store(lse + base + i_m, tl.where(some, b_max + tl.log(b_sum), float("-inf")), mask=inside)
    store_tile(x, b_x, base, i_m, i_v, inside, V)


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
    CLASSES,
    FROM,
    TO,
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

    readers: [B, G, T J], by chunks, then by classes; offsets: [B, G, N CLASSES + 1], where each class begins; owner:
    [B, G, PARTS], a part's chunk; first: [B, G, N + 1], a chunk's first part, and how many there are
    """
    BT: tl.constexpr = BM // RP
    R: tl.constexpr = H // G
    tiles: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0).to(tl.int64)
    tile, part, at = program % tiles, program // tiles % PARTS, program // tiles // PARTS
    g, row = at % G, at // G
    if part >= tl.load(first + at * (N + 1) + N):
        return
    n, begin, stop = part_span(offsets, owner, first, at, part, N, PARTS, PER, CLASSES, FROM, TO)
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
