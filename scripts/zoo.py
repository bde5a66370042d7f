#!/usr/bin/env python
"""All memories beside each other: train, evaluate and compare them, with equal parameters and with equal states.

    python scripts/zoo.py [--memories titans_mag none ...] [--seeds 0 1 2] [--jobs 2]
    python scripts/zoo.py --table  # the tables of benchmarks/zoo, in Markdown, and its pictures

Runs stand in runs/zoo/parameters, where all memories have titans_mag's parameters, and in runs/zoo/state, where they
also have its bytes of state after a row, within 6 %; memories that keep every token cannot, and are left out there.
Each job is one process of one thread. The same command goes on after a stop: finished runs are not trained or
evaluated again. The pages are runs/compare/zoo-parameters and runs/compare/zoo-state; the figures of the tables go to
benchmarks/zoo, where memories without a run here keep theirs. A job that fails leaves its output in runs/zoo/failed
and ends the command with exit code 1 after all others.

A cell of ``--table`` is the mean over seeds and its 95 % interval; the order of rows is that of the first column.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "zoo"
MEMORIES = sorted(path.stem for path in (ROOT / "configs/memory").glob("*.yaml"))
# Their states grow with the text, or are a window and the fast weights of a size that no setting solves.
WITHOUT_STATE = ("attention", "chunk_sparse", "lact", "msa")
SIZES = {
    "parameters": ["match.parameters=titans_mag"],
    "state": ["match.parameters=titans_mag", "match.state=titans_mag", "match.tolerance=0.06"],
}
INTERRUPTED = 130
# Title of a column: topic, row and column in the comparison, digits.
COLUMNS = {
    "MQAR, 8x": ("recall-mqar", None, "8x", 3),
    "MQAR, 1x": ("recall-mqar", None, "1x", 3),
    "passkey, 8x": ("recall-passkey", None, "8x", 3),
    "pairs held": ("saturation-totals", None, "capacity, pairs", 1),
    "written again twice": ("overwrite", "128", 2, 2),
    "bits per byte, reset": ("text-text", None, "reset", 3),
    "carried": ("text-text", None, "carried", 3),
}
# Pictures of the page: their panels, beside one of the state's bytes, and the most that a cell can be.
PICTURES = {
    "recall": ("parameters", {"MQAR, 8x": 1, "passkey, 8x": 1}),
    "pairs": ("state", {"pairs held": 32, "written again twice": 1}),
}


def figures(compared: dict, commit: str, earlier: Sequence[dict] = ()) -> dict:
    """The part of a compare.json that the table shows, with the rows of ``earlier`` that it has not."""
    places = [place[:3] for place in COLUMNS.values()]
    rows = []
    for row in compared["rows"]:
        sizes = {key: row[key] for key in ("name", "seeds", "parameters", "flops", "state_bytes")}
        cells = [cell for cell in row["cells"] if (cell["topic"], cell["down"], cell["across"]) in places]
        rows.append({**sizes, "commit": commit, "cells": cells})
    rows += [row for row in earlier if row["name"] not in {row["name"] for row in rows}]
    return {"command": compared["command"], "rows": sorted(rows, key=lambda row: row["name"])}


def table(compared: dict) -> str:
    """Markdown of ``figures``."""
    lines = []
    for row in compared["rows"]:
        cells = {(c["topic"], c["down"], c["across"]): c for c in row["cells"]}
        found = [(cells.get(place[:3]), place[3]) for place in COLUMNS.values()]
        texts = [_told(cell, digits, len(row["seeds"])) for cell, digits in found]
        order = found[0][0]["value"] if found[0][0] else -1
        lines.append((order, f"| {row['name']} | {row['state_bytes'] / 1000:.0f} | {' | '.join(texts)} |"))
    header = f"| memory | KB of state | {' | '.join(COLUMNS)} |"
    return "\n".join([header, "|---" * (len(COLUMNS) + 2) + "|", *(line for _, line in sorted(lines, reverse=True))])


def _told(cell: dict | None, digits: int, seeds: int) -> str:
    """Value and interval, and the number of seeds if some have none. Student's interval may end below 0."""
    if not cell or cell["value"] is None:
        return "-"
    value, low, high = (f"{max(0.0, cell[word]):.{digits}f}" for word in ("value", "low", "high"))
    return f"{value} ({low} to {high})" + (
        "" if len(cell["seeds"]) == seeds else f", {len(cell['seeds'])} of {seeds} seeds"
    )


