"""Causal softmax attention, full or in a sliding window: the baseline, and a part of hybrid memories.

B batch, T tokens, S keys kept from earlier calls, L = S + T, D hidden, H query heads, G key-value
heads, K head dim, P persistent tokens, N blocks of Q queries, W window.

Everything about who sees whom follows from one number: the distance d from a query back to a key
in the row. A key is seen if 0 <= d < W and d <= the query's place in its document, which covers
causality, the window, document borders, and history that does not exist, in one comparison.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm.layers import ShortConv, rotary, rotary_angles
from memlm.memory.base import (
    Dims,
    MixerContext,
    MixerOutput,
    SequenceMixer,
    State,
    next_position,
    require,
    token_positions,
)
from memlm_kernels.grid import keep_last

# Narrow windows still make matrix products worth starting.
_MIN_BLOCK = 64


@dataclass(frozen=True)
class Config:
    """window_size: tokens a query sees, itself included; None for all of the document.
    conv_size: width of a causal convolution with SiLU on q, k, v; 0 for none.
    persistent_tokens: learned tokens that every query sees, without position (Titans, section 3.3).
    """

    window_size: int | None = None
    conv_size: int = 0
    persistent_tokens: int = 0

    def __post_init__(self) -> None:
        require(
            self.window_size is None or self.window_size >= 1,
            f"window_size={self.window_size} must be at least 1, or null for full attention",
        )
        require(self.conv_size >= 0, f"conv_size={self.conv_size} must be 0 (none) or more")
        require(self.persistent_tokens >= 0, f"persistent_tokens={self.persistent_tokens} must be 0 or more")


class Mixer(SequenceMixer):
    """Grouped-query attention with rotary positions; the backend is transformers' attention interface."""

    is_causal = True

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        heads, kv_heads, head_dim = dims.num_attention_heads, dims.num_key_value_heads, dims.head_dim
        self.config, self.dims, self.layer_idx = config, dims, layer_idx
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(dims.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dims.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dims.hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dims.hidden_size, bias=False)
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if config.conv_size:
            self.conv = ShortConv(sum(self.sizes), config.conv_size)
        if config.persistent_tokens:
            self.persistent = nn.Parameter(torch.empty(config.persistent_tokens, dims.hidden_size))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.config.persistent_tokens:
            # The mixer's input is normalised, so these start at the scale of a token.
            init.normal_(self.persistent, std=1.0)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        kept = self.config.window_size - 1 if self.config.window_size else 0
        kv_shape = (batch_size, kept, self.dims.num_key_value_heads, self.dims.head_dim)
        state = {
            "position": torch.zeros(batch_size, dtype=torch.int64, device=device),
            "k": torch.zeros(kv_shape, device=device, dtype=dtype),
            "v": torch.zeros(kv_shape, device=device, dtype=dtype),
        }
        if self.config.conv_size:
            conv_shape = (batch_size, self.config.conv_size - 1, sum(self.sizes))
            state["conv"] = torch.zeros(conv_shape, device=device, dtype=dtype)
        return state

    def forward(self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None) -> MixerOutput:
        y_BTHK, _, new_state = self.heads(x_BTD, state, ctx)
        return MixerOutput(self.o_proj(y_BTHK.flatten(2)), new_state, {}, {})

    def heads(
        self, x_BTD: Tensor, state: State | None, ctx: MixerContext | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], State]:
        """What the heads read, [B, T, H, K]; their q, k, v before any rotation; and the new state."""
        batch, length, _ = x_BTD.shape
        fresh = state is None and ctx is None
        state = self.init_state(batch, x_BTD.device, x_BTD.dtype) if state is None else state
        ctx = ctx or MixerContext()
        positions_BT = token_positions(x_BTD, state, ctx)
        new_state = {"position": next_position(positions_BT, state, ctx)}

        (q_BTHK, k_BTGK, v_BTGK), history = self.project(x_BTD, state, None if fresh else positions_BT, ctx.lengths_B)
        new_state |= history

        angles = rotary_angles(positions_BT, self.dims.head_dim, self.dims.rope_theta)
        seen = {"k": rotary(k_BTGK, angles), "v": v_BTGK}
        window = self.config.window_size
        for name, new in seen.items():
            # A fresh call has no history: nothing to join, and zeros to keep where it is shorter than the window.
            seen[name] = new if fresh else _join(state[name], new)
            kept = window - 1 if window else seen[name].shape[1]
            source = F.pad(new, (0, 0, 0, 0, max(0, kept - length), 0)) if fresh else seen[name]
            new_state[name] = keep_last(source, kept, length, ctx.lengths_B)

        rotated_BTHK = rotary(q_BTHK, angles)
        if length == 0:
            y_BTHK = q_BTHK
        elif self.config.persistent_tokens:
            # Doubled head dim: tokens score in the rotated half, persistent tokens in the unrotated one.
            q = torch.cat([rotated_BTHK, q_BTHK], -1)
            k, v = (F.pad(x, (0, self.dims.head_dim)) for x in seen.values())
            y_BTHK = self._attend(q, k, v, self._prefix(), positions_BT, fresh, window)[..., : self.dims.head_dim]
        else:
            y_BTHK = self._attend(rotated_BTHK, seen["k"], seen["v"], None, positions_BT, fresh, window)
        return y_BTHK, (q_BTHK, k_BTGK, v_BTGK), new_state

    def project(
        self, x_BTD: Tensor, state: State, positions_BT: Tensor | None, lengths_B: Tensor | None
    ) -> tuple[list[Tensor], State]:
        """q, k, v before any rotation, and what their convolution keeps; positions as ``ShortConv`` takes them."""
        history = {}
        projected = [proj(x_BTD) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if self.config.conv_size:
            qkv, history["conv"] = self.conv(torch.cat(projected, -1), state["conv"], positions_BT, lengths_B)
            projected = list(F.silu(qkv).split(self.sizes, -1))
        return [x.unflatten(-1, (-1, self.dims.head_dim)) for x in projected], history

    def _prefix(self) -> tuple[Tensor, Tensor]:
        """Keys (in the unrotated half) and values of the persistent tokens, [1, P, G, 2K]."""
        k, v = (proj(self.persistent)[None] for proj in (self.k_proj, self.v_proj))
        if self.config.conv_size:
            k, v = F.silu(k), F.silu(v)
        head_dim = self.dims.head_dim
        k, v = (x.unflatten(-1, (-1, head_dim)) for x in (k, v))
        return F.pad(k, (head_dim, 0)), F.pad(v, (0, head_dim))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        positions_BT: Tensor,
        fresh: bool,
        window: int | None,
    ) -> Tensor:
        """softmax(q k^T) v over the keys each query sees; q [B, T, H, *], k and v [B, L, G, *]."""
        backend = self.dims.attn_implementation
        if "flash" in backend:
            return self._flash(q, k, v, prefix, fresh, window)
        if backend == "flex_attention":
            return self._flex(q, k, v, prefix, positions_BT, window)
        if window is None or window >= k.shape[1]:
            if fresh and prefix is None:
                return self._call(backend, q, k, v, None)
            return self._dense(backend, q, k, v, prefix, positions_BT, window)
        block = min(q.shape[1], max(window, _MIN_BLOCK))
        pad, missing = -q.shape[1] % block, window - 1 - (k.shape[1] - q.shape[1])
        # Overlapping views: block n of queries sees its own keys and the W-1 before them.
        q_BNQ = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, block))
        k_BNL, v_BNL = (
            F.pad(x, (0, 0, 0, 0, missing, pad)).unfold(1, block + window - 1, block).movedim(-1, 2) for x in (k, v)
        )
        positions_BNQ = F.pad(positions_BT, (0, pad)).unflatten(1, (-1, block)).expand(q_BNQ.shape[:3])
        q, k, v = (x.flatten(0, 1) for x in (q_BNQ, k_BNL, v_BNL))
        y = self._dense(backend, q, k, v, prefix, positions_BNQ.flatten(0, 1), window)
        return y.unflatten(0, q_BNQ.shape[:2]).flatten(1, 2)[:, : positions_BT.shape[1]]

    def _dense(
        self,
        backend: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        positions_BT: Tensor,
        window: int | None,
    ) -> Tensor:
        queries, keys = q.shape[1], k.shape[1]
        distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
        seen = (distance >= 0) & (distance <= positions_BT[..., None])
        if window:
            seen &= distance < window
        if prefix is not None:
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 1) for p, x in zip(prefix, (k, v), strict=True))
            seen = F.pad(seen, (prefix[0].shape[1], 0), value=True)
        return self._call(backend, q, k, v, seen[:, None])

    def _flex(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        positions_BT: Tensor,
        window: int | None,
    ) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        if prefix is not None:
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 1) for p, x in zip(prefix, (k, v), strict=True))
        always = prefix[0].shape[1] if prefix is not None else 0
        past = k.shape[1] - always - q.shape[1]
        width = window or k.shape[1]
        positions_BT = positions_BT.expand(q.shape[:2])

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distance = i + past - (j - always)
            return (j < always) | ((distance >= 0) & (distance < width) & (distance <= positions_BT[b, i]))

        mask = create_block_mask(seen, len(q), None, q.shape[1], k.shape[1], device=q.device)
        return self._call("flex_attention", q, k, v, mask)

    def _flash(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        fresh: bool,
        window: int | None,
    ) -> Tensor:
        require(
            prefix is None and fresh,
            f"attn_implementation={self.dims.attn_implementation!r} serves whole unpadded documents without "
            "persistent tokens; use 'sdpa' or 'flex_attention' for the rest",
        )
        new = q.shape[1]
        return self._call(
            self.dims.attn_implementation,
            q,
            k[:, -new:],
            v[:, -new:],
            None,
            sliding_window=window,
        )

    def _call(self, backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        function = eager if backend == "eager" else ALL_ATTENTION_FUNCTIONS[backend]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y, _ = function(self, q, k, v, mask, scaling=self.dims.head_dim**-0.5, dropout=0.0, **options)
        return y


def _join(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past.to(new.dtype), new], 1) if past.shape[1] else new


def eager(
    module: Mixer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention in plain matrix products, [B, H, T, K] in and [B, T, H, K] out; the oracle of the others."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    scores = q @ k.mT * scaling
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return (weights.to(v.dtype) @ v).transpose(1, 2), None
