"""The loop over chunks in Triton for a memory of one layer that descends on the squared error; see ``reference``.

N chunks, G rows and heads, C slots of a chunk, K key dim, V value dim. A program carries some columns of a row's
memory W, momentum S and anchor A through all its chunks: the columns of a linear memory learn independently. With c, p
the last rows of C and P,

    e = k A - v        o = beta (q W) + f (q S) - (C * q k^T) e
    W' = beta W + f S - k^T (c e)                  S' = m S - k^T (p e)

Backward has two passes. The first goes through the chunks from the last one, for gradients of memories and errors. The
second takes all groups of chunks at once, each from the memory before it, for gradients of tokens. Both work on a span
of chunks at a time, because the gradient of each chunk's memory is kept in between.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

_SIZES = ["N", "G"]
_TILES, _TILES_HIP = [{"num_warps": 8, "num_stages": 1}], [{"num_warps": 4, "num_stages": 1}]


@triton.jit
def enter(
    b_W,
    b_S,
    b_A,
    opens_document,
    opens_chunk,
    owner,
    initial,
    initial_S,
    initial_anchor,
    n,
    g,
    G,
    i_k,
    i_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The memory before chunk n: a new document starts with the initial memory, a new segment with its owner's, and a
    new chunk sets the anchor.
    """
    if opens_document is not None:
        new = tl.load(opens_document + n * G + g) != 0
        opened = tl.load(opens_chunk + n * G + g) != 0
        started = i_k < tl.where(new, K, 0)
        if owner is None:
            b_W = tl.where(new, load_tile(initial, g * K, i_k, i_v, started, V), b_W)
            b_S = tl.where(new, 0.0, b_S)
        else:
            base = tl.load(owner + n * G + g) * K
            b_W = tl.where(new, load_tile(initial, base, i_k, i_v, started, V), b_W)
            b_A = tl.where(new, load_tile(initial_anchor, base, i_k, i_v, started, V), b_A)
            if initial_S is not None:
                b_S = tl.where(new, load_tile(initial_S, base, i_k, i_v, started, V), b_S)
        b_A = tl.where(opened, b_W, b_A)
    elif BLOCKS == 1:
        b_A = b_W
    else:
        b_A = tl.where(n % BLOCKS == 0, b_W, b_A)
    return b_W, b_S, b_A


@triton.jit
def load_slots(x, base, slots, W_C: tl.constexpr):
    return tl.load(x + base + slots, mask=slots < W_C, other=0.0)


@triton.jit
def leave(b_W, b_S, b_k, b_e, C, beta, f, P, m, at, i_c, W_C: tl.constexpr, PRECISION: tl.constexpr):
    """The memory after chunk ``at`` = n G + g, of W_C slots."""
    b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)
    b_written = tl.dot(tl.trans(b_k), (b_e * b_c[:, None]).to(b_k.dtype), input_precision=PRECISION)
    b_next = b_W * tl.load(beta + at * W_C + W_C - 1) - b_written
    if f is not None:
        b_p = load_slots(P, at * W_C, i_c, W_C)
        b_next += b_S * tl.load(f + at * W_C + W_C - 1)
        b_written = tl.dot(tl.trans(b_k), (b_e * b_p[:, None]).to(b_k.dtype), input_precision=PRECISION)
        b_S = b_S * tl.load(m + at) - b_written
    return b_next, b_S


@triton.jit
def store_last(b_W, b_S, b_A, W, S, anchor, base, i_k, i_v, mask, V: tl.constexpr):
    store_tile(W, b_W, base, i_k, i_v, mask, V)
    if S is not None:
        store_tile(S, b_S, base, i_k, i_v, mask, V)
    store_tile(anchor, b_A, base, i_k, i_v, mask, V)


