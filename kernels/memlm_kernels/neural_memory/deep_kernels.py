"""The loop over chunks in Triton for a memory of two layers, with or without a norm; see ``reference``.

N chunks, G rows and heads, C slots of a chunk, K key dim, X hidden dim, V value dim. The layers depend on each other
in every chunk, so one program has all of a row's memory. The memory lies in rooms, [R, G, in, out] for each layer, and
is processed in tiles of X. ``deep_write`` keeps a memory of one tile of 64 x 64 in registers from chunk to chunk, too.
Chunk i of a span reads the memory of room i + 1 and writes that of room i + 2; if the next chunk starts a document,
room i + 2 gets the document's initial memory. Room 0 holds the anchor before the span; ``anchors`` [chunks, G] holds
the room of each chunk's anchor.

Writes, and their gradients, go from chunk to chunk; reads are for all chunks at once. Tokens are columns, because the
warps of a product divide its rows, and a chunk has few tokens. All products are of fp32 tiles.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

_SIZES = ["begin", "N", "G"]
TILES = [{"BX": 64, "num_warps": 4, "num_stages": 1}]
# Eight warps where the hidden dim takes several tiles: four spill on CUDA. ``deep`` limits them.
WIDE = [tiles | {"num_warps": 8} for tiles in TILES]


@triton.jit
def load_slots(x, base, slots, W_C: tl.constexpr):
    return tl.load(x + base + slots, mask=slots < W_C, other=0.0)


@triton.jit
def activate(x, SILU: tl.constexpr):
    return x * tl.sigmoid(x) if SILU else 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def slope(x, SILU: tl.constexpr):
    """The activation's derivative."""
    if SILU:
        s = tl.sigmoid(x)
        value = s * (1.0 + x * (1.0 - s))
    else:
        value = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return value


@triton.jit
def curvature(x, SILU: tl.constexpr):
    """Its second derivative."""
    if SILU:
        s = tl.sigmoid(x)
        value = s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    else:
        value = 0.3989422804014327 * tl.exp(-0.5 * x * x) * (2.0 - x * x)
    return value


@triton.jit
def load_columns(x, base, tokens, channels, real, width: tl.constexpr):
    """[channels, tokens] of x [..., width], in fp32."""
    return tl.trans(load_tile(x, base, tokens, channels, real, width)).to(tl.float32)


@triton.jit
def store_columns(x, value, base, tokens, channels, real, width: tl.constexpr):
    store_tile(x, tl.trans(value), base, tokens, channels, real, width)


@triton.jit
def pairs(b_x, b_y, PRECISION: tl.constexpr):
    """x^T y, [BT, BT], for two [rows, BT]: the warps share the rows, because 16 x 16 has work for one warp alone."""
    parts: tl.constexpr = b_x.shape[0] // 16
    b_x = tl.permute(tl.reshape(b_x, [parts, 16, b_x.shape[1]]), [0, 2, 1])
    b_y = tl.reshape(b_y, [parts, 16, b_y.shape[1]])
    return tl.sum(tl.dot(b_x, b_y, input_precision=PRECISION), 0)


@triton.jit
def normalised(b_f, i_v, V: tl.constexpr, EPS: tl.constexpr):
    """y and the scale of LayerNorm; the channels lie along the rows."""
    b_centred = tl.where((i_v < V)[:, None], b_f - (tl.sum(b_f, 0) / V)[None, :], 0.0)
    b_scale = tl.rsqrt(tl.sum(b_centred * b_centred, 0) / V + EPS)[None, :]
    return b_centred * b_scale, b_scale


@triton.jit
def pull_back(b_d, b_y, b_scale, i_v, V: tl.constexpr):
    """LayerNorm's backward pass."""
    b_f = b_d - (tl.sum(b_d, 0) / V)[None, :] - b_y * (tl.sum(b_d * b_y, 0) / V)[None, :]
    return tl.where((i_v < V)[:, None], b_f * b_scale, 0.0)


@triton.jit
def load_tail(x, g, i_v, V: tl.constexpr):
    return tl.load(x + g * V + i_v, mask=i_v < V, other=0.0)[:, None]


