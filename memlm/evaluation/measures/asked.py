"""Tasks of ``memlm.evaluation.tasks``: a model reads texts and is asked about them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby, product
from typing import Any

from transformers import PreTrainedModel

from memlm.data import Source
from memlm.evaluation import plots
from memlm.evaluation.data import Examined
from memlm.evaluation.events import Record, run
from memlm.evaluation.figures import Figure, Records, Topic
from memlm.evaluation.measures import LONGEST, Measure, Models, Table, check_counts, check_range
from memlm.evaluation.report import Report
from memlm.evaluation.statistics import bootstrap, wilson
from memlm.evaluation.subject import Subject
from memlm.evaluation.tasks import Setting, Task, View, tasks
from memlm.policies import Policy, build_policies, reader_of
from memlm.reader import continues
from memlm.settings import require


@dataclass(frozen=True)
class Asked(Measure):
    """ask: tasks by name, each with its own settings; null for none
    lengths: tokens of the texts
    rows: texts of each length
    policy: key-value policies, such as {kind: [keydiff, recent], budget: [8192, 16384]}, or a list of such; the model
        reads all texts with each, and without. ``memlm.policies`` has the kinds and their settings
    """

    name = "asked"
    nothing = {}  # noqa: RUF012
    whole = False
    ask: dict | None = None
    lengths: list = field(default_factory=lambda: [256])
    rows: int = 32
    policy: dict | list | None = None

    def __post_init__(self) -> None:
        check_range(self, rows=1)
        check_counts(self, "lengths", LONGEST)
        _ = self.tasks, self.policies

    @cached_property
    def tasks(self) -> list[Task]:
        return tasks(self.ask or {}, self.lengths, self.rows)

    @cached_property
    def policies(self) -> list[Policy]:
        return build_policies(self.policy, "policy")

    def _words(self, policy: Policy | None) -> str:
        """A policy's name in the table by budget, with settings in which the policies differ."""
        if policy is None:
            return "full cache"
        settings = [asdict(other) for other in self.policies]
        differ = [name for name in ("period", "sinks", "recent") if len({s[name] for s in settings}) > 1]
        return policy.words(differ)

    def views(self, task: Task) -> list[View]:
        """The views of a task, and with policies one of their scores by budget, of all texts together."""
        own = list(task.views())
        if not self.policies:
            return own
        floors = {name: value for name, value in own[0].floors.items() if not isinstance(value, Mapping)}
        return [
            *own,
            replace(own[0], across="budget", down="policy", values=own[0].values[:1], floors=floors, name=BY_BUDGET),
        ]

    def applies(self, sources: Mapping[str, Source]) -> bool:
        return bool(self.ask)

    def measures(self, source: Source) -> bool:
        return False

    def check_model(self, model: PreTrainedModel) -> None:
        continues(model)
        for policy in self.policies:
            reader_of(model, policy)

    def tokens(self, sources: Mapping[str, Source]) -> int:
        return max((task.tokens() for task in self.tasks), default=0)

    def cost(self, sources: Mapping[str, Source]) -> int:
        return sum(task.cost() for task in self.tasks) * (1 + len(self.policies))

    def run(self, one: Examined, examined: Sequence[Examined]) -> dict[str, Any]:
        setting, model = Setting(one.tokenizer, one.seed, one.sources), one.subject.model

        def ask(task: Task, policy: Policy | None, records: list[Record]) -> dict[str, Any]:
            streams, unfit = task.fitting(setting)
            records += run(partial(reader_of, model, policy), streams)
            require(bool(records), f"eval.ask.{task.name} asks no question; one of its lists is empty")
            shown = list(task.reduce(records))
            of_views = [cell for view in task.views() for cell in cells(view, shown)]
            return {"cells": of_views + totals(task, shown), "unfit": unfit}

        found: dict[str, Any] = {}
        for task, policy in product(self.tasks, (None, *self.policies)):
            name = task.name if policy is None else f"{task.name}, {policy.label}"
            settings = task if policy is None else {"task": asdict(task), "policy": [policy.kind, asdict(policy)]}
            asked = one.parts.measure(name, settings, partial(ask, task, policy), task.cost())
            if asked is None:
                continue
            of_task = asked["cells"]
            for texts, reason in asked["unfit"].items():
                one.parts.leave_out(f"{name}, {texts}", reason)
            if self.policies:
                of_task = [{**cell, "policy": _told(policy, one.subject)} for cell in of_task]
                budget = f"{policy.budget:,} bytes" if policy else "all entries"
                about = {"policy": self._words(policy), "budget": budget}
                records = [{**record, **about} for record in task.reduce(one.parts.records[name])]
                of_task += cells(self.views(task)[-1], records)
            found.setdefault(task.name, []).extend(of_task)
        return found

    def tables(self, models: Models) -> dict[str, Table]:
        return {name: table for task in self.tasks for name, table in self._tables(task, models).items()}

    def _tables(self, task: Task, models: Models) -> dict[str, Table]:
        found = {}
        for view in self.views(task):
            if of_view := _of(models, task, view.name):
                found["-".join(filter(None, (self.name, task.name, view.name)))] = _table(task, view, of_view)
        if figures := _of(models, task, TOTALS):
            names = list(dict.fromkeys(cell["across"] for cells in figures.values() for cell in cells))
            rows = [[f"{task.name}, {name}", *map(told, cells)] for name, cells in figures.items()]
            found[f"{self.name}-{task.name}-{TOTALS}"] = [task.title, *names], rows
        return found

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        for task, policy in product(self.tasks, (None, *(policy.label for policy in self.policies))):
            of_part = records(task.name if policy is None else f"{task.name}, {policy}")
            shown = list(task.reduce([dict(record) for record in of_part]))
            cells = [cell for cell in found.get(task.name, []) if (cell.get("policy") or {}).get("label") == policy]
            # Texts are drawn by the task's settings, the seed and the tokenizer.
            texts = (repr(task), about["seed"], about["tokenizer"])
            for view in [*task.views(), View(name=TOTALS, label=task.title, across="", share=False)]:
                name = "-".join(filter(None, (task.name, view.name)))
                of_view = [cell for cell in cells if cell["view"] == view.name]
                floors = {**view.floors, **plots.guessed({"": [{**cell, "down": None} for cell in of_view]})}
                topic = Topic(name, task.title, view.label, view.across, view.share, floors, vars(task))
                units = {
                    (down, across): {(texts, text): mean for text, mean in by_text(group, value).items()}
                    for down, across, value, group in (grouped(view, shown) if view.name != TOTALS else ())
                }
                for cell in of_view:
                    down = ", ".join(filter(None, (cell["down"], policy))) or None
                    mean = (math.nan if cell[word] is None else cell[word] for word in ("value", "low", "high"))
                    of_texts = units.get((cell["down"], cell["across"]), {})
                    yield Figure(topic, down, cell["across"], *mean, cell["texts"], of_texts, cell["bytes"])

    def section(self, report: Report, models: Models, first: Subject) -> None:
        for task in self.tasks:
            measured = [of_task for m in models.values() if (of_task := m[self.name].get(task.name))]
            if not measured:
                continue
            cell = measured[0][0]
            report.heading(task.title)
            report.note(f"{task.note} {cell['texts']} texts, {cell['questions']} questions a point.")
            for table in self._tables(task, models).values():
                report.table(*table)
            for view in self.views(task):
                # One picture shows the policies: that of their scores by budget.
                if found := {name: of for name, of in _of(models, task, view.name).items() if name in models}:
                    name = "-".join(filter(None, (self.name, task.name, view.name)))
                    report.picture(name, plots.asked(task, view, found), f"{task.title}: {view.label}")
        told = (cell.get("policy") or {} for m in models.values() for of in m[self.name].values() for cell in of)
        for note in dict.fromkeys(policy["note"] for policy in told if "note" in policy):
            report.note(note)