@tiled(_TILES, _TILES_HIP)
@triton.jit(do_not_specialize=_SIZES)
def memory_forward(
    q,
    k,
    v,
    C,
    beta,
    f,
    P,
    m,
    opens_document,
    opens_chunk,
    owner,
    closes,
    W,
    S,
    anchor,
    initial,
    out,
    errors,
    squares,
    last_W,
    last_S,
    last_anchor,
    kept_W,
    kept_S,
    kept_anchor,
    N,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    W_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """out, errors: [N, G, C, V]; squares: [tiles of V, N, G, C]; kept_*: [N / GROUP, G, K, V]; without it no errors.

    owner: None, or for each chunk the index of its segment's W, S and anchor; closes: [N, G], where a segment ends
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, g = program % tiles, program // tiles
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    real = i_c < W_C
    b_W = tl.zeros([BK, BV], tl.float32)
    if owner is None:
        b_W += load_tile(W, g * K, i_k, i_v, i_k < K, V)
    b_S = b_W * 0.0
    b_A = b_W
    # Two nested conditions: whether a tensor is None is known at compile time.
    if owner is None:
        if S is not None:
            b_S += load_tile(S, g * K, i_k, i_v, i_k < K, V)
        if anchor is not None:
            b_A = load_tile(anchor, g * K, i_k, i_v, i_k < K, V)
        first = initial
    else:
        first = W
    for begin in range(0, N, GROUP):
        if kept_W is not None:
            kept_base = (begin // GROUP * G + g) * K
            store_tile(kept_W, b_W, kept_base, i_k, i_v, i_k < K, V)
            store_tile(kept_anchor, b_A, kept_base, i_k, i_v, i_k < K, V)
            if S is not None:
                store_tile(kept_S, b_S, kept_base, i_k, i_v, i_k < K, V)
        for n in range(begin, tl.minimum(begin + GROUP, N)):
            at = n * G + g
            b_W, b_S, b_A = enter(
                b_W, b_S, b_A, opens_document, opens_chunk, owner, first, S, anchor, n, g, G, i_k, i_v, K, V, BLOCKS
            )
            b_q = load_tile(q, at * W_C, i_c, i_k, real, K)
            b_k = load_tile(k, at * W_C, i_c, i_k, real, K)
            b_e = tl.dot(b_k, b_A.to(b_k.dtype), input_precision=PRECISION)
            b_e -= load_tile(v, at * W_C, i_c, i_v, real, V).to(tl.float32)
            if errors is not None:
                store_tile(errors, b_e, at * W_C, i_c, i_v, real, V)
            tl.store(squares + (tile * N * G + at) * W_C + i_c, tl.sum(b_e * b_e, 1), mask=real)
            b_C = load_tile(C, at * W_C, i_c, i_c, real, W_C)
            b_R = b_C * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_beta = load_slots(beta, at * W_C, i_c, W_C)
            b_o = tl.dot(b_q, b_W.to(b_q.dtype), input_precision=PRECISION) * b_beta[:, None]
            b_o -= tl.dot(b_R.to(b_k.dtype), b_e.to(b_k.dtype), input_precision=PRECISION)
            if f is not None:
                b_f = load_slots(f, at * W_C, i_c, W_C)
                b_o += tl.dot(b_q, b_S.to(b_q.dtype), input_precision=PRECISION) * b_f[:, None]
            store_tile(out, b_o, at * W_C, i_c, i_v, real, V)
            b_W, b_S = leave(b_W, b_S, b_k, b_e, C, beta, f, P, m, at, i_c, W_C, PRECISION)
            if owner is not None:
                base, ended = tl.load(owner + at) * K, i_k < tl.where(tl.load(closes + at) != 0, K, 0)
                store_last(b_W, b_S, b_A, last_W, last_S, last_anchor, base, i_k, i_v, ended, V)
    if owner is None:
        store_last(b_W, b_S, b_A, last_W, last_S, last_anchor, g * K, i_k, i_v, i_k < K, V)


@tiled(_TILES, _TILES_HIP)
@triton.jit(do_not_specialize=[*_SIZES, "begin", "end"])
def memory_backward(
    q,
    k,
    C,
    beta,
    f,
    P,
    m,
    opens_document,
    opens_chunk,
    owner,
    closes,
    d_out,
    d_last_W,
    d_last_S,
    d_last_anchor,
    d_last_initial,
    d_errors,
    d_next_W,
    d_next_S,
    d_W,
    d_S,
    d_anchor,
    d_initial,
    d_of_W,
    d_of_S,
    d_of_anchor,
    begin,
    end,
    N,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    W_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """From the last chunk before ``end`` to ``begin``: gradients of W, S, the anchor, and each token's error.

    d_next_W, d_next_S: [end - begin, G, K, V], gradients of the memory after each chunk; d_last_*: of the memory after
    the last chunk; d_W, d_S, d_anchor, d_initial: of the memory before the first; d_of_*: with owners, the gradients
    of a segment's last memory on entry, and of its first memory on return
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, g = program % tiles, program // tiles
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    real, keys = i_c < W_C, i_k < K
    b_dW = load_tile(d_last_W, g * K, i_k, i_v, keys, V)
    b_dA = load_tile(d_last_anchor, g * K, i_k, i_v, keys, V)
    b_dS = b_dW * 0.0
    b_dinitial = b_dW * 0.0
    if f is not None:
        b_dS += load_tile(d_last_S, g * K, i_k, i_v, keys, V)
    if d_initial is not None:
        b_dinitial += load_tile(d_last_initial, g * K, i_k, i_v, keys, V)
    for back in range(end - begin):
        i = end - begin - 1 - back
        n = begin + i
        at = n * G + g
        if owner is not None:
            # The gradients in registers are 0 where a segment closes.
            base, ended = tl.load(owner + at) * K, i_k < tl.where(tl.load(closes + at) != 0, K, 0)
            b_dW += load_tile(d_of_W, base, i_k, i_v, ended, V)
            b_dA += load_tile(d_of_anchor, base, i_k, i_v, ended, V)
            if f is not None:
                b_dS += load_tile(d_of_S, base, i_k, i_v, ended, V)
        store_tile(d_next_W, b_dW, (i * G + g) * K, i_k, i_v, keys, V)
        b_q = load_tile(q, at * W_C, i_c, i_k, real, K)
        b_k = load_tile(k, at * W_C, i_c, i_k, real, K)
        b_o = load_tile(d_out, at * W_C, i_c, i_v, real, V)
        b_C = load_tile(C, at * W_C, i_c, i_c, real, W_C)
        b_R = tl.trans(b_C * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)).to(b_k.dtype)
        b_de = -tl.dot(b_R, b_o.to(b_k.dtype), input_precision=PRECISION)
        b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)
        b_de -= tl.dot(b_k, b_dW.to(b_k.dtype), input_precision=PRECISION) * b_c[:, None]
        if f is not None:
            store_tile(d_next_S, b_dS, (i * G + g) * K, i_k, i_v, keys, V)
            b_p = load_slots(P, at * W_C, i_c, W_C)
            b_f = load_slots(f, at * W_C, i_c, W_C)
            b_de -= tl.dot(b_k, b_dS.to(b_k.dtype), input_precision=PRECISION) * b_p[:, None]
            b_dS = b_dS * tl.load(m + at) + b_dW * tl.load(f + at * W_C + W_C - 1)
            b_dS += tl.dot(tl.trans(b_q), (b_o * b_f[:, None]).to(b_q.dtype), input_precision=PRECISION)
        b_beta = load_slots(beta, at * W_C, i_c, W_C)
        b_dW *= tl.load(beta + at * W_C + W_C - 1)
        b_dW += tl.dot(tl.trans(b_q), (b_o * b_beta[:, None]).to(b_q.dtype), input_precision=PRECISION)
        b_dA += tl.dot(tl.trans(b_k), b_de.to(b_k.dtype), input_precision=PRECISION)
        store_tile(d_errors, b_de, at * W_C, i_c, i_v, real, V)
        if opens_document is not None:
            new = tl.load(opens_document + n * G + g) != 0
            opened = tl.load(opens_chunk + n * G + g) != 0
            # Products, because Triton 3.9 fails on ``where`` between values in tensor memory (sm_100).
            is_open, is_new = opened.to(tl.float32), new.to(tl.float32)
            b_dW += b_dA * is_open
            b_dA *= 1.0 - is_open
            if owner is None:
                b_dinitial += b_dW * is_new
            else:
                base, started = tl.load(owner + at) * K, i_k < tl.where(new, K, 0)
                store_tile(d_of_W, b_dW, base, i_k, i_v, started, V)
                store_tile(d_of_anchor, b_dA, base, i_k, i_v, started, V)
                if f is not None:
                    store_tile(d_of_S, b_dS, base, i_k, i_v, started, V)
                b_dA *= 1.0 - is_new
            b_dW *= 1.0 - is_new
            b_dS *= 1.0 - is_new
        elif n % BLOCKS == 0:
            b_dW += b_dA
            b_dA = b_dA * 0.0
    store_tile(d_W, b_dW, g * K, i_k, i_v, keys, V)
    store_tile(d_anchor, b_dA, g * K, i_k, i_v, keys, V)
    if f is not None:
        store_tile(d_S, b_dS, g * K, i_k, i_v, keys, V)
    if d_initial is not None:
        store_tile(d_initial, b_dinitial, g * K, i_k, i_v, keys, V)


