#!/usr/bin/env python
"""Markdown tables from the results.json of several evaluations.

    python scripts/summarize.py runs/demo/titans_mag-seed*/evaluation/latest/results.json

A row averages runs that differ only in the seed; settings that differ between rows are columns.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# (kind, task or source, length or way of reading) -> its values
Figures = dict[tuple[str, str, str], tuple[float, ...]]

TITLES = {
    "recall": "tokens recalled: mean (worst seed), whole rows",
    "text": "bits per byte of held-out text: mean (range)",
}
COLUMNS = {"carried": "memory carried", "reset": "reset each segment"}


@dataclass
class Row:
    """A model of one configuration, with the results of each seed and their files."""

    model: str
    settings: dict[str, Any]
    seeds: dict[int | None, tuple[Path, Figures]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json, as evaluate.py writes it")
    try:
        rows = grouped(parser.parse_args().results)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n\n".join("\n".join(table) for kind in TITLES if (table := tabled(rows, kind))))


def grouped(paths: list[Path]) -> list[Row]:
    """Rows in the order of the files. Equal results of one seed count once, with a line on stderr.

    Raises ValueError if a file holds no results, or if a seed has two different results.
    """
    rows: dict[tuple[str, str], Row] = {}
    for path in paths:
        try:
            results = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: cannot be read as JSON ({type(error).__name__}); evaluate the run again"
            ) from None
        try:
            found = [read(results, model) for model in results["models"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else "its parts are of other types"
            raise ValueError(f"{path}: not what evaluate.py writes ({reason}); evaluate the run again") from None
        for model, (settings, seed, figures) in zip(results["models"], found, strict=True):
            row = rows.setdefault((model, repr(sorted(settings.items()))), Row(model, settings))
            if seed not in row.seeds:
                row.seeds[seed] = path, figures
                continue
            before, theirs = row.seeds[seed]
            if figures != theirs:
                raise ValueError(f"{before} and {path} hold two results of {model}, seed {seed}; leave one out")
            print(f"{path}: {model}, seed {seed}, counts once; {before} holds it too", file=sys.stderr)
    return list(rows.values())


def read(results: dict[str, Any], model: str) -> tuple[dict[str, Any], int | None, Figures]:
    """Settings of a model and its evaluation, without the seed; the seed; and the results."""
    held = results["models"][model]
    settings = {**held["settings"], "step": held["step"], "tokens": held["tokenizer"], "dtype": held["dtype"]}
    settings |= {f"eval.{key}": value for key, value in results["evaluation"].items() if key != "seed"}
    settings |= {f"eval.data.{key}": results["data"][key] for key in ("seq_len", "sources")}
    settings |= {f"eval.corpora.{name}": corpus for name, corpus in results["corpora"].items()}
    figures: Figures = {
        ("recall", r["task"], f"{r['factor']}x"): (float(r["accuracy"]), float(r["row_accuracy"]))
        for r in held["recall"]
    }
    for source, ways in held["text"].items():
        bits = {COLUMNS[how]: ways[how]["bits_per_byte"] for how in COLUMNS if how in ways}
        figures |= {("text", source, column): (float(value),) for column, value in bits.items()}
    return settings, held["seed"], figures


def tabled(rows: list[Row], kind: str) -> list[str]:
    """Lines of the table of one kind of results; none if no row has any."""
    keys = dict.fromkeys(key for row in rows for _, figures in row.seeds.values() for key in figures if key[0] == kind)
    if not keys:
        return []
    labels, columns = (list(dict.fromkeys(key[i] for key in keys)) for i in (1, 2))
    settings = differing(rows)
    lines = [f"| {' | '.join([TITLES[kind], *settings, 'seeds', *columns])} |"]
    lines.append("|---" * (len(settings) + len(columns) + 2) + "|")
    for row in rows:
        told = [str(row.settings.get(key, "")) for key in settings] + [", ".join(map(str, row.seeds))]
        for label in labels:
            cells = [cell(row, (kind, label, column)) for column in columns]
            if any(cells):
                lines.append(f"| {' | '.join([f'{row.model}, {label}', *told, *cells])} |")
    return lines


def differing(rows: list[Row]) -> list[str]:
    """Settings that become columns: those that differ between rows; of mixers, only if they differ within one
    model.
    """
    keys = dict.fromkeys(key for row in rows for key in row.settings)

    def differ(key: str, among: list[Row]) -> bool:
        return len({repr(row.settings.get(key)) for row in among}) > 1

    models = {row.model for row in rows}
    return [
        key
        for key in keys
        if any(differ(key, [row for row in rows if row.model == model]) for model in models)
        or (differ(key, rows) and not key.startswith("model.mixers.") and key != "eval.memory_off")
    ]


def cell(row: Row, key: tuple[str, str, str]) -> str:
    values = [figures[key] for _, figures in row.seeds.values() if key in figures]
    if not values:
        return ""
    first, *others = zip(*values, strict=True)
    if key[0] == "text":
        return f"{mean(first):.3f} ({min(first):.3f}-{max(first):.3f})"
    # The worst seed of a control is the one that recalls most.
    worst = max if row.model.startswith("control") else min
    return f"{mean(first):.3f} ({worst(first):.3f}), {mean(others[0]):.3f}"


def mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