@triton.jit
def output_error(b_f, b_k, b_v, gain, bias, g, i_v, V: tl.constexpr, EPS: tl.constexpr):
    """Gradient of the squared error in the MLP's output, as in ``network.OutputError``."""
    if gain is None:
        b_error = b_f - b_v
    else:
        b_gain = load_tail(gain, g, i_v, V)
        b_y, b_scale = normalised(b_f, i_v, V, EPS)
        b_loss = b_k + b_y * b_gain + load_tail(bias, g, i_v, V) - b_v
        b_error = pull_back(b_loss * b_gain, b_y, b_scale, i_v, V)
    return b_error


@triton.jit
def output_error_backward(b_d, b_f, b_k, b_v, gain, bias, g, i_v, V: tl.constexpr, EPS: tl.constexpr):
    """Gradients of b_f, of the error M(k) - v and, per token, of the gain; as in ``network.OutputError.backward``."""
    b_df = b_d
    b_dr = b_d
    b_share = b_d
    if gain is not None:
        b_gain = load_tail(gain, g, i_v, V)
        b_y, b_scale = normalised(b_f, i_v, V, EPS)
        b_loss = b_k + b_y * b_gain + load_tail(bias, g, i_v, V) - b_v
        b_u = b_loss * b_gain
        b_du = pull_back(b_d, b_y, b_scale, i_v, V)
        b_dr = b_du * b_gain
        b_of_y = b_d * (tl.sum(b_u * b_y, 0) / V)[None, :] + b_u * (tl.sum(b_d * b_y, 0) / V)[None, :]
        b_dy = b_dr * b_gain - b_of_y * b_scale
        b_of_scale = tl.sum(b_d * pull_back(b_u, b_y, b_scale, i_v, V), 0) / V
        b_df = pull_back(b_dy, b_y, b_scale, i_v, V) - b_y * b_scale * b_of_scale[None, :]
        b_share = b_du * b_loss + b_dr * b_y
    return b_df, b_dr, b_share


@triton.jit
def held_tile(b_M, M, room, rows, columns, height: tl.constexpr, width: tl.constexpr, HELD: tl.constexpr):
    """Some columns of a matrix: the given ones if they are held, else those of its room."""
    if not HELD:
        b_M = load_tile(M, room * height, rows, columns, rows < height, width)
    return b_M


