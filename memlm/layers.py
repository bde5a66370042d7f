"""Building blocks without memory logic: rotary positions, SwiGLU, short convolution.

Shapes: B batch, T tokens of this call, D hidden, F feed-forward,
C channels, H heads, K head dim, W convolution width, N rows of groups, G groups, O outputs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from memlm_kernels import grouped_linear
from memlm_kernels.backend import as_autocast, outside_autocast
from memlm_kernels.grid import keep_last, pick, place
from memlm_kernels.grouped_linear import linear_of_group
from memlm_kernels.segments import exact


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, with its own backward: autograd's takes about 20
    passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        product = d_y * unit
        d_weight = product.sum(list(range(x.ndim - 1)))
        along = product.mul_(weight).mean(-1, keepdim=True)
        d_x = torch.addcmul(d_y * weight, unit, along, value=-1).mul_(scale)
        return d_x, d_weight, None


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (arXiv:1910.07467) in the input's dtype, so that it stays fused under autocast."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # torch has a fused kernel only for GPUs.
            return _Norm.apply(exact(x), exact(self.weight), self.eps).to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _Unit(torch.autograd.Function):
    """x / |x| with its own backward: autograd's takes about ten passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_unit: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = torch.linalg.vecdot(d_unit, unit)[..., None]
        return torch.addcmul(d_unit, unit, along, value=-1).div_(length)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, as ``F.normalize``."""
    return _Unit.apply(x)


class Rope(NamedTuple):
    """A rotary embedding (arXiv:2104.09864), from ``memlm.memory.rope``.

    frequencies: radians per position of each of the head_dim / 2 pairs; None: theta ** -(i / half)
    scale: a factor on rotated queries and keys (YaRN)
    """

    head_dim: int
    theta: float = 10000.0
    frequencies: tuple[float, ...] | None = None
    scale: float = 1.0


def rotary_angles(positions_BT: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, as ``rotary`` takes them.

    Returns [c, c] and [-s, s], each [B, T, 1, head_dim]. Angles are computed in fp64, so positions are exact far
    beyond 2^24; callers round the results.
    """
    half, device = rope.head_dim // 2, positions_BT.device
    if rope.frequencies is None:
        frequency = rope.theta ** -(torch.arange(half, device=device, dtype=torch.float64) / half)
    else:
        # From pinned memory, because the host would wait for any other copy.
        pinned = device.type == "cuda" and not torch.compiler.is_compiling()
        frequency = torch.tensor(rope.frequencies, dtype=torch.float64, device="cpu", pin_memory=pinned)
        frequency = frequency.to(device, non_blocking=True)
    angle_BT1K = (positions_BT[..., None].double() * frequency)[:, :, None]
    cos, sin = angle_BT1K.cos(), angle_BT1K.sin()
    if rope.scale != 1:
        cos, sin = cos * rope.scale, sin * rope.scale
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotary(x_BTHK: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate the pairs (i, i + K/2) of each head by their angles, as in Llama; None: no rotation."""
    if angles is None:
        return x_BTHK
    cos, sin = angles
    if cos.dtype != x_BTHK.dtype:
        cos, sin = cos.to(x_BTHK.dtype), sin.to(x_BTHK.dtype)
    return torch.addcmul(x_BTHK * cos, x_BTHK.roll(x_BTHK.shape[-1] // 2, -1), sin)


class ExactLinear(nn.Linear):
    """A Linear in fp32 or more, in any dtype of the model or autocast, because the errors of a gate accumulate.

    It is an affine map, so adapters, hooks and quantisation may wrap or replace it. Their output may be rounded; a
    caller that needs fp32 applies ``exact`` to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(exact(x), exact(self.weight), None if self.bias is None else exact(self.bias))


class GroupedLinear(nn.Module):
    """Multiply each row by the matrix of its group. weight: [G * O, D], the groups' matrices stacked.

    Not an ``nn.Linear``: the output also depends on the groups, so tools for Linears must leave it alone.
    """

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * out_features, in_features))
        # As nn.Linear, so that a seed gives the same model.
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x_ND: Tensor, sizes_G: Tensor | None = None, group_N: Tensor | None = None) -> Tensor:
        """x [N, D]: the rows of each group in turn, sizes_G of them, or rows in any order with their groups. Returns
        [N, O].
        """
        (x_ND,) = as_autocast(x_ND)
        weight_GOD = self.weight.to(x_ND.dtype).unflatten(0, (self.groups, -1))
        if group_N is not None:
            return linear_of_group(x_ND, weight_GOD, group_N)
        assert sizes_G is not None
        return grouped_linear(x_ND, weight_GOD, sizes_G)


