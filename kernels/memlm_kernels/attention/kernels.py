"""Softmax attention of tiles of queries, in one softmax, to a prefix, to a span of keys of each token, and to the
chunks that a token chose. All ops of attention use these kernels. The keys of the prefix may belong to documents; a
token then sees those of the documents that it chose.

A program holds BM rows: the RP heads of a group (R of them real) of each of BT = BM / RP successive tokens. It goes
through tiles of the keys that any of them sees, and masks the keys that a row does not see. Backward computes the
scores again: gradients of q by tiles of queries, gradients of k and v by tiles of keys. Each gradient has one owner,
so the order of sums is fixed. Scores have the base 2, lse the base e.

L keys of a row (LK of them with a span, the last ones), P keys of the prefix, D documents chosen, N chunks of C keys,
J chosen, U of a tile's union.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# Behind all keys and chunks.
NEVER = tl.constexpr(2147483647)
_SIZES = ["B", "T", "LK", "L", "P", "D", "N", "U", "SPLITS", "PARTS", "TILES", "window", "shared", "most"]
_FORWARD = [{"BN": 32, "num_warps": 4, "num_stages": 2}]
_FORWARD_HIP = [{"BN": 64, "num_warps": 4, "num_stages": 1}, {"BN": 32, "num_warps": 4, "num_stages": 1}]
_QUERIES = [{"BN": 32, "num_warps": 4, "num_stages": 2}]
_QUERIES_HIP = [{"BN": 64, "num_warps": 4, "num_stages": 1}, {"BN": 32, "num_warps": 4, "num_stages": 1}]
_KEYS = [
    {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 2},
    {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 1},
]
_KEYS_HIP = [
    {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 1},
    {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 1},
]


@triton.jit
def read_tile(b_o, b_max, b_sum, b_q, b_k, b_v, seen, scale, PRECISION: tl.constexpr):
    """Add a tile of keys to an output that is not yet divided by the sum of its weights."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_s = tl.where(seen, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # Any finite number for a row that has seen no key yet.
    b_top = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_w = tl.exp2(b_s - b_top[:, None])
    b_kept = tl.exp2(b_max - b_top)
    b_sum = b_sum * b_kept + tl.sum(b_w, 1)
    b_o = b_o * b_kept[:, None] + tl.dot(b_w.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_o, b_new, b_sum


@triton.jit
def query_gradient(b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION: tl.constexpr):
    """Add the part of a tile of keys, not yet scaled."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_w = tl.where(seen, tl.exp2(b_s - b_lse[:, None]), 0.0)
    b_ds = b_w * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    return b_dq + tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)


@triton.jit
def key_gradients(b_dk, b_dv, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION: tl.constexpr):
    """Add the part of a tile of queries; the gradient of k is not yet scaled. seen: [keys, queries]."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
    b_w = tl.where(seen, tl.exp2(b_s - b_lse[None, :]), 0.0)
    b_dv += tl.dot(b_w.to(b_do.dtype), b_do, input_precision=PRECISION)
    b_ds = b_w * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def load_spans(first, end, at, inside):
    """Each row's first key and end, and those of all rows together, without the rows that see no key."""
    b_first = tl.load(first + at, mask=inside, other=0)
    b_end = tl.load(end + at, mask=inside, other=0)
    some = b_first < b_end
    high = tl.max(tl.where(some, b_end, 0))
    return b_first, b_end, tl.minimum(tl.min(tl.where(some, b_first, NEVER)), high), high


@triton.jit
def spans_of(positions, most, at, t, inside, T, LK):
    """The same for tokens t that see the last ``most`` keys of their document, of which ``positions`` came before them
    (None: all).
    """
    here = LK - T + t
    b_back = tl.minimum(here, most - 1)
    if positions is not None:
        b_back = tl.minimum(tl.maximum(tl.load(positions + at, mask=inside, other=0), 0), b_back).to(tl.int32)
    b_first = tl.where(inside, here - b_back, NEVER)
    b_end = tl.where(inside, here + 1, 0)
    return b_first, b_end, tl.min(b_first), tl.max(b_end)


@triton.jit
def load_item(united, starts, b_index, item, begin, row, N, C: tl.constexpr, BC: tl.constexpr):
    """A tile of the keys of a chunk of the union: its first key, their number, and the rows that chose the chunk."""
    parts: tl.constexpr = (C + BC - 1) // BC
    n = tl.load(united + begin + item // parts)
    start = tl.load(starts + row * N + tl.maximum(n, 0))
    chose = (tl.max((b_index == n).to(tl.int32), 1) > 0) & (n >= 0)
    skipped = item % parts * BC
    return start + skipped, tl.minimum(C - skipped, BC), chose


@triton.jit
def sees_document(document, chosen, keys, real, tokens, inside, D):
    """Whether tokens chose the documents of keys. Keys lie along one of two dimensions, tokens along the other."""
    b_document = tl.load(document + keys, mask=real, other=-1)
    b_seen = b_document == tl.load(chosen + tokens * D, mask=inside, other=-1)
    for d in range(1, D):
        b_seen = b_seen | (b_document == tl.load(chosen + tokens * D + d, mask=inside, other=-1))
    return b_seen & (b_document >= 0)


@tiled(_FORWARD, _FORWARD_HIP)
@triton.jit(do_not_specialize=_SIZES)
def attend_forward(
    q,
    k,
    v,
    first,
    end,
    other_q,
    prefix_k,
    prefix_v,
    document,
    chosen,
    far_k,
    index,
    united,
    count,
    starts,
    o,
    lse,
    scale,
    window,
    most,
    shared,
    B,
    T,
    LK,
    L,
    P,
    D,
    N,
    U,
    SPLITS,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    """The reads of a tile of queries over every SPLITS-th tile of keys, and lse; o: [SPLITS, B, T, H, V].

    first, end: the span of the keys that each token sees; end None: ``spans_of`` finds it, and first has positions
    other_q: queries for the prefix, or for chosen chunks; None: q
    """
    BT: tl.constexpr = BM // RP
    R: tl.constexpr = H // G
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BT)
    split, tile, g = program % SPLITS, program // SPLITS % tiles, program // SPLITS // tiles % G
    row = (program // SPLITS // tiles // G).to(tl.int64)
    i_k, i_v, i_n, i_m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN), tl.arange(0, BM)
    inside = (tile * BT + i_m // RP < T) & (i_m % RP < R)
    base, rows = (row * T + tile * BT) * H + g * R, i_m // RP * H + i_m % RP
    b_o = tl.zeros([BM, BV], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    b_q = load_tile(q, base, rows, i_k, inside, K)
    t = tile * BT + i_m // RP
    if end is None:
        b_first, b_end, low, high = spans_of(first, most, row * T + t, t, inside, T, LK)
    else:
        b_first, b_end, low, high = load_spans(first, end, row * T + t, inside)
    for key in range(low + split * BN, high, SPLITS * BN):
        b_k = load_tile(k, (row * LK + key) * G + g, i_n * G, i_k, key + i_n < high, K)
        b_v = load_tile(v, (row * L + L - LK + key) * G + g, i_n * G, i_v, key + i_n < high, V)
        seen = (key + i_n >= b_first[:, None]) & (key + i_n < b_end[:, None])
        b_o, b_max, b_sum = read_tile(b_o, b_max, b_sum, b_q, b_k, b_v, seen, scale, PRECISION)

    if other_q is not None:
        b_q = load_tile(other_q, base, rows, i_k, inside, K)
    if prefix_k is not None:
        from_row = row * shared * P
        for key in range(split * BN, P, SPLITS * BN):
            seen, some = inside[:, None] & (key + i_n < P), True
            if document is not None:
                at, keys = row * T + tile * BT + i_m // RP, from_row + key + i_n
                real = (key + i_n < P)[None, :]
                seen = sees_document(document, chosen, keys[None, :], real, at[:, None], inside[:, None], D)
                some = tl.max(seen.to(tl.int32)) > 0
            if some:
                b_k = load_tile(prefix_k, (from_row + key) * G + g, i_n * G, i_k, key + i_n < P, K)
                b_v = load_tile(prefix_v, (from_row + key) * G + g, i_n * G, i_v, key + i_n < P, V)
                b_o, b_max, b_sum = read_tile(b_o, b_max, b_sum, b_q, b_k, b_v, seen, scale, PRECISION)
    if index is not None:
        i_c, i_j = tl.arange(0, BC), tl.arange(0, BJ)
        parts: tl.constexpr = (C + BC - 1) // BC
        b_index = load_tile(index, (row * T + tile * BT) * G + g, i_m // RP * G, i_j, inside, J)
        b_index = tl.where(inside[:, None] & (i_j < J), b_index, -1)
        limit = L - T - window + tile * BT + i_m // RP
        at = (row * tiles + tile) * G + g
        items = parts * (U if count is None else tl.load(count + at))
        for item in range(split, items, SPLITS):
            start, size, chose = load_item(united, starts, b_index, item, at * U, row, N, C, BC)
            real = (i_c < size) & (start + i_c >= 0) & (start + i_c < L)
            b_k = load_tile(far_k, (row * L + start) * G + g, i_c * G, i_k, real, K)
            b_v = load_tile(v, (row * L + start) * G + g, i_c * G, i_v, real, V)
            seen = chose[:, None] & real & (start + i_c <= limit[:, None])
            b_o, b_max, b_sum = read_tile(b_o, b_max, b_sum, b_q, b_k, b_v, seen, scale, PRECISION)

    some = b_sum > 0
    b_o = tl.where(some[:, None], b_o / tl.where(some, b_sum, 1.0)[:, None], 0.0)
    b_max = tl.where(some, (b_max + tl.log2(tl.where(some, b_sum, 1.0))) * LN2, float("-inf"))
    at_split = split.to(tl.int64) * B * T * H
    store_tile(o, b_o, at_split + base, rows, i_v, inside, V)
    tl.store(lse + at_split + base + rows, b_max, mask=inside)


@tiled([{"BM": 16, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=["ROWS", "SPLITS"])
def merge_splits(
    parts, lse_parts, o, lse, ROWS, SPLITS, H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr
):
    """Merge the softmaxes of all splits into one; parts: [SPLITS, ROWS, V], lse_parts: [SPLITS, ROWS]."""
    base = tl.program_id(0).to(tl.int64) * BM
    i_m, i_v = tl.arange(0, BM), tl.arange(0, BV)
    inside = base + i_m < ROWS
    b_o = tl.zeros([BM, BV], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for split in range(SPLITS):
        at = base + split * ROWS
        b_lse = tl.load(lse_parts + at + i_m, mask=inside, other=float("-inf"))
        b_new = tl.maximum(b_max, b_lse)
        b_top = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_kept, b_w = tl.exp(b_max - b_top), tl.exp(b_lse - b_top)
        b_o = b_o * b_kept[:, None] + load_tile(parts, at, i_m, i_v, inside, V) * b_w[:, None]
        b_sum = b_sum * b_kept + b_w
        b_max = b_new
    some = b_sum > 0
    store_tile(o, b_o / tl.where(some, b_sum, 1.0)[:, None], base, i_m, i_v, inside, V)
    b_max = tl.where(some, b_max + tl.log(tl.where(some, b_sum, 1.0)), float("-inf"))
    tl.store(lse + base + i_m, b_max, mask=inside)


@tiled(_QUERIES, _QUERIES_HIP)
@triton.jit(do_not_specialize=_SIZES)
def queries_backward(
    q,
    k,
    v,
    first,
    end,
    other_q,
    prefix_k,
    prefix_v,
    document,
    chosen,
    far_k,
    index,
    united,
    count,
    starts,
    o,
    lse,
    d_o,
    d_lse,
    d_q,
    d_other_q,
    delta,
    bounds,
    scale,
    factor,
    window,
    shared,
    T,
    LK,
    L,
    P,
    D,
    N,
    U,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of a tile of queries, and two inputs of the gradients of keys: delta, [B, T, H], for each query, and
    bounds, [B, tiles, 2], the span of keys that each tile sees. factor: the scale without the factor of the base.
    """
    BT: tl.constexpr = BM // RP
    R: tl.constexpr = H // G
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BT)
    tile, g, row = program % tiles, program // tiles % G, (program // tiles // G).to(tl.int64)
    i_k, i_v, i_n, i_m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN), tl.arange(0, BM)
    inside = (tile * BT + i_m // RP < T) & (i_m % RP < R)
    base, rows = (row * T + tile * BT) * H + g * R, i_m // RP * H + i_m % RP
    b_do = load_tile(d_o, base, rows, i_v, inside, V)
    b_delta = tl.sum(b_do.to(tl.float32) * load_tile(o, base, rows, i_v, inside, V).to(tl.float32), 1)
    if d_lse is not None:
        b_delta -= tl.load(d_lse + base + rows, mask=inside, other=0.0)
    tl.store(delta + base + rows, b_delta, mask=inside)
    b_lse = tl.load(lse + base + rows, mask=inside, other=0.0) * LOG2E

    b_q = load_tile(q, base, rows, i_k, inside, K)
    b_dq = tl.zeros([BM, BK], tl.float32)
    b_first, b_end, low, high = load_spans(first, end, row * T + tile * BT + i_m // RP, inside)
    if g == 0:
        tl.store(bounds + (row * tiles + tile) * 2, low)
        tl.store(bounds + (row * tiles + tile) * 2 + 1, high)
    for key in range(low, high, BN):
        b_k = load_tile(k, (row * LK + key) * G + g, i_n * G, i_k, key + i_n < high, K)
        b_v = load_tile(v, (row * L + L - LK + key) * G + g, i_n * G, i_v, key + i_n < high, V)
        seen = (key + i_n >= b_first[:, None]) & (key + i_n < b_end[:, None])
        b_dq = query_gradient(b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION)

    if other_q is not None:
        store_tile(d_q, b_dq * factor, base, rows, i_k, inside, K)
        b_q = load_tile(other_q, base, rows, i_k, inside, K)
        b_dq = tl.zeros([BM, BK], tl.float32)
    if prefix_k is not None:
        from_row = row * shared * P
        for key in range(0, P, BN):
            seen, some = inside[:, None] & (key + i_n < P), True
            if document is not None:
                at, keys = row * T + tile * BT + i_m // RP, from_row + key + i_n
                real = (key + i_n < P)[None, :]
                seen = sees_document(document, chosen, keys[None, :], real, at[:, None], inside[:, None], D)
                some = tl.max(seen.to(tl.int32)) > 0
            if some:
                b_k = load_tile(prefix_k, (from_row + key) * G + g, i_n * G, i_k, key + i_n < P, K)
                b_v = load_tile(prefix_v, (from_row + key) * G + g, i_n * G, i_v, key + i_n < P, V)
                b_dq = query_gradient(b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION)
    if index is not None:
        i_c, i_j = tl.arange(0, BC), tl.arange(0, BJ)
        parts: tl.constexpr = (C + BC - 1) // BC
        b_index = load_tile(index, (row * T + tile * BT) * G + g, i_m // RP * G, i_j, inside, J)
        b_index = tl.where(inside[:, None] & (i_j < J), b_index, -1)
        limit = L - T - window + tile * BT + i_m // RP
        at = (row * tiles + tile) * G + g
        items = parts * (U if count is None else tl.load(count + at))
        for item in range(items):
            start, size, chose = load_item(united, starts, b_index, item, at * U, row, N, C, BC)
            real = (i_c < size) & (start + i_c >= 0) & (start + i_c < L)
            b_k = load_tile(far_k, (row * L + start) * G + g, i_c * G, i_k, real, K)
            b_v = load_tile(v, (row * L + start) * G + g, i_c * G, i_v, real, V)
            seen = chose[:, None] & real & (start + i_c <= limit[:, None])
            b_dq = query_gradient(b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION)
    store_tile(d_q if other_q is None else d_other_q, b_dq * factor, base, rows, i_k, inside, K)


@tiled(_KEYS, _KEYS_HIP)
@triton.jit(do_not_specialize=_SIZES)
def attended_keys_backward(
    q,
    k,
    v,
    first,
    end,
    bounds,
    document,
    chosen,
    lse,
    delta,
    d_o,
    d_k,
    d_v,
    scale,
    factor,
    shared,
    B,
    T,
    LK,
    L,
    D,
    TILES,
    PARTS,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    RP: tl.constexpr,
    BOUND: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of a tile of keys from a part of the queries that see it; d_k, d_v: [PARTS, B, LK, G, K or V].

    bounds: spans of tiles of BOUND tokens; None: all queries see all keys, or those of the documents that they chose.
        Each row has its own keys if shared is 1, otherwise all rows have the same
    """
    BT: tl.constexpr = BM // RP
    R: tl.constexpr = H // G
    program = tl.program_id(0)
    tiles = tl.cdiv(LK, BN)
    part, tile, g = program % PARTS, program // PARTS % tiles, program // PARTS // tiles % G
    row = (program // PARTS // tiles // G).to(tl.int64)
    i_k, i_v, i_n, i_m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN), tl.arange(0, BM)
    key = tile * BN
    real = key + i_n < LK
    b_k = load_tile(k, (row * shared * LK + key) * G + g, i_n * G, i_k, real, K)
    b_v = load_tile(v, (row * shared * L + L - LK + key) * G + g, i_n * G, i_v, real, V)
    b_dk = tl.zeros([BN, BK], tl.float32)
    b_dv = tl.zeros([BN, BV], tl.float32)
    low, high = T * 0, T * 0 + TILES
    if bounds is not None:
        low, high = T * 0 + TILES, T * 0
        for i in range(0, TILES, 1024):
            at = i + tl.arange(0, 1024)
            b_low = tl.load(bounds + (row * TILES + at) * 2, mask=at < TILES, other=NEVER)
            b_high = tl.load(bounds + (row * TILES + at) * 2 + 1, mask=at < TILES, other=0)
            sees = (b_low < key + BN) & (b_high > key)
            low = tl.minimum(low, tl.min(tl.where(sees, at, TILES)))
            high = tl.maximum(high, tl.max(tl.where(sees, at + 1, 0)))
    share = tl.cdiv(tl.maximum(high - low, 0), PARTS)
    low = low + part * share
    high = tl.minimum(high, low + share)
    for token in range(low * BOUND, tl.minimum(high * BOUND, T), BT):
        inside = (token + i_m // RP < T) & (i_m % RP < R)
        base, rows = (row * T + token) * H + g * R, i_m // RP * H + i_m % RP
        # Keys behind the last one get gradients too; these are not stored.
        seen, some = inside[None, :], True
        if bounds is not None:
            b_first = tl.load(first + row * T + token + i_m // RP, mask=inside, other=0)
            b_end = tl.load(end + row * T + token + i_m // RP, mask=inside, other=0)
            seen = seen & ((key + i_n)[:, None] >= b_first[None, :]) & ((key + i_n)[:, None] < b_end[None, :])
        if document is not None:
            at, keys = row * T + token + i_m // RP, row * shared * LK + key + i_n
            seen = sees_document(document, chosen, keys[:, None], real[:, None], at[None, :], seen, D)
            some = tl.max(seen.to(tl.int32)) > 0
        if some:
            b_q = load_tile(q, base, rows, i_k, inside, K)
            b_do = load_tile(d_o, base, rows, i_v, inside, V)
            b_lse = tl.load(lse + base + rows, mask=inside, other=0.0) * LOG2E
            b_delta = tl.load(delta + base + rows, mask=inside, other=0.0)
            b_dk, b_dv = key_gradients(b_dk, b_dv, b_q, b_k, b_v, b_do, b_lse, b_delta, seen, scale, PRECISION)
    of_part = part * B + row
    store_tile(d_k, b_dk * factor, (of_part * LK + key) * G + g, i_n * G, i_k, real, K)
    store_tile(d_v, b_dv, (of_part * LK + key) * G + g, i_n * G, i_v, real, V)
