"""Attention to a window and to a few past chunks, which each token chooses by their pooled keys.

The idea of Memory Sparse Attention inside one stream; see also NSA (arXiv:2502.11089), MoBA (arXiv:2502.13189) and
InfLLM (arXiv:2402.04617).

    score[t, n] = sum over the heads h of a group of q[t, h] . mean of the keys k of chunk n, none of them rotated
    y[t] = one softmax over the window and the tokens of the top_k chunks

Every chunk_size tokens of a document form a chunk. A token chooses among the chunks that begin before its window. Each
group of heads that share keys chooses separately. A token sees those tokens of a chosen chunk that are not in its
window. If top_k covers all chunks and ``far_positions`` is true, this is full causal attention, with the weights of
the kind ``attention``. The op computes the attention, so ``attn_implementation`` has no effect.

The choice is hard, so it has no gradient, and the mean of a chunk need not match the queries that its keys match.
``learning`` selects how the choice is trained:

- "compressed", as in NSA: the token also attends to the means of keys and values of all chunks that it may choose,
  y[t] += gate[t] * softmax(q . mean k) mean v. A better read of means makes a better choice.
- "distilled", as in DeepSeek's DSA (arXiv:2512.02556): a loss, the cross-entropy of softmax(q . mean k) from each
  chunk's share of dense attention. Training then costs as much as full attention.

Both accept a trained backbone (``train.init_from`` of the kind ``attention``) and keep its outputs while all chunks
are chosen: "distilled" adds no weights, and "compressed" with ``gate: tanh`` adds nothing at first.

B batch, T tokens, S keys kept from earlier calls, L = S + T, D hidden, H query heads in G groups, K head dim, N chunks
of the row, E of them new, C chunk_size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import rotary, rotary_of_both
from memlm.memory import attention
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.kv import append, join
from memlm.memory.parts import memory_share, start_delayed
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.settings import require
from memlm_kernels import chunk_mean_attention, chunk_sparse_attention, chunk_topk
from memlm_kernels.grid import keep_last, pick, place
from memlm_kernels.segments import exact

LEARNING = ("compressed", "distilled")
GATES = ("sigmoid", "tanh")
INITIALIZATIONS = ("default", "recall")


@dataclass(frozen=True)
class Config(attention.Projections):
    """chunk_size: tokens of a chunk.
    window_size: last tokens that are always seen, at least chunk_size.
    top_k: chunks that a token chooses.
    learning: how the choice is trained: "compressed" or "distilled".
    loss_weight: weight of the distillation loss in each layer.
    gate: the gate of the read of means: "sigmoid", 1/2 at first; or "tanh", 0 at first, for a trained backbone.
    far_positions: whether rotary positions encode the distance of chosen tokens, as in full attention. Without them,
        far tokens look as in training, however long the document.
    conv_size: width of a causal convolution with SiLU on q, k, v; 0 for none.
    initialization: "default", or "recall": an engineered prior for associative recall. Queries start equal to keys,
        and the convolution delays each channel of the keys by 0 to conv_size - 1 tokens.

    The rest is as in ``attention.Projections``.
    """

    chunk_size: int = 64
    window_size: int = 512
    top_k: int = 16
    learning: str = "compressed"
    loss_weight: float = 0.1
    gate: str = "sigmoid"
    far_positions: bool = True
    conv_size: int = 0
    initialization: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "top_k"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(
            self.window_size >= self.chunk_size,
            f"window_size={self.window_size} must be chunk_size={self.chunk_size} at least, "
            "because nothing else sees the open chunk; raise it, or lower chunk_size",
        )
        require(self.loss_weight >= 0, f"loss_weight={self.loss_weight} must not be negative")
        require(self.conv_size >= 0, f"conv_size={self.conv_size} must be 0 (none) or more")
        for name, known in (("learning", LEARNING), ("gate", GATES), ("initialization", INITIALIZATIONS)):
            value = getattr(self, name)
            require(value in known, f"{name}={value!r} must be one of {', '.join(known)}")
        require(
            self.initialization == "default" or self.conv_size > 0,
            f"initialization={self.initialization!r} delays keys by a convolution; set conv_size, to 4 say",
        )


class ChosenChunks(nn.Module):
    """The numbers of chosen chunks, counted from 1, so that zeros mean none. Long-term memory enters the layer
    here.
    """

    long_term = True

    def forward(self, index_BTGJ: Tensor) -> Tensor:
        return index_BTGJ + 1


class Share(nn.Module):
    """The gate on each head's read of means. Its gradient is nonzero even where the gate starts at 0."""

    long_term = True

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = torch.tanh if form == "tanh" else torch.sigmoid

    def forward(self, logits_BTH: Tensor) -> Tensor:
        return self.form(logits_BTH)


