#!/usr/bin/env python
"""How fast the weights of runs acquired the facts put into their steps, and how long they kept them.

    python scripts/acquisition.py 'runs/acquisition/*' [--against runs/acquisition/none] [--out acquisition.json]

Runs are those of ``experiment=acquisition``, or others with sources of ``kind: injected``. A score is the mean
log-probability of a token of the answers to one kind of probe. Scores of sources with ``times: 0``, whose facts are in
no batch, are subtracted from it, because all answers of this form become likelier. With ``l0`` before the first of a
source's steps, and ``peak``, the highest score within ``probe_steps`` after a step:

    effectivity  peak - score before the step, mean over the source's steps
    gain         peak after the last step - l0
    retained     (score at the end - l0) / gain
    slope        change of (score - l0) / gain, from the peak on, for ten times the steps since the last fact

"binding" is the score of verbatim minus that of swapped: how much likelier the right answer became than an answer of
another fact. A row "(not yet)" has the effectivity of other sources' steps before the source's own: the peak of noise.
Cells are means over seeds and 95 % intervals, from three seeds on. ``--against`` gives differences, seed by seed.
"""

import argparse
import glob
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from memlm.data import Injection
from memlm.evaluation.statistics import of_seeds
from memlm.settings import build_config, require
from memlm.training.tracking import read_metrics

MEASURES = ("effectivity", "gain", "retained", "slope")
NOT_YET = " (not yet)"
# Scores by the number of steps done.
Curve = Mapping[int, float]


def peak(curve: Curve, step: int, within: int) -> int:
    """The step of the highest score after a step."""
    return max((at for at in curve if step < at <= step + within), key=lambda at: curve[at])


def effectivity(curve: Curve, steps: Sequence[int], within: int) -> float:
    return float(np.mean([curve[peak(curve, step, within)] - curve[step] for step in steps]))


def kept(curve: Curve, steps: Sequence[int], within: int) -> dict[str, float]:
    """Gain, share retained and slope; the last two are nan where nothing was gained."""
    before, top, end = curve[steps[0]], peak(curve, steps[-1], within), max(curve)
    gain = curve[top] - before
    shares = {at: (score - before) / gain for at, score in curve.items() if at >= top} if gain > 0 else {}
    later = [math.log10(at - steps[-1]) for at in shares]
    slope = np.polyfit(later, [*shares.values()], 1)[0] if len(shares) > 1 else math.nan
    return {"gain": gain, "retained": shares.get(end, math.nan), "slope": float(slope)}


def acquired(metrics: Sequence[Mapping[str, float]], sources: Mapping[str, Injection]) -> dict[str, dict]:
    """The measures of each source and kind of probe; a row without facts has the effectivity alone.

    metrics: lines of ``metrics.jsonl``
    """
    curves: dict[str, dict[str, dict[int, float]]] = {name: {} for name in sources}
    for line in metrics:
        for key, value in line.items():
            if (found := re.fullmatch(r"validation/([^/]+)/([^/]+)/loss", key)) and found[1] in sources:
                curves[found[1]].setdefault(found[2], {})[int(line["step"])] = -value
    controls = [curves[name] for name, injection in sources.items() if not injection.times]
    measured: dict[str, dict] = {}
    for name, injection in sources.items():
        if not injection.times:
            continue
        scores = {}
        for kind, curve in curves[name].items():
            of_kind = [control[kind] for control in controls if kind in control]
            scores[kind] = {at: x - sum(c[at] for c in of_kind) / max(1, len(of_kind)) for at, x in curve.items()}
        if {"verbatim", "swapped"} <= scores.keys():
            scores["binding"] = {at: curves[name]["verbatim"][at] - x for at, x in curves[name]["swapped"].items()}
        within, others = injection.probe_steps, {step for other in sources.values() for step in other.steps}
        earlier = sorted(step for step in others if step + within <= injection.start)
        for kind, curve in scores.items():
            own = {"effectivity": effectivity(curve, injection.steps, within), **kept(curve, injection.steps, within)}
            measured.setdefault(name, {})[kind] = own
            if earlier:
                placebo = measured.setdefault(name + NOT_YET, {})
                placebo[kind] = {"effectivity": effectivity(curve, earlier, within)}
    return measured


