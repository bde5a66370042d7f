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

``fusion`` selects how the chosen chunks join the window. The above is "joint". The others choose only chunks that lie
whole before the window, and add no ``learning``:

- "head_gate", the reader of LongMem (arXiv:2306.07174): two softmaxes, y[t] = (1 - g) window[t] + g chosen[t], with
  one learned gate for each head, g = sigmoid(b[h]), 1/2 at first as in the release; or with ``gate: tanh`` tanh(b[h]),
  0 at first. The paper's heads each choose; here a group of heads that share keys does. A token that can choose no
  chunk has g = 0.
- "relevance", as in HCAM (arXiv:2105.14039), where the chunks are chosen by a router, for all heads:

      r[t, n] = (W_r x[t]) . mean over s in chunk n of (U_r x[s]) / sqrt(router_dim)
      y[t] = window[t] + sum over the top_k chunks n of softmax(r[t])[n] softmax(q[t] . (k[s] + p[s])) v[s], s in n

  with p a sinusoid of the place of s in its chunk, counted back from its end. The weights give the router a gradient
  of the language-model loss. A token that can choose no chunk reads zero. HCAM adds p to x, before the projections.

Both forms of ``learning`` accept a trained backbone (``train.init_from`` of the kind ``attention``) and keep its
outputs while all chunks are chosen: "distilled" adds no weights, and "compressed" with ``gate: tanh`` adds nothing at
first. "head_gate" with ``gate: tanh`` keeps those of a backbone with the same window.

Files:

    config              the settings
    layout              where the chunks of a call are, their means, and the keys that its tokens see

B batch, T tokens, S keys kept from earlier calls, L = S + T, D hidden, H query heads in G groups, K head dim, N chunks
of the row, E of them new, C chunk_size.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import rotary, rotary_of_both
from memlm.memory import attention
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.chunk_sparse.config import FUSIONS, GATES, LEARNING, Config
from memlm.memory.chunk_sparse.layout import Chunks, SeenKeys, bounded, filled, last
from memlm.memory.kv import append, join
from memlm.memory.parts import ReadEntries, memory_share
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm_kernels import chunk_mean_attention, chunk_sparse_attention, chunk_topk
from memlm_kernels.grid import pick
from memlm_kernels.segments import exact

__all__ = ["FUSIONS", "GATES", "LEARNING", "Chunks", "Config", "Mixer"]


class Share(nn.Module):
    """The gate on each head's far read. Its gradient is nonzero even where the gate starts at 0."""

    long_term = True

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = torch.tanh if form == "tanh" else torch.sigmoid

    def forward(self, logits_BTH: Tensor) -> Tensor:
        return self.form(logits_BTH)


class HeadGate(nn.Module):
    """The chosen chunks' share of each head, [H]."""

    def __init__(self, heads: int, form: str) -> None:
        super().__init__()
        self.share = Share(form)
        self.bias = nn.Parameter(torch.empty(heads))

    def forward(self) -> Tensor:
        return self.share(exact(self.bias))


