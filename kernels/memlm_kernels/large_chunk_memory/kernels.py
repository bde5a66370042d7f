"""LaCT's memory in Triton: all of a chunk but its products. Letters and layouts as in ``chunks_triton``.

A line is one that a write gives its first norm again: a row of W_1^T or W_3^T, a column of W_2. A program of a write
has some lines, and passes over them twice, because it needs their norms first.

N slots of the rows, heads and chunks of a call.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import tiled

# Borders of chunks: they close, or a document opens behind them; otherwise they go on.
CLOSES, OPENS = tl.constexpr(1), tl.constexpr(2)

_SLOTS = [
    {"BN": 32, "BF": 128, "num_warps": 4, "num_stages": 1},
    {"BN": 32, "BF": 128, "num_warps": 8, "num_stages": 1},
]
_LINES = [
    {"BL": 32, "BI": 32, "num_warps": 4, "num_stages": 1},
    {"BL": 32, "BI": 32, "num_warps": 8, "num_stages": 1},
]


@triton.jit
def _load(x, n, i_n, i_f, inside, part: tl.constexpr, PARTS: tl.constexpr, F: tl.constexpr):
    """Some of the F channels of a part of slots, whose parts lie side by side; in fp32."""
    place = n * (PARTS * F) + part * F + (i_n[:, None] * (PARTS * F) + i_f[None, :])
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, n, i_n, i_f, inside, part: tl.constexpr, PARTS: tl.constexpr, F: tl.constexpr):
    place = n * (PARTS * F) + part * F + (i_n[:, None] * (PARTS * F) + i_f[None, :])
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)


@tiled(_SLOTS)
@triton.jit(do_not_specialize=["N"])
def swiglu_forward(ab, h, N, F: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr):
    """h = silu(A) B"""
    n = tl.program_id(0).to(tl.int64) * BN
    i_n = tl.arange(0, BN)
    for f in range(0, F, BF):
        i_f = f + tl.arange(0, BF)
        inside = (n + i_n < N)[:, None] & (i_f < F)[None, :]
        b_a = _load(ab, n, i_n, i_f, inside, 0, 2, F)
        b_b = _load(ab, n, i_n, i_f, inside, 1, 2, F)
        _store(h, b_a * tl.sigmoid(b_a) * b_b, n, i_n, i_f, inside, 0, 1, F)


@tiled(_SLOTS)
@triton.jit(do_not_specialize=["N"])
def swiglu_backward(ab, d_h, d_ab, h, N, F: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BN
    i_n = tl.arange(0, BN)
    for f in range(0, F, BF):
        i_f = f + tl.arange(0, BF)
        inside = (n + i_n < N)[:, None] & (i_f < F)[None, :]
        b_a = _load(ab, n, i_n, i_f, inside, 0, 2, F)
        b_b = _load(ab, n, i_n, i_f, inside, 1, 2, F)
        b_d = _load(d_h, n, i_n, i_f, inside, 0, 1, F)
        b_share = tl.sigmoid(b_a)
        b_silu = b_a * b_share
        b_slope = b_share + b_silu * (1.0 - b_share)
        _store(d_ab, b_d * b_b * b_slope, n, i_n, i_f, inside, 0, 2, F)
        _store(d_ab, b_d * b_silu, n, i_n, i_f, inside, 1, 2, F)
        _store(h, b_silu * b_b, n, i_n, i_f, inside, 0, 1, F)


@triton.jit
def _rates(lr, n, i_n, real):
    """lr: [N, 3], for W_1, W_2, W_3"""
    place = lr + n * 3 + i_n * 3
    b_gate = tl.load(place, mask=real, other=0.0)[:, None]
    b_out = tl.load(place + 1, mask=real, other=0.0)[:, None]
    b_up = tl.load(place + 2, mask=real, other=0.0)[:, None]
    return b_gate, b_out, b_up


@tiled(_SLOTS)
@triton.jit(do_not_specialize=["N"])
def ascent_forward(ab, e, lr, u, N, F: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr):
    """U = L grad phi, of A, B and E"""
    n = tl.program_id(0).to(tl.int64) * BN
    i_n = tl.arange(0, BN)
    real = n + i_n < N
    b_gate, b_out, b_up = _rates(lr, n, i_n, real)
    for f in range(0, F, BF):
        i_f = f + tl.arange(0, BF)
        inside = real[:, None] & (i_f < F)[None, :]
        b_a = _load(ab, n, i_n, i_f, inside, 0, 2, F)
        b_b = _load(ab, n, i_n, i_f, inside, 1, 2, F)
        b_e = _load(e, n, i_n, i_f, inside, 0, 1, F)
        b_share = tl.sigmoid(b_a)
        b_silu = b_a * b_share
        b_slope = b_share + b_silu * (1.0 - b_share)
        _store(u, b_gate * b_b * b_e * b_slope, n, i_n, i_f, inside, 0, 3, F)
        _store(u, b_up * b_silu * b_e, n, i_n, i_f, inside, 1, 3, F)
        _store(u, b_out * b_silu * b_b, n, i_n, i_f, inside, 2, 3, F)


@tiled(_SLOTS)
@triton.jit(do_not_specialize=["N"])
def ascent_backward(ab, e, lr, d_gate_up, d_out, d_z, u, d_lr, N, F: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr):
    """From the gradients of U those of A, B, E and lr, and U again."""
    n = tl.program_id(0).to(tl.int64) * BN
    i_n = tl.arange(0, BN)
    real = n + i_n < N
    b_gate, b_out, b_up = _rates(lr, n, i_n, real)
    b_dgate, b_dout, b_dup = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for f in range(0, F, BF):
        i_f = f + tl.arange(0, BF)
        inside = real[:, None] & (i_f < F)[None, :]
        b_a = _load(ab, n, i_n, i_f, inside, 0, 2, F)
        b_b = _load(ab, n, i_n, i_f, inside, 1, 2, F)
        b_e = _load(e, n, i_n, i_f, inside, 0, 1, F)
        b_share = tl.sigmoid(b_a)
        b_silu, b_rest = b_a * b_share, 1.0 - b_share
        b_slope = b_share + b_silu * b_rest
        # The second derivative of silu.
        b_bend = b_share * b_rest * (2.0 - b_silu + b_a * b_rest)
        b_d = _load(d_gate_up, n, i_n, i_f, inside, 0, 2, F)
        b_u = b_b * b_e * b_slope
        b_dgate += tl.sum(b_d * b_u, 1)
        _store(u, b_gate * b_u, n, i_n, i_f, inside, 0, 3, F)
        b_d = b_d * b_gate
        b_da, b_db, b_de = b_d * b_bend * b_b * b_e, b_d * b_slope * b_e, b_d * b_slope * b_b
        b_d = _load(d_gate_up, n, i_n, i_f, inside, 1, 2, F)
        b_u = b_silu * b_e
        b_dup += tl.sum(b_d * b_u, 1)
        _store(u, b_up * b_u, n, i_n, i_f, inside, 1, 3, F)
        b_d = b_d * b_up
        b_da += b_d * b_slope * b_e
        b_de += b_d * b_silu
        b_d = _load(d_out, n, i_n, i_f, inside, 0, 1, F)
        b_u = b_silu * b_b
        b_dout += tl.sum(b_d * b_u, 1)
        _store(u, b_out * b_u, n, i_n, i_f, inside, 2, 3, F)
        b_d = b_d * b_out
        b_da += b_d * b_slope * b_b
        b_db += b_d * b_silu
        _store(d_z, b_da, n, i_n, i_f, inside, 0, 3, F)
        _store(d_z, b_db, n, i_n, i_f, inside, 1, 3, F)
        _store(d_z, b_de, n, i_n, i_f, inside, 2, 3, F)
    place = d_lr + n * 3 + i_n * 3
    tl.store(place, b_dgate, mask=real)
    tl.store(place + 1, b_dout, mask=real)
    tl.store(place + 2, b_dup, mask=real)


@triton.jit
def _border(border, g, i_l):
    """[lines, 1]: what is behind the chunk; all close without ``border``."""
    b_code = i_l * 0 + CLOSES
    if border is not None:
        b_code = i_l * 0 + tl.load(border + g)
    return b_code[:, None]


@triton.jit
def _places(i_l, i_e, g, F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """The places of elements i_e of lines i_l in a memory [G, 3 F, P] and in its part [G, 2 F, K] or [G, F, V], and
    whether these have them.

    ROWS: whether the lines are rows of W_1^T and W_3^T, and not columns of W_2
    """
    i_l, i_e = i_l[:, None], i_e[None, :]
    if ROWS:
        inside = (i_l < 2 * F) & (i_e < P)
        return g * (3 * F * P) + (i_l * P + i_e), g * (2 * F * K) + (i_l * K + i_e), inside, inside & (i_e < K)
    else:
        inside = (i_l < P) & (i_e < F)
        return g * (3 * F * P) + ((2 * F + i_e) * P + i_l), g * (F * V) + (i_e * V + i_l), inside, inside & (i_l < V)


@triton.jit
def _step(gradient, products, momentum, mean, place, part, inside, there):
    """The chunk's gradient D, and S' = mean S + D."""
    b_d = tl.load(products + part, mask=there, other=0.0).to(tl.float32)
    if gradient is not None:
        b_d += tl.load(gradient + place, mask=inside, other=0.0)
    b_s = b_d
    if momentum is not None:
        b_s += mean * tl.load(momentum + place, mask=inside, other=0.0)
    return b_d, b_s


@triton.jit
def _write_lines(
    weights,
    gradient,
    products,
    momentum,
    means,
    moves,
    initial,
    norms,
    border,
    weights_after,
    narrow,
    gradient_after,
    momentum_after,
    sizes,
    g,
    first,
    F: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BI: tl.constexpr,
    ROWS: tl.constexpr,
):
    length: tl.constexpr = P if ROWS else F
    count: tl.constexpr = 2 * F if ROWS else P
    i_l = first + tl.arange(0, BL)
    of_line = g * (2 * F + P) + (0 if ROWS else 2 * F) + i_l
    code = _border(border, g, i_l)
    mean = 0.0
    if momentum is not None:
        mean = tl.load(means + g)
    b_sum = tl.zeros([BL], tl.float32)
    for e in range(0, length, BI):
        place, part, inside, there = _places(i_l, e + tl.arange(0, BI), g, F, K, V, P, ROWS)
        if moves is None:
            b_s = _step(gradient, products, momentum, mean, place, part, inside, there)[1]
        else:
            b_s = tl.load(moves + place, mask=inside, other=0.0)
        b_m = tl.load(weights + place, mask=inside, other=0.0) + b_s
        b_sum += tl.sum(b_m * b_m, 1)
    b_size = tl.maximum(tl.sqrt(b_sum), EPS)
    b_ratio = tl.load(norms + of_line, mask=i_l < count, other=0.0) / b_size
    tl.store(sizes + of_line, b_size, mask=i_l < count)
    for e in range(0, length, BI):
        place, part, inside, there = _places(i_l, e + tl.arange(0, BI), g, F, K, V, P, ROWS)
        b_d, b_s = _step(gradient, products, momentum, mean, place, part, inside, there)
        b_w = tl.load(weights + place, mask=inside, other=0.0)
        b_m = b_w + b_s
        if moves is not None:
            b_m = b_w + tl.load(moves + place, mask=inside, other=0.0)
        b_m = b_m * b_ratio[:, None]
        if border is not None:
            b_i = tl.load(initial + place, mask=inside & (code == OPENS), other=0.0)
            b_m = tl.where(code == CLOSES, b_m, tl.where(code == OPENS, b_i, b_w))
            tl.store(gradient_after + place, tl.where((code == CLOSES) | (code == OPENS), 0.0, b_d), mask=inside)
            if momentum is None:
                b_s = tl.where(code == CLOSES, b_s, 0.0)
            else:
                b_before = tl.load(momentum + place, mask=inside, other=0.0)
                b_s = tl.where(code == CLOSES, b_s, tl.where(code == OPENS, 0.0, b_before))
        tl.store(weights_after + place, b_m, mask=inside)
        if narrow is not None:
            tl.store(narrow + place, b_m.to(narrow.dtype.element_ty), mask=inside)
        if momentum_after is not None:
            tl.store(momentum_after + place, b_s, mask=inside)


@tiled(_LINES)
@triton.jit
def memory_write(
    weights,
    gradient,
    of_gate_up,
    of_out,
    momentum,
    means,
    moves,
    initial,
    norms,
    border,
    weights_after,
    narrow,
    gradient_after,
    momentum_after,
    sizes,
    F: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BI: tl.constexpr,
):
    """The memory behind a border; see ``triton.write``."""
    rows: tl.constexpr = (2 * F + BL - 1) // BL
    parts: tl.constexpr = rows + (P + BL - 1) // BL
    program = tl.program_id(0)
    g, part = (program // parts).to(tl.int64), program % parts
    if part < rows:
        _write_lines(
            weights, gradient, of_gate_up, momentum, means, moves, initial, norms, border,
            weights_after, narrow, gradient_after, momentum_after, sizes, g, part * BL, F, K, V, P, EPS, BL, BI, True
        )  # fmt: skip
    else:
        _write_lines(
            weights, gradient, of_out, momentum, means, moves, initial, norms, border,
            weights_after, narrow, gradient_after, momentum_after, sizes, g, (part - rows) * BL, F, K, V, P, EPS, BL,
            BI, False
        )  # fmt: skip


@triton.jit
def _d_weights(d_weights, products, place, part, inside, there):
    b_d = tl.load(d_weights + place, mask=inside, other=0.0)
    if products is not None:
        b_d += tl.load(products + part, mask=there, other=0.0).to(tl.float32)
    return b_d


@triton.jit
def _write_lines_backward(
    weights_after,
    sizes,
    norms,
    momentum,
    means,
    border,
    d_weights_after,
    products,
    d_gradient_after,
    d_momentum_after,
    d_opened_after,
    d_weights,
    d_gradient,
    d_momentum,
    d_opened,
    sums,
    G,
    g,
    first,
    F: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BI: tl.constexpr,
    ROWS: tl.constexpr,
):
    length: tl.constexpr = P if ROWS else F
    count: tl.constexpr = 2 * F if ROWS else P
    lines: tl.constexpr = 2 * F + P
    i_l = first + tl.arange(0, BL)
    of_line = g * lines + (0 if ROWS else 2 * F) + i_l
    code = _border(border, g, i_l)
    b_sum = tl.zeros([BL], tl.float32)
    for e in range(0, length, BI):
        place, part, inside, there = _places(i_l, e + tl.arange(0, BI), g, F, K, V, P, ROWS)
        b_dw = _d_weights(d_weights_after, products, place, part, inside, there)
        b_w = tl.load(weights_after + place, mask=inside, other=0.0)
        b_sum += tl.sum(tl.where(code == CLOSES, b_w * b_dw, 0.0), 1)
    tl.store(sums + of_line, b_sum, mask=i_l < count)
    b_norm = tl.load(norms + of_line, mask=i_l < count, other=0.0)
    b_size = tl.load(sizes + of_line, mask=i_l < count, other=1.0)
    # A line that counts as zero was not normalised.
    b_share = tl.where((b_size > EPS) & (b_norm > 0.0), b_sum / tl.where(b_norm > 0.0, b_norm * b_norm, 1.0), 0.0)
    b_ratio = b_norm / b_size
    mean = 0.0
    if momentum is not None:
        mean = tl.load(means + g)
    b_of_mean = tl.zeros([BL], tl.float32)
    for e in range(0, length, BI):
        place, part, inside, there = _places(i_l, e + tl.arange(0, BI), g, F, K, V, P, ROWS)
        b_dw = _d_weights(d_weights_after, products, place, part, inside, there)
        b_w = tl.load(weights_after + place, mask=inside, other=0.0)
        b_dm = (b_dw - b_w * b_share[:, None]) * b_ratio[:, None]
        if border is not None:
            b_opened = tl.load(d_opened_after + place, mask=inside, other=0.0)
            tl.store(d_opened + place, b_opened + tl.where(code == OPENS, b_dw, 0.0), mask=inside)
            b_kept = tl.where(code == OPENS, 0.0, b_dw)
            tl.store(d_weights + place, tl.where(code == CLOSES, b_dm, b_kept), mask=inside)
        else:
            tl.store(d_weights + place, b_dm, mask=inside)
        if d_gradient is not None:
            b_d = b_dm
            if d_momentum_after is not None:
                b_ds = tl.load(d_momentum_after + place, mask=inside, other=0.0)
                b_d += b_ds
            if border is not None:
                goes_on = (code != CLOSES) & (code != OPENS)
                b_before = tl.load(d_gradient_after + place, mask=inside & goes_on, other=0.0).to(tl.float32)
                b_d = tl.where(code == CLOSES, b_d, b_before)
            tl.store(d_gradient + place, b_d.to(d_gradient.dtype.element_ty), mask=inside)
            if momentum is not None:
                b_of = b_d
                b_new = mean * b_d
                if border is not None:
                    b_of = tl.where(code == CLOSES, b_d, 0.0)
                    b_new = tl.where(code == CLOSES, b_new, tl.where(code == OPENS, 0.0, b_ds))
                b_of_mean += tl.sum(b_of * tl.load(momentum + place, mask=inside, other=0.0), 1)
                tl.store(d_momentum + place, b_new, mask=inside)
    tl.store(sums + G * lines + of_line, b_of_mean, mask=i_l < count)


@tiled(_LINES)
@triton.jit(do_not_specialize=["G"])
def memory_write_backward(
    weights_after,
    sizes,
    norms,
    momentum,
    means,
    border,
    d_weights_after,
    d_gate_up_after,
    d_out_after,
    d_gradient_after,
    d_momentum_after,
    d_opened_after,
    d_weights,
    d_gradient,
    d_momentum,
    d_opened,
    sums,
    G,
    F: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BI: tl.constexpr,
):
    """The gradients of ``write``; see ``triton.write_backward``."""
    rows: tl.constexpr = (2 * F + BL - 1) // BL
    parts: tl.constexpr = rows + (P + BL - 1) // BL
    program = tl.program_id(0)
    g, part = (program // parts).to(tl.int64), program % parts
    if part < rows:
        _write_lines_backward(
            weights_after, sizes, norms, momentum, means, border, d_weights_after, d_gate_up_after, d_gradient_after,
            d_momentum_after, d_opened_after, d_weights, d_gradient, d_momentum, d_opened, sums, G, g, part * BL,
            F, K, V, P, EPS, BL, BI, True
        )  # fmt: skip
    else:
        _write_lines_backward(
            weights_after, sizes, norms, momentum, means, border, d_weights_after, d_out_after, d_gradient_after,
            d_momentum_after, d_opened_after, d_weights, d_gradient, d_momentum, d_opened, sums, G, g,
            (part - rows) * BL, F, K, V, P, EPS, BL, BI, False
        )  # fmt: skip
