"""Memory Sparse Attention (arXiv:2603.23516): each document is read once, independently of the others, and kept as the
means of its chunks. A query chooses documents, and attention sees the means of those.

A sample is ``[template | document 1 | document 2 | ... | query | response]``, in the order of its ``Roles``. The
template and each document are separate causal segments, with positions from 0. Every chunk_size tokens of a document
are kept as the means of their rotated keys K, values V and router keys R (a document's last chunk may be short). Later
tokens attend, in one softmax, to

    [template ; K, V of the chosen documents' chunks ; itself, causally, positions from len(template) + top_k on]

    score[document] = max over its chunks of max over query tokens of mean over heads of sim(W_q x, R)

The top_k documents are chosen by a hard selection, and their scores do not weight attention's reads. So the
language-model loss gives no gradient to the router's projections: only the router's own loss does (``router``).
``routes: false`` is a layer without a router, which sees template and itself; the paper routes in the upper half of
the layers.

The choice is made again at every query token, from the query tokens up to it. So a query token is not influenced by
later query tokens, and the tokens after the query see the choice that the whole query made. Outputs do not depend on
how a sample is divided into calls. ``routing: query`` is the rule of the released code: every query token sees the
documents that all query tokens of the call chose together. A query token can choose any document before it in its
sample. Without roles, all tokens are a response: they use causal attention, and also see the documents that were read
before.

The part ``bank`` of the state holds the documents. They may also be put in from outside, from a bank: see ``held``.
After a question to a bank, the state keeps only the documents that this question chose. When a response continues
without roles, the choice is final. The chosen chunks are then put once before the keys of the tokens outside
documents, and later tokens run plain attention.

The table "Paper and released code" in memlm/hub/README.md lists where the paper and its released code differ.

Files:

    layout              the positions of a call's tokens among documents
    held                the state: the documents held
    reading             what tokens outside documents see
    router              the router's losses and metrics

B batch, T tokens, A tokens outside documents, N within, D hidden, H heads in G groups, K head dim, C chunks.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import rotary_of_both
from memlm.memory import attention
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.kv import append, join
from memlm.memory.msa import held, reading, router
from memlm.memory.msa.layout import COUNTERS, Layout, Stream, Within, boundaries, sizes_of
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.roles import Roles
from memlm.settings import require
from memlm_kernels import document_attention, route_documents, segment_mean_pool
from memlm_kernels.grid import keep_last, pick, place
from memlm_kernels.route_documents import REDUCTIONS, SIMILARITIES, Routes, Scored
from memlm_kernels.segments import exact

_NO_LM_GRADIENT = "the choice of documents is hard: only the router's loss, which needs positives, reaches it"


@dataclass(frozen=True)
class Config(attention.Projections):
    """routes: whether this layer chooses documents; if false, only top_k of the routing settings matters.
    chunk_size: tokens that are averaged into one key and value.
    top_k: documents that a query sees.
    routing: "causal": by the query tokens so far; "query": by all query tokens of the call, as released.
    similarity: of router queries and pooled router keys: "cosine", or "dot", over the root of the head dim.
    head_reduce, query_reduce, chunk_reduce: "mean" or "max" over heads, then query tokens, then chunks.
    router_loss: one of ``router.LOSSES``.
    loss_weight: weight, in each layer, of the router's loss, a mean over a row's samples.
    temperature: temperature of the router loss's softmax.
    injection: "causal"; or "bidirectional": tokens of a later call without roles see each other in both directions.
        The released code treats text inserted during decoding this way.
    positions: where positions after the documents begin: "template", at len(template) + top_k, as released; or
        "top_k".

    The rest is as in ``attention.Projections``.
    """

    routes: bool = True
    chunk_size: int = 64
    top_k: int = 16
    routing: str = "causal"
    similarity: str = "cosine"
    head_reduce: str = "mean"
    query_reduce: str = "max"
    chunk_reduce: str = "max"
    router_loss: str = "infonce_decouple"
    loss_weight: float = 0.1
    temperature: float = 0.1
    injection: str = "causal"
    positions: str = "template"
    qk_norm: bool | str = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "top_k"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name, known in (
            ("routing", ("causal", "query")),
            ("similarity", SIMILARITIES),
            ("head_reduce", REDUCTIONS),
            ("query_reduce", REDUCTIONS),
            ("chunk_reduce", REDUCTIONS),
            ("router_loss", router.LOSSES),
            ("injection", ("causal", "bidirectional")),
            ("positions", ("template", "top_k")),
        ):
            value = getattr(self, name)
            require(value in known, f"{name}={value!r} must be one of {', '.join(known)}")
        require(self.loss_weight >= 0, f"loss_weight={self.loss_weight} must not be negative")
        require(self.temperature > 0, f"temperature={self.temperature} must be above 0")


class Heads(NamedTuple):
    """Rotated queries [B, T, H, K] and keys, and values [B, T, G, K]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def of(self, stream: Stream) -> "Heads":
        return Heads(stream.take(self.q), stream.take(self.k), stream.take(self.v))


