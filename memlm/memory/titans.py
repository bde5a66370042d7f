"""Titans' long-term memory as a part: projections, gates and one call of the ``neural_memory`` op.

Paper to code (arXiv:2501.00663): theta = lr, eta = momentum, alpha = decay, M_0 = ``memory``,
b = chunk_size. B batch, T tokens, D hidden, H memory heads, K memory head dim, E inner width.

Conventions the paper leaves open: the inner loss is 1/2 |M(k) - v|^2; a token reads after it has
written; M_0 is learned, its last layer starts at zero so that an empty memory says nothing; gates
are one number for each token and head.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import RMSNorm, ShortConv
from memlm.memory.base import (
    Dims,
    MixerContext,
    MixerOutput,
    SequenceMixer,
    State,
    require,
    token_positions,
)
from memlm_kernels import NeuralMemoryState, neural_memory

INITS = ("default", "recall")


@dataclass(frozen=True)
class NeuralMemoryConfig:
    """memory_heads, memory_head_dim: the memory is ``memory_heads`` independent MLPs on vectors of that size.
    memory_depth: layers of each MLP; memory_expansion: width of its hidden layers over memory_head_dim.
    chunk_size: tokens whose gradients are taken at the same weights; quality is best at the size trained on.
    conv_size: width of the causal convolution with SiLU on q, k, v.
    initial_lr, initial_momentum, initial_decay: where the gates start. Keep
        chunk_size * lr / (1 - momentum) near or below 1, or a repeated key makes the inner loop diverge.
    initialization: "default", or "recall": an engineered prior for associative recall. Queries start equal
        to keys, and each key channel looks a random 0 to conv_size - 1 tokens back, so that a value can
        be stored under the token before it from the first step.
    """

    memory_heads: int = 1
    memory_head_dim: int = 64
    memory_depth: int = 1
    memory_expansion: int = 2
    chunk_size: int = 16
    conv_size: int = 4
    initial_lr: float = 0.047
    initial_momentum: float = 0.12
    initial_decay: float = 0.0025
    initialization: str = "default"

    def __post_init__(self) -> None:
        for name in ("memory_heads", "memory_head_dim", "memory_expansion", "chunk_size", "conv_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(1 <= self.memory_depth <= 4, f"memory_depth={self.memory_depth} must be 1, 2, 3 or 4")
        for name in ("initial_lr", "initial_momentum", "initial_decay"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name}={value} must lie strictly between 0 and 1")
        require(
            self.initialization in INITS,
            f"initialization={self.initialization!r} must be one of {', '.join(INITS)}",
        )


class NeuralMemory(SequenceMixer):
    """The memory with its own projections: [B, T, D] in, [B, T, D] out."""

    def __init__(self, config: NeuralMemoryConfig, dims: Dims) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.memory_heads, config.memory_head_dim
        inner = heads * head_dim
        self.q_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.conv = ShortConv(3 * inner, config.conv_size)
        self.gates = nn.Linear(dims.hidden_size, 3 * heads)
        sizes = [head_dim, *[config.memory_expansion * head_dim] * (config.memory_depth - 1), head_dim]
        self.memory = nn.ParameterList([torch.empty(heads, i, o) for i, o in itertools.pairwise(sizes)])
        self.norm = RMSNorm(head_dim, eps=dims.rms_norm_eps)
        self.output_gate_proj = nn.Linear(dims.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, dims.hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        config = self.config
        init.zeros_(self.gates.weight)
        starts = (config.initial_lr, config.initial_momentum, config.initial_decay)
        logits = torch.tensor([math.log(p / (1 - p)) for p in starts])
        init.copy_(self.gates.bias, logits.repeat_interleave(config.memory_heads))
        for w in list(self.memory)[:-1]:
            init.normal_(w, std=w.shape[1] ** -0.5)
        init.zeros_(self.memory[-1])
        if config.initialization == "recall":
            self._engineer()

    def _engineer(self) -> None:
        init.copy_(self.q_proj.weight, self.k_proj.weight)
        width, channels = self.config.conv_size, self.q_proj.out_features
        taps = torch.zeros(3, channels, width)
        taps[[0, 2], :, -1] = 1.0
        taps[1] = 0.1 * torch.randn(channels, width)
        taps[1, torch.arange(channels), torch.randint(width, (channels,))] += 1.0
        init.copy_(self.conv.weight, taps.flatten(0, 1))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        # Filled from M_0 at position 0, so what stands here before is never read.
        exact = torch.promote_types(dtype, torch.float32)
        state = {"position": torch.zeros(batch_size, dtype=torch.int64, device=device)}
        for layer, w in enumerate(self.memory):
            for name in ("weights", "momentum", "anchor"):
                state[f"{name}.{layer}"] = torch.zeros(batch_size, *w.shape, device=device, dtype=exact)
        state["conv"] = torch.zeros(
            batch_size, self.config.conv_size - 1, self.conv.weight.shape[0], device=device, dtype=dtype
        )
        return state

    def forward(self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None) -> MixerOutput:
        heads = (self.config.memory_heads, self.config.memory_head_dim)
        taps, channels = self.config.conv_size - 1, self.conv.weight.shape[0]
        history_BWC = state["conv"] if state else x_BTD.new_zeros(len(x_BTD), taps, channels)
        ctx = ctx or MixerContext()
        qkv, conv = self.conv(
            torch.cat([proj(x_BTD) for proj in (self.q_proj, self.k_proj, self.v_proj)], -1),
            history_BWC,
            ctx.positions_BT if state is None else token_positions(x_BTD, state, ctx),
            ctx.lengths_B,
        )
        q_BTHK, k_BTHK, v_BTHK = (x.unflatten(-1, heads) for x in F.silu(qkv).chunk(3, -1))
        lr, momentum, decay = self._gates(x_BTD).chunk(3, -1)
        o_BTHK, memory = neural_memory(
            # Normalised in fp32: the smallest norm allowed is 0 in fp16.
            F.normalize(q_BTHK.to(lr.dtype), dim=-1),
            F.normalize(k_BTHK.to(lr.dtype), dim=-1),
            v_BTHK,
            lr,
            momentum,
            decay,
            weights=list(self.memory),
            chunk_size=self.config.chunk_size,
            state=self._unpack(state) if state else None,
            positions=ctx.positions_BT,
            lengths=ctx.lengths_B,
            max_documents=ctx.max_documents,
        )
        y_BTHK = self.norm(o_BTHK) * F.silu(self.output_gate_proj(x_BTD)).unflatten(-1, heads)
        metrics = {
            "lr": lr.mean(),
            "momentum": momentum.mean(),
            "decay": decay.mean(),
            "memory_norm": _norm(memory.weights),
            "surprise": _norm(memory.momentum),
        }
        metrics = {name: value.detach() for name, value in metrics.items()}
        return MixerOutput(self.o_proj(y_BTHK.flatten(2)), self._pack(memory, conv), {}, metrics)

    def _gates(self, x_BTD: Tensor) -> Tensor:
        """lr, momentum and decay, [B, T, 3 H]; at least fp32, for a decay is a small number that adds up."""
        exact = torch.promote_types(self.gates.weight.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            return F.linear(x_BTD.to(exact), self.gates.weight.to(exact), self.gates.bias.to(exact)).sigmoid()

    def _pack(self, memory: NeuralMemoryState, conv: Tensor) -> State:
        state = {"position": memory.position, "conv": conv}
        for name in ("weights", "momentum", "anchor"):
            state |= {f"{name}.{layer}": w for layer, w in enumerate(getattr(memory, name))}
        return state

    def _unpack(self, state: State) -> NeuralMemoryState:
        layers = range(self.config.memory_depth)
        weights, momentum, anchor = (
            tuple(state[f"{name}.{layer}"] for layer in layers) for name in ("weights", "momentum", "anchor")
        )
        return NeuralMemoryState(weights, momentum, anchor, state["position"])


@torch.no_grad()
def _norm(weights: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of all layers of one head's memory, root mean square over rows and heads."""
    squares = torch.stack([w.square().sum((-2, -1)) for w in weights]).sum(0)
    return squares.mean().sqrt()
