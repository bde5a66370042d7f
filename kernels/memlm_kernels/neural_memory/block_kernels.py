"""A memory of one layer under the squared error, solved in blocks of BT tokens whatever the chunk size, in Triton.

L, P, C, beta, f and m are those of ``reference``, over a block; c and p are the last rows of C and P; a(i) is the last
token before the chunk of token i. The corrections d = V - K A of a block's tokens are the solution of a triangular
system, and the chunk size is only its mask::

    N[i, l] = C[a(i), l] (k_i . k_l)     X = (I + N)^-1     R = C * Q K^T
    d = U - Y W - Z S                    U = X V            Y = X (beta_a K)      Z = X (f_a K)
    W' = beta W + f S + K^T (c d)        S' = m S + K^T (p d)                     o = beta Q W + f Q S + R d

A block either begins with a chunk, or lies within one that an earlier block or call began. In the second case all its
tokens have the anchor A of that chunk: X = I and d = V - K A. Forward has three parts: X, R, U, Y and Z of all blocks
at once; along each segment W, S and d; the reads of all blocks at once. ``block_backward_kernels`` has the reverse.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import decay_between, invert, load_tile, part_of, segment_span, store_tile, tiled

SIZES = ["B", "T", "N", "S", "F", "CHUNK", "PERIOD", "INNER"]
# The numbers of a token in ``rates``: beta, f, m, c, p; gradients have those of beta and f at its anchor behind them.
RATES = tl.constexpr(8)


@triton.jit
def pieces(tokens, before, CHUNK, PERIOD, INNER, BT: tl.constexpr):
    """The parts of a segment: the rest of an open chunk, whole chunks, and the last chunk. That one has blocks of its
    own, so that its anchor is the memory before a block. ``before``: the tokens of earlier calls.

    Returns the tokens of the first two parts and the blocks of all three.
    """
    opened = tl.minimum((CHUNK - before % CHUNK) % CHUNK, tokens)
    rest = tokens - opened
    middle = tl.maximum(rest - 1, 0) // CHUNK * CHUNK
    of_middle = (middle + PERIOD - 1) // PERIOD * INNER
    return opened, middle, (opened + BT - 1) // BT, of_middle, (rest - middle + BT - 1) // BT


@tiled([{"num_warps": 1, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_table(
    cu,
    position,
    table,
    first,
    T,
    S,
    N,
    F,
    CHUNK,
    PERIOD,
    INNER,
    BT: tl.constexpr,
    BS: tl.constexpr,
):
    """table: [B, N, 4], the first token of each block, its end, the block that began its chunk (-1: an earlier call),
    and its segment; a block that is not used holds no token. first: [B, S + 1], the first block of each segment.

    position: [B, F], tokens that the first F segments of a row had in earlier calls; None: 0
    Whole chunks come in periods of PERIOD tokens and INNER blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    s, row = program % S, program // S
    i = tl.arange(0, BS)
    n = s * 0
    for j in range(0, s, BS):
        known = j + i < s
        begin, end, _ = segment_span(cu, None, row, tl.where(known, j + i, 0), S, T)
        before = i * 0
        if position is not None:
            before = tl.load(position + row * F + j + i, mask=known & (j + i < F), other=0)
        _, _, x, y, z = pieces(end - begin, before, CHUNK, PERIOD, INNER, BT)
        n += tl.sum(tl.where(known, x + y + z, 0))
    begin, end, _ = segment_span(cu, None, row, s, S, T)
    before = s * 0
    if position is not None:
        before += tl.load(position + row * F + s, mask=s < F, other=0)
    opened, middle, x, y, z = pieces(end - begin, before, CHUNK, PERIOD, INNER, BT)
    tl.store(first + row * (S + 1) + s, n)
    last = n + x + y + z
    if s == S - 1:
        tl.store(first + row * (S + 1) + S, last)
    for j in range(n, tl.where(s == S - 1, N, last), BS):
        block = j + i
        b = block - n
        m = b - x
        e = m - y
        inner = (m // INNER) * PERIOD
        start = tl.where(b < x, b * BT, tl.where(m < y, opened + inner + m % INNER * BT, opened + middle + e * BT))
        upto = tl.where(m < y, opened + tl.minimum(inner + PERIOD, middle), end - begin)
        upto = tl.minimum(start + BT, tl.where(b < x, opened, upto))
        opener = tl.where(b < x, -1, tl.where(m < y, block - m % INNER, n + x + y))
        used = block < last
        place = table + (row * N + block) * 4
        inside = block < tl.where(s == S - 1, N, last)
        tl.store(place, tl.where(used, begin + start, 0), mask=inside)
        tl.store(place + 1, tl.where(used, begin + upto, 0), mask=inside)
        tl.store(place + 2, opener, mask=inside)
        tl.store(place + 3, s + i * 0, mask=inside)


@triton.jit
def block_at(table, row, n, N, there):
    """First token of block n, its end, and the block that began its chunk; no token unless ``there``."""
    place = table + (row * N + n) * 4
    start = tl.load(place, mask=there, other=0)
    return start, tl.load(place + 1, mask=there, other=0), tl.load(place + 2, mask=there, other=0)


@triton.jit
def load_rate(rates, base, rows, which: tl.constexpr, inside):
    return tl.load(rates + (base + rows) * RATES + which, mask=inside, other=0.0)


@triton.jit
def load_logs(momentum, decay, base, rows, inside):
    """The logarithms of momentum and of 1 - decay, at least those of the smallest numbers; 0 where not inside."""
    b_m = tl.zeros(rows.shape, tl.float32)
    b_g = b_m
    if momentum is not None:
        b_m = tl.log(tl.maximum(tl.load(momentum + base + rows, mask=inside, other=1.0), 1e-30))
    if decay is not None:
        b_x = -tl.minimum(tl.load(decay + base + rows, mask=inside, other=0.0), 1 - 2**-24)
        # log1p: the division takes back the rounding of 1 + x.
        b_u = 1 + b_x
        b_g = tl.where(b_u == 1.0, b_x, tl.log(b_u) * b_x / tl.where(b_u == 1.0, 1.0, b_u - 1))
    return b_m, b_g


@triton.jit
def lower_decay(b_g, BT: tl.constexpr):
    """L, below the diagonal alone."""
    i = tl.arange(0, BT)
    return tl.where(i[:, None] > i[None, :], decay_between(b_g, BT), 0.0)


@triton.jit
def weights(b_lr, b_m, b_g, MOMENTUM: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """L, E and C = L E lr, L below the diagonal alone; there it is 1. Without momentum E is the identity."""
    i, b_L = tl.arange(0, BT), lower_decay(b_g, BT)
    if MOMENTUM:
        b_E = decay_between(b_m, BT)
        b_C = tl.dot(b_L, b_E * b_lr[None, :], input_precision=PRECISION)
    else:
        b_E = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
        b_C = b_L * b_lr[None, :]
    return b_L, b_E, b_C


@triton.jit
def places_of_anchors(opener, n, CHUNK, BT: tl.constexpr):
    """a(i) for each token of block n."""
    return tl.where(opener == n, tl.arange(0, BT) // CHUNK, 0) * CHUNK - 1


@triton.jit
def anchors(opener, n, CHUNK, BT: tl.constexpr):
    """[BT, BT]: whether token r of a block is a(i)."""
    return tl.arange(0, BT)[None, :] == places_of_anchors(opener, n, CHUNK, BT)[:, None]


@triton.jit
def load_at_anchors(rates, base, inside, opener, n, CHUNK, H: tl.constexpr, BT: tl.constexpr):
    """beta and f at a(i), those before a block are 1 and 0."""
    i_a = places_of_anchors(opener, n, CHUNK, BT)
    place, there = rates + (base + i_a * H) * RATES, inside & (i_a >= 0)
    return tl.load(place, mask=there, other=1.0), tl.load(place + 1, mask=there, other=0.0)


@triton.jit
def solve_system(b_N, BT: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + N)^-1 for the pairs of a block of at most so many chunks, whose own pairs are not in N: N^CHUNKS is 0."""
    if CHUNKS > 4:
        return invert(b_N, BT, PRECISION)
    i = tl.arange(0, BT)
    b_X = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - b_N
    if CHUNKS > 2:
        b_X += tl.dot(b_X, tl.dot(b_N, b_N, input_precision=PRECISION), input_precision=PRECISION)
    return b_X


@tiled([{"BK": 32, "num_warps": 4, "num_stages": 1}], [{"BK": 32, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_systems(
    q,
    k,
    lr,
    momentum,
    decay,
    table,
    X,
    R,
    C,
    rates,
    T,
    N,
    CHUNK,
    H: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """X, R, C: [B, N, H, BT, BT], C for backward alone; rates: [B, T, H, RATES], of which beta, f, m, c and p are
    stored.
    """
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end, opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_lr = tl.load(lr + base + rows, mask=inside, other=0.0)
    b_m, b_g = load_logs(momentum, decay, base, rows, inside)
    b_L, b_E, b_C = weights(b_lr, b_m, b_g, momentum is not None, BT, PRECISION)
    b_P = b_E * b_lr[None, :]
    b_C += b_P
    # Stores of one row of a tile, because sums over rows would wait for all warps.
    place, last = rates + (base + rows) * RATES, (i_t[:, None] == end - start - 1) & inside[None, :]
    tl.store(place[None, :] + 3 + i_t[:, None] * 0, b_C, mask=last)
    tl.store(place, tl.exp(tl.cumsum(b_g, 0)), mask=inside)
    if momentum is not None:
        b_of_S = tl.exp(tl.cumsum(b_m, 0))
        tl.store(place + 1, tl.sum(b_L * b_of_S[None, :], 1) + b_of_S, mask=inside)
        tl.store(place + 2, b_of_S, mask=inside)
        tl.store(place[None, :] + 4 + i_t[:, None] * 0, b_P, mask=last)
    if C is not None:
        store_tile(C, b_C, program * BT, i_t, i_t, i_t < BT, BT)
    b_pairs = tl.zeros([BT, BT], tl.float32)
    for i in range((K + BK - 1) // BK):
        i_k = i * BK + tl.arange(0, BK)
        b_k = load_tile(k, base, rows, i_k, inside, K)
        b_pairs += tl.dot(load_tile(q, base, rows, i_k, inside, K), tl.trans(b_k), input_precision=PRECISION)
    store_tile(R, b_C * b_pairs, program * BT, i_t, i_t, i_t < BT, BT)
    b_N = b_C * 0.0
    if CHUNKS > 1:
        b_at = anchors(opener, n, CHUNK, BT).to(tl.float32)
        b_N = tl.dot(b_at, b_C, input_precision=PRECISION)
        b_pairs = tl.zeros([BT, BT], tl.float32)
        for i in range((K + BK - 1) // BK):
            b_k = load_tile(k, base, rows, i * BK + tl.arange(0, BK), inside, K)
            b_pairs += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_N *= b_pairs
    b_X = solve_system(b_N, BT, CHUNKS, PRECISION)
    store_tile(X, b_X, program * BT, i_t, i_t, i_t < BT, BT)


# Half as wide on sm_100, where fp32 spills otherwise.
@tiled([{"BD": 64, "num_warps": 4, "num_stages": 1}], sm_100=[{"BD": 32, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_solutions(
    x,
    rates,
    table,
    X,
    out,
    out_S,
    T,
    N,
    CHUNK,
    H: tl.constexpr,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """out = X x, or X^T x, some columns; with ``rates`` X (beta_a x), and out_S = X (f_a x)."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (D + BD - 1) // BD
    tile, h, n, row = part_of(program, tiles, H, N)
    start, end, opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t, i_d = tl.arange(0, BT), (tile * BD).to(tl.int32) + tl.arange(0, BD)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_x = load_tile(x, base, rows, i_d, inside, D)
    b_X = load_tile(X, ((row * N + n) * H + h) * BT, i_t, i_t, i_t < BT, BT)
    if TRANSPOSED:
        b_X = tl.trans(b_X)
    if rates is None:
        b_out = tl.dot(b_X, b_x, input_precision=PRECISION)
    else:
        b_beta, b_f = load_at_anchors(rates, base, inside, opener, n, CHUNK, H, BT)
        b_out = tl.dot(b_X, (b_x * b_beta[:, None]).to(b_x.dtype), input_precision=PRECISION)
        if out_S is not None:
            b_of_S = tl.dot(b_X, (b_x * b_f[:, None]).to(b_x.dtype), input_precision=PRECISION)
            store_tile(out_S, b_of_S, base, rows, i_d, inside, D)
    store_tile(out, b_out, base, rows, i_d, inside, D)


@triton.jit
def of_document(cu, position, row, s, S):
    """Whether a segment that is a document starts at ``initial``, and whether it is the row's last one."""
    fresh = s > 0
    if position is not None:
        fresh = fresh | (tl.load(position + row) == 0)
    closes = s == 0
    if cu is not None:
        begin, end, total = (
            tl.load(cu + row * (S + 1) + s),
            tl.load(cu + row * (S + 1) + s + 1),
            tl.load(cu + row * (S + 1) + S),
        )
        closes = (end == total) & ((begin < end) | ((s == 0) & (total == 0)))
    return fresh, closes


@triton.jit
def load_writes(rates, row, start, end, i_t, T, h, H: tl.constexpr):
    """c and p of a block's tokens, and beta, f and m of its last one."""
    base, inside = (row * T + start) * H + h, start + i_t < end
    b_c, b_p = load_rate(rates, base, i_t * H, 3, inside), load_rate(rates, base, i_t * H, 4, inside)
    last, there = (row * T + end - 1) * H + h, start < end
    beta = load_rate(rates, last, 0, 0, there)
    return b_c, b_p, beta, load_rate(rates, last, 0, 1, there), load_rate(rates, last, 0, 2, there)


@triton.jit
def load_rows(x, row, start, end, i_t, columns, T, h, H: tl.constexpr, width: tl.constexpr):
    """Some columns of a block of x, [B, T, H, width]."""
    return load_tile(x, (row * T + start) * H + h, i_t * H, columns, start + i_t < end, width)


@tiled([{"BV": 32, "num_warps": 8, "num_stages": 1}], [{"BV": 32, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=SIZES)
def block_states(
    k,
    Y,
    Z,
    U,
    rates,
    table,
    first,
    cu,
    position,
    before_W,
    before_S,
    before_anchor,
    initial,
    states_W,
    states_S,
    last_W,
    last_S,
    last_anchor,
    d,
    T,
    N,
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Some columns of a segment's memory W, S and anchor, from block to block, and the corrections d: [B, T, H, V].

    before_*: [B, S, H, K, V], before each segment; with ``initial``, [B, H, K, V], only for a row's first segment
    states_*: [B, N, H, K, V], before each block. Without ``before_anchor`` each block begins with a chunk.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, s, row = part_of(program, tiles, H, S)
    i_t, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    n = tl.load(first + row * (S + 1) + s)
    count = tl.load(first + row * (S + 1) + s + 1) - n
    at, own, closes = ((row * S + s) * H + h) * K, i_k < K, i_k < K
    b_W = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        fresh, closing = of_document(cu, position, row, s, S)
        at = (row * H + h) * K
        own, closes = i_k < tl.where(fresh, 0, K), i_k < tl.where(closing, K, 0)
        b_W += load_tile(initial, at, i_k, i_v, i_k < tl.where(fresh, K, 0), V)
    b_A = b_W
    b_W += load_tile(before_W, at, i_k, i_v, own, V)
    b_S = tl.zeros([BK, BV], tl.float32)
    if before_S is not None:
        b_S += load_tile(before_S, at, i_k, i_v, own, V)
    if before_anchor is not None:
        b_A += load_tile(before_anchor, at, i_k, i_v, own, V)
    start, end, opener = block_at(table, row, n, N, count > 0)
    b_Y = load_rows(Y, row, start, end, i_t, i_k, T, h, H, K)
    b_Z = b_Y
    if before_S is not None:
        b_Z = load_rows(Z, row, start, end, i_t, i_k, T, h, H, K)
    b_d = load_rows(U, row, start, end, i_t, i_v, T, h, H, V)
    b_k = load_rows(k, row, start, end, i_t, i_k, T, h, H, K)
    b_c, b_p, beta, f, m = load_writes(rates, row, start, end, i_t, T, h, H)
    for i in range(count):
        if before_anchor is None:
            b_A = b_W
            if i == count - 1:
                store_tile(last_anchor, b_A, at, i_k, i_v, closes, V)
        else:
            b_A = tl.where(opener == n + i, b_W, b_A)
        kept = ((row * N + n + i) * H + h) * K
        store_tile(states_W, b_W, kept, i_k, i_v, i_k < K, V)
        base, inside = (row * T + start) * H + h, start + i_t < end
        # A tile of the next block is loaded as soon as that of this block is used.
        start, end, opener = block_at(table, row, n + i + 1, N, i + 1 < count)
        b_d = b_d - tl.dot(b_Y, b_A.to(b_Y.dtype), input_precision=PRECISION)
        b_Y = load_rows(Y, row, start, end, i_t, i_k, T, h, H, K)
        if before_S is not None:
            store_tile(states_S, b_S, kept, i_k, i_v, i_k < K, V)
            b_d -= tl.dot(b_Z, b_S.to(b_Z.dtype), input_precision=PRECISION)
            b_Z = load_rows(Z, row, start, end, i_t, i_k, T, h, H, K)
        store_tile(d, b_d, base, i_t * H, i_v, inside, V)
        b_kt = tl.trans(b_k)
        b_W = b_W * beta + tl.dot(b_kt, (b_d * b_c[:, None]).to(b_k.dtype), input_precision=PRECISION)
        if before_S is not None:
            b_W += b_S * f
            b_S = b_S * m + tl.dot(b_kt, (b_d * b_p[:, None]).to(b_k.dtype), input_precision=PRECISION)
        b_d = load_rows(U, row, start, end, i_t, i_v, T, h, H, V)
        b_k = load_rows(k, row, start, end, i_t, i_k, T, h, H, K)
        b_c, b_p, beta, f, m = load_writes(rates, row, start, end, i_t, T, h, H)
    store_tile(last_W, b_W, at, i_k, i_v, closes, V)
    if before_S is not None:
        store_tile(last_S, b_S, at, i_k, i_v, closes, V)
    if before_anchor is not None:
        store_tile(last_anchor, b_A, at, i_k, i_v, closes, V)


@tiled(
    [{"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 1}], [{"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 1}]
)
@triton.jit(do_not_specialize=SIZES)
def block_reads(
    q,
    R,
    rates,
    table,
    states_W,
    states_S,
    d,
    o,
    squares,
    T,
    N,
    B,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Some value channels of a block's reads; squares: [tiles of V, B, T, H], of the corrections, or None."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, h, n, row = part_of(program, tiles, H, N)
    start, end, _opener = block_at(table, row, n, N, True)
    if start >= end:
        return
    i_t, i_v = tl.arange(0, BT), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    at = (row * N + n) * H + h
    b_W = tl.zeros([BT, BV], tl.float32)
    b_S = tl.zeros([BT, BV], tl.float32)
    for i in range((K + BK - 1) // BK):
        i_k = i * BK + tl.arange(0, BK)
        b_q = load_tile(q, base, rows, i_k, inside, K)
        b_W += tl.dot(b_q, load_tile(states_W, at * K, i_k, i_v, i_k < K, V), input_precision=PRECISION)
        if states_S is not None:
            b_S += tl.dot(b_q, load_tile(states_S, at * K, i_k, i_v, i_k < K, V), input_precision=PRECISION)
    b_d = load_tile(d, base, rows, i_v, inside, V)
    if squares is not None:
        b_exact = b_d.to(tl.float32)
        tl.store(squares + tile * B * T * H + base + rows, tl.sum(b_exact * b_exact, 1), mask=inside)
    b_R = load_tile(R, at * BT, i_t, i_t, i_t < BT, BT)
    b_o = tl.dot(b_R, b_d, input_precision=PRECISION) + b_W * load_rate(rates, base, rows, 0, inside)[:, None]
    if states_S is not None:
        b_o += b_S * load_rate(rates, base, rows, 1, inside)[:, None]
    store_tile(o, b_o, base, rows, i_v, inside, V)
