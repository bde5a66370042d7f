"""The update rules of linear memories, each with its gates and its op, and their settings.

A rule writes a matrix M for each head with k, v and gates of each token, and reads it with q:

    linear_attention    M <- M + k^T v                    arXiv:2006.16236
    retention           M <- a M + k^T v, a fixed         RetNet, arXiv:2307.08621
    simple_gla          M <- a_t M + k^T v                Mamba-2's decay, arXiv:2405.21060
    gla                 M <- diag(a_t) M + k^T v          arXiv:2312.06635
    delta_net           M <- M + b_t k^T (v - k M)        arXiv:2406.06484
    gated_delta_net     the same, on M decayed by a_t     arXiv:2412.06464
    kda                 the same, on diag(a_t) M          Kimi Delta Attention, arXiv:2510.26692
    comba               M <- a_t M + b_t k^T (v - f k M), read with q - g k    arXiv:2506.02475
    momentum_delta_net  S <- m_t S - b_t k^T (a_t k M - v), M <- a_t M + S     arXiv:2605.05838
    titans              momentum and decay on the gradient of 1/2 |k M - v|^2, arXiv:2501.00663

B batch, T tokens, S segments of a row (see ``memlm_kernels.segments``), H heads, K key dim, V value dim, C channels of
q, k, v together, L logits of the gates.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import ExactLinear
from memlm.memory.joined import Joined, carried
from memlm.memory.state import State
from memlm.memory.stretches import Tensors
from memlm.settings import require
from memlm_kernels import SegmentedMemoryState, delta_rule, linear_attention, segmented_neural_memory
from memlm_kernels.segments import exact

INITIALIZATIONS = ("default", "recall")
# The logarithm of the least share that a token leaves of a memory, where values are divided by it: fp16 holds them.
_LEAST_KEPT = -8.0


@dataclass(frozen=True)
class Config:
    """num_heads, head_dim: heads, and the size of queries and keys.
    value_dim: size of a head's values, null for head_dim.
    conv_size: width of the causal convolution with SiLU on q, k, v; 1 for none.
    initial_decay: initial decay per token, if the rule learns it. null: random per head, with rates uniform from 0 to
        16 and steps log-uniform from 0.001 to 0.1; 0.001 for the titans rule.
    initial_lr, initial_momentum: initial rate and momentum of the rules with momentum. lr null: 0.047 for titans,
        0.5 for momentum_delta_net.
    chunk_size: of the titans rule, see ``NeuralMemoryConfig``.
    initialization: "default", or "recall": an engineered prior for associative recall, see ``NeuralMemoryConfig``.
    """

    num_heads: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    conv_size: int = 4
    initial_decay: float | None = None
    initial_lr: float | None = None
    initial_momentum: float = 0.12
    chunk_size: int = 16
    initialization: str = "default"

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "conv_size", "chunk_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.value_dim is None or self.value_dim >= 1, f"value_dim={self.value_dim} must be at least 1")
        for name in ("initial_decay", "initial_lr", "initial_momentum"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, f"{name}={value} must lie between 0 and 1")
        require(
            self.initialization in INITIALIZATIONS,
            f"initialization={self.initialization!r} must be one of {', '.join(INITIALIZATIONS)}",
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        keys = self.num_heads * self.head_dim
        return keys, keys, self.num_heads * (self.value_dim or self.head_dim)


class Rule(nn.Module):
    """An update rule. unit_keys: whether keys and queries have unit norm; logits: number of gate logits per token."""

    unit_keys = False
    logits = 0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def reset_parameters(self) -> None:
        """Initialise the rule's own parameters."""

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        heads, keys = self.config.num_heads, self.config.head_dim
        shape = (batch_size, heads, keys, self.config.value_dim or keys)
        return {"memory": torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits_BTL: Tensor,
        cu_seqlens: Tensor | None,
        state: State,
        told: bool,
        joined: Joined | None,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """q, k, v: [B, T, H, *]; state: [B, S, ...]. Returns reads [B, T, H, V], the state, and metrics if
        ``told``.
        """
        log_decay = self.log_decay(logits_BTL)

        def op(columns: Tensors, shared: Tensors, memory: Tensor) -> tuple[Tensor, Tensor]:
            q, k, log_decay = shared
            return linear_attention(q, k, columns[0], log_decay, cu_seqlens=cu_seqlens, state=memory)

        o, memory = carried(joined, op, [v], [q, k, log_decay], state["memory"], diagonal=True)
        return o, {"memory": memory}, _metrics(log_decay) if told else {}

    def log_decay(self, logits_BTL: Tensor) -> Tensor | None:
        return None


class Retention(Rule):
    def log_decay(self, logits_BTL: Tensor) -> Tensor:
        """log(1 - 2^-5), log(1 - 2^-6), ... for the heads."""
        head = torch.arange(self.config.num_heads, device=logits_BTL.device, dtype=logits_BTL.dtype)
        return torch.log1p(-torch.exp2(-5 - head)).expand(*logits_BTL.shape[:2], -1)


class _Decay(nn.Module):
    """log a = -exp(A_log) softplus(logit + dt_bias), as in Mamba-2 and Gated DeltaNet; each head has an A_log, and
    ``of_head`` decays with a dt_bias each.
    """

    def __init__(self, config: Config, of_head: int = 1) -> None:
        super().__init__()
        self.config, self.of_head = config, of_head
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads * of_head))

    def reset_parameters(self) -> None:
        start, decays = self.config.initial_decay, self.dt_bias.shape
        if start is None:
            rate = torch.empty(self.config.num_heads).uniform_(0, 16).clamp(min=1e-4)
            dt = torch.exp(torch.empty(decays).uniform_(math.log(1e-3), math.log(1e-1)))
        else:
            rate, dt = torch.ones(self.config.num_heads), torch.full(decays, -math.log1p(-start))
        init.copy_(self.A_log, rate.log())
        init.copy_(self.dt_bias, dt.expm1().log())

    def forward(self, logits_BTX: Tensor) -> Tensor:
        """logits: [B, T, H * of_head], all decays of the first head first"""
        rate_X = exact(self.A_log).exp()
        if self.of_head > 1:
            rate_X = rate_X.repeat_interleave(self.of_head)
        return -rate_X * F.softplus(logits_BTX + exact(self.dt_bias))


