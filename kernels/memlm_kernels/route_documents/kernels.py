"""Routing in Triton; see ``reference`` for the mathematics.

``score_chunks`` reduces each chunk's scores over tokens; a program has a tile of chunks. If ``running``, decisions
differ from token to token: ``choose_running`` computes the scores again, a tile of tokens per program, from the values
that ``score_chunks`` kept at the start of that tile. ``choose_best`` chooses among values that are given.

The best are kept as a set without an order. A tile's best candidate replaces the worst of the set until none is
better, which costs almost nothing once the set is good. A document in the set keeps its place when a later tile has
more of its chunks.

B rows, M tokens, C chunks, N documents, G groups of P heads, K key dim, R decisions of a row, J documents of each.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, tiled

_LAST: tl.constexpr = tl.constexpr(2**31 - 1)
_NEVER: tl.constexpr = tl.constexpr(float("-inf"))
_SIZES = ["M", "C", "N", "R", "SPLIT", "SPLITS"]
_SCORES = [{"BC": 64, "num_warps": 8, "num_stages": 3}]
# Twice the chunks read the queries half as often. Elsewhere these tiles take all registers, or spill.
_SCORES_90 = [{"BC": 128, "num_warps": 8, "num_stages": 2}, *_SCORES]
_SCORES_HIP = [{"BC": 64, "num_warps": 4, "num_stages": 1}]
_RUNNING = [{"BC": 64, "num_warps": 8, "num_stages": 2}]


@triton.jit
def similarities(
    query,
    k,
    of_query,
    of_k,
    last_m,
    last_c,
    G: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    MEAN: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """[BM, BC], or with ROWS [BC, BM], a chunk in a row: the sum or the maximum over heads.

    A tile of keys is read, and its length computed, once for all heads of a group. of_query, of_k: the first token and
    the first chunk. Rows behind last_m and last_c are these once more, because masks take registers.
    """
    i_k = tl.arange(0, BK)
    i_m, i_c = tl.minimum(tl.arange(0, BM), last_m), tl.minimum(tl.arange(0, BC), last_c)
    b_scores = tl.zeros([BC, BM] if ROWS else [BM, BC], tl.float32)
    if not MEAN:
        b_scores += _NEVER
    for g in range(G):
        b_k = load_tile(k, of_k * G + g, i_c * G, i_k, i_c >= 0, K)
        if COSINE:
            b_exact = b_k.to(tl.float32)
            b_scale = tl.rsqrt(tl.sum(b_exact * b_exact, 1) + 1e-12)
        for p in range(P):
            b_q = load_tile(query, of_query * (G * P) + g * P + p, i_m * (G * P), i_k, i_m >= 0, K)
            b_same = b_k.to(b_q.dtype)
            if ROWS:
                b_head = tl.dot(b_same, tl.trans(b_q), input_precision=PRECISION)
            else:
                b_head = tl.dot(b_q, tl.trans(b_same), input_precision=PRECISION)
            if COSINE:
                b_head *= b_scale[:, None] if ROWS else b_scale[None, :]
            if MEAN:
                b_scores += b_head
            else:
                b_scores = tl.maximum(b_scores, b_head)
    return b_scores


@triton.jit
def knows(b_document, asks, first, end, at, inside):
    """Which tokens ``at`` may choose which documents, and which of these tokens route. Documents lie along one of two
    dimensions, tokens along the other.
    """
    sees = inside & (b_document >= 0)
    if first is not None:
        sees = sees & (b_document >= tl.load(first + at, mask=inside, other=0))
        sees = sees & (b_document < tl.load(end + at, mask=inside, other=0))
    asking = inside
    if asks is not None:
        asking = inside & (tl.load(asks + at, mask=inside, other=0) != 0)
    return sees, asking


@tiled(_SCORES, _SCORES_HIP, sm_90=_SCORES_90)
@triton.jit(do_not_specialize=_SIZES)
def score_chunks(
    query,
    k,
    document,
    asks,
    first,
    end,
    before_score,
    before_asked,
    score,
    asked,
    token,
    so_far_score,
    so_far_asked,
    M,
    C,
    G: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """score: the maximum over tokens, or with SUM the sum; so_far: [B, tiles of tokens, C], the score before each
    tile; the number of tokens only with SUM.
    """
    program = tl.program_id(0)
    tiles_c, tiles_m = tl.cdiv(C, BC), tl.cdiv(M, BM)
    row, c = (program // tiles_c).to(tl.int64), program % tiles_c * BC
    row_k = row * (1 - SHARED)
    i_c = tl.arange(0, BC)
    inside_c = c + i_c < C
    b_document = tl.load(document + row_k * C + c + i_c, mask=inside_c, other=-1)
    b_score = tl.load(before_score + row * C + c + i_c, mask=inside_c, other=0.0)
    b_asked = tl.load(before_asked + row * C + c + i_c, mask=inside_c, other=0)
    if not SUM:
        b_score = tl.where(b_asked > 0, b_score, _NEVER)
    b_token = tl.zeros([BC], tl.int32)
    for tile in range(tiles_m):
        if so_far_score is not None:
            at = (row * tiles_m + tile) * C + c + i_c
            tl.store(so_far_score + at, b_score, mask=inside_c)
        i_m, m = tl.arange(0, BM), row * M + tile * BM
        inside = tile * BM + i_m < M
        lasts = M - tile * BM - 1, C - c - 1
        b_s = similarities(query, k, m, row_k * C + c, *lasts, G, P, K, MEAN, COSINE, PRECISION, True, BM, BC, BK)
        sees, asking = knows(b_document[:, None], asks, first, end, m + i_m[None, :], inside[None, :])
        known = sees & asking
        if SUM:
            b_score += tl.sum(tl.where(known, b_s, 0.0), 1)
        else:
            b_s = tl.where(known, b_s, _NEVER)
            b_max = tl.max(b_s, 1)
            b_first = tl.min(tl.where(b_s == b_max[:, None], tile * BM + i_m[None, :], _LAST), 1)
            b_token = tl.where(b_max > b_score, b_first, b_token)
            b_score = tl.maximum(b_score, b_max)
    # A loop of its own needs fewer registers.
    for tile in range(tiles_m):
        if so_far_asked is not None:
            tl.store(so_far_asked + (row * tiles_m + tile) * C + c + i_c, b_asked, mask=inside_c)
        i_m = tile * BM + tl.arange(0, BM)
        sees, asking = knows(b_document[:, None], asks, first, end, row * M + i_m[None, :], (i_m < M)[None, :])
        b_asked += tl.sum((sees & asking).to(tl.int32), 1)
    at = row * C + c + i_c
    tl.store(score + at, tl.where(b_asked > 0, b_score, 0.0), mask=inside_c)
    tl.store(asked + at, b_asked, mask=inside_c)
    tl.store(token + at, b_token, mask=inside_c)


@triton.jit
def candidate(b_values, b_names, b_best, b_best_name, LAST: tl.constexpr):
    """For each row: the best value and its name, the name of the set's worst, and whether it must be replaced."""
    b_value = tl.max(b_values, 1)
    b_name = tl.min(tl.where(b_values == b_value[:, None], b_names, LAST), 1)
    b_least = tl.min(b_best, 1)
    b_worst = tl.max(tl.where(b_best == b_least[:, None], b_best_name, -1), 1)
    better = (b_value > b_least) | ((b_value == b_least) & (b_value > _NEVER) & (b_name < b_worst))
    return b_value, b_name, b_worst, better


