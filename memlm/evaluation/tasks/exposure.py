"""Recognition, recall and retention of sentences, held by the state or learnt by the weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from memlm.evaluation.events import Ask, Event, Learn, Read, Record, Stream
from memlm.evaluation.tasks import Setting, Task, View
from memlm.evaluation.tasks.invented import clauses
from memlm.settings import named, require

BY = ("state", "weights")


@dataclass(frozen=True, kw_only=True)
class Exposure(Task):
    """exposures: how often an item is read, or learnt; 0 is the control
    others: numbers of other items after it at which is asked; lengths play no part
    by: the stores of the item: state, a reading; weights, a step of AdamW on a copy of them, with an empty memory
    rate: the step's learning rate
    """

    name = "exposure"
    title = "Sentences that were seen before"
    note = (
        "A sentence of two clauses is read, or learnt by a step on the weights, and so are others after it. "
        "Recognition: it is likelier than itself with another second clause. Recall: the first clause is continued "
        "by the second, greedily and without an error. With 0 exposures it was never seen."
    )
    exposures: list = field(default_factory=lambda: [0, 1, 2, 3])
    others: list = field(default_factory=lambda: [0, 1, 4, 16])
    by: list = field(default_factory=lambda: [*BY])
    rate: float = 1e-3

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            for name in ("exposures", "others"):
                given = getattr(self, name)
                fit = given and all(type(n) is int and n >= 0 for n in given) and sorted({*given}) == given
                require(bool(fit), f"{name}={given} must be rising whole numbers from 0 on")
            require(bool(self.by) and {*self.by} <= {*BY}, f"by={self.by} must be a list of {' and '.join(BY)}")
            require(self.rate > 0, f"rate={self.rate} must be above 0")

    def tokens(self) -> int:
        # Two clauses have less than 80 bytes.
        return 80 * (max(self.exposures, default=0) + max(self.others, default=0) + 1)

    def cost(self) -> int:
        asked = 80 * 3 * len(self.others)
        return self.rows * len(self.by) * len(self.exposures) * (self.tokens() + asked)

    def views(self) -> Sequence[View]:
        seen = {n: 1 / (1 + n) for n in self.others}
        recall = {"knows all second clauses": 1 / 640, "has those that were read": seen}
        floors: dict[str, dict] = {"recognition": {"chance": 0.5}, "recall": recall}
        return [View("other items", "seen", (name,), f"share, {name}", True, of, name) for name, of in floors.items()]

    def reduce(self, records: Iterable[Record]) -> Iterable[Record]:
        for record in records:
            right = record["correct"] if record["test"] == "recognition" else float(record["exact"])
            yield {**record, "correct": right, record["test"]: right}

    def streams(self, setting: Setting) -> Iterator[Stream]:
        front = np.concatenate([setting.start, setting.encode("\n")])
        for by in self.by:
            for exposures in self.exposures:
                for row in range(self.rows):
                    # The same items whatever holds them. Two rows exchange item and foil, so the control's share is
                    # one half; the two are not independent.
                    rng = setting.rng(self.name, row // 2)
                    (first, one), (_, other) = clauses(rng), clauses(rng)
                    while other == one:
                        _, other = clauses(rng)
                    first, second, foil = setting.pieces([first, other, one] if row % 2 else [first, one, other])
                    item = np.concatenate([front, first, second])
                    stream: list[Event] = [self._see(by, item)] * exposures
                    for before, others in zip([0, *self.others], self.others, strict=False):
                        for _ in range(others - before):
                            stream.append(self._see(by, np.concatenate([front, *setting.pieces(clauses(rng))])))
                        tag = {"other items": others, "by": by, "seen": f"{exposures} by {by}", "unit": row // 2}
                        both = [item[len(front) :], np.concatenate([first, foil])]
                        stream.append(Ask(front, both, {**tag, "test": "recognition"}))
                        stream.append(Ask(item[: -len(second)], [second], {**tag, "test": "recall"}))
                    yield stream

    def _see(self, by: str, ids: np.ndarray) -> Event:
        return Read(ids) if by == "state" else Learn(ids, self.rate)
