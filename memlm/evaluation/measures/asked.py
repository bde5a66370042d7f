"""Tasks of ``memlm.evaluation.tasks``: a model reads texts and is asked about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel

from memlm.data import Source
from memlm.evaluation import plots
from memlm.evaluation.data import Examined
from memlm.evaluation.events import Record, run
from memlm.evaluation.measures import LONGEST, Measure, Models, Table, check_counts, check_range
from memlm.evaluation.report import Report
from memlm.evaluation.statistics import wilson
from memlm.evaluation.subject import Subject
from memlm.evaluation.tasks import Setting, Task, tasks
from memlm.hub.causal import new_memory
from memlm.reader import Reader
from memlm.settings import require


@dataclass(frozen=True)
class Asked(Measure):
    """ask: tasks by name, each with its own settings; {} for none
    lengths: tokens of the texts
    rows: texts of each length
    """

    name = "asked"
    nothing = {}  # noqa: RUF012
    ask: dict = field(default_factory=dict)
    lengths: list = field(default_factory=lambda: [256])
    rows: int = 32

    def __post_init__(self) -> None:
        check_range(self, rows=1)
        check_counts(self, "lengths")
        require(max(self.lengths, default=0) <= LONGEST, f"lengths={self.lengths} must be at most {LONGEST}")
        _ = self.tasks

    @cached_property
    def tasks(self) -> list[Task]:
        return tasks(self.ask, self.lengths, self.rows)

    def applies(self, sources: Mapping[str, Source]) -> bool:
        return bool(self.ask)

    def measures(self, source: Source) -> bool:
        return False

    def check_model(self, model: PreTrainedModel) -> None:
        new_memory(model)

    def tokens(self, sources: Mapping[str, Source]) -> int:
        return max((n for task in self.tasks for n in task.lengths), default=0)

    def run(self, one: Examined, examined: Sequence[Examined]) -> dict[str, Any]:
        setting = Setting(one.tokenizer, one.seed)
        for task in self.tasks:
            task.check(setting)
        model = one.subject.model
        return {task.name: cells(task, list(run(lambda: Reader(model), task.streams(setting)))) for task in self.tasks}

    def table(self, models: Models) -> Table:
        first = next(iter(models.values()))[self.name]
        across = list(dict.fromkeys(cell["across"] for found in first.values() for cell in found))
        rows = []
        for task in self.tasks:
            for name, measured in models.items():
                for down, found in groupby(measured[self.name][task.name], key=lambda cell: cell["down"]):
                    of_column = {cell["across"]: told(cell) for cell in found}
                    label = ", ".join(str(x) for x in (task.name, name, down) if x is not None)
                    rows.append([label, *(of_column.get(x, "") for x in across)])
            for floor, value in task.floors().items():
                rows.append([f"{task.name}, {floor}", *[f"{value:.3f}"] * len(across)])
        return [f"share right (95 % interval), by {self.tasks[0].across}", *map(str, across)], rows

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("Asked about what was read")
        report.table(*self.table(models))
        for task in self.tasks:
            found = {name: measured[self.name][task.name] for name, measured in models.items()}
            report.picture(f"asked-{task.name}", plots.asked(task, found), f"{task.title}: share right")
            cell = next(iter(found.values()))[0]
            report.note(f"{task.title}: {task.note} {cell['texts']} texts, {cell['questions']} questions a point.")


def cells(task: Task, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Means over the records of each cell of the task's table.

    The questions of one text are not independent, so the interval counts texts, not questions.
    """
    found = []
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record.get(task.down or ""), record[task.across]), []).append(record)
    for (down, across), group in groups.items():
        texts = len({record["stream"] for record in group})
        correct, exact, seconds = (sum(r[key] for r in group) / len(group) for key in ("correct", "exact", "seconds"))
        nats = [r["nats"] for r in group if r["nats"] is not None]
        low, high = wilson(correct, texts)
        found.append(
            {
                **{"down": down, "across": across, "texts": texts, "questions": len(group)},
                **{"correct": correct, "low": low, "high": high, "exact": exact},
                **{"nats": sum(nats) / len(nats) if nats else None, "seconds": seconds},
                **{"bytes": max(r["bytes"] for r in group), "read": max(r["read"] for r in group)},
            }
        )
    return found


def told(cell: Mapping[str, Any]) -> str:
    return f"{cell['correct']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"