class Chunks(NamedTuple):
    """The chunks of a row: first the kept ones of the open document, then those that end in this call. All indices are
    among the row's L keys.

    starts_BN: the start of each chunk; None: the keys are cut into chunks from the first key on
    first_BT, end_BT: a token may choose chunks first to end - 1, which begin before its window
    document_BT: the start of each token's document
    new: the chunks that end in this call: their number; or, for a fixed number of slots, the last token [B, E] of
        each, and the number [B] in use
    """

    starts_BN: Tensor | None
    first_BT: Tensor
    end_BT: Tensor
    document_BT: Tensor
    new: int | tuple[Tensor, Tensor]

    @staticmethod
    def of(rows: Rows, past: int, kept: int, config: Config) -> "Chunks":
        """past, kept: keys and chunks in the state."""
        positions_BT, size, length = rows.positions_BT, config.chunk_size, rows.length
        known_BT = (positions_BT - config.window_size + size).clamp(min=0) // size
        if rows.goes_on and rows.start == past and kept == past // size:
            none_BT = torch.zeros_like(positions_BT)
            return Chunks(None, none_BT, known_BT, none_BT, (past + length) // size - kept)
        token_T = torch.arange(length, device=positions_BT.device)
        ends_BT = (positions_BT + 1) % size == 0
        if rows.real_BT is not None:
            ends_BT = ends_BT & rows.real_BT
        so_far_BT = ends_BT.long().cumsum(1)
        most = (length + size - 1) // size
        # One more slot, for tokens that end no chunk.
        slot_BT = torch.where(ends_BT, so_far_BT - 1, most)
        new_BE = place(token_T.expand(len(ends_BT), -1)[..., None], slot_BT, most + 1)[:, :-1, 0]
        back_N = torch.arange(kept, 0, -1, device=positions_BT.device) * size
        old_BN = past - (rows.before_B % size)[:, None] - back_N
        first_BT = kept + so_far_BT - (positions_BT + 1) // size
        return Chunks(
            starts_BN=torch.cat([old_BN, past + new_BE - size + 1], 1),
            first_BT=first_BT,
            end_BT=first_BT + known_BT,
            document_BT=past + token_T - positions_BT,
            new=(new_BE, so_far_BT[:, -1]),
        )


class Mixer(attention.Mixer):
    has_room = False

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(attention.Config(conv_size=config.conv_size, **config.projections()), dims, layer_idx)
        self.chunked, self.any_length = config, False
        self.choice = ChosenChunks()
        if config.learning == "compressed":
            self.gate = nn.Linear(dims.hidden_size, dims.num_attention_heads)
            self.share = Share(config.gate)
            self.starts_silent = ("gate.weight", "gate.bias") if config.gate == "tanh" else ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.chunked.learning == "compressed":
            init.zeros_(self.gate.weight)
            init.zeros_(self.gate.bias)
        if self.chunked.initialization == "recall":
            groups, head_dim = self.dims.num_key_value_heads, self.dims.head_dim
            keys = self.k_proj.weight.unflatten(0, (groups, head_dim))
            init.copy_(self.q_proj.weight, keys.repeat_interleave(self.num_key_value_groups, 0).flatten(0, 1))
            start_delayed(self.conv, self.sizes[0], self.sizes[1])

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        state = super().init_state(batch_size, device, dtype)
        means = ("k", "v") if self.chunked.learning == "compressed" else ("k",)
        return state | {"pooled": {name: exact(state[name]) for name in means}}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        config, length, positions_BT = self.chunked, rows.length, rows.positions_BT
        (q_BTHK, k_BTGK, v_BTGK), after = self.project(x_BTD, state, rows)
        if length == 0:
            return MixerOutput(self.output(q_BTHK), state, {}, {})
        angles = self.angles(rows, q_BTHK.dtype)
        turned_BTHK, turned_BTGK = rotary_of_both(q_BTHK, k_BTGK, angles)
        if rows.stretches is not None:
            if config.far_positions:
                state, turned_BTGK, v_BTGK = self._joined(turned_BTGK, v_BTGK, state, rows)
            else:
                state, k_BTGK, v_BTGK = self._joined(k_BTGK, v_BTGK, state, rows)
        past, kept = state["v"].shape[1], state["pooled"]["k"].shape[1]
        # Equal settings imply equal sizes. A size in a key would be a constant of compiled code.
        settings = (config.chunk_size, config.window_size)
        chunks = rows.once(("chunks", settings), lambda: Chunks.of(rows, past, kept, config))
        # Past keys are kept in one form, rotated or not. Only near keys are needed in the other: the window and the
        # open chunk.
        near = min(state["k"].shape[1], config.window_size - 1)
        recent_BSGK = state["k"][:, state["k"].shape[1] - near :]
        recent_BSGK = rotary(recent_BSGK, self._recent_angles(rows, near, recent_BSGK.dtype))
        if config.far_positions:
            seen_BLGK, after["k"] = append(state["k"], turned_BTGK, rows.lengths_B)
            far, plain_BLGK = None, join(recent_BSGK, k_BTGK)
        else:
            plain_BLGK, after["k"] = append(state["k"], k_BTGK, rows.lengths_B)
            far, seen_BLGK = (q_BTHK, plain_BLGK), join(recent_BSGK, turned_BTGK)
        v_BLGK, after["v"] = append(state["v"], v_BTGK, rows.lengths_B)
        after["pooled"] = {}
        pooled_BNGK = self._pooled(plain_BLGK, chunks, "k", state, after)
        spans: tuple[Tensor, Tensor] | None = (chunks.first_BT, chunks.end_BT)
        known, top_k = pooled_BNGK.shape[1], config.top_k
        if length == 1 and chunks.starts_BN is None:
            # The host knows which chunks the token may choose.
            spans, known = None, max(0, past - config.window_size + config.chunk_size) // config.chunk_size
            top_k = min(top_k, max(1, known))
        may_BNGK = pooled_BNGK[:, :known]

        chosen_BTGJ = chunk_topk(q_BTHK, may_BNGK, top_k=top_k, spans=spans)
        seen_BTHK = chunk_sparse_attention(
            turned_BTHK,
            seen_BLGK,
            v_BLGK,
            self.choice(chosen_BTGJ) - 1,
            chunks.starts_BN,
            chunk_size=config.chunk_size,
            window=config.window_size,
            positions=None if chunks.starts_BN is None else positions_BT,
            far=far,
        ).o
        aux_losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if config.learning == "compressed":
            pooled_v_BNGK = self._pooled(v_BLGK, chunks, "v", state, after)
            means_BTHK = chunk_mean_attention(q_BTHK, may_BNGK, pooled_v_BNGK[:, :known], spans=spans).o
            gate_BTH = self.share(self.gate(x_BTD))
            means_BTHK = gate_BTH[..., None] * means_BTHK
            if rows.metrics:
                metrics = {"gate": gate_BTH.detach().mean(), "memory_share": memory_share(means_BTHK, seen_BTHK)}
            seen_BTHK = seen_BTHK + means_BTHK
        elif self.training and config.loss_weight:
            dense = far or (turned_BTHK, seen_BLGK)
            aux_losses["router"] = config.loss_weight * self._unlike_dense(
                q_BTHK, pooled_BNGK, dense, chunks, state, rows
            )
            if rows.metrics:
                metrics["router"] = aux_losses["router"].detach().mean()
        return MixerOutput(self.output(seen_BTHK), after, aux_losses, metrics)

    def _joined(self, k_BTGK: Tensor, v_BTGK: Tensor, state: State, rows: Rows) -> tuple[State, Tensor, Tensor]:
        """The state after the stretches of earlier processes; and keys, as the state has them, and values, to be used
        afterwards. Means are made again: they cost little beside the exchange of all keys.
        """
        new, old = (torch.stack(pair, 3) for pair in ((k_BTGK, v_BTGK), (state["k"], state["v"])))
        new, old = rows.past(new, old, whole=True)
        (k_BSGK, v_BSGK), size, past = old.unbind(3), self.chunked.chunk_size, old.shape[1]
        plain_BSGK = k_BSGK
        if self.chunked.far_positions:
            plain_BSGK = rotary(k_BSGK, self._recent_angles(rows, past, k_BSGK.dtype))
        back_N = torch.arange(past // size, 0, -1, device=new.device) * size
        starts_BN = past - (rows.before_B % size)[:, None] - back_N
        index_BNC = (starts_BN[..., None] + torch.arange(size, device=new.device)).clamp(min=0)
        pooled = {
            name: exact(pick(x, index_BNC.flatten(1))).unflatten(1, index_BNC.shape[1:]).mean(2)
            for name, x in (("k", plain_BSGK), ("v", v_BSGK))
            if name in state["pooled"]
        }
        k_BTGK, v_BTGK = new.unbind(3)
        return {**state, "k": k_BSGK, "v": v_BSGK, "pooled": pooled}, k_BTGK, v_BTGK

    def _recent_angles(self, rows: Rows, near: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Angles that rotate the last ``near`` keys of the past, or with far_positions rotate them back."""
        back = self.chunked.far_positions

        def make() -> Tensor:
            places_BS = rows.positions_BT[:, :1] - torch.arange(near, 0, -1, device=rows.device)
            return -places_BS if back else places_BS

        # With stretches, all of the past is asked too.
        places_BS = rows.once(("recent", self.chunked.window_size, back, rows.stretches and near), make)
        rope = self.dims.rope
        if back:
            rope = rope._replace(scale=1 / rope.scale)
        return rows.rotary(rope, dtype, places_BS) if self.config.rotary else None

    def _pooled(self, x_BLGK: Tensor, chunks: Chunks, name: str, state: State, after: State) -> Tensor:
        """Means of each chunk's x, [B, N, G, K]; x ends with the call's tokens."""
        size, length, kept_BNGK = self.chunked.chunk_size, chunks.first_BT.shape[1], state["pooled"][name]
        past = state["v"].shape[1]
        if isinstance(chunks.new, int):
            pooled_BNGK = kept_BNGK
            if chunks.new:
                start = x_BLGK.shape[1] - length - past % size
                new_BEGK = exact(x_BLGK[:, start : start + chunks.new * size]).unflatten(1, (-1, size)).mean(2)
                pooled_BNGK = join(kept_BNGK, new_BEGK)
            after["pooled"][name] = pooled_BNGK
            return pooled_BNGK
        new_BE, count_B = chunks.new
        # All tokens of chunks that end in this call.
        x_BLGK = x_BLGK[:, max(0, x_BLGK.shape[1] - length - size + 1) :]
        token_C = torch.arange(x_BLGK.shape[1] - length - size + 1, x_BLGK.shape[1] - length + 1, device=x_BLGK.device)
        # Unused slots get any valid index.
        index_BEC = (new_BE[..., None] + token_C).clamp(min=0)
        new_BEGK = exact(pick(x_BLGK, index_BEC.flatten(1))).unflatten(1, index_BEC.shape[1:]).mean(2)
        pooled_BNGK = torch.cat([kept_BNGK.to(new_BEGK.dtype), new_BEGK], 1)
        most = (past + length) // size
        after["pooled"][name] = keep_last(pooled_BNGK, most, new_BEGK.shape[1], count_B)
        return pooled_BNGK

    def _unlike_dense(
        self,
        q_BTHK: Tensor,
        pooled_BNGK: Tensor,
        dense: tuple[Tensor, Tensor],
        chunks: Chunks,
        state: State,
        rows: Rows,
    ) -> Tensor:
        """The cross-entropy of softmax(q . mean k) from the chunks' shares of dense attention, in nats per token and
        head, [B]: a mean over a row's tokens that have a choice.

        It equals lse - sum_n share[n] q . mean k[n], and the sum over chunks is a sum over keys: dense attention whose
        values are the means of their chunks. So no tensor is larger than those of attention.
        """
        config, length, positions_BT = self.chunked, rows.length, rows.positions_BT
        chunks_of_row = pooled_BNGK.shape[1]
        if chunks_of_row == 0:
            return exact(q_BTHK.new_zeros(len(q_BTHK)))
        past, kept = state["v"].shape[1], state["pooled"]["k"].shape[1]
        boundary_B = past - rows.before_B % config.chunk_size
        old_BS = (torch.arange(past, device=q_BTHK.device) - boundary_B[:, None]).div(
            config.chunk_size, rounding_mode="floor"
        )
        new_BT = chunks.first_BT + positions_BT // config.chunk_size
        owner_BL = torch.cat([old_BS + kept, new_BT], 1).clamp(0, chunks_of_row - 1)
        before_T = past + torch.arange(length, device=q_BTHK.device) - config.window_size + 1
        spans = (chunks.document_BT, before_T.expand_as(chunks.document_BT))
        with torch.autocast(q_BTHK.device.type, enabled=False):
            q, k = (x.detach() for x in dense)
            wanted_BTHK = exact(chunk_mean_attention(exact(q), k, pick(pooled_BNGK, owner_BL), spans=spans).o)
            known = chunk_mean_attention(q_BTHK, pooled_BNGK, pooled_BNGK, spans=(chunks.first_BT, chunks.end_BT))
            score_BTH = (exact(q_BTHK) * wanted_BTHK).sum(-1) * self.dims.head_dim**-0.5
        taught_BT = chunks.end_BT > chunks.first_BT
        if rows.real_BT is not None:
            taught_BT = taught_BT & rows.real_BT
        nats_BT = (known.lse - score_BTH).mean(-1).masked_fill(~taught_BT, 0.0)
        taught_B = taught_BT.sum(1)
        if rows.stretches is not None:
            taught_B = rows.stretches.mean(taught_B.to(nats_BT.dtype))
            return nats_BT.sum(1) / taught_B.clamp(min=1 / rows.stretches.size)
        return nats_BT.sum(1) / taught_B.clamp(min=1)
