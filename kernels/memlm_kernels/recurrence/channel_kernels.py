"""The kernels of a decay per channel, where each pair of tokens has a factor per channel.

A chunk is cut into blocks of BC tokens. Inside a block, pairs are taken one by one. Between blocks, the factor is
split at the start of the query's block: each part sums the log decays on one side of it, so nothing overflows.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import channels_behind, chunk_span, load_tile, lower, part_of, store_tile, tiled

_SIZES = ["T", "N"]
_WHOLE_K = [{"num_warps": 4, "num_stages": 1}]


@tiled([{"BK": 64, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def decay_channels(
    q,
    k,
    log_decay,
    chunks,
    q_decayed,
    k_decayed,
    k_carried,
    kept,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """q with the decays from its chunk's start on, k with those behind it, and the share that a chunk keeps of each
    channel, [B, N, H, K]: all kernels of states take the same.

    k_carried: k with the decays from its chunk's start on, or None
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (K + BK - 1) // BK
    tile, h, n, row = part_of(program, tiles, H, N)
    i_k = (tile * BK).to(tl.int32) + tl.arange(0, BK)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    inside = start + tl.arange(0, BT) < end
    base, rows = (row * T + start) * H + h, tl.arange(0, BT) * H
    b_q, b_k = load_tile(q, base, rows, i_k, inside, K), load_tile(k, base, rows, i_k, inside, K)
    b_g = load_tile(log_decay, base, rows, i_k, inside, K).to(tl.float32)
    b_behind = channels_behind(log_decay, base, start, end, i_k, H, K, BT)
    b_from_start = tl.exp(tl.cumsum(b_g, 0))
    store_tile(q_decayed, b_q * b_from_start, base, rows, i_k, inside, K)
    if k_carried is not None:
        store_tile(k_carried, b_k * b_from_start, base, rows, i_k, inside, K)
    store_tile(k_decayed, b_k * tl.exp(b_behind), base, rows, i_k, inside, K)
    tl.store(kept + ((row * N + n) * H + h) * K + i_k, tl.exp(tl.sum(b_g, 0)), mask=i_k < K)


@triton.jit
def load_row(x, base, j, count, i_k, H: tl.constexpr, K: tl.constexpr):
    """[BK], token j of a block whose first ``count`` tokens are real; 0 for others."""
    of_j = i_k < tl.where(j < count, K, 0)
    return tl.load(x + (base + j * H) * K + i_k, mask=of_j, other=0.0)