class Mixer(attention.Mixer):
    at_once = has_room = False
    without_gradient = {  # noqa: RUF012
        "router_q_proj.weight": _NO_LM_GRADIENT,
        "router_k_proj.weight": _NO_LM_GRADIENT,
        "router_bias": _NO_LM_GRADIENT,
    }

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(attention.Config(**config.projections()), dims, layer_idx)
        self.msa = config
        queries, keys, _ = self.sizes
        if config.routes:
            self.choice = reading.ChosenDocuments()
            self.router_q_proj = nn.Linear(dims.hidden_size, queries, bias=False)
            self.router_k_proj = nn.Linear(dims.hidden_size, keys, bias=False)
            if config.router_loss == "bce":
                self.router_bias = nn.Parameter(torch.empty(()))
                self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.msa.routes and self.msa.router_loss == "bce":
            # Most documents are not positives.
            init.constant_(self.router_bias, -20.0)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        kept = (batch_size, 0, self.dims.num_key_value_heads, self.dims.head_dim)
        zeros = torch.zeros(kept, device=device, dtype=dtype)
        state: State = {name: torch.zeros(batch_size, dtype=torch.int64, device=device) for name in COUNTERS}
        # Keys and values of tokens outside documents, and of the open document.
        state |= {"k": zeros, "v": zeros, "open": {"k": zeros, "v": zeros}}
        if self.msa.routes:
            none = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
            # Marks the chosen chunks among the first keys in ``k``; empty while the choice may change.
            state["front"] = none.bool()
            state["bank"] = {name: exact(zeros) for name in ("k", "v", "router_k")}
            state["bank"] |= dict.fromkeys(("size", "document", "number", "asked"), none)
            state["bank"] |= {"score": exact(zeros[:, :, 0, 0]), "found": none.bool()}
        return state

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        config, before = self.msa, state
        # Whether all tokens continue a response.
        answers = rows.given_BT is None and rows.roles is None
        count_template = config.positions == "template"
        layout = Layout.of(rows, before, config.chunk_size, config.top_k, count_template)
        bank_asked = (
            config.routes and rows.roles is not None and rows.roles.bank is not None and layout.outside is not None
        )
        if config.routes and x_BTD.shape[1]:
            before = self._settled(before, layout) if answers else held.unsettled(before)
        if bank_asked:
            before, layout = self._retrieved(x_BTD, before, layout, rows)
        (q_BTHK, k_BTGK, v_BTGK), _ = self.project(x_BTD, before, rows)
        angles = self.angles(rows, k_BTGK.dtype, layout.rotary_BT)
        heads = Heads(*rotary_of_both(q_BTHK, k_BTGK, angles), v_BTGK)

        aux_losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        after = dict(layout.after)
        after |= {name: before[name] for name in ("k", "v", "open", "front") if name in before}
        outputs, bank = [], dict(before["bank"]) if config.routes else {}
        if layout.within is not None:
            of_documents = heads.of(layout.within.stream)
            seen, kept = self._within(layout.within, of_documents, before)
            outputs.append(seen)
            after |= kept
            if config.routes:
                bank = self._pooled(layout, layout.within, x_BTD, of_documents, bank, rows.roles)
        elif rows.lengths_B is None and x_BTD.shape[1]:
            # No row has an open document now.
            after["open"] = {name: x[:, :0] for name, x in before["open"].items()}
        if layout.outside is not None and x_BTD.shape[1]:
            outside, chosen = layout.outside, None
            if config.routes and answers:
                front_B = self.choice(before["front"][:, None]).sum(2)
                outside = outside._replace(place_BA=outside.place_BA + front_B)
            elif config.routes and bank["k"].shape[1]:
                routes, document_BC = self._route(x_BTD, layout, bank, rows.roles)
                bank["score"], bank["asked"] = routes.scored
                documents_BAJ = self.choice(routes.document + 1, document_BC) - 1
                chosen = reading.DocumentChoice(documents_BAJ, document_BC, bank["k"], bank["v"])
                if routes.scores is not None and rows.roles is not None:
                    aux_losses, metrics = self._taught(layout, routes.scores, bank["found"], document_BC, rows)
            injected = rows.start != 0 and rows.roles is None and config.injection == "bidirectional"
            # No mask is needed at the start of rows, or for one token without chosen chunks before it.
            fronted = "front" in before and before["front"].shape[1] > 0
            alone = rows.length == 1 and rows.goes_on and rows.start is not None and answers and not fronted
            plain = alone or (rows.start == 0 and rows.given_BT is None)
            seen, kept = self._outside(outside, heads.of(outside), before, chosen, plain, injected, rows)
            outputs.insert(0, seen)
            after |= kept
        y_BTHK = torch.cat(outputs, 1) if outputs else q_BTHK
        if layout.source_BT is not None:
            y_BTHK = pick(y_BTHK, layout.source_BT)
        if config.routes:
            after["bank"] = bank
        if bank_asked:
            after = held.arranged(after, bank, self._chosen(bank, after["chunks"]))
        return MixerOutput(self.output(y_BTHK), after, aux_losses, metrics)

    def _within(self, documents: Within, heads: Heads, before: State) -> tuple[Tensor, State]:
        """Attention inside each document. The state keeps the document that is still open."""
        self._check_backend()
        stream, counts, new, opened = documents.stream, documents.counts, heads.q.shape[1], before["open"]
        past, k, v = opened["k"].shape[1], join(opened["k"], heads.k), join(opened["v"], heads.v)
        if past == 0:
            y = self._on_rows(documents, heads)
        else:
            y = self._attend(heads.q, k, v, None, stream.place_BA, past + counts.longest)
        kept = min(past + new, counts.longest + (past if counts.whole else 0))
        open_k, open_v = (keep_last(x, kept, new, stream.lengths_B) for x in (k, v))
        return y, {"open": {"k": open_k, "v": open_v}}

    def _on_rows(self, documents: Within, heads: Heads) -> Tensor:
        """Attention for documents that begin in this call: each gets its own row, so plain causal attention fits. Rows
        are grouped by length, so one long document among short ones adds little padding.
        """
        slots_1N, size = documents.on_rows()
        # One more slot, for padding.
        q, k, v = (place(x.flatten(0, 1)[None], slots_1N, size + 1)[0] for x in heads)
        outputs, first = [], 0
        for group in documents.groups:
            here = slice(first, first := first + group.most * group.rows)
            of_q, of_k, of_v = (x[here].unflatten(0, (group.rows, group.most)) for x in (q, k, v))
            outputs.append(self._attend(of_q, of_k, of_v, None, None, None).flatten(0, 1))
        y = torch.cat([*outputs, torch.zeros_like(q[:1])])
        return pick(y[None], slots_1N)[0].view_as(heads.q)

    def _outside(
        self,
        stream: Stream,
        heads: Heads,
        before: State,
        chosen: reading.DocumentChoice | None,
        plain: bool,
        injected: bool,
        rows: Rows,
    ) -> tuple[Tensor, State]:
        """Attention of template, query and response tokens: to the chosen chunks, and causally to each other."""
        q, new = heads.q, heads.q.shape[1]
        k, kept_k = append(before["k"], heads.k, stream.lengths_B)
        v, kept_v = append(before["v"], heads.v, stream.lengths_B)
        kept = {"k": kept_k, "v": kept_v}
        if chosen is None and not injected:
            return self._attend(q, k, v, None, None if plain else stream.place_BA, None), kept
        past = k.shape[1] - new
        seen = rows.once_for((stream.place_BA,), ("spans", injected), lambda: reading.spans(stream, past, injected))
        chosen = chosen or reading.DocumentChoice.nothing(q, k, v)
        self._check_backend()
        if self.dims.attn_implementation == "flex_attention":
            return self._call("flex_attention", q, *reading.masked(k, v, chosen, seen)), kept
        documents = chosen.k.to(k.dtype), chosen.v.to(v.dtype), chosen.document_BC, chosen.document_BAJ
        return document_attention(q, k, v, *documents, spans=seen, backend=self.op_backend), kept

    def _check_backend(self) -> None:
        require(
            "flash" not in self.dims.attn_implementation,
            f"attn_implementation={self.dims.attn_implementation!r} has no masks, which documents need; use 'sdpa' or "
            "'flex_attention'",
        )

    def _pooled(
        self,
        layout: Layout,
        documents: Within,
        x_BTD: Tensor,
        heads: Heads,
        bank: State,
        roles: Roles | None,
    ) -> State:
        """The state's documents with the chunks of this call; the first chunk may continue one of an earlier call."""
        stream, count = documents.stream, documents.chunks
        owner_BN = (documents.chunk_BN - documents.first_chunk_B[:, None]).clamp(0, count)
        sizes_BC = sizes_of(owner_BN, stream.lengths_B, count)
        ends_BC = boundaries(sizes_BC)
        router_k = self._heads(self.router_k_proj(stream.take(x_BTD)))
        parts = {"k": heads.k, "v": heads.v, "router_k": router_k}
        new: dict[str, Any] = {
            name: segment_mean_pool(x, ends_BC, longest=self.msa.chunk_size) for name, x in parts.items()
        }
        # The index of each chunk's first token.
        first_BC = ends_BC[:, :-1].clamp(max=owner_BN.shape[1] - 1)
        new["document"] = documents.number_BN.gather(1, first_BC)
        found_BN = torch.zeros_like(owner_BN, dtype=torch.bool)
        if roles is not None and roles.positives is not None:
            found_BN = stream.take(roles.positives.bool())
        new["found"] = found_BN.gather(1, first_BC)

        slot_C = torch.arange(bank["k"].shape[1] + count, device=x_BTD.device)
        source_BC = slot_C - documents.first_chunk_B[:, None]
        written_BC = (source_BC >= 0) & (source_BC < count)
        source_BC = source_BC.clamp(0, count - 1)
        written_BC = written_BC & (sizes_BC.gather(1, source_BC) > 0)
        old = {name: torch.cat([x, x.new_zeros(len(x), count, *x.shape[2:])], 1) for name, x in bank.items()}
        new_size_BC = sizes_BC.gather(1, source_BC).where(written_BC, 0)
        merged = dict(old)
        merged["size"] = old["size"] + new_size_BC
        share_BC = new_size_BC.to(old["k"].dtype) / merged["size"].clamp(min=1)
        for name in parts:
            merged[name] = torch.lerp(old[name], pick(new[name], source_BC), share_BC[..., None, None])
        for name in ("document", "found"):
            merged[name] = torch.where(written_BC, new[name].gather(1, source_BC), old[name])
        # Chunks read here belong to no bank.
        merged["number"] = old["number"].masked_fill(written_BC, -1)
        return merged

    def _retrieved(self, x_BTD: Tensor, before: State, layout: Layout, rows: Rows) -> tuple[State, Layout]:
        """State and layout as if the bank's candidate documents had been read after the template.

        Documents that an earlier question chose stay, with their scores. All others get scores from the new query
        alone. That suffices: by the old scores, top_k documents were better.
        """
        assert rows.roles is not None and rows.roles.bank is not None
        assert layout.outside is not None and layout.asks_BA is not None and layout.within is None
        config, number_BC = self.msa, before["bank"]["number"].masked_fill(before["bank"]["size"] == 0, -1)
        require(
            number_BC.shape[1] == 0 or config.query_reduce == config.chunk_reduce == "max",
            f"query_reduce={config.query_reduce!r} and chunk_reduce={config.chunk_reduce!r} let a memory ask a "
            "memory_bank once: a mean needs the scores of all documents; ask with a fork of it from before",
        )
        q_BAHK = self._heads(self.router_q_proj(layout.outside.take(x_BTD)))
        found = rows.roles.bank.candidates(self.layer_idx, q_BAHK, layout.asks_BA, number_BC)
        before = held.with_documents(before, found)
        known = {name: before[name] for name in ("documents", "chunks")}
        end_BA = torch.where(layout.behind_BA, known["documents"][:, None], 0)
        after = layout.after | known | {"first": torch.zeros_like(known["documents"])}
        return before, layout._replace(first_BA=torch.zeros_like(end_BA), end_BA=end_BA, after=after)

    def _settled(self, before: State, layout: Layout) -> State:
        if before["bank"]["k"].shape[1] == 0 or before["front"].shape[1]:
            return before
        spans = layout.first_BA[:, :1], layout.end_BA[:, :1]
        return held.settled(before, self._chosen(before["bank"], before["chunks"], spans))

    def _chosen(self, bank: State, chunks_B: Tensor, spans: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Chunks that later tokens see, [B, C]; spans: first and end of the documents they may choose, [B, 1] each"""
        config, document_BC = self.msa, held.documents_of(bank, chunks_B)
        routes = route_documents(
            None,
            bank["router_k"],
            document_BC,
            top_k=config.top_k,
            num_documents=document_BC.shape[1],
            spans=spans,
            scored=Scored(bank["score"], bank["asked"]),
            query_reduce=config.query_reduce,
            chunk_reduce=config.chunk_reduce,
        )
        return held.chunks_of(routes.document, document_BC)[:, 0]

    def _route(self, x_BTD: Tensor, layout: Layout, bank: State, roles: Roles | None) -> tuple[Routes, Tensor]:
        """The choices of tokens outside documents, and the document of each chunk (C if none)."""
        assert layout.outside is not None
        config, document_BC = self.msa, held.documents_of(bank, layout.after["chunks"])
        q_BAHK = None
        if layout.asks_BA is not None:
            q_BAHK = self._heads(self.router_q_proj(layout.outside.take(x_BTD)))
        with torch.autocast(x_BTD.device.type, enabled=False):
            routes = route_documents(
                q_BAHK,
                bank["router_k"],
                document_BC,
                top_k=config.top_k,
                num_documents=document_BC.shape[1],
                asks=layout.asks_BA,
                spans=(layout.first_BA, layout.end_BA),
                running=config.routing == "causal",
                scored=Scored(bank["score"], bank["asked"]),
                similarity=config.similarity,
                head_reduce=config.head_reduce,
                query_reduce=config.query_reduce,
                chunk_reduce=config.chunk_reduce,
                return_scores=roles is not None and roles.positives is not None,
            )
        return routes, document_BC

    def _taught(
        self, layout: Layout, scores_BN: Tensor, found_BC: Tensor, document_BC: Tensor, rows: Rows
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The router's loss [B], a mean over each row's samples, and its metrics."""
        assert layout.outside is not None
        config, size = self.msa, scores_BN.shape[1]
        found_BN = torch.zeros(len(found_BC), size + 1, device=found_BC.device, dtype=torch.int64)
        found_BN = found_BN.scatter_reduce(1, document_BC, found_BC.long(), "amax")[:, :size].bool()
        # Samples differ in the first document that they may choose.
        first_BS, end_BS = _samples(layout, rows)
        number_N = torch.arange(size, device=scores_BN.device)
        known_BSN = (number_N >= first_BS[..., None]) & (number_N < end_BS[..., None])
        known_BSN = known_BSN & (scores_BN > float("-inf"))[:, None]
        found_BSN, scores_BSN = found_BN[:, None] & known_BSN, scores_BN[:, None].expand(known_BSN.shape)
        nats_BS = router.router_loss(
            config.router_loss,
            scores_BSN,
            found_BSN,
            known_BSN,
            config.temperature,
            getattr(self, "router_bias", None),
        )
        taught_BS = (known_BSN if config.router_loss == "bce" else found_BSN).any(-1)
        loss_B = config.loss_weight * nats_BS.sum(1) / taught_BS.sum(1).clamp(min=1)
        metrics = {}
        if rows.metrics:
            metrics = router.router_metrics(scores_BSN.detach(), found_BSN, known_BSN, config.top_k)
        return ({"router": loss_B} if config.loss_weight else {}), metrics


def _samples(layout: Layout, rows: Rows) -> tuple[Tensor, Tensor]:
    """First and end of each sample's documents, [B, S]; equal if there is no sample."""
    assert layout.outside is not None
    first_BA, end_BA = layout.first_BA, layout.end_BA
    opens_BA = torch.cat([torch.ones_like(first_BA[:, :1]), (first_BA[:, 1:] > first_BA[:, :-1]).long()], 1)
    sample_BA = opens_BA.cumsum(1) - 1
    if layout.outside.lengths_B is not None:
        place_A = torch.arange(first_BA.shape[1], device=first_BA.device)
        real_BA = place_A < layout.outside.lengths_B[:, None]
        sample_BA = torch.where(real_BA, sample_BA, rows.max_documents)
    zeros_BS = first_BA.new_zeros(len(first_BA), rows.max_documents + 1)
    first_BS, end_BS = (zeros_BS.scatter_reduce(1, sample_BA, x, "amax")[:, :-1] for x in (first_BA, end_BA))
    return first_BS, end_BS
