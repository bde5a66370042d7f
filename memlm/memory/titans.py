"""Titans' long-term memory as a part: projections, gates and one call of the ``neural_memory`` op.

Paper to code (arXiv:2501.00663): theta = lr, eta = momentum, alpha = decay, M_0 = ``Store.memory``,
b = chunk_size. B batch, T tokens, D hidden, H memory heads, K memory head dim, C channels.

The paper leaves some conventions open; here: the inner loss is 1/2 |M(k) - v|^2; a token reads after it has written;
M_0 is learned; gates are one number for each token and head. The last layer of M_0 starts at zero, so an empty memory
outputs zero; with ``memory_norm``, where M(q) = q + LayerNorm(MLP(q)), it outputs q.

Metrics. Per token, averaged over heads: the gates ``lr``, ``momentum``, ``decay``, ``weight``; ``surprise``, the norm
of the token's gradient; ``output_gate``, the mean size of the gate on the token's read; ``gate``, the weight of the
memory's branch against the attention's (MAC, MAG); and, with ``memory_norm``, ``known_share``, the share of
LayerNorm(MLP(q)) in its sum with q. Per call: ``memory_norm`` and ``momentum_norm``, the norms at its end;
``update_norm``, the norm of the change; and ``memory_share``, the share of the memory's branch in the mixer's output,
or, for a memory alone, its share beside the layer's input.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import ExactLinear, RMSNorm, ShortConv, products
from memlm.memory import attention, eidetic
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.parts import Parameters, Recalled, gate_logits, memory_share, start_delayed
from memlm.memory.rows import Rows
from memlm.memory.state import State, in_order, numbered
from memlm.memory.stretches import Tensors
from memlm.settings import require
from memlm_kernels import NeuralMemoryState, neural_memory
from memlm_kernels.backend import autocast_type
from memlm_kernels.neural_memory import (
    ACTIVATIONS,
    BLOCKS,
    NeuralMemoryOutput,
    block_size,
    dot_product,
    huber,
    lp,
    squared_error,
)
from memlm_kernels.segments import exact_type
from memlm_kernels.short_convolution import ShortConvolutionOutput, unit_length

INITIALIZATIONS = ("default", "recall")
LOSSES = ("squared_error", "huber", "lp", "dot_product")
_PARTS = ("weights", "momentum", "anchor", "recent")


@dataclass(frozen=True)
class NeuralMemoryConfig:
    """memory_heads, memory_head_dim: the memory is ``memory_heads`` independent MLPs on vectors of that size.
    memory_depth: layers of each MLP, 1 to 4; memory_expansion: width of its hidden layers over memory_head_dim.
    memory_activation: activation between its layers; memory_norm: M(x) = x + LayerNorm(MLP(x)) instead of MLP(x)
        (TTT), with values of root mean square 1. null: true for memories of several layers, which diverge without it,
        except with polynomial_degree 2. This LayerNorm adds 0.1 to the variance, not 1e-5, so that an output that has
        decayed stays small.
    chunk_size: tokens whose gradients are taken at the same weights; quality is best at the size trained on. Above
        64 it must be a multiple of a number from 16 to 64. Linear memories under the squared error cost about the same
        at every size, also at 1.
    conv_size: width of the causal convolution with SiLU on q, k, v; 1: each token alone.
    max_lr, max_momentum, max_decay: upper bounds of the gates; initial_lr, initial_momentum, initial_decay: their
        initial values. Momentum or decay 0 removes the gate. lr null: 0.047 for chunks of up to 16 tokens (memories of
        more than one layer: 0.01, up to 32 tokens), and proportionally less for longer chunks. So chunk_size * lr / (1
        - momentum) stays below 1; above 2, a repeated key would make the inner loop diverge. decay null: 0.001, for
        more layers 0.0003.
    inner_loss: the loss whose gradient a write follows; huber_delta, lp_power: its parameter (MIRAS).
    omega_window: number of last tokens whose losses each write minimises, weighted by a gate that starts at 1 /
        omega_window (ATLAS); 1: the token's own loss alone.
    polynomial_degree: 2 adds all products of two channels to keys and queries (ATLAS).
    initialization: "default", or "recall": an engineered prior for associative recall. Queries start equal
        to keys, and each key channel looks a random 0 to conv_size - 1 tokens back, so that a value can
        be stored under the token before it from the first step.
    """

    linear_lr: ClassVar[float] = 0.047

    memory_heads: int = 1
    memory_head_dim: int = 64
    memory_depth: int = 1
    memory_expansion: int = 2
    memory_activation: str = "gelu"
    memory_norm: bool | None = None
    chunk_size: int = 16
    conv_size: int = 4
    max_lr: float = 1.0
    max_momentum: float = 1.0
    max_decay: float = 1.0
    initial_lr: float | None = None
    initial_momentum: float = 0.12
    initial_decay: float | None = None
    inner_loss: str = "squared_error"
    huber_delta: float = 1.0
    lp_power: float = 3.0
    omega_window: int = 1
    polynomial_degree: int = 1
    initialization: str = "default"

    def __post_init__(self) -> None:
        sizes = ("memory_heads", "memory_head_dim", "memory_expansion", "chunk_size", "conv_size", "omega_window")
        for name in sizes:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(block_size(self.chunk_size) <= 64, f"chunk_size={self.chunk_size} {BLOCKS}")
        require(1 <= self.memory_depth <= 4, f"memory_depth={self.memory_depth} must be 1, 2, 3 or 4")
        deep = self.memory_depth > 1
        if self.memory_norm is None:
            object.__setattr__(self, "memory_norm", deep and self.polynomial_degree == 1)
        if self.initial_lr is None:
            start, whole = (0.01, 32) if deep else (self.linear_lr, 16)
            object.__setattr__(self, "initial_lr", start * min(1.0, whole / self.chunk_size))
        if self.initial_decay is None:
            object.__setattr__(self, "initial_decay", 0.0003 if deep else 0.001)
        for gate in ("lr", "momentum", "decay"):
            cap, start = getattr(self, f"max_{gate}"), getattr(self, f"initial_{gate}")
            require(0 < cap <= 1, f"max_{gate}={cap} must lie above 0, and 1 at most")
            require(
                0 < start < cap or (start == 0 and gate != "lr"),
                f"initial_{gate}={start} must lie between 0 and max_{gate}={cap}",
            )
        for name, known in (
            ("memory_activation", tuple(ACTIVATIONS)),
            ("inner_loss", LOSSES),
            ("polynomial_degree", (1, 2)),
            ("initialization", INITIALIZATIONS),
        ):
            value = getattr(self, name)
            require(value in known, f"{name}={value!r} must be one of {', '.join(map(str, known))}")
        require(self.huber_delta > 0, f"huber_delta={self.huber_delta} must be positive")
        require(self.lp_power >= 1, f"lp_power={self.lp_power} must be at least 1")
        require(
            not self.memory_norm or self.polynomial_degree == 1,
            "memory_norm=true needs polynomial_degree=1, because M(x) = x + LayerNorm(MLP(x)) has one width",
        )

    @property
    def gates(self) -> dict[str, tuple[float, float]]:
        """Initial value and upper bound of each gate in use."""
        names = ("lr", "momentum", "decay")
        gates = {name: (getattr(self, f"initial_{name}"), getattr(self, f"max_{name}")) for name in names}
        if self.omega_window > 1:
            gates["weight"] = (1 / self.omega_window, 1.0)
        return {name: gate for name, gate in gates.items() if gate[0]}

    @property
    def features(self) -> int:
        """Width of the memory's inputs: keys and queries after ``NeuralMemory.features``."""
        products = self.memory_head_dim * (self.memory_head_dim + 1) // 2
        return self.memory_head_dim + (products if self.polynomial_degree == 2 else 0)


