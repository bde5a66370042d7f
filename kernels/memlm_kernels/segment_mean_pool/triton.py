"""Means of segments by Triton kernels, as an op of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.launch import cdiv, laid, no_products, powers_of_two, with_features
from memlm_kernels.ops import kernel_op
from memlm_kernels.segment_mean_pool.kernels import pool, pool_backward
from memlm_kernels.segment_mean_pool.reference import owners


@kernel_op("segment_mean_pool")
def forward(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """x: [B, T, F]"""
    x, cu_seqlens = laid(x, cu_seqlens)
    (batch, length, features), count = x.shape, cu_seqlens.shape[1] - 1
    mean = x.new_empty(batch, count, features, dtype=torch.float32)
    pool(
        lambda tiles: batch * count * cdiv(features, tiles["BF"]),
        powers_of_two(BT=longest, BF=features),
        **{"x": x, "cu": cu_seqlens, "mean": mean, "T": length, "S": count, "LONGEST": longest, "F": features},
    )
    return mean


@forward.register_fake
def _(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    return x.new_empty(len(x), cu_seqlens.shape[1] - 1, x.shape[2], dtype=torch.float32)


@kernel_op("segment_mean_pool_backward")
def backward(d_mean: Tensor, cu_seqlens: Tensor, length: int, longest: int, dtype: torch.dtype) -> Tensor:
    d_mean, cu_seqlens = laid(d_mean, cu_seqlens)
    batch, count, features = d_mean.shape
    d_x = d_mean.new_empty(batch, length, features, dtype=dtype)
    pool_backward(
        lambda tiles: batch * cdiv(length, tiles["BT"]) * cdiv(features, tiles["BF"]),
        powers_of_two(BT=length, BF=features),
        **{"d_mean": d_mean, "cu": cu_seqlens, "owner": owners(cu_seqlens, length, longest)[0], "d_x": d_x},
        **{"T": length, "S": count, "LONGEST": longest, "F": features},
    )
    return d_x


@backward.register_fake
def _(d_mean: Tensor, cu_seqlens: Tensor, length: int, longest: int, dtype: torch.dtype) -> Tensor:
    return d_mean.new_empty(len(d_mean), length, d_mean.shape[2], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu_seqlens, ctx.longest = inputs
    ctx.length, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(cu_seqlens)


@outside_autocast
def _backward(ctx: Any, d_mean: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return backward(d_mean, cu_seqlens, ctx.length, ctx.longest, ctx.dtype), None, None


forward.register_autograd(_backward, setup_context=_setup)
register_flop_formula([torch.ops.memlm.segment_mean_pool, torch.ops.memlm.segment_mean_pool_backward])(no_products)


def segment_mean_pool_triton(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    return forward(with_features(x), cu_seqlens, longest).view(len(x), -1, *x.shape[2:])
