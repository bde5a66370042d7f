"""The norm in Triton. A program has some whole vectors; gradients of the weight are sums per program, which torch adds
up.

N vectors of K channels.
"""

import triton
import triton.language as tl

from memlm_kernels.launch import load_tile, store_tile, tiled

# Warps are cut to the width.
_TILES = [
    {"BN": 32, "num_warps": 16, "num_stages": 1},
    {"BN": 16, "num_warps": 16, "num_stages": 1},
    {"BN": 8, "num_warps": 16, "num_stages": 1},
]


@tiled(_TILES)
@triton.jit(do_not_specialize=["N"])
def normalise(x, weight, gate, other, y, N, K: tl.constexpr, EPS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BN
    i_n, i_k = tl.arange(0, BN), tl.arange(0, BK)
    real = n + i_n < N
    b_x = load_tile(x, n, i_n, i_k, real, K).to(tl.float32)
    b_w = tl.load(weight + i_k, mask=i_k < K, other=0.0).to(tl.float32)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / K + EPS)[:, None] * b_w[None, :]
    if gate is not None:
        b_g = load_tile(gate, n, i_n, i_k, real, K).to(tl.float32)
        b_share = tl.sigmoid(b_g)
        if other is None:
            b_y = b_y * b_g * b_share
        else:
            b_o = load_tile(other, n, i_n, i_k, real, K).to(tl.float32)
            b_y = b_o + b_share * (b_y - b_o)
    store_tile(y, b_y, n, i_n, i_k, real, K)


@tiled(_TILES)
@triton.jit(do_not_specialize=["N", "SPAN"])
def normalise_backward(
    d_y,
    x,
    weight,
    gate,
    other,
    d_x,
    d_weight,
    d_gate,
    d_other,
    N,
    SPAN,
    K: tl.constexpr,
    EPS: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """SPAN vectors."""
    program = tl.program_id(0).to(tl.int64)
    i_n, i_k = tl.arange(0, BN), tl.arange(0, BK)
    b_w = tl.load(weight + i_k, mask=i_k < K, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BK], tl.float32)
    end = tl.minimum((program + 1) * SPAN, N)
    for n in range(program * SPAN, end, BN):
        real = n + i_n < end
        b_x = load_tile(x, n, i_n, i_k, real, K).to(tl.float32)
        b_d = load_tile(d_y, n, i_n, i_k, real, K).to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / K + EPS)[:, None]
        b_u = b_x * b_r
        if gate is not None:
            b_g = load_tile(gate, n, i_n, i_k, real, K).to(tl.float32)
            b_share = tl.sigmoid(b_g)
            b_n = b_u * b_w[None, :]
            if other is None:
                b_dg = b_d * b_n * b_share * (1.0 + b_g * (1.0 - b_share))
                b_d = b_d * b_g * b_share
            else:
                b_o = load_tile(other, n, i_n, i_k, real, K).to(tl.float32)
                b_dg = b_d * (b_n - b_o) * b_share * (1.0 - b_share)
                store_tile(d_other, b_d * (1.0 - b_share), n, i_n, i_k, real, K)
                b_d = b_d * b_share
            store_tile(d_gate, b_dg, n, i_n, i_k, real, K)
        b_dw += tl.sum(b_d * b_u, 0)
        b_d = b_d * b_w[None, :]
        b_d = b_r * (b_d - b_u * (tl.sum(b_u * b_d, 1) / K)[:, None])
        store_tile(d_x, b_d, n, i_n, i_k, real, K)
    tl.store(d_weight + program * K + i_k, b_dw, mask=i_k < K)