@tiled(_WHOLE_K)
@triton.jit(do_not_specialize=_SIZES)
def channel_scores(
    q,
    k,
    log_decay,
    chunks,
    scores,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """scores: [B, N, H, BT, BT], the sum over K of q_i k_j exp(g_{j+1} + ... + g_i), 0 above the diagonal."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = BT // BC
    block, h, n, row = part_of(program, blocks, H, N)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    i_c, i_k = tl.arange(0, BC), tl.arange(0, BK)
    at = ((row * N + n) * H + h) * BT + block * BC
    first = start + block * BC
    inside = first + i_c < end
    base, rows = (row * T + first) * H + h, i_c * H
    b_q = load_tile(q, base, rows, i_k, inside, K)
    b_g = load_tile(log_decay, base, rows, i_k, inside, K).to(tl.float32)
    b_diagonal = tl.zeros([BC, BC], tl.float32)
    b_between = tl.zeros([BC, BK], tl.float32)
    count = tl.minimum(end - first, BC)
    # The next token is loaded while one is in use.
    b_row, b_step = load_row(k, base, BC - 1, count, i_k, H, K), load_row(log_decay, base, BC - 1, count, i_k, H, K)
    for back in range(BC):
        j = BC - 1 - back
        before = tl.maximum(j - 1, 0)
        b_next = load_row(k, base, before, count, i_k, H, K)
        b_next_step = load_row(log_decay, base, before, count, i_k, H, K)
        b_column = tl.sum(b_q * b_row.to(tl.float32)[None, :] * tl.exp(b_between), 1)
        b_diagonal = tl.where((i_c[:, None] >= j) & (i_c[None, :] == j), b_column[:, None], b_diagonal)
        b_between = tl.where(i_c[:, None] >= j, b_between + b_step.to(tl.float32)[None, :], 0.0)
        b_row, b_step = b_next, b_next_step
    store_tile(scores, b_diagonal, at, i_c, block * BC + i_c, i_c < BC, BT)
    b_q = (b_q * tl.exp(tl.cumsum(b_g, 0))).to(b_q.dtype)
    b_total = tl.zeros([BK], tl.float32)
    for back in range(block):
        j = block - 1 - back
        base_j = (row * T + start + j * BC) * H + h
        inside_j = start + j * BC + i_c < end
        b_k = load_tile(k, base_j, rows, i_k, inside_j, K)
        b_after = channels_behind(log_decay, base_j, start + j * BC, end, i_k, H, K, BC)
        b_k = (b_k * tl.exp(b_after + b_total[None, :])).to(b_q.dtype)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        store_tile(scores, b_scores, at, i_c, j * BC + i_c, i_c < BC, BT)
        b_total += tl.sum(load_tile(log_decay, base_j, rows, i_k, inside_j, K).to(tl.float32), 0)
    for j in range(block + 1, blocks):
        store_tile(scores, tl.zeros([BC, BC], tl.float32), at, i_c, j * BC + i_c, i_c < BC, BT)


@tiled([{"BV": 64, "num_warps": 4, "num_stages": 2}], [{"BV": 32, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def scores_backward(
    v,
    chunks,
    d_o,
    d_scores,
    T,
    N,
    H: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """d_scores: [B, N, H, BT, BT], products of d_o and v, 0 above the diagonal."""
    program = tl.program_id(0).to(tl.int64)
    _tile, h, n, row = part_of(program, 1, H, N)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    i_t = tl.arange(0, BT)
    inside = start + i_t < end
    base, rows = (row * T + start) * H + h, i_t * H
    b_scores = tl.zeros([BT, BT], tl.float32)
    for i in range((V + BV - 1) // BV):
        i_v = i * BV + tl.arange(0, BV)
        b_o, b_v = load_tile(d_o, base, rows, i_v, inside, V), load_tile(v, base, rows, i_v, inside, V)
        b_scores += tl.dot(b_o, tl.trans(b_v), input_precision=PRECISION)
    store_tile(d_scores, b_scores * lower(BT), program * BT, i_t, i_t, i_t < BT, BT)


@tiled(_WHOLE_K)
@triton.jit(do_not_specialize=_SIZES)
def channel_scores_backward(
    q,
    k,
    log_decay,
    chunks,
    d_scores,
    d_q,
    d_k,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradients of q and k through the scores alone, in fp32."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = BT // BC
    block, h, n, row = part_of(program, blocks, H, N)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    first = start + block * BC
    if first >= end:
        return
    i_c, i_k = tl.arange(0, BC), tl.arange(0, BK)
    at = ((row * N + n) * H + h) * BT
    inside = first + i_c < end
    base, rows = (row * T + first) * H + h, i_c * H
    b_up_to = tl.cumsum(load_tile(log_decay, base, rows, i_k, inside, K).to(tl.float32), 0)
    b_behind = channels_behind(log_decay, base, first, end, i_k, H, K, BC)

    b_dq = tl.zeros([BC, BK], tl.float32)
    b_total = tl.zeros([BK], tl.float32)
    for back in range(block):
        j = block - 1 - back
        base_j = (row * T + start + j * BC) * H + h
        inside_j = start + j * BC + i_c < end
        b_k = load_tile(k, base_j, rows, i_k, inside_j, K)
        b_after = channels_behind(log_decay, base_j, start + j * BC, end, i_k, H, K, BC)
        b_k = (b_k * tl.exp(b_after + b_total[None, :])).to(b_k.dtype)
        b_ds = load_tile(d_scores, at + block * BC, i_c, j * BC + i_c, i_c < BC, BT)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
        b_total += tl.sum(load_tile(log_decay, base_j, rows, i_k, inside_j, K).to(tl.float32), 0)
    b_dq *= tl.exp(b_up_to)
    b_between = tl.zeros([BC, BK], tl.float32)
    count = tl.minimum(end - first, BC)
    own = d_scores + (at + block * BC) * BT + block * BC
    # The next token is loaded while one is in use.
    b_row, b_step = load_row(k, base, BC - 1, count, i_k, H, K), load_row(log_decay, base, BC - 1, count, i_k, H, K)
    b_pair = tl.load(own + i_c * BT + BC - 1, mask=i_c >= BC - 1, other=0.0)
    for back in range(BC):
        j = BC - 1 - back
        before = tl.maximum(j - 1, 0)
        b_next = load_row(k, base, before, count, i_k, H, K)
        b_next_step = load_row(log_decay, base, before, count, i_k, H, K)
        b_next_pair = tl.load(own + i_c * BT + before, mask=i_c >= before, other=0.0)
        b_dq += b_pair[:, None] * b_row.to(tl.float32)[None, :] * tl.exp(b_between)
        b_between = tl.where(i_c[:, None] >= j, b_between + b_step.to(tl.float32)[None, :], 0.0)
        b_row, b_step, b_pair = b_next, b_next_step, b_next_pair
    store_tile(d_q, b_dq, base, rows, i_k, inside, K)

    b_dk = tl.zeros([BC, BK], tl.float32)
    b_total = tl.zeros([BK], tl.float32)
    for i in range(block + 1, blocks):
        base_i = (row * T + start + i * BC) * H + h
        inside_i = start + i * BC + i_c < end
        b_q = load_tile(q, base_i, rows, i_k, inside_i, K)
        b_g = load_tile(log_decay, base_i, rows, i_k, inside_i, K).to(tl.float32)
        b_q = (b_q * tl.exp(tl.cumsum(b_g, 0) + b_total[None, :])).to(b_q.dtype)
        b_ds = load_tile(d_scores, at + i * BC, i_c, block * BC + i_c, i_c < BC, BT)
        b_dk += tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, input_precision=PRECISION)
        b_total += tl.sum(b_g, 0)
    b_dk *= tl.exp(b_behind)
    b_between = tl.zeros([BC, BK], tl.float32)
    b_row, b_step = load_row(q, base, 0, count, i_k, H, K), load_row(log_decay, base, 0, count, i_k, H, K)
    b_pair = tl.load(own + i_c, mask=i_c <= 0, other=0.0)
    for i in range(BC):
        after = tl.minimum(i + 1, BC - 1)
        b_next = load_row(q, base, after, count, i_k, H, K)
        b_next_step = load_row(log_decay, base, after, count, i_k, H, K)
        b_next_pair = tl.load(own + after * BT + i_c, mask=i_c <= after, other=0.0)
        b_between = tl.where(i_c[:, None] < i, b_between + b_step.to(tl.float32)[None, :], 0.0)
        b_dk += b_pair[:, None] * b_row.to(tl.float32)[None, :] * tl.exp(b_between)
        b_row, b_step, b_pair = b_next, b_next_step, b_next_pair
    store_tile(d_k, b_dk, base, rows, i_k, inside, K)


@tiled(
    [{"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2}],
    [{"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}],
)
@triton.jit(do_not_specialize=_SIZES)
def channel_keys_backward(
    q,
    k,
    v,
    log_decay,
    chunks,
    states,
    d_o,
    d_states,
    inner_q,
    inner_k,
    d_q,
    d_k,
    d_decay,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of some channels of a chunk's q, k and decay; inner_q, inner_k: their parts through the scores."""
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (K + BK - 1) // BK
    tile, h, n, row = part_of(program, tiles, H, N)
    i_k = (tile * BK).to(tl.int32) + tl.arange(0, BK)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    t = start + tl.arange(0, BT)
    inside = t < end
    base, rows = (row * T + start) * H + h, tl.arange(0, BT) * H
    at = (row * N + n) * H + h
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_kept = tl.zeros([BK], tl.float32)
    for i in range((V + BV - 1) // BV):
        i_v = i * BV + tl.arange(0, BV)
        b_v = load_tile(v, base, rows, i_v, inside, V)
        b_o = load_tile(d_o, base, rows, i_v, inside, V)
        b_state = load_tile(states, at * K, i_k, i_v, i_k < K, V)
        b_dstate = load_tile(d_states, at * K, i_k, i_v, i_k < K, V)
        b_dq += tl.dot(b_o, tl.trans(b_state), input_precision=PRECISION)
        b_dk += tl.dot(b_v, tl.trans(b_dstate), input_precision=PRECISION)
        b_kept += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1)
    b_g = load_tile(log_decay, base, rows, i_k, inside, K).to(tl.float32)
    b_q, b_k = load_tile(q, base, rows, i_k, inside, K), load_tile(k, base, rows, i_k, inside, K)
    b_inner = load_tile(inner_k, base, rows, i_k, inside, K)
    b_dq = b_dq * tl.exp(tl.cumsum(b_g, 0)) + load_tile(inner_q, base, rows, i_k, inside, K)
    b_dk *= tl.exp(channels_behind(log_decay, base, start, end, i_k, H, K, BT))
    # As in ``keys_backward``, channel by channel.
    b_behind = b_dk * b_k
    b_up_to = b_dq * b_q - b_inner * b_k
    b_dg = tl.cumsum(b_up_to, 0, reverse=True) + tl.cumsum(b_behind, 0) - b_behind
    b_dg += (b_kept * tl.exp(tl.sum(b_g, 0)))[None, :]
    store_tile(d_q, b_dq, base, rows, i_k, inside, K)
    store_tile(d_k, b_dk + b_inner, base, rows, i_k, inside, K)
    store_tile(d_decay, b_dg, base, rows, i_k, inside, K)


@tiled([{"BK": 32, "num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=_SIZES)
def corrections_backward(
    k,
    log_decay,
    chunks,
    of_reads,
    of_solutions,
    of_rows,
    of_columns,
    decay_of_reads,
    d_k,
    d_decay,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums the gradients of some channels of the delta rule's k and decay, from their parts.

    of_reads, decay_of_reads: those of ``channel_keys_backward``; of_solutions: of k with the decays from its chunk's
    start on; of_rows, of_columns: through the pairs k_i . k_j, of k_i and of k_j
    """
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (K + BK - 1) // BK
    tile, h, n, row = part_of(program, tiles, H, N)
    i_k = (tile * BK).to(tl.int32) + tl.arange(0, BK)
    start, end = chunk_span(chunks, row, n, N, T, BT)
    if start >= end:
        return
    inside = start + tl.arange(0, BT) < end
    base, rows = (row * T + start) * H + h, tl.arange(0, BT) * H
    b_k = load_tile(k, base, rows, i_k, inside, K).to(tl.float32)
    b_g = load_tile(log_decay, base, rows, i_k, inside, K).to(tl.float32)
    b_carried = load_tile(of_solutions, base, rows, i_k, inside, K) * tl.exp(tl.cumsum(b_g, 0))
    b_rows = load_tile(of_rows, base, rows, i_k, inside, K)
    b_columns = load_tile(of_columns, base, rows, i_k, inside, K)
    b_dk = load_tile(of_reads, base, rows, i_k, inside, K) + b_carried + b_rows + b_columns
    b_up_to = (b_carried + b_rows - b_columns) * b_k
    b_dg = load_tile(decay_of_reads, base, rows, i_k, inside, K) + tl.cumsum(b_up_to, 0, reverse=True)
    store_tile(d_k, b_dk, base, rows, i_k, inside, K)
    store_tile(d_decay, b_dg, base, rows, i_k, inside, K)