def draw(folder: Path) -> None:
    """Write the pictures: a line for each memory, means with intervals over seeds."""
    import matplotlib.pyplot as plt

    for name, (size, panels) in PICTURES.items():
        found = json.loads((RESULTS / f"{size}.json").read_text())["rows"]
        cells = {
            (row["name"], *(c[key] for key in ("topic", "down", "across"))): c for row in found for c in row["cells"]
        }
        first, *_ = panels
        rows = sorted(found, key=lambda row: cells[row["name"], *COLUMNS[first][:3]]["value"] or 0)
        figure, axes = plt.subplots(
            1, len(panels) + 1, figsize=(10, 1.2 + 0.22 * len(rows)), sharey=True, layout="constrained"
        )
        for axis, (title, most) in zip(axes, panels.items(), strict=False):
            for i, row in enumerate(rows):
                cell = cells.get((row["name"], *COLUMNS[title][:3]))
                if cell and cell["value"] is not None:
                    axis.hlines(i, max(0.0, cell["low"]), min(most, cell["high"]), "C0", linewidth=2, alpha=0.5)
                    axis.plot(cell["value"], i, "o", color="C0", markersize=5)
            axis.set(title=title, xlim=(-0.03 * most, 1.03 * most))
        sizes = [row["state_bytes"] / 1000 for row in rows]
        axes[-1].plot(sizes, range(len(rows)), "s", color="C1", markersize=5)
        axes[-1].set(title="KB of state", xlim=(0, 1.05 * max(sizes)))
        axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
        for axis in axes:
            axis.grid(alpha=0.25)
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)


def run(size: str, memory: str, seed: int) -> str | None:
    """Train and evaluate. Returns the folder of a run that failed."""
    place = f"runs/zoo/{size}/{memory}-seed{seed}"
    train = ["train.py", "experiment=zoo", f"name=zoo/{size}", f"memory={memory}", f"seed={seed}", *SIZES[size]]
    evaluate = ["evaluate.py", f"checkpoint={place}", "control=null", "eval=zoo", f"seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (train, evaluate):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        if done.returncode == INTERRUPTED:
            return None
        if done.returncode:
            log = Path("runs/zoo/failed") / f"{size}-{memory}-seed{seed}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            print(f"{place}: {command[0]} failed, see {log}", flush=True)
            return place
    print(place, flush=True)
    return None


def publish() -> None:
    pages = {size: Path(f"runs/compare/zoo-{size}/compare.json") for size in SIZES}
    for size, page in pages.items():
        if page.exists():
            described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
            results = RESULTS / f"{size}.json"
            earlier = json.loads(results.read_text())["rows"] if results.exists() else []
            found = figures(json.loads(page.read_text()), described.stdout.strip(), earlier)
            RESULTS.mkdir(parents=True, exist_ok=True)
            results.write_text(json.dumps(found, indent=1) + "\n")
    draw(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", nargs="+", default=MEMORIES, choices=MEMORIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--table", action="store_true", help="print the tables, draw, and run nothing")
    given = parser.parse_args()
    if given.table:
        for size in SIZES:
            print(f"{size}\n\n{table(json.loads((RESULTS / f'{size}.json').read_text()))}\n")
        draw(RESULTS)
        return
    # All memories of one seed come before the next seed, so that a stopped command can already be compared.
    chosen = itertools.product(given.seeds, SIZES, given.memories)
    jobs = [(size, m, seed) for seed, size, m in chosen if size == "parameters" or m not in WITHOUT_STATE]
    with ThreadPoolExecutor(given.jobs) as pool:
        try:
            started = [pool.submit(run, *job) for job in jobs]
            failed = [place for job in started if (place := job.result())]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            print("interrupted; the same command goes on", flush=True)
            sys.exit(INTERRUPTED)
    for size in SIZES:
        command = [sys.executable, "evaluate.py", f"compare=[runs/zoo/{size}/*]", f"out=runs/compare/zoo-{size}"]
        failed += [size] if subprocess.run(command).returncode else []
    publish()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
