"""A reader whose cache keeps the entries that a policy chooses.

B streams, T tokens, S entries, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.hub.causal import of_model
from memlm.memory.state import State, mapped, numbered
from memlm.policies import entries, queries
from memlm.policies.kinds import Arrivals, Entries, Policy
from memlm.reader import Reader
from memlm.settings import require


class PolicyReader(Reader):
    """Streams of equal length, read within a budget of bytes.

    >>> reader = PolicyReader(model, KeyDiff(budget=16384))

    Keys keep the rotation of their place, and later tokens count on from the place they have in the text. The text is
    read in blocks that end at multiples of ``policy.period``, and entries go only there, so the result does not
    depend on how the text is divided into calls.

    capacity: the most entries of a layer
    prompt_BP: tokens whose queries score the entries; they are not kept
    held: of each layer the places and marks of its entries, the last queries; the last predictions. They are not part
        of the budget

    Raises ValueError if the model's cache cannot lose entries, or if the budget is too small.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, segment: int = 2048) -> None:
        # The predictions of all tokens of a forward are large.
        super().__init__(model, policy.period if policy.predicts else segment)
        self.policy, self.held = policy, State()
        self._places = not of_model(model, known=True)
        self.prompt_BP: Tensor | None = None
        if policy.queries:
            queries.check(model)
        self.capacity = self._capacity()

    def _capacity(self) -> int:
        probe = Reader(self.model)
        probe(torch.zeros(1, 1, dtype=torch.int64, device=self.model.device))
        entries.check(self.model, probe.cache)
        entry = sum(x.numel() * x.element_size() for kv in entries.keys_values(probe.cache) for x in kv)
        rest, policy = probe.nbytes() - entry, self.policy
        least = policy.period + max(policy.sinks + policy.recent, 1)
        capacity = (policy.budget // policy.caches - rest) // entry
        require(
            capacity >= least,
            f"policy: budget={policy.budget} bytes hold {max(capacity, 0)} entries; period, sinks and recent take "
            f"{least}, so set at least budget={policy.caches * (rest + least * entry)}",
        )
        return capacity

    def _next(self) -> int:
        present = self._entries()
        fits = (self.tokens + self.capacity - present) // self.policy.period * self.policy.period - self.tokens
        if fits == 0:
            self._evict(self.capacity - self.policy.period)
            fits = self.policy.period
        return min(fits, super()._next())

    def _entries(self) -> int:
        return self.held["places"]["0"].shape[1] if self.held else 0

    def _read(self, ids_BT: Tensor, keep: int, **words: Any) -> Tensor:
        policy, first, length = self.policy, self.tokens, ids_BT.shape[1]
        places_T = torch.arange(first, first + length, device=ids_BT.device)
        with queries.watched(self.model) if policy.queries else nullcontext({}) as q:
            logits_BSV = super()._read(ids_BT, length if policy.predicts else keep, **words, **self._positions(ids_BT))
        self.held = self._after(ids_BT, places_T, logits_BSV, q)
        return logits_BSV[:, -keep:]

    def _after(self, ids_BT: Tensor, places_T: Tensor, logits_BTV: Tensor, q: dict[int, Tensor]) -> State:
        """``held`` after these tokens."""
        held, last, logp_BTV = self.held, {}, None
        if self.policy.predicts:
            after_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).log_softmax(-1)
            before = held["last"] if held else {"logp": torch.zeros_like(after_BTV[:, 0]), "id": ids_BT[:, 0] * 0 - 1}
            logp_BTV = torch.cat([before["logp"][:, None], after_BTV[:, :-1]], 1)
            last = {"logp": after_BTV[:, -1], "id": ids_BT[:, -1]}
            before_BT = torch.cat([before["id"][:, None], ids_BT[:, :-1]], 1)
        else:
            before_BT = ids_BT
        marks_BT = self.policy.mark(Arrivals(ids_BT, before_BT, places_T, logp_BTV))
        layers = range(len(entries.keys_values(self.cache)))
        new = {"places": numbered(places_T.expand(ids_BT.shape) for _ in layers)}
        if marks_BT is not None:
            new["marks"] = numbered(marks_BT for _ in layers)
        if q:
            new["queries"] = numbered(q[i] for i in layers)
        if held:
            new = mapped(lambda x, past: torch.cat([past, x], 1), new, held)
        if q:
            new["queries"] = mapped(lambda x: x[:, -self.policy.queries :], new["queries"])
        return {**new, "last": last} if last else new

    def _evict(self, kept: int) -> None:
        held, indices, now = self.held, [], self.tokens
        asked = {} if self.prompt_BP is None else self._prompted(self.prompt_BP)
        for i, (k_BSGK, v_BSGK) in enumerate(entries.keys_values(self.cache)):
            places_BS, marks_BS, q_BQHK = (held.get(key, {}).get(str(i)) for key in ("places", "marks", "queries"))
            if asked:
                q_BQHK, now = asked[i], self.tokens + asked[i].shape[1]
            score_BS = self.policy.score(Entries(k_BSGK, v_BSGK, places_BS, marks_BS, q_BQHK, now))
            always_BS = (places_BS < self.policy.sinks) | (places_BS >= self.tokens - self.policy.recent)
            score_BS = _rounded(score_BS).masked_fill(always_BS, torch.inf)
            indices.append(score_BS.argsort(dim=1, stable=True)[:, -kept:].sort(1).values)
        entries.keep(self.cache, indices)
        of_layers = numbered(indices)
        chosen = {
            key: mapped(lambda x, index: x.gather(1, index), held[key], of_layers)
            for key in ("places", "marks")
            if key in held
        }
        self.held = {**held, **chosen}

    def _prompted(self, prompt_BP: Tensor) -> dict[int, Tensor]:
        """The queries of a prompt that follows what was read."""
        reader = Reader.fork(self)
        with queries.watched(self.model) as found:
            Reader._read(reader, prompt_BP, 1, **self._positions(prompt_BP))
        return found

    def _positions(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """The places of the next tokens, for models that count the entries of their cache."""
        places_T = torch.arange(self.tokens, self.tokens + ids_BT.shape[1], device=ids_BT.device)
        return {"position_ids": places_T.expand(ids_BT.shape)} if self._places else {}

    def fork(self, rows: Tensor | None = None, question_BT: Tensor | None = None) -> Self:
        other = super().fork(rows)
        if rows is not None:
            if self.prompt_BP is not None:
                other.prompt_BP = self.prompt_BP.index_select(0, rows)
            other.held = mapped(lambda x: x.index_select(0, rows.to(x.device)), self.held)
        return other


def _rounded(score_BS: Tensor) -> Tensor:
    """Equal tokens may have equal scores but for rounding errors, which depend on the division into calls. Without
    these errors, such entries rank by their place.
    """
    mantissa, exponent = score_BS.double().frexp()
    return (mantissa * 2**14).round().ldexp(exponent)