@triton.jit
def keep_best(b_values, b_names, b_best, b_best_name, LAST: tl.constexpr):
    """The best among a set and values [D, n] with names [D or 1, n] below LAST, the largest number of their type;
    among equal values the lowest name wins.
    """
    b_value, b_name, b_worst, better = candidate(b_values, b_names, b_best, b_best_name, LAST)
    while tl.max(better.to(tl.int32), 0) > 0:
        same = b_best_name == b_name[:, None]
        has = tl.max(same.to(tl.int32), 1) > 0
        place = tl.where(has[:, None], same & (b_best < b_value[:, None]), b_best_name == b_worst[:, None])
        place = place & better[:, None]
        b_best = tl.where(place, b_value[:, None], b_best)
        b_best_name = tl.where(place, b_name[:, None], b_best_name)
        b_values = tl.where(b_names == b_name[:, None], _NEVER, b_values)
        b_value, b_name, b_worst, better = candidate(b_values, b_names, b_best, b_best_name, LAST)
    return b_best, b_best_name


@triton.jit
def empty_set(names, BD: tl.constexpr, BJ: tl.constexpr, LAST: tl.constexpr):
    """A set whose empty places have different names; names: a pointer of the names' type."""
    b_name = tl.zeros([BD, BJ], names.dtype.element_ty) - tl.arange(0, BJ)[None, :] + (LAST - 1)
    return tl.zeros([BD, BJ], tl.float32) + _NEVER, b_name


@triton.jit
def store_best(best, best_name, b_best, b_best_name, at, inside, J, LAST: tl.constexpr):
    """Store the set in order, J entries for each row from ``at`` on."""
    for j in range(J):
        b_value = tl.max(b_best, 1)
        b_name = tl.min(tl.where(b_best == b_value[:, None], b_best_name, LAST), 1)
        tl.store(best + at * J + j, b_value, mask=inside)
        tl.store(best_name + at * J + j, tl.where(b_value > _NEVER, b_name, -1), mask=inside)
        b_best = tl.where(b_best_name == b_name[:, None], _NEVER, b_best)


