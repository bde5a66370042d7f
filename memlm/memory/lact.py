"""LaCT: sliding-window attention whose heads also read fast weights, written once per chunk (arXiv:2505.23884).

    y = W_o (attention(x) + silu(scale(x)) * norm(f(q))),    f(x) = (silu(x W1) * (x W3)) W2

The window covers the open chunk; the fast weights f hold everything before it. As in the released language model, both
use the same q, k, v: the memory applies a scale and an offset per channel to q and k, then SiLU to all three, and
normalises q and k. Each head has one learning rate for each of its three matrices, one momentum, a norm and a scale.

Two conventions are ours. The memory's q and k are not rotated (the release supports both), so reads do not depend on
the position in a document. And lr and momentum start at their configured values for every token.

Metrics are those of ``titans``, and ``scale``, the mean absolute scale. There is no surprise: the gradient of f(k) . v
is as large for known content as for new content.

B batch, T tokens, D hidden, H attention heads of size K, G key-value heads, M memory heads of size C = H K / M.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import ExactLinear, RMSNorm
from memlm.memory import attention
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.parts import Parameters, gate_logits, memory_share
from memlm.memory.rows import Rows
from memlm.memory.state import State, in_order, numbered
from memlm.memory.titans import memory_norms
from memlm.settings import require
from memlm_kernels import LargeChunkMemoryState, large_chunk_memory
from memlm_kernels.large_chunk_memory import MUON
from memlm_kernels.segments import exact
from memlm_kernels.short_convolution import unit_length

_PARTS = ("weights", "gradient", "momentum", "momentum_sum")


@dataclass(frozen=True)
class Config:
    """chunk_size: tokens between two writes.
    window_size: tokens that attention sees, at least chunk_size.
    memory_heads: number of independent networks; they divide the channels of all attention heads among them.
    memory_expansion: width of their hidden layers, relative to a head's.
    initial_lr: initial learning rate; the paper's rates sum to about 2 over a chunk (2048 of 0.001).
    initial_momentum: initial share of the last step in each step; 0 for none.
    muon_steps: Newton-Schulz steps on each write, 5 in the paper; 0 for none. With them, every write is as large as
        the weights, only the ratios of lr within a chunk matter, and rounding errors grow from chunk to chunk.
    """

    chunk_size: int = 32
    window_size: int = 32
    memory_heads: int = 1
    memory_expansion: int = 1
    initial_lr: float = 0.06
    initial_momentum: float = 0.5
    muon_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("chunk_size", "memory_heads", "memory_expansion"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(
            self.window_size >= self.chunk_size,
            f"window_size={self.window_size} must be chunk_size={self.chunk_size} at least, "
            "because nothing else remembers the open chunk; raise it, or lower chunk_size",
        )
        require(self.initial_lr > 0, f"initial_lr={self.initial_lr} must be positive")
        start = self.initial_momentum
        require(0 <= start < 1, f"initial_momentum={start} must lie between 0 and 1, or be 0 for none")
        require(0 <= self.muon_steps <= len(MUON), f"muon_steps={self.muon_steps} must be 0 (none) to {len(MUON)}")


class FastWeights(nn.Module):
    """The memory as a part: its output is added to the attention heads' reads, [B, T, H K]."""

    long_term = True

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        channels, heads = dims.num_attention_heads * dims.head_dim, config.memory_heads
        require(
            channels % heads == 0,
            f"memory_heads={heads} must divide num_attention_heads * head_dim = {channels}",
        )
        size = channels // heads
        width = config.memory_expansion * size
        self.config = config
        self.qk_scale = nn.Parameter(torch.empty(2, channels))
        self.qk_offset = nn.Parameter(torch.empty(2, channels))
        self.memory = Parameters(*((heads, i, o) for i, o in ((size, width), (width, size), (size, width))))
        self.gates = ExactLinear(dims.hidden_size, heads * (3 + self._has_momentum))
        self.norm = RMSNorm(size, eps=dims.rms_norm_eps)
        self.scale = nn.Linear(dims.hidden_size, heads)

    @property
    def _has_momentum(self) -> bool:
        return self.config.initial_momentum > 0

    def reset_parameters(self) -> None:
        init.ones_(self.qk_scale)
        init.zeros_(self.qk_offset)
        for w in self.memory():
            # Columns start with about unit norm, which writes keep. Zeros would stay zeros.
            init.normal_(w, std=w.shape[1] ** -0.5)
        init.zeros_(self.gates.weight)
        start = [math.log(math.expm1(self.config.initial_lr))] * 3
        if self._has_momentum:
            start.append(math.log(self.config.initial_momentum / (1 - self.config.initial_momentum)))
        init.copy_(self.gates.bias, torch.tensor(start).repeat(self.config.memory_heads).to(self.gates.bias.dtype))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        # Filled from the learned weights at position 0, so these zeros are never read.
        dtype = torch.promote_types(dtype, torch.float32)
        state: State = {}
        shapes = self.memory.shapes
        parts = {"weights": shapes, "gradient": shapes}
        if self._has_momentum:
            parts |= {"momentum": shapes, "momentum_sum": ((self.config.memory_heads, 1, 1),)}
        for name, shapes in parts.items():
            state[name] = numbered(torch.zeros(batch_size, *shape, device=device, dtype=dtype) for shape in shapes)
        return state

    def forward(self, x_BTD: Tensor, qkv: tuple[Tensor, Tensor, Tensor], state: State, rows: Rows) -> MixerOutput:
        """qkv: the attention's q [B, T, H, K], k and v [B, T, G, K], before rotation."""
        q_BTMC, k_BTMC, v_BTMC = self._features(*qkv)
        # Three learning rates and one momentum per head.
        gates_BTMN = rearrange(gate_logits(self.gates, x_BTD), "b t (m n) -> b t m n", m=self.config.memory_heads)
        lr_BTM3 = F.softplus(gates_BTMN[..., :3])
        momentum_BTM = torch.sigmoid(gates_BTMN[..., 3]) if self._has_momentum else None
        o_BTMC, after = large_chunk_memory(
            q_BTMC,
            k_BTMC,
            v_BTMC,
            lr_BTM3,
            momentum_BTM,
            weights=self.memory(),
            chunk_size=self.config.chunk_size,
            muon_steps=self.config.muon_steps,
            cu_seqlens=rows.cu_seqlens,
            start=rows.start if rows.goes_on else None,
            state=None if rows.fresh else _unpack(state, rows.first_B),
        )
        scale_BTM = F.silu(self.scale(x_BTD))
        y_BTMC = scale_BTM[..., None] * self.norm(o_BTMC)
        memory, metrics = _pack(after), {}
        if rows.metrics:
            metrics = {"scale": scale_BTM.detach().abs().mean(-1), "lr": lr_BTM3.detach().mean((-2, -1))}
            if momentum_BTM is not None:
                metrics["momentum"] = momentum_BTM.detach().mean(-1)
            metrics |= memory_norms(self.memory(), state, memory, rows)
        return MixerOutput(rearrange(y_BTMC, "b t m c -> b t (m c)"), memory, {}, metrics)

    def _features(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, [B, T, M, C] each; q and k of unit norm, in fp32 or more: fp16 cannot hold small norms."""
        heads = self.config.memory_heads

        def spread(x_BTGK: Tensor) -> Tensor:
            shared = q_BTHK.shape[2] // x_BTGK.shape[2]
            x_BTHK = x_BTGK if shared == 1 else x_BTGK.repeat_interleave(shared, 2)
            return rearrange(x_BTHK, "b t h k -> b t (h k)")

        scale, offset = (x[:, None, None] for x in (self.qk_scale, self.qk_offset))
        qk = F.silu(torch.stack([spread(q_BTHK), spread(k_BTGK)]) * scale + offset)
        q, k = unit_length(exact(rearrange(qk, "s b t (m c) -> s b t m c", m=heads))).unbind()
        return q, k, rearrange(spread(F.silu(v_BTGK)), "b t (m c) -> b t m c", m=heads)


class Mixer(SequenceMixer):
    """The reads of the attention heads and of the memory are added before ``o_proj``."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.attention = attention.Mixer(attention.Config(config.window_size), dims, layer_idx)
        self.memory = FastWeights(config, dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.memory.reset_parameters()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        sizes = (batch_size, device, dtype)
        return {"attention": self.attention.init_state(*sizes), "memory": self.memory.init_state(*sizes)}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        seen_BTHK, qkv, attention_state = self.attention.heads(x_BTD, state["attention"], rows)
        recalled = self.memory(x_BTD, qkv, state["memory"], rows)
        seen_BTC, metrics = rearrange(seen_BTHK, "b t h k -> b t (h k)"), recalled.metrics
        if rows.metrics:
            metrics = metrics | {"memory_share": memory_share(recalled.y_BTD, seen_BTC)}
        y_BTD = self.attention.o_proj(seen_BTC + recalled.y_BTD)
        return MixerOutput(y_BTD, {"attention": attention_state, "memory": recalled.state}, {}, metrics)


def _pack(memory: LargeChunkMemoryState) -> State:
    return {name: numbered(x) for name in _PARTS if (x := getattr(memory, name))}


def _unpack(state: State, position_B: Tensor) -> LargeChunkMemoryState:
    parts = {name: in_order(state.get(name, {})) for name in _PARTS}
    return LargeChunkMemoryState(**parts, position=position_B)
