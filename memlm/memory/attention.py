"""Causal softmax attention, full or in a sliding window: the baseline, and a part of hybrid memories.

B batch, T tokens, S keys kept from earlier calls, L = S + T, D hidden, H query heads, G key-value heads, K head dim, P
persistent tokens.

One number decides which keys a query sees: the distance d from the query back to the key in the row. A key is seen if
0 <= d < W and d <= the query's position in its document. This one comparison covers causality, the window, document
borders, and missing history.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm.layers import RMSNorm, ShortConv, products, rotary_of_both
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.kv import append, join
from memlm.memory.parts import start_delayed
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.settings import require
from memlm_kernels import prefix_window_attention
from memlm_kernels.attention import plain
from memlm_kernels.grid import keep_last

# Values of ``attn_implementation`` that the op serves: its own choice, and plain products.
_BACKENDS = {"sdpa": "auto", "eager": "reference"}


@dataclass(frozen=True, kw_only=True)
class Projections:
    """qk_norm: RMSNorm of queries and keys: true, of each head's (Qwen3); "all", of all heads' together (OLMo 2).
    qkv_bias: a bias on queries, keys and values (Qwen2).
    output_bias: a bias on the output.
    rotary: rotary positions; false for none (the NoPE layers of SmolLM3).
    """

    qk_norm: bool | str = False
    qkv_bias: bool = False
    output_bias: bool = False
    rotary: bool = True

    def __post_init__(self) -> None:
        require(self.qk_norm in (True, False, "all"), f"qk_norm={self.qk_norm!r} must be true, false or 'all'")

    def projections(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(Projections)}


@dataclass(frozen=True)
class Config(Projections):
    """window_size: tokens a query sees, itself included; null for the whole document.
    conv_size: width of a causal convolution with SiLU on q, k, v; 0 for none.
    persistent_tokens: learned tokens that every query sees, without position (Titans, section 3.3).

    The rest is as in ``Projections``.
    """

    window_size: int | None = None
    conv_size: int = 0
    persistent_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.window_size is None or self.window_size >= 1,
            f"window_size={self.window_size} must be at least 1, or null for full attention",
        )
        require(self.conv_size >= 0, f"conv_size={self.conv_size} must be 0 (none) or more")
        require(self.persistent_tokens >= 0, f"persistent_tokens={self.persistent_tokens} must be 0 or more")


class Mixer(SequenceMixer):
    """Grouped-query attention with rotary positions, by ``prefix_window_attention``, or by FlexAttention or
    flash-attn through transformers' attention interface.
    """

    is_causal = True
    at_once = True
    has_room = True

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        heads, kv_heads, head_dim = dims.num_attention_heads, dims.num_key_value_heads, dims.head_dim
        self.config, self.dims, self.layer_idx = config, dims, layer_idx
        self.num_key_value_groups = heads // kv_heads
        self.any_length = self.grows = config.window_size is None
        self.q_proj = nn.Linear(dims.hidden_size, heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(dims.hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(dims.hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, dims.hidden_size, bias=config.output_bias)
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if config.qk_norm:
            together = config.qk_norm == "all"
            self.q_norm = RMSNorm(heads * head_dim if together else head_dim, eps=dims.rms_norm_eps)
            self.k_norm = RMSNorm(kv_heads * head_dim if together else head_dim, eps=dims.rms_norm_eps)
        if config.conv_size:
            self.conv = ShortConv(sum(self.sizes), config.conv_size, silu=True)
        if config.persistent_tokens:
            self.persistent = nn.Parameter(torch.empty(config.persistent_tokens, dims.hidden_size))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.config.persistent_tokens:
            # The mixer's input is normalised, so these start at the scale of a token.
            init.normal_(self.persistent, std=1.0)

    def start_for_recall(self) -> None:
        """Initialise queries equal to keys, each of whose channels looks a random few tokens back."""
        keys = self.k_proj.weight.unflatten(0, (-1, self.dims.head_dim))
        init.copy_(self.q_proj.weight, keys.repeat_interleave(self.num_key_value_groups, 0).flatten(0, 1))
        start_delayed(self.conv, self.sizes[0], self.sizes[1])

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        kept = self.config.window_size - 1 if self.config.window_size else 0
        kv_shape = (batch_size, kept, self.dims.num_key_value_heads, self.dims.head_dim)
        state = {
            "k": torch.zeros(kv_shape, device=device, dtype=dtype),
            "v": torch.zeros(kv_shape, device=device, dtype=dtype),
        }
        if self.config.conv_size:
            conv_shape = (batch_size, self.config.conv_size - 1, sum(self.sizes))
            state["conv"] = torch.zeros(conv_shape, device=device, dtype=dtype)
        return state

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        y_BTHK, _, new_state = self.heads(x_BTD, state, rows)
        return MixerOutput(self.output(y_BTHK), new_state, {}, {})

    def heads(
        self,
        x_BTD: Tensor,
        state: State,
        rows: Rows,
        persistent: tuple[Tensor, Tensor] | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], State]:
        """The heads' reads, [B, T, H, K]; q, k, v before rotation; and the new state, which a fresh call may not keep.

        persistent: the result of ``persistent_tokens``, if the caller has it
        """
        length, fresh = rows.length, rows.fresh
        (q_BTHK, k_BTGK, v_BTGK), new_state = self.project(x_BTD, state, rows)
        angles = self.angles(rows, k_BTGK.dtype)
        rotated_BTHK, rotated_BTGK = rotary_of_both(q_BTHK, k_BTGK, angles)
        seen = {"k": rotated_BTGK, "v": v_BTGK}
        window = self.config.window_size
        places = window or rows.room
        if rows.stretches is not None:
            state = dict(state)
            both, past = (torch.stack([x["k"], x["v"]], 3) for x in (seen, state))
            (seen["k"], seen["v"]), (state["k"], state["v"]) = (
                x.unbind(3) for x in rows.past(both, past, whole=window is None)
            )
        for name, new in seen.items():
            if places is None:
                seen[name], new_state[name] = append(state[name], new, rows.lengths_B, new.device.type == "cpu")
                continue
            if fresh and not keep:
                continue
            # A fresh call has no history, but zeros fill the window if the call is shorter.
            past = state[name]
            if rows.room and not past.shape[1]:
                past = F.pad(past, (0, 0, 0, 0, places - 1, 0))
            joined = new if fresh and length >= places - 1 else join(past, new)
            seen[name] = new if fresh else joined
            new_state[name] = keep_last(joined, places - 1, length, rows.lengths_B)

        prefix = None
        if self.config.persistent_tokens and length:
            # Their queries are not rotated.
            prefix = (q_BTHK, *(persistent or self.persistent_tokens()))
        y_BTHK = q_BTHK
        if length:
            k, v = seen["k"], seen["v"]
            if length == 1 and rows.goes_on and rows.start is not None:
                # One token sees all keys, so it needs no mask.
                known = rows.start + 1 if window is None else min(rows.start + 1, window)
                k, v, fresh, window = k[:, -known:], v[:, -known:], True, None
            y_BTHK = self._attend(rotated_BTHK, k, v, prefix, None if fresh else rows.positions_BT, window)
        return y_BTHK, (q_BTHK, k_BTGK, v_BTGK), new_state

    def project(self, x_BTD: Tensor, state: State, rows: Rows) -> tuple[tuple[Tensor, Tensor, Tensor], State]:
        """q, k, v before rotation, and the convolution's inputs for the next call."""
        history = {}
        projected = products(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        if self.config.conv_size:
            past = state["conv"]
            if rows.stretches is not None:
                qkv, past = rows.past(torch.cat(projected, -1), past)
                projected = list(qkv.split(self.sizes, -1))
            parts, history["conv"] = self.conv(projected, past, rows.history_BT, rows.lengths_B)
            projected = list(parts)
        q_BTC, k_BTC, v_BTC = projected
        norms = (self.q_norm, self.k_norm) if self.config.qk_norm else (None, None)
        q_BTHK, k_BTGK = self._heads(q_BTC, norms[0]), self._heads(k_BTC, norms[1])
        return (q_BTHK, k_BTGK, self._heads(v_BTC)), history

    def _heads(self, x_BTC: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Heads, normalised each, or all together."""
        if norm is not None and self.config.qk_norm == "all":
            x_BTC, norm = norm(x_BTC), None
        batch, length, channels = x_BTC.shape
        x_BTHK = x_BTC.view(batch, length, channels // self.dims.head_dim, self.dims.head_dim)
        return x_BTHK if norm is None else norm(x_BTHK)

    def angles(self, rows: Rows, dtype: torch.dtype, positions: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Rotary angles at the tokens' positions or others; None: this layer does not rotate."""
        return rows.rotary(self.dims.rope, dtype, positions) if self.config.rotary else None

    def output(self, y_BTHK: Tensor) -> Tensor:
        """The mixer's output [B, T, D] from the heads' reads."""
        return self.o_proj(y_BTHK.flatten(2))

    def persistent_tokens(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens, [1, P, G, K]."""
        kv_2PC = torch.stack(products(self.persistent, self.k_proj, self.v_proj))
        kv_2PC = F.silu(kv_2PC) if self.config.conv_size else kv_2PC
        if self.config.qk_norm == "all":
            kv_2PC = torch.stack([self.k_norm(kv_2PC[0]), kv_2PC[1]])
        k, v = rearrange(kv_2PC, "s p (h k) -> s 1 p h k", k=self.dims.head_dim)
        return self.k_norm(k) if self.config.qk_norm is True else k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor, Tensor] | None,
        positions_BT: Tensor | None,
        window: int | None,
    ) -> Tensor:
        """softmax(q k^T) v over the keys each query sees; q [B, T, H, K], k and v [B, L, G, K].

        positions_BT: positions of queries in their documents; None: all keys are in the query's document
        """
        backend = self.dims.attn_implementation
        if "flash" in backend:
            return self._flash(q, k, v, prefix, positions_BT is None, window)
        if backend == "flex_attention":
            return self._flex(q, k, v, prefix, positions_BT, window)
        places_BT = None if positions_BT is None else positions_BT.expand(q.shape[:2])
        options: Any = {"window": window, "positions": places_BT, "prefix": prefix, "backend": self.op_backend}
        return prefix_window_attention(q, k, v, **options).o

    @property
    def op_backend(self) -> str:
        """The backend that ``attn_implementation`` gives an op."""
        if (name := self.dims.attn_implementation) not in _BACKENDS:
            known = ", ".join([*_BACKENDS, "flex_attention", "flash_attention_2"])
            raise ValueError(f"attn_implementation={name!r} is unknown here; use one of {known}")
        return _BACKENDS[name]

    def _flex(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor, Tensor] | None,
        positions_BT: Tensor | None,
        window: int | None,
    ) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        always, size = 0, self.dims.head_dim
        if prefix is not None:
            # Double head dim: tokens score in one half, persistent tokens in the other.
            own_q, own_k, own_v = prefix
            always, q = own_k.shape[1], torch.cat([q, own_q], -1)
            joined = ((F.pad(own_k, (size, 0)), F.pad(k, (0, size))), (F.pad(x, (0, size)) for x in (own_v, v)))
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 1) for p, x in joined)
        past = k.shape[1] - always - q.shape[1]
        width = window or k.shape[1]
        if positions_BT is None:
            positions_BT = torch.arange(past, past + q.shape[1], device=q.device)
        back_BT = positions_BT.expand(q.shape[:2])

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distance = i + past - (j - always)
            return (j < always) | ((distance >= 0) & (distance < width) & (distance <= back_BT[b, i]))

        mask = create_block_mask(seen, len(q), None, q.shape[1], k.shape[1], device=q.device)
        return self._call("flex_attention", q, k, v, mask)[..., :size]

    def _flash(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor, Tensor] | None,
        whole: bool,
        window: int | None,
    ) -> Tensor:
        require(
            prefix is None and whole,
            f"attn_implementation={self.dims.attn_implementation!r} serves whole unpadded documents without "
            "persistent tokens; use 'sdpa' or 'flex_attention' for the rest",
        )
        return self._call(self.dims.attn_implementation, q, k, v, None, sliding_window=window)

    def _call(self, backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        function = eager if backend == "eager" else ALL_ATTENTION_FUNCTIONS[backend]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y, _ = function(self, q, k, v, mask, scaling=self.dims.head_dim**-0.5, dropout=0.0, **options)
        return y


def eager(
    module: Mixer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention in plain matrix products, [B, H, T, K] in and [B, T, H, K] out; the reference for the other
    backends.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return plain(q, k, v, mask, scaling)[0], None
