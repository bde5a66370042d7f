"""The output of an evaluation: tables, for screen and page alike, and the page itself."""

from collections.abc import Sequence
from typing import Any

from memlm.evaluation import plots
from memlm.evaluation.measures import Measure, Models, Table
from memlm.evaluation.report import Report
from memlm.evaluation.subject import Subject, differences
from memlm.training.tracking import read_metrics


def tables(results: dict[str, Any], measures: Sequence[Measure]) -> dict[str, Table]:
    """Header and rows of each table, by title, for screen and page."""
    models = results["models"]
    header = ["model", "parameters", "tokens are", "step", "tokens seen"]
    found = {"models": (header, [_trained(name, model) for name, model in models.items()])}
    for measure in measures:
        if measured := measured_by(measure, models):
            found |= measure.tables(measured)
    return found


def measured_by(measure: Measure, models: Models) -> Models:
    """The models that have results of a measure."""
    return {name: model for name, model in models.items() if model[measure.name]}


def _trained(name: str, model: dict[str, Any]) -> list[str]:
    step, seen = ("unknown" if model[key] is None else f"{model[key]:,}" for key in ("step", "tokens_seen"))
    if model["step"] is not None and model["steps"] is not None:
        step += f" of {model['steps']:,}"
    if model["begun_from"]:
        seen += f" after {model['begun_from']}"
    return [name, f"{model['parameters']:,}", model["tokenizer"], step, seen]


def page(subjects: list[Subject], results: dict[str, Any], measures: Sequence[Measure]) -> Report:
    models = results["models"]
    report = Report(f"memlm: {', '.join(models)}")
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    report.code(results["command"])
    report.note(f"{environment}; {results['seconds']} s.")
    shown = tables(results, measures)
    header, rows = shown["models"]
    more = ([", ".join(m["kinds"]), m["dtype"], m["checkpoint"]] for m in models.values())
    report.table(
        [*header, "kind", "dtype", "checkpoint"], [[*row, *rest] for row, rest in zip(rows, more, strict=True)]
    )
    for note in results["notes"]:
        report.note(note)
    others = differences([m["settings"] for m in models.values()])
    if others:
        report.heading("Settings that differ")
        report.table(["", *models], [[key, *map(str, values)] for key, values in others.items()])
    for measure in measures:
        if measured := measured_by(measure, models):
            measure.section(report, measured, next(one for one in subjects if one.name in measured))
    # Training always has the memory on.
    trained = [s for s in subjects if s.run_dir and not s.memory_off]
    runs = {s.name: read_metrics(s.run_dir / "metrics.jsonl") for s in trained}
    if any(runs.values()):
        report.heading("Training")
        report.picture("loss", plots.curves(runs, "loss/", "nats, training", logarithmic=True), "training loss")
        report.picture("validation", plots.curves(runs, "validation/", "validation"), "validation")
        report.picture("gates", plots.curves(runs, "layer", "memory"), "gates and memory over training")
    return report
