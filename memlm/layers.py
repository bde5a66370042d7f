"""Building blocks without memory logic: rotary positions, SwiGLU, short convolution.

Shapes: B batch, T tokens of this call, D hidden, F feed-forward,
C channels, H heads, K head dim, W convolution width, N rows of groups, G groups, O outputs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import initialization as init

import memlm_kernels
from memlm_kernels import grouped_linear, rms_norm, short_convolution
from memlm_kernels.backend import as_autocast, asks_for, autocast_type
from memlm_kernels.checks import TENSORS
from memlm_kernels.grid import pick, place
from memlm_kernels.grouped_linear import MOST_MAPS, linear_of_group, linears
from memlm_kernels.rms_norm import norm
from memlm_kernels.rotary import rotate
from memlm_kernels.segments import exact
from memlm_kernels.short_convolution import ShortConvolutionOutput


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (arXiv:1910.07467) in the input's dtype, so that it stays fused under autocast."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)

    def forward(
        self, x: Tensor, gate: Tensor | None = None, other: Tensor | None = None, for_products: bool = False
    ) -> Tensor:
        """The norm; with a gate, the result of ``memlm_kernels.rms_norm``.

        for_products: round to autocast's type, once; each of the products that follow would round again
        """
        dtype = autocast_type(x) if for_products and x.dtype == torch.float32 else None
        if gate is None and dtype is None:
            return norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, gate, other, eps=self.eps, dtype=dtype)


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
    return x_BTHK if angles is None else rotate(x_BTHK, *angles)


def rotary_of_both(q_BTHK: Tensor, k_BTGK: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The same for queries and keys, in one op."""
    return (q_BTHK, k_BTGK) if angles is None else memlm_kernels.rotary(q_BTHK, k_BTGK, *angles)


class ExactLinear(nn.Linear):
    """A Linear in fp32 or more, in any dtype of the model or autocast, because the errors of a gate accumulate.

    It is an affine map, so adapters, hooks and quantisation may wrap or replace it. Their output may be rounded; a
    caller that needs fp32 applies ``exact`` to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(exact(x), exact(self.weight), None if self.bias is None else exact(self.bias))


# Rows of a call that ``products`` takes at once: the kernel's tile.
_FEW = 16


def products(x: Tensor, *maps: nn.Module) -> list[Tensor]:
    """Each map of x [..., D]. Where the kernels run, a decoded token takes plain Linears in one launch; a module that
    is wrapped, replaced or watched is called.
    """
    if len(maps) > MOST_MAPS or not _joins(x) or not all(_is_plain(linear, x) for linear in maps):
        return [linear(x) for linear in maps]
    weights, biases = [linear.weight for linear in maps], [linear.bias for linear in maps]
    found = linears(x.flatten(0, -2), weights, biases, [type(linear) is ExactLinear for linear in maps]).y
    return [y.unflatten(0, x.shape[:-1]) for y in found]


def is_few(x: Tensor) -> bool:
    return x.shape[:-1].numel() <= _FEW and not torch.is_grad_enabled()


def _joins(x: Tensor) -> bool:
    # The number of rows comes last: an exporter would fix a length that is compared.
    return (not x.is_cpu or asks_for("triton", "auto")) and autocast_type(x) is None and is_few(x)


def _is_plain(linear: Any, x: Tensor) -> bool:
    """Whether a call of the module multiplies by its weight and does nothing else."""
    if type(linear) not in (nn.Linear, ExactLinear) or "forward" in vars(linear):
        return False
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks)
    weight = linear.weight
    return not any(hooks) and type(weight) in TENSORS and weight.dtype == x.dtype and weight.device == x.device


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
        gate_BTF, up_BTF = products(x_BTD, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)


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

    def forward(
        self,
        x: Sequence[Tensor],
        history_BWC: Tensor | None,
        positions_BT: Tensor | None,
        lengths_B: Tensor | None,
        channels: slice | None = None,
        **parts: Any,
    ) -> ShortConvolutionOutput:
        """The parts of the channels, and the last W - 1 inputs for the next call.

        x: tensors [B, T, *] that together have the channels
        history_BWC: the last W - 1 inputs; None: x begins with them
        positions_BT: positions in documents; None: the history is zero or of the same document, and none starts in
            this call
        lengths_B: number of real tokens of each row; None: all
        channels: the channels of the weight that x has; None: all
        parts: the sizes of the parts, and which of them get heads of unit length, as in ``short_convolution``
        """
        weight_CW = self.weight if channels is None else self.weight[channels]
        places: Any = {"lengths": lengths_B, "positions": positions_BT, "state": history_BWC}
        return short_convolution(x, weight_CW, silu=self.silu, **parts, **places)

    def over_rows(
        self,
        x_BTC: Tensor,
        history_BWC: Tensor,
        positions_BT: Tensor | None,
        lengths_B: Tensor | None,
        channels: slice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same for one tensor and one part."""
        (y_BTC,), history_BWC = self([x_BTC], history_BWC, positions_BT, lengths_B, channels)
        return y_BTC, history_BWC

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
        (y_BLC,), _ = self([row_BLC], None, None, None)
        after_BS = (ends_BS[..., None] + before_SW).flatten(1)
        return pick(y_BLC, place_BT - spare), pick(row_BLC, after_BS).unflatten(1, (segments, spare))

    def over_fresh_segments(
        self, x_BTC: Tensor, cu_seqlens_BS: Tensor, **parts: Any
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same where no segment has a history, so that tokens stay where they are; in parts."""
        spare, starts_BS, ends_BS = self.width - 1, cu_seqlens_BS[:, :-1], cu_seqlens_BS[:, 1:].contiguous()
        token_BT = torch.arange(x_BTC.shape[1], device=x_BTC.device).expand(len(x_BTC), -1).contiguous()
        owner_BT = torch.searchsorted(ends_BS, token_BT, right=True).clamp(max=ends_BS.shape[1] - 1)
        place_BT = token_BT - starts_BS.gather(1, owner_BT)
        zeros_BWC = x_BTC.new_zeros(len(x_BTC), spare, x_BTC.shape[2])
        of_parts, _ = self([x_BTC], zeros_BWC, place_BT, None, **parts)
        last_BSW = ends_BS[..., None] + torch.arange(-spare, 0, device=x_BTC.device)
        after_BSWC = pick(x_BTC, last_BSW.clamp(min=0).flatten(1)).unflatten(1, last_BSW.shape[1:])
        return of_parts, after_BSWC.masked_fill((last_BSW < starts_BS[..., None])[..., None], 0.0)