class ScalarDecay(Rule):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.logits = config.num_heads
        self.decay = _Decay(config)

    def reset_parameters(self) -> None:
        self.decay.reset_parameters()

    def log_decay(self, logits_BTL: Tensor) -> Tensor:
        return self.decay(logits_BTL)


class ChannelDecay(Rule):
    """log a = log_sigmoid(low-rank logits) / 16, so decay is slow."""

    logits = 16

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.decay = ExactLinear(self.logits, config.sizes[1])

    def reset_parameters(self) -> None:
        start = self.config.initial_decay
        share = 0.5 if start is None else (1 - start) ** 16
        init.constant_(self.decay.bias, math.log(share / (1 - share)))

    def log_decay(self, logits_BTL: Tensor) -> Tensor:
        log_decay_BTC = F.logsigmoid(exact(self.decay(logits_BTL))) / 16
        return rearrange(log_decay_BTC, "b t (h k) -> b t h k", h=self.config.num_heads)


class Delta(Rule):
    """with_residual: whether "residual", the size of each correction [B, T, H], is among the metrics at every call."""

    unit_keys = True
    with_residual = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.logits = config.num_heads

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits_BTL: Tensor,
        cu_seqlens: Tensor | None,
        state: State,
        told: bool,
        joined: Joined | None,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        heads = self.config.num_heads
        beta_BTH, decay_BTL = logits_BTL.split([heads, self.logits - heads], -1)
        beta, log_decay = beta_BTH.sigmoid(), self.log_decay(decay_BTL)
        metrics = {"beta": beta.detach().mean(), **_metrics(log_decay)} if told else {}
        q, v, beta = self.corrected(q, k, v, beta, log_decay)

        options: Any = {"with_residual": self.with_residual, "cu_seqlens": cu_seqlens}

        def op(columns: Tensors, shared: Tensors, memory: Tensor) -> tuple[Tensor, ...]:
            q, k, *gates = shared
            o, after, residual = delta_rule(q, k, columns[0], *gates, **options, state=memory)
            return (o, after) if residual is None else (o, after, residual)

        o, memory, *residual = carried(joined, op, [v], [q, k, beta, log_decay], state["memory"])
        return o, {"memory": memory}, metrics | ({"residual": residual[0]} if residual else {})

    def corrected(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, v and beta for ``delta_rule``."""
        return q, v, beta


class GatedDelta(Delta):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.logits = 2 * config.num_heads
        self.decay = _Decay(config)

    def reset_parameters(self) -> None:
        self.decay.reset_parameters()

    def log_decay(self, logits_BTL: Tensor) -> Tensor:
        return self.decay(logits_BTL)


class ChannelDelta(Delta):
    """Each channel of the key has a decay, from logits of rank head_dim."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.logits = config.num_heads + config.head_dim
        self.spread = ExactLinear(config.head_dim, config.sizes[1], bias=False)
        self.decay = _Decay(config, config.head_dim)

    def reset_parameters(self) -> None:
        self.decay.reset_parameters()

    def log_decay(self, logits_BTL: Tensor) -> Tensor:
        return self.decay(exact(self.spread(logits_BTL))).unflatten(-1, (self.config.num_heads, -1))


class Comba(GatedDelta):
    """The correction reads the memory before its decay, and only a share f of it; queries lose a multiple g of the
    key. f and g are learned numbers of a head. With D = a M,

        a M + b k^T (v - f k M) = D + (b f / a) k^T (v a / f - k D)

    is the delta rule of other values and rates.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.feedback = nn.Parameter(torch.empty(config.num_heads))
        self.correction = nn.Parameter(torch.empty(config.num_heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.ones_(self.feedback)
        init.constant_(self.correction, 0.02)

    def log_decay(self, logits_BTL: Tensor) -> Tensor:
        return super().log_decay(logits_BTL).clamp(min=_LEAST_KEPT)

    def corrected(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert log_decay is not None
        share_BTH = exact(self.feedback).sigmoid() * torch.exp(-log_decay)
        q = (q - exact(self.correction)[:, None] * k).to(q.dtype)
        return q, (v / share_BTH[..., None]).to(v.dtype), beta * share_BTH


class Titans(Rule):
    """The state holds M, momentum and anchor, all zero at first, and the number of tokens written."""

    unit_keys = True
    initial_lr = 0.047

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.chunk_size = config.chunk_size
        self.logits = 3 * config.num_heads
        self.bias = nn.Parameter(torch.empty(self.logits))

    def reset_parameters(self) -> None:
        decay = 0.001 if self.config.initial_decay is None else self.config.initial_decay
        lr = self.initial_lr if self.config.initial_lr is None else self.config.initial_lr
        starts = torch.tensor([lr, self.config.initial_momentum, decay])
        init.copy_(self.bias, starts.logit().repeat_interleave(self.config.num_heads))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        memory = super().init_state(batch_size, device, dtype)["memory"]
        written = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return {"memory": torch.stack([memory] * 3, 1), "written": written}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits_BTL: Tensor,
        cu_seqlens: Tensor | None,
        state: State,
        told: bool,
        joined: Joined | None,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        gates = (logits_BTL + exact(self.bias)).sigmoid().chunk(3, -1)
        named = zip(("lr", "momentum", "decay"), gates, strict=True)
        metrics = {name: gate.detach().mean() for name, gate in named} if told else {}
        v, gates = self.corrected(v, *gates)
        written = state["written"] if joined is None else joined.tokens_before()

        def op(columns: Tensors, shared: Tensors, memory: Tensor) -> tuple[Tensor, ...]:
            before = SegmentedMemoryState(memory, written)
            options: Any = {"chunk_size": self.chunk_size, "cu_seqlens": cu_seqlens, "state": before}
            o, (after, position) = segmented_neural_memory(*shared[:2], *columns, *shared[2:], **options)
            return o, after, position

        def op_of_rows(columns: Tensors, shared: Tensors, memory: Tensor) -> tuple[Tensor, ...]:
            o, after, position = op(columns, shared, rearrange(memory, "b s h (p k) v -> b s p h k v", p=3))
            return o, rearrange(after, "b s p h k v -> b s h (p k) v"), position

        columns, shared, memory = [v], [q, k, *gates], state["memory"]
        if joined is None:
            o, memory, position = op(columns, shared, memory)
        else:
            # M, momentum and anchor are one state: T mixes them.
            memory = rearrange(memory, "b s p h k v -> b s h (p k) v")
            o, memory, position = joined.carry(op_of_rows, columns, shared, memory)
            memory = rearrange(memory, "b s h (p k) v -> b s p h k v", p=3)
        return o, {"memory": memory, "written": position}, metrics

    def corrected(self, v: Tensor, *gates: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """v and the gates for ``segmented_neural_memory``."""
        return v, gates


class MomentumDelta(Titans):
    """The gradient of every token is taken at the memory before it, decayed: with a = 1 - decay and S as momentum,

        S <- m S - b k^T (a k M - v) = m S - (b a) k^T (k M - v / a)        M <- a M + S

    is Titans' rule of other values and rates, in chunks of one token. It is the paper's rule, whose S and M are our M
    and -S, with the paper's b, a second gate on the momentum's way into the memory, 1: eta is the rate.
    """

    initial_lr = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.chunk_size = 1

    def corrected(self, v: Tensor, *gates: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        lr, momentum, decay = gates
        kept = (1 - decay).clamp(min=math.exp(_LEAST_KEPT))
        return (v / kept[..., None]).to(v.dtype), (lr * kept, momentum, decay)


RULES: dict[str, type[Rule]] = {
    "linear_attention": Rule,
    "retention": Retention,
    "simple_gla": ScalarDecay,
    "gla": ChannelDecay,
    "delta_net": Delta,
    "gated_delta_net": GatedDelta,
    "kda": ChannelDelta,
    "comba": Comba,
    "momentum_delta_net": MomentumDelta,
    "titans": Titans,
}


def _metrics(log_decay: Tensor | None) -> dict[str, Tensor]:
    return {} if log_decay is None else {"decay": -torch.expm1(log_decay.detach()).mean()}
