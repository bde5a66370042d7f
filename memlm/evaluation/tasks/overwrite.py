"""Overwriting: which value of a key that was written several times does the memory give?"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memlm.evaluation.events import Ask, Read, Record, Stream
from memlm.evaluation.tasks import Setting, Task, View
from memlm.evaluation.tasks.invented import NAMES, VALUES_OF, noise
from memlm.evaluation.tasks.symbols import signs
from memlm.settings import named, require


@dataclass(frozen=True, kw_only=True)
class _Rewritten(Task):
    """rewrites: how often the key is written again
    others: further keys, each written once
    """

    rewrites: list = field(default_factory=lambda: [0, 1, 2, 4, 8])
    others: int = 4

    def views(self) -> Sequence[View]:
        won = View("rewrites", self.down, ("latest", "stale", "other"), "share of answers", name="won")
        return [View("rewrites", self.down, floors=self.floors()), won]

    def reduce(self, records: Iterable[Record]) -> Iterable[Record]:
        for record in records:
            won = dict.fromkeys(("latest", "stale", "other"), 0.0)
            for kind, share in zip(record["kinds"], record["shares"], strict=True):
                won[kind] += share
            yield {**record, **won}

    def _check(self, most: int) -> None:
        """most: values beside the first one"""
        require(self.others >= 0, f"others={self.others} must be at least 0")
        fit = self.rewrites and all(type(n) is int and 0 <= n <= most - self.others for n in self.rewrites)
        require(bool(fit), f"rewrites={self.rewrites} must be whole numbers in 0..{most - self.others}")


@dataclass(frozen=True, kw_only=True)
class Overwrite(_Rewritten):
    """gap: tokens after the latest write, so that its distance is the same for all numbers of rewrites
    num_keys, num_values: symbols to choose from

    Half of the other keys are written after the latest write, so the last value of the text is not the answer.
    """

    name = "overwrite"
    title = "A key is written again"
    note = (
        "A key and its value are written, then the key with other values, among noise and other keys. The key "
        "is asked last; all values are candidates. Stale is an earlier value of the key."
    )
    down = "length"
    gap: int = 40
    num_keys: int = 32
    num_values: int = 32

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            signs(setting, self.num_keys, self.num_values)
            self._check(self.num_values - 1)
            require(self.others < self.num_keys, f"others={self.others} must be below num_keys={self.num_keys}")
            room = 2 * self._behind
            require(self.gap >= room, f"gap={self.gap} must be at least {room}, for half of others={self.others}")
            least = 2 * (1 + max(self.rewrites) + self.others - self._behind) + self.gap
            require(min(self.lengths) >= least, f"lengths={self.lengths} must be at least {least}; lower gap")

    @property
    def _behind(self) -> int:
        """Other keys after the latest write."""
        return (self.others + 1) // 2

    def cost(self) -> int:
        return sum(self.lengths) * self.rows * len(self.rewrites)

    def floors(self) -> dict[str, Any]:
        return {
            "chance": 1 / self.num_values,
            "knows the values seen": {n: 1 / (1 + n + self.others) for n in self.rewrites},
            "knows the key's values, not their order": {n: 1 / (1 + n) for n in self.rewrites},
        }

    def streams(self, setting: Setting) -> Iterator[Stream]:
        chosen = signs(setting, self.num_keys, self.num_values)
        for length in self.lengths:
            for n in self.rewrites:
                for row in range(self.rows):
                    rng = setting.rng(self.name, length, n, row)
                    keys, values = rng.permutation(chosen.keys), rng.permutation(chosen.values)
                    ids = chosen.filler(rng, length)
                    last = length - self.gap - 2
                    # The key's writes first; the latest has a fixed place.
                    written = np.concatenate([np.repeat(keys[0], n + 1), keys[1 : self.others + 1]])
                    before = last - 2 - 2 * rng.permutation(last // 2)[: n + self.others - self._behind]
                    behind = last + 2 + 2 * rng.permutation(self.gap // 2)[: self._behind]
                    places = np.concatenate([np.sort(before[:n]), [last], before[n:], behind])
                    ids[places], ids[places + 1] = written, values[: len(written)]
                    answers = [values[i : i + 1] for i in (*range(n, -1, -1), *range(n + 1, len(values)))]
                    kinds = ["latest", *["stale"] * n, *["other"] * (len(values) - n - 1)]
                    tag = {"length": length, "rewrites": n, "kinds": kinds}
                    yield [Read(ids), Ask(keys[:1], answers, tag)]


@dataclass(frozen=True, kw_only=True)
class OverwriteText(_Rewritten):
    """sentences: of noise, between the others; lengths play no part"""

    name = "overwrite_text"
    title = "A fact changes"
    note = (
        "A sentence gives a fact and later ones change it, among other sentences. The present fact is asked, and the "
        "first one, with all values of the kind as candidates. Stale is an earlier value, and right for the first."
    )
    down = "asked"
    rewrites: list = field(default_factory=lambda: [0, 1, 2, 4, 6])
    others: int = 3
    sentences: int = 8

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            require(self.others < len(NAMES), f"others={self.others} must be below {len(NAMES)}")
            require(self.sentences >= 0, f"sentences={self.sentences} must be at least 0")
            self._check(len(VALUES_OF["town"]) - 1)

    def tokens(self) -> int:
        # A sentence has less than 40 bytes.
        return 40 * (max(self.rewrites, default=0) + 2 + self.others + self.sentences)

    def cost(self) -> int:
        return self.tokens() * self.rows * len(self.rewrites)

    def floors(self) -> dict[str, Any]:
        return {
            "chance": 1 / len(VALUES_OF["town"]),
            "knows the values seen": {n: 1 / (1 + n + self.others) for n in self.rewrites},
            "knows the fact's values, not their order": {n: 1 / (1 + n) for n in self.rewrites},
        }

    def streams(self, setting: Setting) -> Iterator[Stream]:
        for n in self.rewrites:
            for row in range(self.rows):
                rng = setting.rng(self.name, n, row)
                who, *others = rng.permutation(NAMES)[: 1 + self.others]
                values = rng.permutation(VALUES_OF["town"])
                first, now = f"At first, the town of {who} was", f"Now the town of {who} is"
                told = [f"{first} {values[0]}.", *(f"{now} {value}." for value in values[1 : n + 1])]
                # Others are told in both forms, so that a form without its name does not tell the answer.
                forms = ("At first, the town of {} was {}.", "Now the town of {} is {}.")
                rest = [forms[i % 2].format(other, values[n + 1 + i]) for i, other in enumerate(others)]
                rest += [noise(rng) for _ in range(self.sentences)]
                # The latest fact has the same place for all numbers of rewrites: a fourth of the rest follows it.
                *before, last = told
                early, late = rest[len(rest) // 4 :], rest[: len(rest) // 4]
                places = np.sort(rng.integers(len(early) + 1, size=n))
                for sentence, place in zip(before[::-1], places[::-1], strict=True):
                    early.insert(place, sentence)
                lines = setting.pieces([f"{sentence}\n" for sentence in (*early, last, *late)])
                text = Read(np.concatenate([setting.start, *lines]))
                yield [text, *(self._ask(setting, *q, values, n) for q in (("now", now, n), ("first", first, 0)))]

    def _ask(self, setting: Setting, asked: str, question: str, right: int, values: Sequence[str], n: int) -> Ask:
        order = [right, *(i for i in range(len(values)) if i != right)]
        kinds = ["latest" if i == n else "stale" if i < n else "other" for i in order]
        tag = {"rewrites": n, "asked": asked, "kinds": kinds}
        ids, *answers = setting.pieces([question, *(f" {values[i]}" for i in order)])
        return Ask(ids, answers, tag)