@tiled(_RUNNING, _SCORES_HIP)
@triton.jit(do_not_specialize=_SIZES)
def choose_running(
    query,
    k,
    document,
    asks,
    first,
    end,
    so_far_score,
    so_far_asked,
    best,
    best_name,
    M,
    C,
    N,
    SPLIT,
    SPLITS,
    G: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    J: tl.constexpr,
    LAST: tl.constexpr,
    BJ: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """best: [B, M, SPLITS, J], for each token the best among SPLIT chunks, by the tokens up to it."""
    program = tl.program_id(0).to(tl.int64)
    tiles_m = (M + BM - 1) // BM
    split, tile, row = program % SPLITS, program // SPLITS % tiles_m, program // SPLITS // tiles_m
    row_k = row * (1 - SHARED)
    i_m, i_c = tl.arange(0, BM), tl.arange(0, BC)
    m = row * M + tile * BM
    inside = tile * BM + i_m < M
    b_best, b_best_name = empty_set(best_name, BM, BJ, LAST)
    for i in range((tl.minimum(SPLIT, C - split * SPLIT) + BC - 1) // BC):
        c = split * SPLIT + i * BC
        inside_c = c + i_c < C
        b_document = tl.load(document + row_k * C + c + i_c, mask=inside_c, other=-1)
        lasts = (M - tile * BM - 1).to(tl.int32), (C - c - 1).to(tl.int32)
        b_s = similarities(query, k, m, row_k * C + c, *lasts, G, P, K, MEAN, COSINE, PRECISION, False, BM, BC, BK)
        sees, asking = knows(b_document[None, :], asks, first, end, m + i_m[:, None], inside[:, None])
        known = sees & asking
        at = (row * tiles_m + tile) * C + c + i_c
        b_score = tl.load(so_far_score + at, mask=inside_c, other=_NEVER)
        if SUM:
            b_asked = tl.load(so_far_asked + at, mask=inside_c, other=0).to(tl.float32)
            b_count = tl.cumsum(known.to(tl.float32), 0) + b_asked[None, :]
            b_s = tl.cumsum(tl.where(known, b_s, 0.0), 0) + b_score[None, :]
            b_s = tl.where(b_count > 0, b_s / tl.maximum(b_count, 1.0), _NEVER)
        else:
            b_s = tl.associative_scan(tl.where(known, b_s, _NEVER), 0, larger)
            b_s = tl.maximum(b_s, b_score[None, :])
        b_s = tl.where(sees & (b_document < N)[None, :], b_s, _NEVER)
        b_best, b_best_name = keep_best(b_s, b_document[None, :], b_best, b_best_name, LAST)
    store_best(best, best_name, b_best, b_best_name, (m + i_m) * SPLITS + split, inside, J, LAST)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@tiled(
    [{"BC": 256, "num_warps": 16, "num_stages": 1}],
    [{"BC": 128, "num_warps": 4, "num_stages": 1}, {"BC": 256, "num_warps": 8, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def choose_best(
    values,
    names,
    first,
    end,
    best,
    best_name,
    C,
    N,
    R,
    SPLIT,
    SPLITS,
    SHARED: tl.constexpr,
    J: tl.constexpr,
    LAST: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """best: [B, R, SPLITS, J], for each decision the best among SPLIT values of [B, C] with names [B or 1, C]."""
    program = tl.program_id(0).to(tl.int64)
    tiles_d = (R + BD - 1) // BD
    split, tile, row = program % SPLITS, program // SPLITS % tiles_d, program // SPLITS // tiles_d
    i_d, i_c = tl.arange(0, BD), tl.arange(0, BC)
    d = row * R + tile * BD
    inside = tile * BD + i_d < R
    b_best, b_best_name = empty_set(best_name, BD, BJ, LAST)
    for i in range((tl.minimum(SPLIT, C - split * SPLIT) + BC - 1) // BC):
        c = split * SPLIT + i * BC
        inside_c = c + i_c < C
        b_names = tl.load(names + row * (1 - SHARED) * C + c + i_c, mask=inside_c, other=-1)
        b_values = tl.load(values + row * C + c + i_c, mask=inside_c, other=_NEVER)
        sees, _ = knows(b_names[None, :], None, first, end, d + i_d[:, None], inside[:, None])
        b_values = tl.where(sees & (b_names < N)[None, :], b_values[None, :], _NEVER)
        b_best, b_best_name = keep_best(b_values, b_names[None, :], b_best, b_best_name, LAST)
    store_best(best, best_name, b_best, b_best_name, (d + i_d) * SPLITS + split, inside, J, LAST)