class Mixer(attention.Mixer):
    has_room = False

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(attention.Config(conv_size=config.conv_size, **config.projections()), dims, layer_idx)
        self.chunked, self.any_length, self.grows = config, False, not config.max_chunks
        self.choice = ReadEntries()
        # A router's keys do not pass between processes.
        self.at_once = config.fusion != "relevance"
        self.compressed = config.fusion == "joint" and config.learning == "compressed"
        if config.fusion == "relevance":
            self.router_q_proj, self.router_k_proj = (
                nn.Linear(dims.hidden_size, config.router_dim, bias=False) for _ in range(2)
            )
        elif config.fusion == "head_gate":
            self.head_gate = HeadGate(dims.num_attention_heads, config.gate)
            self.starts_silent = ("head_gate.bias",) if config.gate == "tanh" else ()
        if self.compressed:
            self.gate = nn.Linear(dims.hidden_size, dims.num_attention_heads)
            self.share = Share(config.gate)
            self.starts_silent = ("gate.weight", "gate.bias") if config.gate == "tanh" else ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.compressed:
            init.zeros_(self.gate.weight)
            init.zeros_(self.gate.bias)
        if self.chunked.fusion == "head_gate":
            init.zeros_(self.head_gate.bias)
        if self.chunked.initialization == "recall":
            self.start_for_recall()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        state = super().init_state(batch_size, device, dtype)
        if self.chunked.fusion == "relevance":
            router = torch.zeros(batch_size, 0, 1, self.chunked.router_dim, device=device, dtype=dtype)
            # Rotated keys of the window, and the router's keys of the open chunk.
            state |= {"near": state["k"], "router": router, "pooled": {"router": exact(router)}}
        else:
            state["pooled"] = {name: exact(state[name]) for name in (("k", "v") if self.compressed else ("k",))}
        return bounded(state, self.chunked) if self.chunked.max_chunks else state

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        config, length = self.chunked, rows.length
        if length == 0:
            return MixerOutput(x_BTD, state, {}, {})
        # Stretches begin with an empty state.
        if config.max_chunks and (seen := 0 if rows.stretches is not None else rows.start) is not None:
            state = filled(state, config, seen)
        (q_BTHK, k_BTGK, v_BTGK), after = self.project(x_BTD, state, rows)
        angles = self.angles(rows, q_BTHK.dtype)
        turned_BTHK, turned_BTGK = rotary_of_both(q_BTHK, k_BTGK, angles)
        if rows.stretches is not None:
            if config.far_positions:
                state, turned_BTGK, v_BTGK = self._joined(turned_BTGK, v_BTGK, state, rows)
            else:
                state, k_BTGK, v_BTGK = self._joined(k_BTGK, v_BTGK, state, rows)
        past, kept = state["v"].shape[1], next(iter(state["pooled"].values())).shape[1]
        # Equal settings imply equal sizes. A size in a key would be a constant of compiled code.
        settings = (config.chunk_size, config.window_size, config.behind, config.max_chunks)
        chunks = rows.once(("chunks", settings), lambda: Chunks.of(rows, past, kept, config))
        v_BLGK, after["v"] = append(state["v"], v_BTGK, rows.lengths_B)
        after["pooled"] = {}
        if config.fusion == "relevance":
            placed_BTGK = k_BTGK + self._places(rows, k_BTGK.dtype)
            far_BLGK, after["k"] = append(state["k"], placed_BTGK, rows.lengths_B)
            seen_BLGK, near_BLGK = append(state["near"], turned_BTGK, rows.lengths_B)
            after["near"] = last(near_BLGK, config.window_size - 1)
            keys = SeenKeys(far_BLGK, (q_BTHK, far_BLGK), seen_BLGK)
        else:
            keys = self._keys((q_BTHK, k_BTGK), (turned_BTHK, turned_BTGK), state, after, rows)
        fuse = {"joint": self._joint, "relevance": self._relevance, "head_gate": self._gated}[config.fusion]
        out = fuse(x_BTD, (q_BTHK, turned_BTHK), keys, v_BLGK, chunks, state, after, rows)
        if config.max_chunks:
            after = bounded(after, config)
        return out._replace(y_BTD=self.output(out.y_BTD), state=after)

    def _keys(
        self,
        plain: tuple[Tensor, Tensor],
        turned: tuple[Tensor, Tensor],
        state: State,
        after: State,
        rows: Rows,
    ) -> SeenKeys:
        """plain, turned: queries and keys of the call before and after the rotation."""
        (q_BTHK, k_BTGK), (_, turned_BTGK) = plain, turned
        # Past keys are kept in one form, rotated or not. Only near keys are needed in the other: the window and the
        # open chunk.
        near = min(state["k"].shape[1], self.chunked.window_size - 1)
        recent_BSGK = state["k"][:, state["k"].shape[1] - near :]
        recent_BSGK = rotary(recent_BSGK, self._recent_angles(rows, near, recent_BSGK.dtype))
        if self.chunked.far_positions:
            seen_BLGK, after["k"] = append(state["k"], turned_BTGK, rows.lengths_B)
            return SeenKeys(join(recent_BSGK, k_BTGK), None, seen_BLGK)
        plain_BLGK, after["k"] = append(state["k"], k_BTGK, rows.lengths_B)
        return SeenKeys(plain_BLGK, (q_BTHK, plain_BLGK), join(recent_BSGK, turned_BTGK))

    def _joint(
        self,
        x_BTD: Tensor,
        queries: tuple[Tensor, Tensor],
        keys: SeenKeys,
        v_BLGK: Tensor,
        chunks: Chunks,
        state: State,
        after: State,
        rows: Rows,
    ) -> MixerOutput:
        """One softmax over the window and the chosen chunks, before the output's projection."""
        config, (q_BTHK, turned_BTHK) = self.chunked, queries
        pooled_BNGK = self._pooled(keys.plain, chunks, "k", state, after)
        spans: tuple[Tensor, Tensor] | None = (chunks.first_BT, chunks.end_BT)
        known, top_k = pooled_BNGK.shape[1], config.top_k
        if rows.length == 1 and chunks.starts_BN is None and not config.max_chunks:
            # The host knows which chunks the token may choose.
            spans, known = None, max(0, state["v"].shape[1] - config.behind) // config.chunk_size
            top_k = min(top_k, max(1, known))
        may_BNGK = pooled_BNGK[:, :known]
        chosen_BTGJ = chunk_topk(q_BTHK, may_BNGK, top_k=top_k, spans=spans)
        seen_BTHK = self._read(
            turned_BTHK, keys.near, v_BLGK, self.choice(chosen_BTGJ + 1) - 1, chunks, rows, keys.far
        )
        aux_losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if self.compressed:
            pooled_v_BNGK = self._pooled(v_BLGK, chunks, "v", state, after)
            means_BTHK = chunk_mean_attention(q_BTHK, may_BNGK, pooled_v_BNGK[:, :known], spans=spans).o
            gate_BTH = self.share(self.gate(x_BTD))
            means_BTHK = gate_BTH[..., None] * means_BTHK
            if rows.metrics:
                metrics = {"gate": gate_BTH.detach().mean(), "memory_share": memory_share(means_BTHK, seen_BTHK)}
            seen_BTHK = seen_BTHK + means_BTHK
        elif self.training and config.loss_weight:
            dense = keys.far or (turned_BTHK, keys.near)
            aux_losses["router"] = config.loss_weight * self._unlike_dense(
                q_BTHK, pooled_BNGK, dense, chunks, state, rows
            )
            if rows.metrics:
                metrics["router"] = aux_losses["router"].detach().mean()
        return MixerOutput(seen_BTHK, after, aux_losses, metrics)

    def _gated(
        self,
        x_BTD: Tensor,
        queries: tuple[Tensor, Tensor],
        keys: SeenKeys,
        v_BLGK: Tensor,
        chunks: Chunks,
        state: State,
        after: State,
        rows: Rows,
    ) -> MixerOutput:
        """A softmax over the window and one over the chosen chunks, mixed by each head's gate."""
        q_BTHK, turned_BTHK = queries
        pooled_BNGK = self._pooled(keys.plain, chunks, "k", state, after)
        spans = chunks.first_BT, chunks.end_BT
        index_BTGJ = self.choice(chunk_topk(q_BTHK, pooled_BNGK, top_k=self.chunked.top_k, spans=spans) + 1) - 1
        window_BTHK = self._window(turned_BTHK, keys, v_BLGK, chunks, rows)
        far = keys.far or (turned_BTHK, keys.near)
        chosen_BTHK, knows_BTH = chunks.read_alone(far, v_BLGK, index_BTGJ, rows, self.chunked.chunk_size)
        gate_BTH1 = (self.head_gate() * knows_BTH)[..., None].to(window_BTHK.dtype)
        metrics = {}
        if rows.metrics:
            share = memory_share(gate_BTH1 * chosen_BTHK, (1 - gate_BTH1) * window_BTHK)
            metrics = {"gate": gate_BTH1.detach().mean(), "memory_share": share}
        return MixerOutput(torch.lerp(window_BTHK, chosen_BTHK, gate_BTH1), after, {}, metrics)

    def _relevance(
        self,
        x_BTD: Tensor,
        queries: tuple[Tensor, Tensor],
        keys: SeenKeys,
        v_BLGK: Tensor,
        chunks: Chunks,
        state: State,
        after: State,
        rows: Rows,
    ) -> MixerOutput:
        """A softmax over the window, and one over each chosen chunk, weighted by the chunks' relevance."""
        (_, turned_BTHK), config, groups = queries, self.chunked, v_BLGK.shape[2]
        router_q, router_k = (proj(x_BTD)[:, :, None] for proj in (self.router_q_proj, self.router_k_proj))
        router_BL1R, kept_BL1R = append(state["router"], router_k, rows.lengths_B)
        after["router"] = last(kept_BL1R, config.chunk_size - 1)
        pooled_BN1R = self._pooled(router_BL1R, chunks, "router", state, after)
        spans = chunks.first_BT, chunks.end_BT
        index_BT1J = self.choice(chunk_topk(router_q, pooled_BN1R, top_k=config.top_k, spans=spans) + 1) - 1
        weight_BTJ = self._weights(router_q, pooled_BN1R, index_BT1J)
        recalled_BTHK = torch.zeros_like(turned_BTHK)
        assert keys.far is not None
        for j in range(config.top_k):
            index_BTGJ = index_BT1J[..., j : j + 1].expand(-1, -1, groups, -1)
            read_BTHK, _ = chunks.read_alone(keys.far, v_BLGK, index_BTGJ, rows, config.chunk_size)
            recalled_BTHK = recalled_BTHK + weight_BTJ[..., j, None, None].to(read_BTHK.dtype) * read_BTHK
        window_BTHK = self._window(turned_BTHK, keys, v_BLGK, chunks, rows)
        metrics = {"memory_share": memory_share(recalled_BTHK, window_BTHK)} if rows.metrics else {}
        return MixerOutput(window_BTHK + recalled_BTHK, after, {}, metrics)

    def _weights(self, q_BT1R: Tensor, pooled_BN1R: Tensor, index_BT1J: Tensor) -> Tensor:
        """softmax over the chosen chunks of their relevance, [B, T, J]; zeros where there is no chunk."""
        index_BTJ = index_BT1J[:, :, 0]
        if not pooled_BN1R.shape[1]:
            return exact(q_BT1R.new_zeros(index_BTJ.shape))
        key_BTJR = pick(pooled_BN1R[:, :, 0], index_BTJ.clamp(min=0).flatten(1)).unflatten(1, index_BTJ.shape[1:])
        relevance_BTJ = (exact(q_BT1R) * key_BTJR).sum(-1) * self.chunked.router_dim**-0.5
        missing_BTJ = index_BTJ < 0
        least = torch.finfo(relevance_BTJ.dtype).min
        return relevance_BTJ.masked_fill(missing_BTJ, least).softmax(-1).masked_fill(missing_BTJ, 0.0)

    def _window(self, q_BTHK: Tensor, keys: SeenKeys, v_BLGK: Tensor, chunks: Chunks, rows: Rows) -> Tensor:
        none_BTGJ = torch.zeros(*q_BTHK.shape[:2], v_BLGK.shape[2], 0, dtype=torch.int64, device=q_BTHK.device)
        return self._read(q_BTHK, keys.near, last(v_BLGK, keys.near.shape[1]), none_BTGJ, chunks, rows)

    def _read(
        self,
        q_BTHK: Tensor,
        k_BLGK: Tensor,
        v_BLGK: Tensor,
        index_BTGJ: Tensor,
        chunks: Chunks,
        rows: Rows,
        far: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return chunk_sparse_attention(
            q_BTHK,
            k_BLGK,
            v_BLGK,
            index_BTGJ,
            chunks.starts_BN,
            chunk_size=self.chunked.chunk_size,
            window=self.chunked.window_size,
            positions=None if chunks.starts_BN is None else rows.positions_BT,
            far=far,
        ).o

    def _places(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Sinusoids of the tokens' places in their chunks, counted back from the last one, [B, T, 1, K]."""
        size, channels = self.chunked.chunk_size, self.dims.head_dim

        def make() -> Tensor:
            channel_K = torch.arange(channels, device=rows.device)
            # In fp32, or in fp64 for fp64.
            rate_K = 10000.0 ** (-(channel_K // 2 * 2).to(torch.promote_types(dtype, torch.float32)) / channels)
            angle_BTK = (size - 1 - rows.positions_BT % size)[..., None] * rate_K
            return torch.where(channel_K % 2 == 1, angle_BTK.cos(), angle_BTK.sin()).to(dtype)[:, :, None]

        return rows.once(("places", size, channels, dtype), make)

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
        kept_BNGK, past = state["pooled"][name], state["v"].shape[1]
        pooled_BNGK, after["pooled"][name] = chunks.means(x_BLGK, kept_BNGK, past, self.chunked.chunk_size)
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
