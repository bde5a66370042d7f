"""Many runs side by side: ``python evaluate.py compare='[runs/zoo/*]'``.

Runs that differ in the seed alone share a row. The first row is the reference of all differences.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from memlm import files
from memlm.evaluation import plots, storage
from memlm.evaluation.figures import Figure, Topic, Units
from memlm.evaluation.measures import Table
from memlm.evaluation.report import Report
from memlm.evaluation.runs import FOLDERS, Runs, find, grouped
from memlm.evaluation.screen import shown
from memlm.evaluation.statistics import bootstrap, of_seeds, paired, unpaired, wilson
from memlm.evaluation.subject import differences, flat
from memlm.settings import require

# 1 KB of state.
_KB = 1000
_SIZES = {"parameters": "parameters", "flops": "FLOPs a token", "tokens_seen": "tokens trained"}
_SIZES |= {"state_bytes": "bytes of state"}
# The share by which sizes may differ before a note is made.
_ALIKE = 0.01


def compare(cfg: DictConfig) -> bool:
    """Compare the runs of ``cfg.compare``: names of runs, of evaluations or of their results.json, with wildcards.

    Returns whether all results could be read. Raises ValueError if none could, or for a wrong setting.
    """
    given = OmegaConf.to_container(cfg.compare, resolve=True) if OmegaConf.is_config(cfg.compare) else [cfg.compare]
    named = isinstance(given, list) and given and all(isinstance(name, str) and name for name in given)
    require(named, f"compare={given} must be a list of runs, such as compare='[runs/zoo/*]'")
    console = Console(highlight=False, soft_wrap=True)
    paths, lines = find(given)
    rows, unreadable, notes = grouped(paths)
    lines += unreadable
    for line in lines:
        console.print(line, markup=False)
    require(bool(rows), f"compare={given}: there are no results; evaluate the runs first")
    out = Path(cfg.out) if cfg.out else Path("runs") / "compare" / _name(paths)
    found = compared(rows)
    results = {"schema": storage.SCHEMA, "command": storage.command(), "left_out": lines, **found}
    results["notes"] = notes + _uneven(found["rows"]) + _asked_otherwise(rows)
    tables = {"models": _models(found), **_tables(found)}
    report = _page(results, tables)
    # The page has the range of the seeds too.
    tables |= _tables(found, seeds=False)
    path = report.write(out)
    files.write(out / "compare.json", json.dumps(results, indent=1, default=str))
    for header, body in tables.values():
        for part in shown(header, body, console.width):
            console.print(part)
    for note in results["notes"]:
        console.print(note, markup=False)
    console.print(f"{len(rows)} rows; results: {path}", markup=False)
    if lines:
        console.print(f"{len(lines)} of {len(lines) + len(paths) - len(unreadable)} left out, see above", markup=False)
    return not lines


def _name(paths: Sequence[Path]) -> str:
    """The folders that hold the runs."""
    runs = [next((place.parent for place in path.parents if place.name in FOLDERS), path) for path in paths]
    return "-".join(dict.fromkeys(run.parent.name for run in runs))[:100] or "runs"


def compared(rows: Sequence[Runs]) -> dict[str, Any]:
    """Ready for JSON: the name of the reference, the topics, and the rows with their sizes and cells."""
    topics: dict[str, Topic] = {}
    told = []
    reference = dict(_by_place(rows[0]))
    for row in rows:
        cells = []
        for place, figures in _by_place(row):
            topic = topics.setdefault(place[0], next(iter(figures.values())).topic)
            cells.append(_cell(topic, figures, row))
            if row is not rows[0] and place in reference:
                cells[-1]["difference"] = _difference(figures, reference[place])
        told.append({"name": row.label, **_about(row), "cells": cells})
    return {
        "reference": rows[0].label,
        "topics": {name: asdict(topic) for name, topic in topics.items()},
        "rows": told,
    }


def _by_place(row: Runs) -> Iterator[tuple[tuple, dict[Any, Figure]]]:
    """The figures of each seed, by place."""
    for place in dict.fromkeys(place for figures in row.seeds.values() for place in figures):
        yield place, {seed: figures[place] for seed, figures in row.seeds.items() if place in figures}


def _about(row: Runs) -> dict[str, Any]:
    facts = next(iter(row.facts.values()))
    sizes = {key: facts.get(key) for key in (*_SIZES, "tokenizer", "kinds")}
    return {"seeds": list(row.facts), **sizes, "settings": row.settings, "files": row.files}


def _cell(topic: Topic, figures: dict[Any, Figure], row: Runs) -> dict[str, Any]:
    """The mean over seeds. Its interval is over seeds if there are three, otherwise over texts."""
    first = next(iter(figures.values()))
    value, (low, high), n = _mean(figures)
    facts = {seed: row.facts[seed].get("state_bytes") for seed in figures}
    known = [facts[seed] if figure.bytes is None else figure.bytes for seed, figure in figures.items()]
    size = max(known) if all(known) else None
    chance = topic.floors.get("chance", 0.0)
    chance = chance.get(first.across, 0.0) if isinstance(chance, Mapping) else chance
    return {
        **{"topic": topic.name, "down": first.down, "across": first.across},
        **{"value": value, "low": low, "high": high, "over": "seeds" if len(figures) > 2 else "texts", "texts": n},
        **{"seeds": {str(seed): figure.value for seed, figure in figures.items()}, "bytes": size},
        "above_chance_per_kb": (value - chance) / (size / _KB) if topic.share and size else None,
    }


def _mean(figures: dict[Any, Figure]) -> tuple[float, tuple[float, float], int]:
    """Value, interval, and the number of different texts."""
    values = [figure.value for figure in figures.values()]
    first, units = next(iter(figures.values())), _pooled(figures)
    value, n = sum(values) / len(values), len(units) or max(figure.n for figure in figures.values())
    if len(values) > 2:
        low, high = of_seeds(values)
        # Student's t has no bounds, a share has.
        return value, (max(low, 0.0), min(high, 1.0)) if first.topic.share else (low, high), n
    if len(values) == 1:
        return value, (first.low, first.high), n
    return value, wilson(value, n) if first.topic.share else _over(units), n


def _over(units: Units) -> tuple[float, float]:
    values, weights = zip(*units.values(), strict=True) if units else ((), ())
    return bootstrap(values, weights, draws=2000)


def _pooled(figures: dict[Any, Figure]) -> Units:
    """The mean over seeds of each text."""
    found: dict[Any, list[tuple[float, float]]] = {}
    for figure in figures.values():
        for unit, mean in figure.units.items():
            found.setdefault(unit, []).append(mean)
    return {unit: (sum(x for x, _ in of) / len(of), of[0][1]) for unit, of in found.items()}


def _difference(mine: dict[Any, Figure], theirs: dict[Any, Figure]) -> dict[str, Any]:
    """From the reference, over the texts that both read; of texts that are not the same, from the two intervals.

    It is marked if its interval excludes 0, and that over seeds too; fewer than three seeds must not overlap.
    """
    a, b = _pooled(mine), _pooled(theirs)
    common = [unit for unit in b if unit in a]
    (value, interval, n), (other, interval_of_other, n_of_other) = _mean(mine), _mean(theirs)
    over_seeds = unpaired(value, interval, other, interval_of_other)
    if len(common) > 1:
        value, *found = paired([a[unit] for unit in common], [b[unit] for unit in common])
        n = len(common)
    else:
        value, found, n = value - other, list(over_seeds), min(n, n_of_other)
    seeds = list(over_seeds) if min(len(mine), len(theirs)) > 2 else None
    # Too few seeds for an interval must at least not overlap.
    here, there = ([figure.value for figure in figures.values()] for figures in (mine, theirs))
    beyond = seeds or [min(here) - max(there), max(here) - min(there)]
    marked = all(low > 0 or high < 0 for low, high in (found, beyond))
    return {
        **{"value": value, "low": found[0], "high": found[1], "paired": len(common) > 1, "texts": n},
        **{"over_seeds": seeds, "marked": marked},
    }


def _uneven(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A note for each size in which the rows differ."""
    notes = []
    for key, label in _SIZES.items():
        sizes = [row[key] for row in rows if row[key]]
        if sizes and max(sizes) > (1 + _ALIKE) * min(sizes):
            word = {"parameters": "parameters", "flops": "flops", "state_bytes": "state"}.get(key)
            fix = f"; train.py match.{word}=... makes them equal" if word else ""
            notes.append(f"The rows differ in {label}: {min(sizes):,.0f} to {max(sizes):,.0f}{fix}.")
    return notes


