"""Recall tasks at the trained length and beyond."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from memlm.data import Batch, RecallSource, RecallTask, Source
from memlm.evaluation import plots
from memlm.evaluation.data import Examined
from memlm.evaluation.figures import Figure, Records, Topic, identity, scored
from memlm.evaluation.measures import LONGEST, Measure, Models, Table, check_counts, check_range, plain
from memlm.evaluation.report import Report
from memlm.evaluation.statistics import wilson
from memlm.evaluation.subject import Subject
from memlm.reader import bytes_after
from memlm.settings import require
from memlm.training.objective import Score, score

# Tokens of a forward: enough to keep the processor busy, few enough for small memories.
_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy of one task at one length: by token, and by row with every answer right.

    chance, set_guesser: accuracies by token without reading, and without binding values to keys
    low, high: the 95 % interval of ``accuracy``; its n is rows, as the answers of a row are not independent
    bytes: of the state of a row; None if unknown
    """

    task: str
    factor: int
    length: int
    rows: int
    chance: float
    set_guesser: float
    accuracy: float
    low: float
    high: float
    row_accuracy: float
    bytes: int | None = None


def recall(
    model: PreTrainedModel,
    name: str,
    task: RecallTask,
    seed: int,
    factors: Sequence[int],
    rows: int,
    records: list[dict[str, Any]] | None = None,
) -> list[TaskAccuracy]:
    """The task at ``factor`` times its length and gap, on test rows with full filler noise.

    records: gets one for each factor, as in ``score_task``
    """
    results = []
    for factor in factors:
        scaled = task.scaled(factor)
        s, of_rows = score_task(model, scaled, seed, rows)
        floors, interval = (scaled.chance, scaled.set_guesser), wilson(s.accuracy, rows)
        sizes = (name, factor, scaled.length, rows)
        results.append(TaskAccuracy(*sizes, *floors, s.accuracy, *interval, s.row_accuracy))
        if records is not None:
            records.append({"task": name, "factor": factor, **of_rows})
    return results


def score_task(
    model: PreTrainedModel, task: RecallTask, seed: int, rows: int, first: int = 0
) -> tuple[Score, dict[str, list]]:
    """The score of ``rows`` test rows, from number ``first`` on; and of each row its identity, its tokens asked for,
    and how many are right.
    """
    size, texts = max(1, min(rows, _TOKENS_AT_ONCE // task.length)), list[str]()

    def batches() -> Iterator[Batch]:
        for start in range(0, rows, size):
            numbers = range(start, min(start + size, rows))
            of_batch = [task.sample(seed, "test", first + i, 1.0) for i in numbers]
            texts.extend(identity(*row) for row in of_batch)
            yield Batch.from_rows(of_batch, numbers)

    sizes, names = torch.ones(model.config.vocab_size, dtype=torch.long), [str(i) for i in range(rows)]
    scores = score(model, batches(), names, sizes, model.device).values()
    of_rows = {"texts": texts, "right": [s.correct for s in scores], "asked": [s.tokens for s in scores]}
    return sum(scores, Score()), of_rows


@dataclass(frozen=True)
class Recall(Measure):
    """factors: multiples of the training length; [] for no recall
    recall_rows: test rows for each length
    """

    name = "recall"
    whole = False
    factors: list
    recall_rows: int

    def __post_init__(self) -> None:
        check_range(self, recall_rows=1)
        check_counts(self, "factors")

    def measures(self, source: Source) -> bool:
        return bool(self.factors) and isinstance(source, RecallSource)

    def check(self, sources: Mapping[str, Source]) -> None:
        require(
            self.tokens(sources) <= LONGEST,
            f"eval.factors={self.factors} times data.seq_len is more than {LONGEST} tokens; lower one",
        )

    def tokens(self, sources: Mapping[str, Source]) -> int:
        lengths = [source.task.length for source in sources.values() if isinstance(source, RecallSource)]
        return max(self.factors, default=0) * max(lengths, default=0)

    def cost(self, sources: Mapping[str, Source]) -> int:
        lengths = [source.task.length for source in sources.values() if isinstance(source, RecallSource)]
        return sum(self.factors) * sum(lengths) * self.recall_rows

    def run(self, one: Examined, examined: Sequence[Examined]) -> list[dict] | None:
        return one.parts.measure(self.name, self, partial(self._measured, one), self.cost(one.sources))

    def _measured(self, one: Examined, records: list[dict[str, Any]]) -> list[dict]:
        model, found = one.subject.model, list[TaskAccuracy]()
        for name, s in one.sources.items():
            if isinstance(s, RecallSource):
                found += recall(model, name, s.task, s.seed, self.factors, self.recall_rows, records)
        sizes = {length: bytes_after(model, length) for length in {cell.length for cell in found}}
        return plain(replace(cell, bytes=sizes[cell.length]) for cell in found)

    def table(self, models: Models) -> Table:
        first = next(iter(models.values()))["recall"]
        header = [
            "tokens recalled (95 % interval), whole rows",
            *(f"{f}x length" for f in dict.fromkeys(r["factor"] for r in first)),
        ]
        rows = []
        for name, measured in models.items():
            for task in dict.fromkeys(r["task"] for r in measured["recall"]):
                mine = [r for r in measured["recall"] if r["task"] == task]
                cells = [
                    f"{r['accuracy']:.3f} ({r['low']:.3f} to {r['high']:.3f}), {r['row_accuracy']:.2f}" for r in mine
                ]
                rows.append([f"{name}, {task}", *cells])
        for task in dict.fromkeys(r["task"] for r in first):
            for floor in ("chance", "set_guesser"):
                cells = [f"{r[floor]:.3f}" for r in first if r["task"] == task]
                rows.append([f"{floor.replace('_', ' ')}, {task}", *cells])
        return header, rows

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        of_rows = records(self.name)
        for task in dict.fromkeys(cell["task"] for cell in found):
            mine = {f"{cell['factor']}x": cell for cell in found if cell["task"] == task}
            floors = {
                floor.replace("_", " "): {length: cell[floor] for length, cell in mine.items()}
                for floor in ("chance", "set_guesser")
            }
            about_task = {"recall_rows": self.recall_rows, **about["sources"].get(task, {})}
            words = ("tokens recalled", "training length")
            topic = Topic(f"recall-{task}", f"Recall: {task}", *words, floors=floors, settings=about_task)
            for length, cell in mine.items():
                mean = (cell["accuracy"], cell["low"], cell["high"])
                units = scored(of_rows, {"task": task, "factor": cell["factor"]}, "right", "asked")
                yield Figure(topic, None, length, *mean, cell["rows"], units, cell.get("bytes"))

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("Recall at the trained length and beyond")
        report.table(*self.table(models))
        recalls: dict[str, Any] = {name: m["recall"] for name, m in models.items()}
        report.picture("recall", plots.accuracy_by_length(recalls), "recall accuracy by length")
        rows = models[first.name]["recall"][0]["rows"]
        report.note(
            f"{rows} test rows a point; whole rows: every answer of the row right. Intervals count rows. The set "
            "guesser has all values of a row without their keys: a score below it shows no binding."
        )