@triton.jit
def leave(
    b_W,
    b_S,
    W,
    S,
    initial,
    b_a,
    b_e,
    b_c,
    b_p,
    b_beta,
    b_f,
    b_m,
    new,
    after,
    g,
    rows,
    columns,
    height: tl.constexpr,
    width: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W and S after the write of inputs b_a [rows, C] and errors b_e [columns, C], stored in room ``after``; the
    initial memory if the next chunk starts a document.
    """
    b_W *= b_beta
    if S is not None:
        b_W += b_S * b_f
        b_S = tl.dot(b_a, tl.trans(b_e * -b_p[None, :]), acc=b_S * b_m, input_precision=PRECISION)
    b_W = tl.dot(b_a, tl.trans(b_e * -b_c[None, :]), acc=b_W, input_precision=PRECISION)
    inside = rows < height
    if initial is not None and new:
        b_W = load_tile(initial, g * height, rows, columns, inside, width)
        b_S = tl.zeros_like(b_S)
    store_tile(W, b_W, after * height, rows, columns, inside, width)
    if S is not None:
        store_tile(S, b_S, after * height, rows, columns, inside, width)
    return b_W, b_S


@triton.jit
def through_anchor(
    b_W,
    b_x,
    W,
    own,
    anchor,
    rows,
    columns,
    height: tl.constexpr,
    width: tl.constexpr,
    FORWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of a layer of the anchor, transposed with FORWARD, times b_x; own: whether the anchor is b_W."""
    if own:
        b_y = tl.dot(tl.trans(b_W) if FORWARD else b_W, b_x, input_precision=PRECISION)
    else:
        b_A = load_tile(W, anchor * height, rows, columns, rows < height, width)
        b_y = tl.dot(tl.trans(b_A) if FORWARD else b_A, b_x, input_precision=PRECISION)
    return b_y


# On sm_100 four do not spill, and eight do.
@tiled(WIDE, hip=TILES, sm_100=TILES)
@triton.jit(do_not_specialize=[*_SIZES, "end"])
def deep_write(
    k,
    v,
    C,
    beta,
    f,
    P,
    m,
    gain,
    bias,
    opens_document,
    anchors,
    initial_1,
    initial_2,
    W_1,
    S_1,
    W_2,
    S_2,
    hidden,
    outputs,
    errors_1,
    errors_2,
    begin,
    end,
    N,
    G,
    K: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    W_C: tl.constexpr,
    OWN: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """From chunk ``begin`` to ``end``: the memory of each chunk, and the tensors that its tokens write, [end - begin,
    G, C, ...]: hidden values before the activation, the MLP's output, and the errors of both layers.

    OWN: each chunk is its own anchor
    """
    HELD: tl.constexpr = X <= BX and BK <= 64 and BV <= 64
    # With other anchors there are no registers for S.
    HELD_S: tl.constexpr = HELD and OWN
    g = tl.program_id(0).to(tl.int64)
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    real = i_c < W_C
    i_x = tl.arange(0, BX)
    b_W1 = tl.zeros([BK, BX], tl.float32)
    b_W2 = tl.zeros([BX, BV], tl.float32)
    b_S1 = b_W1
    b_S2 = b_W2
    if HELD:
        b_W1 = load_tile(W_1, (G + g) * K, i_k, i_x, i_k < K, X)
        b_W2 = load_tile(W_2, (G + g) * X, i_x, i_v, i_x < X, V)
    if HELD_S and S_1 is not None:
        b_S1 = load_tile(S_1, (G + g) * K, i_k, i_x, i_k < K, X)
        b_S2 = load_tile(S_2, (G + g) * X, i_x, i_v, i_x < X, V)
    # Values that are the same for all chunks would occupy registers all the time.
    for i in tl.range(end - begin, disable_licm=True):
        at, here = (begin + i) * G + g, i * G + g
        room = here + G
        anchor = room
        own = HELD
        if not OWN:
            anchor = tl.load(anchors + here) * G + g
            if HELD:
                own = anchor == room
        b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
        b_v = load_columns(v, at * W_C, i_c, i_v, real, V)
        b_c = load_slots(C, (at * W_C + W_C - 1) * W_C, i_c, W_C)
        b_beta = tl.load(beta + at * W_C + W_C - 1)
        b_p = b_c
        b_f = b_beta
        b_m = b_beta
        if f is not None:
            b_p = load_slots(P, at * W_C, i_c, W_C)
            b_f = tl.load(f + at * W_C + W_C - 1)
            b_m = tl.load(m + at)
        new = False
        if opens_document is not None:
            new = tl.load(opens_document + at + G, mask=begin + i + 1 < N, other=0) != 0
        b_out = tl.zeros([BV, BT], tl.float32)
        b_h = tl.zeros([BX, BT], tl.float32)
        for j in tl.range((X + BX - 1) // BX, disable_licm=True):
            i_x = j * BX + tl.arange(0, BX)
            b_h = through_anchor(b_W1, b_k, W_1, own, anchor, i_k, i_x, K, X, True, PRECISION)
            store_columns(hidden, b_h, here * W_C, i_c, i_x, real, X)
            b_a = activate(b_h, SILU)
            b_out += through_anchor(b_W2, b_a, W_2, own, anchor, i_x, i_v, X, V, True, PRECISION)
        store_columns(outputs, b_out, here * W_C, i_c, i_v, real, V)
        b_e = output_error(b_out, b_k, b_v, gain, bias, g, i_v, V, EPS)
        store_columns(errors_2, b_e, here * W_C, i_c, i_v, real, V)
        if not HELD:
            # Other threads than those that stored the hidden activations read them.
            tl.debug_barrier()
        for j in tl.range((X + BX - 1) // BX, disable_licm=True):
            i_x = j * BX + tl.arange(0, BX)
            if not HELD:
                b_h = load_columns(hidden, here * W_C, i_c, i_x, real, X)
            b_e1 = through_anchor(b_W2, b_e, W_2, own, anchor, i_x, i_v, X, V, False, PRECISION)
            b_e1 *= slope(b_h, SILU)
            store_columns(errors_1, b_e1, here * W_C, i_c, i_x, real, X)
            b_a = activate(b_h, SILU)
            b_W1 = held_tile(b_W1, W_1, room, i_k, i_x, K, X, HELD)
            b_S1 = held_tile(b_S1, S_1, room, i_k, i_x, K, X, HELD_S or S_1 is None)
            b_W1, b_S1 = leave(
                b_W1,
                b_S1,
                W_1,
                S_1,
                initial_1,
                b_k,
                b_e1,
                b_c,
                b_p,
                b_beta,
                b_f,
                b_m,
                new,
                room + G,
                g,
                i_k,
                i_x,
                K,
                X,
                PRECISION,
            )
            b_W2 = held_tile(b_W2, W_2, room, i_x, i_v, X, V, HELD)
            b_S2 = held_tile(b_S2, S_2, room, i_x, i_v, X, V, HELD_S or S_2 is None)
            b_W2, b_S2 = leave(
                b_W2,
                b_S2,
                W_2,
                S_2,
                initial_2,
                b_a,
                b_e,
                b_c,
                b_p,
                b_beta,
                b_f,
                b_m,
                new,
                room + G,
                g,
                i_x,
                i_v,
                X,
                V,
                PRECISION,
            )
        if not (HELD and OWN):
            # The next chunk reads the rooms.
            tl.debug_barrier()


@triton.jit
def read_hidden(
    b_q,
    b_R,
    b_beta,
    b_f,
    W_1,
    S_1,
    errors_1,
    room,
    here,
    i_c,
    i_k,
    i_x,
    K: tl.constexpr,
    X: tl.constexpr,
    W_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Hidden values before the activation, [X, C]; b_R: [C written, C reading], the first layer's weights of pairs."""
    b_W = load_tile(W_1, room * K, i_k, i_x, i_k < K, X)
    b_z = tl.dot(tl.trans(b_W), b_q, input_precision=PRECISION) * b_beta[None, :]
    if S_1 is not None:
        b_S = load_tile(S_1, room * K, i_k, i_x, i_k < K, X)
        b_z += tl.dot(tl.trans(b_S), b_q, input_precision=PRECISION) * b_f[None, :]
    b_e = load_columns(errors_1, here * W_C, i_c, i_x, i_c < W_C, X)
    return b_z - tl.dot(b_e, b_R, input_precision=PRECISION)


@tiled(TILES)
@triton.jit(do_not_specialize=_SIZES)
def deep_read(
    q,
    k,
    C,
    beta,
    f,
    W_1,
    S_1,
    W_2,
    S_2,
    hidden,
    errors_1,
    errors_2,
    out,
    begin,
    N,
    G,
    K: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    W_C: tl.constexpr,
    SILU: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """out: [N, G, C, V], the MLP's output for each query."""
    here = tl.program_id(0).to(tl.int64)
    at, room = begin * G + here, G + here
    i_c, i_k, i_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    real = i_c < W_C
    b_q = load_columns(q, at * W_C, i_c, i_k, real, K)
    b_k = load_columns(k, at * W_C, i_c, i_k, real, K)
    b_C = load_columns(C, at * W_C, i_c, i_c, real, W_C)
    b_R = b_C * pairs(b_k, b_q, PRECISION)
    b_beta = load_slots(beta, at * W_C, i_c, W_C)
    b_f = b_beta
    if f is not None:
        b_f = load_slots(f, at * W_C, i_c, W_C)
    b_out = tl.zeros([BV, BT], tl.float32)
    b_scores = tl.zeros([BT, BT], tl.float32)
    for j in tl.range((X + BX - 1) // BX, disable_licm=True):
        i_x = j * BX + tl.arange(0, BX)
        b_z = read_hidden(b_q, b_R, b_beta, b_f, W_1, S_1, errors_1, room, here, i_c, i_k, i_x, K, X, W_C, PRECISION)
        b_x = activate(b_z, SILU)
        b_W = load_tile(W_2, room * X, i_x, i_v, i_x < X, V)
        b_out += tl.dot(tl.trans(b_W), b_x, input_precision=PRECISION) * b_beta[None, :]
        if S_2 is not None:
            b_S = load_tile(S_2, room * X, i_x, i_v, i_x < X, V)
            b_out += tl.dot(tl.trans(b_S), b_x, input_precision=PRECISION) * b_f[None, :]
        b_a = activate(load_columns(hidden, here * W_C, i_c, i_x, real, X), SILU)
        b_scores += pairs(b_a, b_x, PRECISION)
    b_e = load_columns(errors_2, here * W_C, i_c, i_v, real, V)
    b_out -= tl.dot(b_e, b_C * b_scores, input_precision=PRECISION)
    store_columns(out, b_out, at * W_C, i_c, i_v, real, V)