def _asked_otherwise(rows: Sequence[Runs]) -> list[str]:
    """A note for each topic whose texts or questions are not the same for all runs."""
    topics: dict[str, list[Topic]] = {}
    for figures in (figures for row in rows for figures in row.seeds.values()):
        for figure in figures.values():
            known = topics.setdefault(figure.topic.name, [])
            if all(topic.settings != figure.topic.settings for topic in known):
                known.append(figure.topic)
    return [
        f"{name} was not measured alike in all runs: "
        + "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in found.items())
        for name, known in topics.items()
        if (found := differences([flat(dict(topic.settings)) for topic in known]))
    ]


def _models(found: dict[str, Any]) -> Table:
    def told(size: float | None) -> str:
        return "unknown" if size is None else f"{size:,.0f}"

    rows = [
        [row["name"], ", ".join(map(str, row["seeds"])), row["tokenizer"], *(told(row[key]) for key in _SIZES)]
        for row in found["rows"]
    ]
    return ["model", "seeds", "tokens are", *_SIZES.values()], rows


def _tables(found: dict[str, Any], seeds: bool = True) -> dict[str, Table]:
    """Means and differences of each topic; seeds: with the range of each cell's seeds."""
    tables: dict[str, Table] = {}
    for name, topic in found["topics"].items():
        lines = _lines(found, name)
        across = list(dict.fromkeys(cell["across"] for cells in lines.values() for cell in cells))
        values, differences = [], []
        for label, cells in lines.items():
            of_column = {cell["across"]: cell for cell in cells}
            per_kb = [cell["above_chance_per_kb"] for cell in cells]
            mean = [] if not topic["share"] else ["" if None in per_kb else f"{sum(per_kb) / len(per_kb):.4f}"]
            values.append([label, *(_told(of_column[x], seeds) if x in of_column else "" for x in across), *mean])
            if any("difference" in cell for cell in cells):
                row = [of_column.get(x, {}).get("difference") for x in across]
                differences.append([label, *("" if d is None else _told_difference(d) for d in row)])
        for floor, value in topic["floors"].items():
            by_column = value if isinstance(value, Mapping) else dict.fromkeys(across, value)
            blank = [""] if topic["share"] else []
            values.append([floor, *(f"{by_column[x]:.3f}" if x in by_column else "" for x in across), *blank])
        header = [f"{topic['title']}: {topic['label']}, by {topic['across']}", *map(str, across)]
        tables[name] = [*header, *(["above chance per KB of state"] if topic["share"] else [])], values
        if differences:
            tables[f"{name}-differences"] = [f"difference from {found['reference']}", *map(str, across)], differences
    return tables


