"""The policies: each scores the entries of a cache, and the largest scores stay.

B streams, T tokens of a call, S entries of a layer, H query heads, G key heads, K head dim, Q queries, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.settings import build_config, require, suggest


class Arrivals(NamedTuple):
    """Tokens that are read.

    ids_BT, before_BT: their ids, and those of the tokens before them, -1 for none
    places_T: their numbers in the text, from 0
    logp_BTV: log-probabilities that the model gave to their places; None unless the policy ``predicts``
    """

    ids_BT: Tensor
    before_BT: Tensor
    places_T: Tensor
    logp_BTV: Tensor | None


class Entries(NamedTuple):
    """The entries of a layer, in the text's order.

    k_BSGK, v_BSGK: keys as the model stores them, and values
    places_BS: the numbers of their tokens in the text
    marks_BS: the policy's marks of their tokens, if it makes any
    q_BQHK: the last queries, or those of a prompt, as they meet the keys, with the scale of the scores; None unless
        the policy asks for them
    now: the number of the token after the queries
    """

    k_BSGK: Tensor
    v_BSGK: Tensor
    places_BS: Tensor
    marks_BS: Tensor | None
    q_BQHK: Tensor | None
    now: int


@dataclass(frozen=True, kw_only=True)
class Policy:
    """kind: its name in ``eval.policy``
    budget: bytes of a stream's state, which are never exceeded between calls
    period: the text is read in blocks that end at multiples of ``period`` tokens; entries go before a block that would
        not fit
    sinks, recent: the first and the last tokens of the text, whose entries always stay

    predicts: whether it needs the model's predictions; queries: the number of last queries that it needs; caches: of a
        stream, which share the budget
    """

    kind: ClassVar[str]
    predicts: ClassVar[bool] = False
    queries: ClassVar[int] = 0
    caches: ClassVar[int] = 1
    budget: int
    period: int = 16
    sinks: int = 4
    recent: int = 0

    def __post_init__(self) -> None:
        for name, least in {"budget": 1, "period": 1, "sinks": 0, "recent": 0}.items():
            value = getattr(self, name)
            require(value >= least, f"{name}={value} must be at least {least}")

    def mark(self, tokens: Arrivals) -> Tensor | None:
        """Marks [B, T] of tokens, which their entries carry."""
        return None

    def score(self, entries: Entries) -> Tensor:
        """[B, S]; among equal scores, the later entries stay."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """All that distinguishes it, in words."""
        return f"{self.words([f.name for f in fields(Policy)])}, {self.budget:,} bytes"

    def words(self, names: Collection[str] = ()) -> str:
        """Its kind, its own settings other than the defaults, and those of all kinds that are named."""
        shown = {f.name for f in fields(self)} - {f.name for f in fields(Policy)} | {*names} - {"budget"}
        others = [f for f in fields(self) if f.name in shown and getattr(self, f.name) != f.default]
        return " ".join([self.kind, *(f"{f.name}={getattr(self, f.name)}" for f in others)])


@dataclass(frozen=True, kw_only=True)
class Recent(Policy):
    """The last tokens, behind the first ones (StreamingLLM; its positions are the original ones here)."""

    kind: ClassVar[str] = "recent"

    def score(self, entries: Entries) -> Tensor:
        return entries.places_BS.double()


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """A draw for each token, by its place and its id: the control of every other policy."""

    kind: ClassVar[str] = "random"
    seed: int = 0

    def mark(self, tokens: Arrivals) -> Tensor:
        x_BT = tokens.ids_BT.long() + 1
        for x in (tokens.places_T + 1, torch.full_like(tokens.places_T, self.seed + 1)):
            # Products modulo 2 ** 64; the shift brings the upper bits down.
            x_BT = (x_BT ^ (x_BT >> 29)) * 0x2545F4914F6CDD1D + x * 0x1B873593CC9E2D51
        x_BT = (x_BT ^ (x_BT >> 29)) * 0x2545F4914F6CDD1D
        return (x_BT >> 20 & 0xFFFFFF).double()

    def score(self, entries: Entries) -> Tensor:
        assert entries.marks_BS is not None
        return entries.marks_BS


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Keys of small norm, which draw much attention; a mean over the key heads."""

    kind: ClassVar[str] = "knorm"

    def score(self, entries: Entries) -> Tensor:
        return -_exact(entries.k_BSGK).norm(dim=-1).mean(2)


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keys unlike the mean direction of all keys; a mean over the key heads."""

    kind: ClassVar[str] = "keydiff"

    def score(self, entries: Entries) -> Tensor:
        unit_BSGK = F.normalize(_exact(entries.k_BSGK), dim=-1)
        return -F.cosine_similarity(unit_BSGK, unit_BSGK.mean(1, keepdim=True), dim=-1).mean(2)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Entries to which the last tokens attend, or whose neighbours they attend to. A mean over heads and queries.

    The paper also keeps the entries of these last tokens: ``recent`` as large as ``queries``.

    queries: the last tokens; pool: entries over which the attention is max-pooled
    """

    kind: ClassVar[str] = "snapkv"
    queries: int = 64  # type: ignore[misc]
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.queries >= 1, f"queries={self.queries} must be at least 1")
        require(self.pool >= 1 and self.pool % 2 == 1, f"pool={self.pool} must be odd")

    def score(self, entries: Entries) -> Tensor:
        return F.max_pool1d(attention(entries).mean((1, 2, 3)), self.pool, 1, self.pool // 2)


@dataclass(frozen=True, kw_only=True)
class Surprisal(Policy):
    """Tokens that the model did not expect (SirLLM): -log p(x_t | x_<t).

    For models that were trained on all tokens: one that was trained on answers alone predicts no other token, and its
    surprisal then shows nothing.

    decay: a factor on the scores for each period that has passed since (the paper: for each turn)
    repeat_bug: the score of the published code, -log p(x_t = x_t-1 | x_<t), for comparison
    """

    kind: ClassVar[str] = "surprisal"
    predicts: ClassVar[bool] = True
    decay: float = 1.0
    repeat_bug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.decay <= 1, f"decay={self.decay} must lie in (0, 1]")

    def mark(self, tokens: Arrivals) -> Tensor:
        assert tokens.logp_BTV is not None
        of_BT = tokens.before_BT.clamp(min=0) if self.repeat_bug else tokens.ids_BT
        nats_BT = -tokens.logp_BTV.gather(2, of_BT[..., None])[..., 0]
        # Nothing predicts the first token.
        return nats_BT.masked_fill(tokens.places_T == 0, torch.finfo(nats_BT.dtype).max)

    def score(self, entries: Entries) -> Tensor:
        assert entries.marks_BS is not None
        passed_BS = entries.now // self.period - entries.places_BS // self.period
        return entries.marks_BS * self.decay**passed_BS


