"""The same facts in several stores: read into the memory, learnt by steps, edited into weights, or in a bank."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from memlm.evaluation.events import Ask, Edit, Event, Learn, Read, Record, Shelve, Stream
from memlm.evaluation.tasks import Setting, Task, View
from memlm.evaluation.tasks.symbols import Signs, signs
from memlm.settings import named, require

BY = ("nothing", "memory", "steps", "edit", "bank")


@dataclass(frozen=True, kw_only=True)
class Stores(Task):
    """facts: facts that are written, each a key and a value; lengths play no part
    rewritten: facts among them that are written again later, with another value
    fresh: pairs that are read afterwards in any case
    gap: tokens of noise that are read between the writing and the second round of questions
    by: the stores. memory: one text of all facts is read. steps: a step of AdamW on a copy of the weights for each
        fact. edit: one edit of such a copy by all facts (``memlm.editing``). bank: a document for each fact, in a bank
        of Memory Sparse Attention; noise and later pairs are then documents too, and questions those of data=facts.
        nothing: the control
    rate, edit_rate: of a step of AdamW, and of the edit
    num_keys, num_values: symbols to choose from
    """

    name = "stores"
    title = "The same facts in several stores"
    note = (
        "Facts, each a key and a value, are written into one store. A key is asked at once, after noise, and after "
        "some facts were written again, when the latest value is right; all values are candidates. Then pairs are "
        "read and asked: a store that damages this ability is worse than nothing."
    )
    facts: int = 64
    rewritten: int = 16
    fresh: int = 8
    gap: int = 256
    by: list = field(default_factory=lambda: ["nothing", "memory", "steps", "edit"])
    rate: float = 3e-3
    edit_rate: float = 3e-2
    num_keys: int = 96
    num_values: int = 32

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            signs(setting, self.num_keys, self.num_values)
            known = bool(self.by) and {*self.by} <= {*BY}
            require(known, f"by={self.by} must be a list of {', '.join(BY)}")
            for name in ("facts", "fresh"):
                require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
            most = self.num_keys - self.fresh
            require(self.facts <= most, f"facts={self.facts} must be at most num_keys - fresh = {most}")
            fits = 0 <= self.rewritten < self.facts
            require(fits, f"rewritten={self.rewritten} must be at least 0 and below facts={self.facts}")
            require(self.gap >= 0, f"gap={self.gap} must be at least 0")
            for name in ("rate", "edit_rate"):
                require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")

    def tokens(self) -> int:
        return 2 * (self.facts + self.rewritten + self.fresh) + self.gap

    def cost(self) -> int:
        return self.rows * len(self.by) * (self.tokens() + 3 * self.facts + self.fresh)

    def views(self) -> Sequence[View]:
        floors = {"chance": 1 / self.num_values}
        return [
            View("asked", "store", floors=floors),
            View("place of the fact", "store", floors=floors, name="age"),
            View("asked", "store", ("stale",), "share of answers that are the earlier value", name="stale"),
            View("asked", "store", ("kilobytes",), "KB that the store takes", share=False, name="bytes"),
        ]

    def reduce(self, records: Iterable[Record]) -> Iterable[Record]:
        for record in records:
            found = {**record, "kilobytes": record["bytes"] / 1024}
            if "earlier" in record:
                found["stale"] = record["shares"][record["earlier"]]
            yield found

    def streams(self, setting: Setting) -> Iterator[Stream]:
        known = signs(setting, self.num_keys, self.num_values)
        for by in self.by:
            for row in range(self.rows):
                yield [*self._stream(by, setting.rng(self.name, row), known, setting)]

    def _stream(self, by: str, rng: np.random.Generator, known: Signs, setting: Setting) -> Iterator[Event]:
        keys = rng.permutation(known.keys)[: self.facts + self.fresh]
        value = rng.integers(self.num_values, size=len(keys))
        facts, fresh = np.arange(self.facts), np.arange(self.facts, len(keys))
        again = rng.permutation(facts)[: self.rewritten]

        def ask(asked: str, numbers: np.ndarray, earlier: np.ndarray | None = None) -> Iterator[Event]:
            for i in numbers:
                others = np.delete(np.arange(self.num_values), value[i])
                answers = known.values[[value[i], *others], None]
                tag = {"store": by, "asked": asked}
                if asked == "at once":
                    quarter = 4 * i // self.facts
                    tag["place of the fact"] = f"{('first', 'second', 'third', 'last')[quarter]} quarter"
                if earlier is not None:
                    tag["earlier"] = 1 + int(np.flatnonzero(others == earlier[i])[0])
                question = [known.ask, keys[i]] if by == "bank" else [keys[i]]
                yield Ask(np.array(question), answers, tag)

        yield from self._written(by, keys[facts], known.values[value[facts]])
        yield from ask("at once", facts)
        noise = known.filler(rng, self.gap)
        # A bank's question comes to an empty memory, so all that is read is filed.
        pieces = noise[: self.gap // 2 * 2].reshape(-1, 2)
        yield Shelve(pieces, [f"noise {i}" for i in range(len(pieces))]) if by == "bank" else Read(noise)
        yield from ask("after noise", facts)
        if self.rewritten:
            before = value.copy()
            value[again] = (before[again] + rng.integers(1, self.num_values, size=len(again))) % self.num_values
            yield from self._written(by, keys[again], known.values[value[again]])
            yield from ask("written again", again, before)
            yield from ask("the others then", np.setdiff1d(facts, again))
        yield from self._written("bank" if by == "bank" else "memory", keys[fresh], known.values[value[fresh]])
        yield from ask("pairs read then", fresh)

    def _written(self, by: str, keys: np.ndarray, values: np.ndarray) -> Iterator[Event]:
        pairs = np.stack([keys, values], 1)
        if by == "memory":
            yield Read(pairs.ravel())
        elif by == "steps":
            yield from (Learn(pair, self.rate) for pair in pairs)
        elif by == "edit":
            yield Edit(pairs, 1, self.edit_rate)
        elif by == "bank":
            yield Shelve(pairs, [str(key) for key in keys])
