"""Mixture of memories (MoM, arXiv:2502.13685): a router sends each token to a few of many memories, and the token
reads the content of these. Each memory is a linear recurrence of any kind; the memories that are not chosen neither
write nor forget.

    p = softmax(x W_router)        w = the top_k of p, renormalised to 1
    o = sum over chosen m of w_m q M_m, and q M_shared        y = (norm(o) * silu(x W_gate)) W_o

Each memory has its own keys, values and gates; all memories share the queries. One stable sort puts a row's tokens in
the order of their memories, and the recurrence runs over them as segments. The cost is that of top_k memories, however
many memories there are, and the host never waits for a size from the device.

B batch, T tokens, D hidden, M memories, J = top_k, R = T * J routed tokens of a row, S segments (one per document and
memory), H heads, V value dim, C channels of q, k, v together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import ExactGroupedLinear, ExactLinear, GroupedLinear, ShortConv
from memlm.memory import attention, parts, recurrence, rules
from memlm.memory.base import Dims, MixerOutput, SequenceMixer
from memlm.memory.parts import BranchGate, gate_logits
from memlm.memory.recurrence import recur
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.settings import require, suggest
from memlm_kernels import MemoryRoutes, combine_reads, dispatch_tokens
from memlm_kernels.segments import exact

CONVOLUTIONS = ("per_memory", "before_routing", "none")


@dataclass(frozen=True)
class Config(rules.Config):
    """rule: the update rule of the memories, a key of ``rules.RULES``; its settings are in ``rules.Config``.
    num_memories, top_k: number of memories, and how many of them get each token.
    shared_memory: one more memory, which every token writes and reads with weight 1.
    single_kv: all memories, the shared one too, take keys, values and gates from the same projections.
    conv: short convolution: "per_memory", along the tokens of each memory; "before_routing", on the layer's input; or
        "none".
    conv_across_segments: in training, convolve along all routed tokens of a batch, memory after memory, as
        flash-linear-attention does. Such a convolution sees later tokens and other rows, so use it only to continue
        the training of checkpoints from there.
    balance_loss: weight of num_memories * sum_m (share of tokens sent to m) (mean probability of m) in the training
        loss, whose floor is top_k (Switch, arXiv:2101.03961). Share and mean are computed per row (as in
        arXiv:2412.19437), because each row has its own memory states: other rows write nothing into them. Also, a mean
        over rows does not depend on how a step is divided into calls. The paper's loss, computed over all rows of a
        call, does.
    z_loss: weight of the mean square of the router's log-sum-exp (ST-MoE, arXiv:2202.08906).
    balance_bias: a bias on the choice of memories alone, trained towards even loads (arXiv:2408.15664).
    window_size: the window of an attention branch beside the memories, gated as in titans_mag; null for no branch.
    """

    rule: str = "gated_delta_net"
    num_memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    single_kv: bool = False
    conv: str = "per_memory"
    conv_across_segments: bool = False
    balance_loss: float = 0.01
    z_loss: float = 0.0
    balance_bias: bool = False
    window_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rule in rules.RULES,
            f"rule={self.rule!r} is unknown; {suggest(str(self.rule), list(rules.RULES))}",
        )
        require(self.num_memories >= 1, f"num_memories={self.num_memories} must be at least 1")
        require(
            1 <= self.top_k <= self.num_memories,
            f"top_k={self.top_k} must lie between 1 and num_memories={self.num_memories}",
        )
        require(self.conv in CONVOLUTIONS, f"conv={self.conv!r} must be one of {', '.join(CONVOLUTIONS)}")
        for name in ("balance_loss", "z_loss"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(
            self.window_size is None or self.window_size >= 1,
            f"window_size={self.window_size} must be at least 1, or null for no attention branch",
        )


class Mixer(SequenceMixer):
    at_once = True

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.recurrence = recurrence.Recurrence(config.rule, config, convolve=config.conv == "per_memory")
        queries, keys, values = config.sizes
        inputs, logits = dims.hidden_size, self.recurrence.rule.logits
        self.router = ExactLinear(inputs, config.num_memories, bias=False)
        self.q_proj = nn.Linear(inputs, queries, bias=False)
        self.kv_proj: nn.Linear | GroupedLinear
        self.gates: ExactLinear | GroupedLinear | None = None
        if config.single_kv:
            self.kv_proj = nn.Linear(inputs, keys + values, bias=False)
            self.gates = ExactLinear(inputs, logits, bias=False) if logits else None
        else:
            self.kv_proj = GroupedLinear(config.num_memories, inputs, keys + values)
            self.gates = ExactGroupedLinear(config.num_memories, inputs, logits) if logits else None
        if config.shared_memory and not config.single_kv:
            self.shared_kv_proj = nn.Linear(inputs, keys + values, bias=False)
            self.shared_gates = ExactLinear(inputs, logits, bias=False) if logits else None
        if config.conv == "before_routing" and config.conv_size > 1:
            self.conv = ShortConv(dims.hidden_size, config.conv_size)
        if config.balance_bias:
            self.bias = nn.Parameter(torch.empty(config.num_memories))
        self.reading = recurrence.Readout(config, dims)
        if config.window_size is not None:
            self.attention = attention.Mixer(attention.Config(config.window_size), dims, layer_idx)
            self.gate = BranchGate(dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        config = self.config
        self.recurrence.rule.reset_parameters()
        if config.window_size is not None:
            self.gate.reset_parameters()
        if config.balance_bias:
            init.zeros_(self.bias)
        for gates in (self.gates, getattr(self, "shared_gates", None)):
            if gates is not None:
                init.zeros_(gates.weight)
        if config.initialization == "recall":
            sets = 1 if config.single_kv else config.num_memories
            recurrence.start_for_recall(self.q_proj, self.kv_proj, self.recurrence.conv, config, sets)
            if config.shared_memory and not config.single_kv:
                init.copy_(self.shared_kv_proj.weight, self.kv_proj.weight[: sum(config.sizes[1:])])

    def idle_parameters(self) -> int:
        config = self.config
        if config.single_kv:
            return 0
        of_memories = self.kv_proj.weight.numel() + (self.gates.weight.numel() if self.gates is not None else 0)
        return of_memories * (config.num_memories - config.top_k) // config.num_memories

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        memories = self.config.num_memories
        state = {"routed": self.recurrence.init_state(batch_size, memories, device, dtype)}
        if self.config.shared_memory:
            state["shared"] = self.recurrence.init_state(batch_size, 1, device, dtype)
        if hasattr(self, "conv"):
            shape = (batch_size, self.conv.width - 1, self.conv.channels)
            state["input"] = {"conv": torch.zeros(shape, device=device, dtype=dtype)}
        if self.config.window_size is not None:
            state["attention"] = self.attention.init_state(batch_size, device, dtype)
        return state

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        after: dict[str, State] = {}
        input_BTD = x_BTD
        if hasattr(self, "conv"):
            x_BTD, past = rows.past(x_BTD, state["input"]["conv"])
            input_BTD, history = self.conv.over_rows(x_BTD, past, rows.history_BT, rows.lengths_B)
            after["input"] = {"conv": history}

        weight_BTJ, memory_BTJ, aux_losses, metrics = self._choose(x_BTD, rows)
        if self.config.shared_memory:
            weight_BTJ = F.pad(weight_BTJ, (0, 1), value=1.0)
        across = self.config.conv_across_segments and self.training
        require(
            not (across and rows.stretches),
            "conv_across_segments=true sees tokens of all rows, and sequence parallelism cuts rows; set it to false",
        )
        alone = rows.length == 1 and rows.goes_on and rows.stretches is None
        mix = self._mix_token if alone and not across else self._mix
        o_BTHV, of_memories, of_rule = mix(input_BTD, state, rows, weight_BTJ, memory_BTJ)
        y_BTD = self.reading(o_BTHV, x_BTD)
        if self.config.window_size is not None:
            seen = self.attention(x_BTD, state["attention"], rows)
            y_BTD, of_gate = self.gate(x_BTD, seen.y_BTD, y_BTD, rows.metrics)
            after["attention"], metrics = seen.state, metrics | of_gate
        return MixerOutput(y_BTD, after | of_memories, aux_losses, metrics | of_rule)

    def _mix(
        self, x_BTD: Tensor, state: State, rows: Rows, weight_BTJ: Tensor, memory_BTJ: Tensor
    ) -> tuple[Tensor, dict[str, State], dict[str, Tensor]]:
        """Reads [B, T, H, V], the memories after the call, and metrics. A document's last memory is the shared one."""
        config, documents = self.config, rows.segments()
        of_documents = (documents.index_BT, documents.most) if documents else ()
        routes = MemoryRoutes.of(memory_BTJ, config.num_memories, *of_documents, shared=config.shared_memory)
        x_ND = x_BTD if config.single_kv else dispatch_tokens(x_BTD.flatten(0, 1)[None], routes.grouped)[0]

        def of_memories(linear: nn.Module, shared_BTC: Tensor | None) -> Tensor:
            y_NC = linear(x_ND, sizes_G=routes.sizes)
            if shared_BTC is not None:
                y_NC = torch.cat([y_NC, shared_BTC.flatten(0, 1)])
            return dispatch_tokens(y_NC[None], routes.ungrouped)[0].unflatten(0, routes.place.flatten(1).shape)

        before = start = self._memories(state)
        if documents:
            start = self._memories(self.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype))
        across = config.conv_across_segments and self.training
        o_BRHV, after, metrics = recur(
            self.recurrence,
            self._inputs(x_BTD, lambda y_BTC: dispatch_tokens(y_BTC, routes.place), of_memories),
            routes.cu_seqlens,
            documents,
            before,
            start,
            routes.ungrouped[0, : memory_BTJ.numel(), 0] if across else None,
            told=rows.metrics,
            stretches=rows.stretches,
            fresh=rows.start == 0,
        )
        # Copies, because a view would keep the whole tensor alive.
        kept = {"routed": {name: x[:, : config.num_memories].clone() for name, x in after.items()}}
        if config.shared_memory:
            kept["shared"] = {name: x[:, config.num_memories :].clone() for name, x in after.items()}
        return combine_reads(o_BRHV, routes.place, weight_BTJ), kept, metrics

    def _memories(self, state: State) -> State:
        """[B, M, ...] of all memories."""
        if not self.config.shared_memory:
            return state["routed"]
        return {name: torch.cat([x, state["shared"][name]], 1) for name, x in state["routed"].items()}

    def _mix_token(
        self, x_B1D: Tensor, state: State, rows: Rows, weight_B1J: Tensor, memory_B1J: Tensor
    ) -> tuple[Tensor, dict[str, State], dict[str, Tensor]]:
        """``_mix`` for one token per row, if every row continues its document. Only the memories that get a token take
        a step, as rows of one token: first the N chosen ones (first choices of all rows, then second, ...), then the
        shared ones.
        """
        config, x_BD, memory_N = self.config, x_B1D[:, 0], memory_B1J[:, 0].T.flatten()
        batch, choices, memories = len(x_BD), weight_B1J.shape[2], config.num_memories
        row_N = memory_N
        if batch > 1:
            row_N = memory_N + (memories * torch.arange(batch, device=x_BD.device)).repeat(config.top_k)

        def spread(y_BC: Tensor, copies: int = choices) -> Tensor:
            return y_BC.expand(copies, -1, -1).flatten(0, 1)

        def of_memories(linear: nn.Module, shared_BC: Tensor | None) -> Tensor:
            y_NC = linear(spread(x_BD, config.top_k), group_N=memory_N)
            return y_NC if shared_BC is None else torch.cat([y_NC, shared_BC])

        routed = {name: x.flatten(0, 1) for name, x in state["routed"].items()}
        before = {name: x.index_select(0, row_N)[:, None] for name, x in routed.items()}
        if config.shared_memory:
            before = {name: torch.cat([x, state["shared"][name]]) for name, x in before.items()}
        qkv_RC, logits_RL = self._inputs(x_BD, spread, of_memories)
        o_R1HV, after, metrics = self.recurrence(qkv_RC[:, None], logits_RL[:, None], None, before, told=rows.metrics)
        weight_JB111 = weight_B1J.movedim(2, 0)[..., None, None]
        o_B1HV = (o_R1HV.unflatten(0, (choices, batch)) * weight_JB111).sum(0)
        kept: dict[str, State] = {"routed": {}}
        for name, x in after.items():
            of_all = routed[name].to(x.dtype).index_copy(0, row_N, x[: len(row_N), 0])
            kept["routed"][name] = of_all.unflatten(0, (batch, memories))
        if config.shared_memory:
            kept["shared"] = {name: x[len(row_N) :].clone() for name, x in after.items()}
        return o_B1HV, kept, metrics

    def _inputs(
        self, x: Tensor, spread: Callable[[Tensor], Tensor], of_memories: Callable[[nn.Module, Tensor | None], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """q, k, v and gate logits of tokens x [..., D], for each of their memories.

        spread: copies the values of a token to all its memories
        of_memories: applies each chosen memory's own linear map to x, and takes the shared memory's values as given
        """
        q, (kv, logits) = self.q_proj(x), self._shared_projections(x)
        if self.config.single_kv and kv is not None:
            return spread(torch.cat([q, kv], -1)), spread(logits)
        qkv = torch.cat([spread(q), of_memories(self.kv_proj, kv)], -1)
        if self.gates is None:
            return qkv, logits.new_zeros(*qkv.shape[:-1], 0)
        return qkv, of_memories(self.gates, logits if self.config.shared_memory else None)

    def _choose(self, x_BTD: Tensor, rows: Rows) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Weights and memories of each token, [B, T, J]; auxiliary losses [B]; and metrics. Padding has no effect."""
        config = self.config
        logits_BTM = gate_logits(self.router, x_BTD)
        p_BTM = logits_BTM.softmax(-1)
        scores_BTM = p_BTM + exact(self.bias).detach() if config.balance_bias else p_BTM
        memory_BTJ = parts.top_choices(scores_BTM, config.top_k)
        chosen_BTJ = p_BTM.gather(2, memory_BTJ)
        weight_BTJ = chosen_BTJ / chosen_BTJ.sum(-1, keepdim=True)

        real_BT1: Tensor | None = None
        tokens: Tensor | int = rows.length
        share: Tensor | float = 1 / max(rows.length, 1)
        if rows.real_BT is not None and rows.lengths_B is not None:
            real_BT1, tokens = rows.real_BT[..., None].to(p_BTM.dtype), rows.lengths_B[:, None].to(p_BTM.dtype)
            if rows.stretches is not None:
                tokens = rows.stretches.mean(tokens)
            share = 1 / tokens.clamp(min=1)

        def total(x_BTK: Tensor) -> Tensor:
            """The sum over each row's real tokens, [B, K]."""
            return (x_BTK if real_BT1 is None else x_BTK * real_BT1).sum(1)

        if rows.length == 1 and not (rows.metrics or torch.is_grad_enabled()):
            # A decoded token has no target, so its losses would count 0 times.
            return weight_BTJ, memory_BTJ, {}, {}
        load_BM = total(torch.zeros_like(p_BTM).scatter_(2, memory_BTJ, 1.0)) * share
        losses = {}
        if config.balance_loss:
            scale = config.balance_loss * config.num_memories
            of_row_BM = load_BM if rows.stretches is None else rows.stretches.mean(load_BM)
            losses["balance"] = (of_row_BM * (scale * share) * total(p_BTM)).sum(1)
        if config.z_loss:
            square_BT1 = logits_BTM.logsumexp(-1, keepdim=True).square()
            losses["router_z"] = config.z_loss * (total(square_BT1) * share)[:, 0]
        if config.balance_bias:
            # No value, only a gradient: the bias falls where the load is above its share.
            overload_BM = load_BM * config.num_memories / config.top_k - tokens * share
            losses["balance_bias"] = ((self.bias - self.bias.detach()) * overload_BM).sum(1)
        if not rows.metrics:
            return weight_BTJ, memory_BTJ, losses, {}
        sent_M = (load_BM * tokens).sum(0)
        whole = (sent_M.sum() / config.top_k).clamp(min=1)
        metrics = {f"load_{m}": load for m, load in enumerate(sent_M / whole)}
        entropy_BT1 = -(p_BTM * logits_BTM.log_softmax(-1)).sum(-1, keepdim=True)
        metrics["router_entropy"] = total(entropy_BT1).sum().detach() / whole
        metrics["dead_memories"] = (sent_M == 0).sum().to(p_BTM.dtype)
        return weight_BTJ, memory_BTJ, losses, metrics

    def _shared_projections(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Keys, values and gate logits that all memories share, or those of the shared memory; None if there
        are none.
        """
        if self.config.single_kv:
            return self.kv_proj(x), gate_logits(self.gates, x)
        if self.config.shared_memory:
            return self.shared_kv_proj(x), gate_logits(self.shared_gates, x)
        return None, gate_logits(None, x)