class ExactGroupedLinear(GroupedLinear):
    """A ``GroupedLinear`` in fp32 or more, as ``ExactLinear``."""

    def forward(self, x_ND: Tensor, sizes_G: Tensor | None = None, group_N: Tensor | None = None) -> Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            return super().forward(exact(x_ND), sizes_G, group_N)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv:2002.05202) with Llama's parameter names."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # Not flattened to [B T, D], which would save two views: a per-row adapter needs the rows.
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


# Elements of a short convolution's output that a CPU works on at once: 1 MB, which fits its cache.
_AT_ONCE = 2**18


class _Taps(torch.autograd.Function):
    """y[:, t] = sum over ``back`` of past[:, W - 1 + t - back] * weight[:, W - 1 - back] within a document, then SiLU
    if asked.

    Gradients are summed in place: autograd would make two tensors as large as the input for each tap. The backward
    recomputes the input of SiLU.
    """

    @staticmethod
    def forward(ctx: Any, past_BSC: Tensor, taps_WC: Tensor, positions_BT: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(past_BSC, taps_WC, positions_BT)
        ctx.silu = silu
        batch, total, channels = past_BSC.shape
        y_BTC = past_BSC.new_empty(batch, total - len(taps_WC) + 1, channels)
        taps = taps_WC.unbind()
        for y_BPC, x_BSC, positions_BP in _Taps.pieces(y_BTC, past_BSC, positions_BT):
            _Taps.convolve(_windows(x_BSC, len(taps)), taps, positions_BP, y_BPC)
            if silu:
                F.silu(y_BPC, inplace=True)
        return y_BTC

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_y_BTC: Tensor) -> tuple[Tensor, Tensor, None, None]:
        past_BSC, taps_WC, positions_BT = ctx.saved_tensors
        d_past_BSC, sums, width = torch.zeros_like(past_BSC), [], len(taps_WC)
        taps = taps_WC.unbind()
        for d_BPC, x_BSC, positions_BP, d_x_BSC in _Taps.pieces(d_y_BTC, past_BSC, positions_BT, d_past_BSC):
            seen = _windows(x_BSC, width)
            d_seen = _windows(d_x_BSC, width)
            product_BPC = torch.empty_like(d_BPC, memory_format=torch.contiguous_format)
            if ctx.silu:
                _Taps.convolve(seen, taps, positions_BP, product_BPC)
                d_BPC = torch.ops.aten.silu_backward(d_BPC, product_BPC)
            for tap in range(width):
                of_tap_BPC = _within(d_BPC, positions_BP, width - 1 - tap)
                d_seen[tap].addcmul_(of_tap_BPC, taps[tap])
                sums.append(torch.mul(of_tap_BPC, seen[tap], out=product_BPC).sum((0, 1)))
        d_taps_WC = torch.stack(sums)
        if len(sums) > width:
            d_taps_WC = d_taps_WC.unflatten(0, (-1, width)).sum(0)
        return d_past_BSC, d_taps_WC, None, None

    @staticmethod
    def pieces(y_BTC: Tensor, past_BSC: Tensor, positions_BT: Tensor | None, *more_BSC: Tensor) -> Iterator[Any]:
        """Parts of y, each with the inputs that its tokens see."""
        length, spare = y_BTC.shape[1], past_BSC.shape[1] - y_BTC.shape[1]
        of_token = y_BTC.shape[0] * y_BTC.shape[2]
        # Compiled code has one piece, so that it serves every length.
        if y_BTC.device.type != "cpu" or torch.compiler.is_compiling() or length * of_token <= _AT_ONCE:
            yield y_BTC, past_BSC, positions_BT, *more_BSC
            return
        size = max(1, _AT_ONCE // of_token)
        for start in range(0, length, size):
            of_y, of_past = slice(start, start + size), slice(start, min(start + size, length) + spare)
            positions_BP = None if positions_BT is None else positions_BT[:, of_y]
            yield y_BTC[:, of_y], past_BSC[:, of_past], positions_BP, *(x[:, of_past] for x in more_BSC)

    @staticmethod
    def convolve(seen: list[Tensor], taps: tuple[Tensor, ...], positions_BT: Tensor | None, out: Tensor) -> None:
        torch.mul(seen[-1], taps[-1], out=out)
        for back in range(1, len(taps)):
            out.addcmul_(_within(seen[-1 - back], positions_BT, back), taps[-1 - back])


def _windows(past_BSC: Tensor, width: int) -> list[Tensor]:
    """Views [B, T, C]: the input of each tap; the last tap is the token itself."""
    length = past_BSC.shape[1] - width + 1
    return [past_BSC.narrow(1, tap, length) for tap in range(width)]


def _within(x_BTC: Tensor, positions_BT: Tensor | None, back: int) -> Tensor:
    """x, with zeros where a document has no token ``back`` places earlier."""
    return x_BTC if positions_BT is None or not back else x_BTC * (positions_BT >= back)[..., None]


class ShortConv(nn.Module):
    """Causal depthwise convolution along each document; the last tap is the token itself. SiLU follows if ``silu``.

    weight: [C, W]. Missing tokens before a document's first count as zero.
    """

    def __init__(self, channels: int, width: int, silu: bool = False) -> None:
        super().__init__()
        self.channels, self.width, self.silu = channels, width, silu
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        init.uniform_(self.weight, -bound, bound)

    def forward(self, past_BSC: Tensor, positions_BT: Tensor | None, channels: slice | None = None) -> Tensor:
        """y [B, T, C] of the last T tokens of ``past``, which has W - 1 more; other arguments as in ``over_rows``."""
        taps_WC = (self.weight if channels is None else self.weight[channels]).t()
        if past_BSC.shape[1] != self.width:
            # Contiguous taps: strided ones would be several times slower.
            return _Taps.apply(past_BSC, taps_WC.contiguous(), positions_BT, self.silu)
        # A single token.
        if positions_BT is not None:
            back_W = torch.arange(self.width - 1, -1, -1, device=past_BSC.device)
            past_BSC = past_BSC * (positions_BT >= back_W)[..., None]
        y_B1C = (past_BSC * taps_WC).sum(1, keepdim=True)
        return (F.silu(y_B1C) if self.silu else y_B1C).to(past_BSC.dtype)

    def over_rows(
        self,
        x_BTC: Tensor,
        history_BWC: Tensor,
        positions_BT: Tensor | None,
        lengths_B: Tensor | None,
        channels: slice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns y [B, T, C] and the last W - 1 inputs for the next call.

        history_BWC: the last W - 1 inputs
        positions_BT: positions in documents; None: the history is zero or of the same document, and none starts in
            this call
        lengths_B: number of real tokens of each row; None: all
        channels: the channels of the weight that x has; None: all
        """
        past_BSC = torch.cat([history_BWC.to(x_BTC.dtype), x_BTC], 1)
        y_BTC = self(past_BSC, positions_BT, channels)
        return y_BTC, keep_last(past_BSC, self.width - 1, x_BTC.shape[1], lengths_B)

    def over_segments(
        self, x_BTC: Tensor, history_BSWC: Tensor, cu_seqlens_BS: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same along each segment of a row (``memlm_kernels.segments``); each segment has its own history."""
        length, spare = x_BTC.shape[1], self.width - 1
        if cu_seqlens_BS is None:
            y_BTC, history_BWC = self.over_rows(x_BTC, history_BSWC[:, 0], None, None)
            return y_BTC, history_BWC[:, None]
        # One row of all segments, each after its history.
        segments = history_BSWC.shape[1]
        ends_BS = cu_seqlens_BS[:, 1:].contiguous()
        token_T = torch.arange(length, device=x_BTC.device)
        owner_BT = torch.searchsorted(ends_BS, token_T.expand(len(x_BTC), -1).contiguous(), right=True)
        # Padding comes after all segments and uses no history.
        place_BT = token_T + (owner_BT.clamp(max=segments - 1) + 1) * spare
        before_SW = torch.arange(segments, device=x_BTC.device)[:, None] * spare + torch.arange(
            spare, device=x_BTC.device
        )
        before_BS = (cu_seqlens_BS[:, :-1, None] + before_SW).flatten(1)
        inputs_BLC = torch.cat([x_BTC, history_BSWC.flatten(1, 2).to(x_BTC.dtype)], 1)
        row_BLC = place(inputs_BLC, torch.cat([place_BT, before_BS], 1), length + segments * spare)
        # The history of the first segment comes first.
        y_BLC = self(row_BLC, None)
        after_BS = (ends_BS[..., None] + before_SW).flatten(1)
        return pick(y_BLC, place_BT - spare), pick(row_BLC, after_BS).unflatten(1, (segments, spare))