def read(run: Path) -> tuple[int, dict[str, dict]]:
    """Seed and measures of a run. Raises ValueError if it has no facts, or has not ended."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    sources = {
        name: build_config(Injection, {k: v for k, v in o.items() if k not in ("kind", "weight")}, name)
        for name, o in config["data"]["sources"].items()
        if o["kind"] == "injected"
    }
    require(bool(sources), f"{run}: no source has kind: injected; name a run of experiment=acquisition")
    metrics, steps = read_metrics(run / "metrics.jsonl"), config["train"]["steps"]
    ended = any(line["step"] == steps for line in metrics)
    require(ended, f"{run}: its {steps} steps are not done; go on with it")
    return config["seed"], acquired(metrics, sources)


def summary(found: Mapping[str, Mapping[int, dict]]) -> list[dict]:
    """Rows of the results: run, source, kind, measure, values of the seeds, their mean and interval."""
    rows = []
    for run, seeds in found.items():
        first = next(iter(seeds.values()))
        for source, kinds in first.items():
            for kind, measures in kinds.items():
                for measure in measures:
                    values = {seed: of[source][kind][measure] for seed, of in seeds.items()}
                    rows.append(_row(run, source, kind, measure, values))
    return rows


def _row(run: str, source: str, kind: str, measure: str, values: Mapping[int, float]) -> dict:
    finite = [x for x in values.values() if math.isfinite(x)]
    low, high = of_seeds(finite)
    about = {"run": run, "source": source, "kind": kind, "measure": measure, "values": dict(values)}
    return about | {"mean": float(np.mean(finite)) if finite else math.nan, "low": low, "high": high}


def differences(rows: Sequence[dict], against: str) -> list[dict]:
    """The rows of all other runs, minus that of one, seed by seed."""
    others = {tuple(row[key] for key in ("source", "kind", "measure")): row for row in rows if row["run"] == against}
    made = []
    for row in rows:
        other = others.get(tuple(row[key] for key in ("source", "kind", "measure")))
        if other and row["run"] != against:
            values = {s: x - other["values"][s] for s, x in row["values"].items() if s in other["values"]}
            made.append(_row(f"{row['run']} - {against}", row["source"], row["kind"], row["measure"], values))
    return made


def table(rows: Sequence[dict], measure: str) -> str:
    """Markdown: a line for each run and source, a column for each kind of probe."""
    chosen = [row for row in rows if row["measure"] == measure]
    kinds = list(dict.fromkeys(row["kind"] for row in chosen))
    lines = [f"| {measure} | facts | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    for run, source in dict.fromkeys((row["run"], row["source"]) for row in chosen):
        cells = {row["kind"]: _told(row) for row in chosen if (row["run"], row["source"]) == (run, source)}
        lines.append(f"| {run} | {source} | {' | '.join(cells.get(kind, '-') for kind in kinds)} |")
    return "\n".join(lines)


def _told(row: dict) -> str:
    given = f"{row['mean']:.2f}" if math.isfinite(row["mean"]) else "-"
    missing = sum(not math.isfinite(x) for x in row["values"].values())
    interval = f" ({row['low']:.2f} to {row['high']:.2f})" if math.isfinite(row["low"]) else ""
    return given + interval + (f", without {missing} seeds" if missing else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or patterns; -seedN at the end is the seed")
    parser.add_argument("--against", type=Path, help="a run without its -seedN, from which others are told apart")
    parser.add_argument("--out", type=Path, help="a JSON file for all results")
    given = parser.parse_args()
    found: dict[str, dict[int, dict]] = {}
    try:
        for run in sorted({Path(path) for pattern in given.runs for path in glob.glob(pattern)}):
            seed, measured = read(run)
            found.setdefault(re.sub(r"-seed\d+$", "", run.name), {})[seed] = measured
        require(bool(found), f"{given.runs}: no such run; train one with experiment=acquisition")
        rows = summary(found)
        if given.against:
            require(given.against.name in found, f"--against={given.against}: not among {', '.join(found)}; name one")
            rows += differences(rows, given.against.name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    if given.out:
        # JSON has no nan.
        plain = json.loads(json.dumps(rows), parse_constant=lambda _: None)
        given.out.write_text(json.dumps(plain, indent=1) + "\n")
    print("\n\n".join(table(rows, measure) for measure in MEASURES))


if __name__ == "__main__":
    main()