# The names of the cells that show all records, and all records of each policy.
TOTALS, BY_BUDGET = "totals", "policies"
# Kinds of sources whose rows train a model on answers alone.
_ANSWERS = {"mqar", "passkey", "copy", "facts", "chains", "questions"}


def _told(policy: Policy | None, subject: Subject) -> dict[str, Any] | None:
    """A policy in the results, with a note where its scores say little."""
    if policy is None:
        return None
    found = {"label": policy.label, "kind": policy.kind, **asdict(policy)}
    data = subject.record.config.get("data") or {}
    kinds = {source.get("kind") for source in (data.get("sources") or {}).values()}
    if policy.predicts and kinds and kinds <= _ANSWERS:
        found["note"] = (
            f"{subject.name} was trained on answers alone, so its predictions of other tokens are untrained, and "
            f"policy {policy.kind} shows nothing; use a model of all tokens, such as one of data=mixture"
        )
    return found


def cells(view: View, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Means over the records of each cell of a view, row by row.

    Records without the view's column or values are left out. The questions of one text are not independent, so the
    interval counts texts, not questions. A cell of scores has those of the guessers, if the questions have any.
    """
    found = []
    for down, across, value, group in grouped(view, records):
        cell = {"view": view.name, "down": down, "across": across}
        found.append({**cell, **_mean(group, value, view.share), **_about(group)})
        told = [record["guesses"] for record in group if "guesses" in record]
        if told and value == "correct":
            found[-1]["guesses"] = {name: sum(x[name] for x in told) / len(told) for name in told[0]}
    return found


def grouped(view: View, records: Sequence[Record]) -> Iterator[tuple[str | None, Any, str, list[Record]]]:
    """The records of each cell of a view, row by row: its place, down and across, and the word whose mean it shows."""
    groups: dict[Any, dict[Any, list[Record]]] = {}
    # The runner returns texts of one shape together; rows and columns have the order of the texts.
    for record in sorted(records, key=lambda record: record["stream"]):
        if not all(word in record for word in (view.across, *view.values)):
            continue
        groups.setdefault(record.get(view.down or ""), {}).setdefault(record[view.across], []).append(record)
    for down, row in groups.items():
        for value in view.values:
            words = [str(x) for x in (down, value if len(view.values) > 1 else None) if x is not None]
            for across, group in row.items():
                yield ", ".join(words) if words else None, across, value, group


def by_text(group: Sequence[Record], value: str) -> dict[int, tuple[float, float]]:
    """Mean and number of the records of each text, or of texts that share a ``unit`` and are not independent."""
    texts: dict[int, list[float]] = {}
    for record in group:
        texts.setdefault(_unit(record), []).append(record[value])
    return {text: (sum(found) / len(found), len(found)) for text, found in texts.items()}


def _unit(record: Record) -> int:
    return record.get("unit", record["stream"])


def totals(task: Task, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A cell for each figure of all records together."""
    return [
        {"view": TOTALS, "down": None, "across": name, "value": value, "low": low, "high": high, **_about(records)}
        for name, (value, low, high) in task.totals(records).items()
    ]


def _mean(group: Sequence[Record], value: str, share: bool) -> dict[str, float | None]:
    """The mean and its interval; a lone text has no interval unless the value is a share."""
    mean = sum(record[value] for record in group) / len(group)
    texts, weights = zip(*by_text(group, value).values(), strict=True)
    if share:
        # Unequal numbers of questions count as fewer texts (Kish).
        low, high = wilson(mean, sum(weights) ** 2 / sum(weight**2 for weight in weights))
    elif len(texts) == 1:
        return {"value": mean, "low": None, "high": None}
    else:
        low, high = bootstrap(texts, weights, draws=1000)
    return {"value": mean, "low": low, "high": high}


def _about(group: Sequence[Record]) -> dict[str, Any]:
    correct, exact, seconds = (sum(r[key] for r in group) / len(group) for key in ("correct", "exact", "seconds"))
    nats = [r["nats"] for r in group if r["nats"] is not None]
    return {
        **{"texts": len({_unit(record) for record in group}), "questions": len(group)},
        **{"correct": correct, "exact": exact, "nats": sum(nats) / len(nats) if nats else None, "seconds": seconds},
        **{"bytes": max(r["bytes"] for r in group), "read": max(r["read"] for r in group)},
    }


def _of(models: Models, task: Task, view: str) -> dict[str, list[dict[str, Any]]]:
    """The cells of a view, by model and policy; models without any are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, measured in models.items():
        for cell in measured[Asked.name].get(task.name, []):
            if cell["view"] == view:
                policy = cell.get("policy")
                found.setdefault(f"{name}, {policy['label']}" if policy else name, []).append(cell)
    return found


def _table(task: Task, view: View, models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    across = plots.columns_of(models)
    rows = []
    for name, measured in models.items():
        for down, found in groupby(measured, key=lambda cell: cell["down"]):
            of_column = {cell["across"]: told(cell) for cell in found}
            label = ", ".join(str(x) for x in (task.name, name, down) if x is not None)
            rows.append([label, *(of_column.get(x, "") for x in across)])
    for floor, value in {**view.floors, **plots.guessed(models)}.items():
        by_column = value if isinstance(value, Mapping) else dict.fromkeys(across, value)
        rows.append([f"{task.name}, {floor}", *(f"{by_column[x]:.3f}" if x in by_column else "" for x in across)])
    return [f"{view.label} (95 % interval), by {view.across}", *map(str, across)], rows


def told(cell: Mapping[str, Any]) -> str:
    interval = "" if cell["low"] is None else f" ({_short(cell['low'])} to {_short(cell['high'])})"
    return _short(cell["value"]) + interval


def _short(x: float) -> str:
    return f"{x:.3f}" if abs(x) <= 1 else f"{x:.3g}" if abs(x) < 100 else f"{x:,.0f}"