@dataclass(frozen=True)
class HybridConfig(NeuralMemoryConfig):
    """window_size: tokens that the attention branch sees.
    persistent_tokens: learned tokens that it always sees.
    attention_conv_size: width of the attention branch's own convolution, 0 for none.
    eidetic_slots: tokens before the window that it also sees, those with the largest surprise (``eidetic``).
    """

    window_size: int = 16
    persistent_tokens: int = 4
    attention_conv_size: int = 4
    eidetic_slots: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attention()
        eidetic.check_slots(self.eidetic_slots, self.chunk_size, self.window_size, "eidetic_slots")

    def attention(self) -> attention.Config:
        """Settings of the attention branch."""
        return attention.Config(self.window_size, self.attention_conv_size, self.persistent_tokens)

    def branch(self, dims: Dims, layer_idx: int) -> SequenceMixer:
        """The attention branch; with slots, a call takes the memory's surprise too."""
        if not self.eidetic_slots:
            return attention.Mixer(self.attention(), dims, layer_idx)
        return eidetic.EideticAttention(self.attention(), self.eidetic_slots, self.chunk_size, dims, layer_idx)


class Store(nn.Module):
    """The memory itself: its learned initial weights, the gates of its writes, and the call of the op.

    with_surprise: whether "surprise" is among the metrics at every call
    """

    with_surprise = False

    def __init__(self, config: NeuralMemoryConfig, dims: Dims) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.memory_heads, config.memory_head_dim
        self.gates = ExactLinear(dims.hidden_size, len(config.gates) * heads)
        hidden = [config.memory_expansion * head_dim] * (config.memory_depth - 1)
        shapes = itertools.pairwise([config.features, *hidden, head_dim])
        self.memory = Parameters(*((heads, i, o) for i, o in shapes))
        if config.memory_norm:
            # Gain and bias.
            self.memory_norm = Parameters(*[(heads, head_dim)] * 2)
        losses = {"huber": huber(config.huber_delta), "lp": lp(config.lp_power), "dot_product": dot_product}
        self.loss = losses.get(config.inner_loss, squared_error)

    def reset_parameters(self) -> None:
        config = self.config
        init.zeros_(self.gates.weight)
        shares = torch.tensor([start / cap for start, cap in config.gates.values()], dtype=torch.float64)
        init.copy_(self.gates.bias, shares.logit().repeat_interleave(config.memory_heads).to(self.gates.bias.dtype))
        for w in self.memory():
            init.normal_(w, std=w.shape[1] ** -0.5)
        if config.memory_norm:
            gain, bias = self.memory_norm()
            init.ones_(gain)
            init.zeros_(bias)
        init.zeros_(self.memory()[-1])  # An empty memory outputs zero.

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        # Filled from M_0 at position 0, so these zeros are never read.
        config, dtype = self.config, torch.promote_types(dtype, torch.float32)
        parts = ["weights", *(["momentum"] if "momentum" in config.gates else []), "anchor"]
        shapes = dict.fromkeys(parts, self.memory.shapes)
        if config.omega_window > 1:
            recent = (config.omega_window - 1, config.memory_heads)
            widths = ((config.features,), (config.memory_head_dim,), ())
            shapes["recent"] = tuple((*recent, *width) for width in widths)
        zeros = functools.partial(torch.zeros, device=device, dtype=dtype)
        return {part: numbered(zeros(batch_size, *shape) for shape in of_part) for part, of_part in shapes.items()}

    def forward(
        self,
        x_BTD: Tensor,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        state: State,
        rows: Rows,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """x drives the gates; q and k come from ``NeuralMemory.features``. Returns reads, state, metrics [B, T]."""
        gates = self._gates(x_BTD)
        if rows.stretches is None:
            before, weights = None if rows.fresh else unpack(state, rows.first_B), self.memory()
            o_BTHK, memory, surprise_BTH = self._op(q_BTHK, k_BTHK, v_BTHK, gates, weights, before, rows)
        else:
            o_BTHK, memory, surprise_BTH = self._joined(q_BTHK, k_BTHK, v_BTHK, gates, state, rows)
        if surprise_BTH is None:
            return o_BTHK, pack(memory), {}
        if not rows.metrics:
            return o_BTHK, pack(memory), {"surprise": surprise_BTH.mean(-1)}
        with torch.no_grad():
            metrics = {name: x.mean(-1) for name, x in {**gates, "surprise": surprise_BTH}.items()}
            if self.config.memory_norm:
                metrics["known_share"] = memory_share(o_BTHK - q_BTHK, q_BTHK, (-2, -1))
        return o_BTHK, pack(memory), metrics

    def _op(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        gates: dict[str, Tensor],
        weights: Sequence[Tensor],
        before: NeuralMemoryState | None,
        rows: Rows,
    ) -> NeuralMemoryOutput:
        return neural_memory(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            gates["lr"],
            gates.get("momentum"),
            gates.get("decay"),
            weights=weights,
            chunk_size=self.config.chunk_size,
            window=self.config.omega_window,
            weight=gates.get("weight"),
            loss=self.loss,
            **self.network(),
            cu_seqlens=rows.cu_seqlens,
            start=rows.start if rows.goes_on else None,
            state=before,
            with_surprise=rows.metrics or self.with_surprise,
        )

    def _joined(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, gates: dict[str, Tensor], state: State, rows: Rows
    ) -> NeuralMemoryOutput:
        """One layer, linear in M, momentum and anchor, from their values after the stretches of earlier processes."""
        assert rows.stretches is not None
        names, (weights,) = list(gates), self.memory()
        parts = [name for name in _PARTS[:3] if name in state]
        halo: list[Tensor] = []
        if self.config.omega_window > 1:
            # In one exchange.
            sizes = [k_BTHK.shape[-1], v_BTHK.shape[-1], 1]
            tokens, past = (
                torch.cat([k, v, weight[..., None]], -1)
                for k, v, weight in ((k_BTHK, v_BTHK, gates["weight"]), in_order(state["recent"]))
            )
            tokens, past = rows.past(tokens, past)
            k_BTHK, v_BTHK, weight_BTH1 = tokens.split(sizes, -1)
            gates = gates | {"weight": weight_BTH1[..., 0]}
            halo = list(past.split(sizes, -1))

        def op(columns: Tensors, shared: Tensors, memory: Tensor) -> tuple[Tensor, ...]:
            v, weights, *recent_v = columns
            q, k, *rest = shared
            of_gates, recent = dict(zip(names, rest, strict=False)), tuple[Tensor, ...]()
            if recent_v:
                recent_k, recent_weight = rest[len(names) :]
                recent = (recent_k, *recent_v, recent_weight[..., 0])
            tensors = rearrange(memory, "b h (p k) v -> p b h k v", p=len(parts)).unbind()
            of_parts = {name: (x,) for name, x in zip(parts, tensors, strict=True)}
            before = NeuralMemoryState(**{"momentum": ()} | of_parts, position=rows.first_B, recent=recent)
            o, after, surprise = self._op(q, k, v, of_gates, [weights], None if rows.fresh else before, rows)
            end = torch.cat([getattr(after, name)[0] for name in parts], 2)
            return (o, end) if surprise is None else (o, end, surprise)

        columns, shared = [v_BTHK, weights, *halo[1:2]], [q_BTHK, k_BTHK, *gates.values(), *halo[::2]]
        start = torch.cat([state[name]["0"] for name in parts], 2)
        o_BTHK, end, *surprise = rows.stretches.carry(op, columns, shared, start)
        after = rearrange(end, "b h (p k) v -> p b h k v", p=len(parts)).unbind()
        # The decoder keeps no state of stretches: recent tokens are left out.
        memory = NeuralMemoryState(
            **{"momentum": ()} | {name: (x,) for name, x in zip(parts, after, strict=True)}, position=rows.after_B
        )
        return NeuralMemoryOutput(o_BTHK, memory, surprise[0] if surprise else None)

    def norms(self, before: State, after: State, rows: Rows) -> dict[str, Tensor]:
        """Metrics of the memory after a call."""
        return memory_norms(self.memory(), before, after, rows)

    def network(self) -> dict[str, Any]:
        """The activation and the norm of M, as arguments of the op."""
        norm = tuple(self.memory_norm()) if self.config.memory_norm else None
        return {"activation": self.config.memory_activation, "norm": norm}

    def _gates(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Each gate [B, T, H]."""
        gates = self.config.gates
        shares = gate_logits(self.gates, x_BTD).sigmoid().chunk(len(gates), -1)
        capped = zip(gates.items(), shares, strict=True)
        return {name: share if cap == 1 else cap * share for (name, (_, cap)), share in capped}


class NeuralMemory(SequenceMixer):
    """The memory with its own projections: [B, T, D] in, [B, T, D] out."""

    def __init__(self, config: NeuralMemoryConfig, dims: Dims) -> None:
        super().__init__()
        self.config = config
        inner = config.memory_heads * config.memory_head_dim
        self.q_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.conv = ShortConv(3 * inner, config.conv_size, silu=True)
        if config.polynomial_degree == 2:
            self.feature_scales = nn.Parameter(torch.empty(2))
        self.store = Store(config, dims)
        self.norm = RMSNorm(config.memory_head_dim, eps=dims.rms_norm_eps)
        self.output_gate_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, dims.hidden_size, bias=False)
        self.recalled = Recalled()
        self.reset_parameters()

    @property
    def at_once(self) -> bool:  # type: ignore[override]
        """Whether the memory is linear in its state, and T of ``Stretches.carry`` is small."""
        config = self.config
        linear = config.memory_depth == 1 and not config.memory_norm
        return linear and config.inner_loss in ("squared_error", "dot_product") and config.polynomial_degree == 1

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, Store):
                module.reset_parameters()
        if self.config.polynomial_degree == 2:
            # Up to the norm, phi(q) . phi(k) = s + s^2 / 2 with s = q . k.
            init.copy_(self.feature_scales, torch.tensor([1.0, 0.5**0.5]))
        if self.config.initialization == "recall":
            init.copy_(self.q_proj.weight, self.k_proj.weight)
            start_delayed(self.conv, self.q_proj.out_features, self.k_proj.out_features)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        conv = torch.zeros(batch_size, self.conv.width - 1, self.conv.channels, device=device, dtype=dtype)
        return {"conv": conv, **self.store.init_state(batch_size, device, dtype)}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        """Metrics are per token; ``Store.norms`` has those of the memory."""
        q_BTHK, k_BTHK, v_BTHK, conv = self.project(x_BTD, state, rows)
        o_BTHK, memory, metrics = self.store(x_BTD, q_BTHK, k_BTHK, v_BTHK, state, rows)
        gate_BTC = self.output_gate(x_BTD)
        if rows.metrics:
            metrics["output_gate"] = mean_size(gate_BTC)
        return MixerOutput(self.output(o_BTHK, gate_BTC), {"conv": conv, **memory}, {}, metrics)

    def project(self, x_BTD: Tensor, state: State, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of queries and keys; values; and the convolution's history for the next call."""
        qkv, past = products(x_BTD, self.q_proj, self.k_proj, self.v_proj), state["conv"]
        if rows.stretches is not None:
            joined, past = rows.past(torch.cat(qkv, -1), past)
            qkv = list(joined.chunk(3, -1))
        if self.config.polynomial_degree == 1:
            (q_BTHK, k_BTHK, v_BTC), conv = self.convolved(qkv, past, rows, unit=2)
        else:
            # Products of both are made at once.
            inner = qkv[0].shape[-1]
            (qk_BTHK, v_BTC), conv = self.convolved(qkv, past, rows, unit=1, sizes=[2 * inner, inner])
            q_BTHK, k_BTHK = self.features(qk_BTHK).chunk(2, 2)
        v_BTHK = rearrange(v_BTC, "b t (h k) -> b t h k", h=self.config.memory_heads)
        if self.config.memory_norm:
            # The scale of a LayerNorm output.
            v_BTHK = F.rms_norm(v_BTHK, v_BTHK.shape[-1:], eps=self.norm.eps)
        return q_BTHK, k_BTHK, v_BTHK, conv

    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """Before its SiLU."""
        return self.output_gate_proj(x_BTD)

    def output(self, o_BTHK: Tensor, gate_BTC: Tensor) -> Tensor:
        """Reads after norm and gate, [B, T, D], in the gate's dtype."""
        return self.recalled(self.o_proj(self.norm(o_BTHK, gate_BTC)))

    def convolved(
        self, x: Sequence[Tensor], history_BWC: Tensor, rows: Rows, unit: int, **parts: Any
    ) -> ShortConvolutionOutput:
        """Parts after the convolution, the first ``unit`` as heads of unit length, and the history for the next call.

        Parts are in fp32 or more: fp16 cannot hold small norms, and reads are rounded once, at the end. Under autocast
        the op rounds them, so they come rounded where nothing else is computed with them.
        """
        dtype = exact_type(x[0])
        if self.config.polynomial_degree == 1 and not self.config.memory_norm and rows.stretches is None:
            dtype = autocast_type(x[0]) or dtype
        parts |= {"unit": unit, "head_dim": self.config.memory_head_dim, "dtype": dtype}
        return self.conv(x, history_BWC, rows.history_BT, rows.lengths_B, **parts)

    def features(self, x_BTHK: Tensor) -> Tensor:
        """Keys or queries from heads of unit length; with polynomial_degree 2, also their products."""
        if self.config.polynomial_degree == 1:
            return x_BTHK
        row, column = torch.triu_indices(x_BTHK.shape[-1], x_BTHK.shape[-1], device=x_BTHK.device)
        # Products off the diagonal count twice, so that phi(q) . phi(k) = (q . k)^2.
        scales = x_BTHK.new_full(row.shape, 2**0.5).masked_fill(row == column, 1.0)
        products = x_BTHK[..., row] * x_BTHK[..., column] * scales
        first, second = self.feature_scales.to(x_BTHK.dtype)
        return unit_length(torch.cat([first * x_BTHK, second * products], -1))


@torch.no_grad()
def mean_size(gate_BTC: Tensor) -> Tensor:
    """The metric ``output_gate`` [B, T]: mean absolute gate, from the gate before its SiLU."""
    return F.silu(gate_BTC).abs().mean(-1)


def pack(memory: NeuralMemoryState) -> State:
    return {name: numbered(x) for name in _PARTS if (x := getattr(memory, name))}


def unpack(state: State, position_B: Tensor) -> NeuralMemoryState:
    parts = {name: in_order(state.get(name, {})) for name in _PARTS}
    return NeuralMemoryState(**parts, position=position_B)


@torch.no_grad()
def memory_norms(initial: Iterable[Tensor], before: State, after: State, rows: Rows) -> dict[str, Tensor]:
    """Frobenius norms of memory and momentum after a call, and of the memory's change: root mean squares over rows and
    heads. Empty if no metrics are asked for.

    initial: M_0, [H, in, out] of each layer. It replaces ``before`` in rows whose document starts in this call
    """
    if not rows.metrics:
        return {}
    weights, momentum = (list(in_order(after.get(name, {}))) for name in ("weights", "momentum"))
    start = [w.to(now.dtype) for w, now in zip(initial, weights, strict=True)]
    if not rows.fresh:
        new_B = rows.after_B <= (rows.length if rows.lengths_B is None else rows.lengths_B)
        if rows.lengths_B is not None:
            new_B = new_B & (rows.lengths_B > 0)
        old = in_order(before["weights"])
        start = [torch.where(new_B[:, None, None, None], w, o) for w, o in zip(start, old, strict=True)]

    def norm(tensors: list[Tensor]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(x) / x.shape[:-2].numel() ** 0.5 for x in tensors]).norm()

    change = [w - s for w, s in zip(weights, start, strict=True)]
    norms = {"memory_norm": norm(weights), "update_norm": norm(change)}
    return norms | ({"momentum_norm": norm(momentum)} if momentum else {})