def _lines(found: dict[str, Any], topic: str) -> dict[str, list[dict[str, Any]]]:
    """The cells of each line of a topic's table."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        for cell in row["cells"]:
            if cell["topic"] == topic:
                label = row["name"] if cell["down"] is None else f"{row['name']}, {cell['down']}"
                lines.setdefault(label, []).append(cell)
    return lines


def _told(cell: dict[str, Any], seeds: bool) -> str:
    interval = f" ({_short(cell['low'])} to {_short(cell['high'])})" if math.isfinite(cell["low"]) else ""
    values = list(cell["seeds"].values())
    spread = f"; seeds {_short(min(values))} to {_short(max(values))}" if seeds and len(values) > 1 else ""
    return f"{_short(cell['value'])}{interval}{spread}"


def _told_difference(difference: dict[str, Any]) -> str:
    low, high = difference["low"], difference["high"]
    interval = f" ({low:+.3f} to {high:+.3f})" if math.isfinite(low) else ""
    return f"{difference['value']:+.3f}{interval}{' *' if difference['marked'] else ''}"


def _short(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:,.4g}"


def _page(results: dict[str, Any], tables: dict[str, Table]) -> Report:
    report = Report(f"memlm: {len(results['rows'])} models compared")
    for line in (*results["left_out"], *results["notes"]):
        report.note(line)
    report.table(*tables["models"])
    report.note(
        "A row is the mean of the seeds of one configuration. Brackets hold 95 % intervals: over seeds (Student's t) "
        "of three and more, otherwise over texts (Wilson's for shares, the bootstrap for others). A difference is "
        f"that of a row and {results['reference']}, over texts that both read (paired bootstrap), or from both "
        "intervals if the texts are not the same. * marks one whose interval excludes 0; the interval over seeds then "
        f"excludes it too, or, below three, the seeds do not overlap. 1 KB is {_KB} bytes of the state of one text."
    )
    others = differences([row["settings"] for row in results["rows"]])
    if others:
        report.heading("Settings that differ")
        names = [row["name"] for row in results["rows"]]
        report.table(["", *names], [[key, *map(str, values)] for key, values in others.items()])
    for name, topic in results["topics"].items():
        report.heading(topic["title"])
        report.table(*tables[name])
        if f"{name}-differences" in tables:
            report.table(*tables[f"{name}-differences"])
        cells = {row["name"]: [cell for cell in row["cells"] if cell["topic"] == name] for row in results["rows"]}
        report.picture(name, plots.compared(topic, cells), f"{topic['title']} of all runs")
        counts = sorted({cell["texts"] for of_row in cells.values() for cell in of_row})
        report.note(f"Texts a cell: {', '.join(map(str, counts))}.")
    return report