@dataclass(frozen=True, kw_only=True)
class EpiCache(Policy):
    """A cache for each episode of the text; a question chooses one (``memlm.policies.episodes``). An entry counts by
    the largest attention of its episode's prompt. All caches share the budget; the paper counts one alone.

    caches: episodes; window: tokens of the pieces of the text that are clustered; nearest: the windows of a prompt
    """

    kind: ClassVar[str] = "epicache"
    caches: int = 4  # type: ignore[misc]
    window: int = 64
    nearest: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("caches", "window", "nearest"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")

    def score(self, entries: Entries) -> Tensor:
        return attention(entries).amax((2, 3)).mean(1)


KINDS = {kind.kind: kind for kind in (Recent, Random, KNorm, KeyDiff, SnapKV, Surprisal, EpiCache)}


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention(entries: Entries) -> Tensor:
    """The weights [B, G, H / G, Q, S] of the last queries over the entries, as far as these are not after them; 0 of a
    query whose entries have all gone.
    """
    assert entries.q_BQHK is not None
    q_BQHK, k_BSGK = _exact(entries.q_BQHK), _exact(entries.k_BSGK)
    q_BQGRK = q_BQHK.unflatten(2, (k_BSGK.shape[2], -1))
    scores = torch.einsum("bqgrk,bsgk->bgrqs", q_BQGRK, k_BSGK)
    places_Q = torch.arange(entries.now - q_BQHK.shape[1], entries.now, device=scores.device)
    after_BGRQS = (entries.places_BS[:, None] > places_Q[:, None])[:, None, None]
    return scores.masked_fill(after_BGRQS, -torch.inf).softmax(-1).masked_fill(after_BGRQS, 0.0)


def build_policies(given: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, key: str) -> list[Policy]:
    """Policies from settings; ``kind`` and ``budget`` may be lists, for all combinations. ``key`` is their place.

    ``random`` joins them at every budget, with the settings of the first one there, because it is their control.

    Raises ValueError with the key, the value and a fix.
    """
    found: list[Policy] = []
    for settings in [given] if isinstance(given, Mapping) else given or []:
        require(
            isinstance(settings, Mapping), f"{key}={settings!r:.80} must be settings, {{kind: keydiff, budget: 16384}}"
        )
        for kind, budget in product(*(_listed(settings, name, key) for name in ("kind", "budget"))):
            require(kind in KINDS, f"{key}.kind={kind!r} is unknown; {suggest(str(kind), sorted(KINDS))}")
            rest = {name: value for name, value in settings.items() if name != "kind"}
            found.append(build_config(KINDS[kind], {**rest, "budget": budget}, key))
    for first in {policy.budget: policy for policy in reversed(found)}.values():
        control = Random(budget=first.budget, period=first.period, sinks=first.sinks, recent=first.recent)
        if not any(policy.kind == Random.kind and policy.budget == first.budget for policy in found):
            found.append(control)
    return list(dict.fromkeys(found))


def _listed(settings: Mapping[str, Any], name: str, key: str) -> list[Any]:
    require(name in settings, f"{key}.{name} is missing; set it")
    value = settings[name]
    return value if isinstance(value, list) else [value]