@tiled(_TILES, _TILES_HIP)
@triton.jit(do_not_specialize=[*_SIZES, "begin", "end"])
def tokens_backward(
    q,
    k,
    C,
    beta,
    f,
    P,
    m,
    opens_document,
    opens_chunk,
    owner,
    initial,
    initial_S,
    initial_anchor,
    errors,
    kept_W,
    kept_S,
    kept_anchor,
    d_out,
    d_errors,
    d_next_W,
    d_next_S,
    d_q,
    d_k,
    d_C,
    d_c,
    d_beta,
    d_f,
    d_P,
    d_m,
    begin,
    end,
    N,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    W_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of a group's tokens and scalars; each tile of values stores its own part: [tiles of V, ...].

    Tokens are columns, because the warps of a product divide its rows, and a chunk has few tokens.

    d_c: [tiles of V, N, G, C], the gradient of the last row of C through the write to W; d_C: that through the reads
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile, g, group = program % tiles, program // tiles % G, begin // GROUP + program // tiles // G
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), (tile * BV).to(tl.int32) + tl.arange(0, BV)
    real, keys, last = i_c < W_C, i_k < K, i_c == W_C - 1
    b_W = load_tile(kept_W, (group * G + g) * K, i_k, i_v, keys, V)
    b_A = load_tile(kept_anchor, (group * G + g) * K, i_k, i_v, keys, V)
    b_S = b_W * 0.0
    if f is not None:
        b_S += load_tile(kept_S, (group * G + g) * K, i_k, i_v, keys, V)
    for n in range(group * GROUP, tl.minimum(group * GROUP + GROUP, end)):
        at = n * G + g
        place = tile * N * G + at
        b_W, b_S, b_A = enter(
            b_W,
            b_S,
            b_A,
            opens_document,
            opens_chunk,
            owner,
            initial,
            initial_S,
            initial_anchor,
            n,
            g,
            G,
            i_k,
            i_v,
            K,
            V,
            BLOCKS,
        )
        b_q = tl.trans(load_tile(q, at * W_C, i_c, i_k, real, K))
        b_k = tl.trans(load_tile(k, at * W_C, i_c, i_k, real, K))
        b_o = tl.trans(load_tile(d_out, at * W_C, i_c, i_v, real, V)).to(b_k.dtype)
        b_e = tl.trans(load_tile(errors, at * W_C, i_c, i_v, real, V)).to(b_k.dtype)

        b_C = load_tile(C, at * W_C, i_c, i_c, real, W_C)
        b_pairs = -tl.dot(tl.trans(b_o), b_e, input_precision=PRECISION)
        b_scores = tl.dot(tl.trans(b_q), b_k, input_precision=PRECISION)
        store_tile(d_C, b_scores * b_pairs, place * W_C, i_c, i_c, real, W_C)
        b_ds = (b_C * b_pairs).to(b_k.dtype)

        b_dW = load_tile(d_next_W, ((n - begin) * G + g) * K, i_k, i_v, keys, V)
        b_beta = load_slots(beta, at * W_C, i_c, W_C)
        b_of_o = tl.dot(b_W.to(b_k.dtype), b_o, input_precision=PRECISION)
        b_dbeta = tl.sum(b_of_o * b_q, 0) + tl.where(last, tl.sum(b_dW * b_W), 0.0)
        tl.store(d_beta + place * W_C + i_c, b_dbeta, mask=real)
        b_dq = b_of_o * b_beta[None, :]
        if f is not None:
            b_f = load_slots(f, at * W_C, i_c, W_C)
            b_of_o = tl.dot(b_S.to(b_k.dtype), b_o, input_precision=PRECISION)
            b_df = tl.sum(b_of_o * b_q, 0) + tl.where(last, tl.sum(b_dW * b_S), 0.0)
            tl.store(d_f + place * W_C + i_c, b_df, mask=real)
            b_dq += b_of_o * b_f[None, :]
        b_dq += tl.dot(b_k, tl.trans(b_ds), input_precision=PRECISION)
        store_tile(d_q, tl.trans(b_dq), place * W_C, i_c, i_k, real, K)

        b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)
        b_of_e = tl.dot(b_dW.to(b_k.dtype), b_e, input_precision=PRECISION)
        tl.store(d_c + place * W_C + i_c, -tl.sum(b_of_e * b_k, 0), mask=real)
        b_dk = -b_of_e * b_c[None, :]
        if f is not None:
            b_p = load_slots(P, at * W_C, i_c, W_C)
            b_dS = load_tile(d_next_S, ((n - begin) * G + g) * K, i_k, i_v, keys, V)
            tl.store(d_m + place, tl.sum(b_dS * b_S))
            b_of_e = tl.dot(b_dS.to(b_k.dtype), b_e, input_precision=PRECISION)
            tl.store(d_P + place * W_C + i_c, -tl.sum(b_of_e * b_k, 0), mask=real)
            b_dk -= b_of_e * b_p[None, :]
        b_de = tl.trans(load_tile(d_errors, at * W_C, i_c, i_v, real, V)).to(b_k.dtype)
        b_dk += tl.dot(b_A.to(b_k.dtype), b_de, input_precision=PRECISION)
        b_dk += tl.dot(b_q, b_ds, input_precision=PRECISION)
        store_tile(d_k, tl.trans(b_dk), place * W_C, i_c, i_k, real, K)
        b_W, b_S = leave(b_W, b_S, tl.trans(b_k), tl.trans(b_e), C, beta, f, P, m, at, i_c, W_C, PRECISION)
