"""The results of many runs: found, read, and grouped by configuration."""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memlm import files
from memlm.configuration import MemLMConfig
from memlm.evaluation import storage
from memlm.evaluation.figures import Figure
from memlm.evaluation.measures import Measure, measures
from memlm.evaluation.subject import differences, flat
from memlm.flops import count_flops
from memlm.hub.causal import read_config
from memlm.settings import require
from memlm.training.resume import DEFAULTS

FOLDERS = ("evaluation", "evaluation-memory_off")


@dataclass
class Runs:
    """Models of one configuration: for each seed of training, the facts of its model, and its figures by place."""

    name: str
    settings: dict[str, Any]
    facts: dict[int | None, dict[str, Any]] = field(default_factory=dict)
    seeds: dict[int | None, dict[tuple, Figure]] = field(default_factory=dict)
    files: dict[int | None, list[str]] = field(default_factory=dict)
    label: str = ""


def find(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Results of runs, of evaluations' folders, or files; and a line for each name without any."""
    found: dict[Path, None] = {}
    lines = []
    for pattern in patterns:
        paths = [Path(p) for p in sorted(glob.glob(pattern))] or [Path(pattern)]
        for path in paths:
            results = _results(path)
            found |= dict.fromkeys(results)
            is_run = (path / "checkpoints").is_dir()
            if results or (len(paths) > 1 and not is_run):
                continue
            fix = f"python evaluate.py checkpoint={path} control=null" if is_run else "name a run, or its results"
            lines.append(f"{path}: {'no results' if path.exists() else 'no such run'}; {fix}")
    return list(found), lines


def _results(path: Path) -> list[Path]:
    """The newest first."""
    if path.is_file():
        return [path]
    places = [path, *(path / folder for folder in FOLDERS)]
    found = {file.resolve() for place in places for file in (place / "results.json", *place.glob("*/results.json"))}
    there = [file for file in found if file.exists()]
    return sorted(there, key=lambda file: (-file.stat().st_mtime_ns, str(file)))


def grouped(paths: Sequence[Path]) -> tuple[list[Runs], list[str], list[str]]:
    """Rows in the order of the files, a line for each file that cannot be read, and notes.

    A figure that several evaluations of a run have is taken from the first of them, the newest. Evaluations of earlier
    checkpoints and of other weights of a run do not count, which is noted.
    """
    rows: dict[tuple[str, str], Runs] = {}
    origins: dict[tuple, Path] = {}
    read, lines = list[tuple[Path, str, dict[str, Any], list[Figure], list[str]]](), []
    for path in paths:
        try:
            read += [(path, *model) for model in list(_models(path))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            lines.append(f"{path}: {_reason(error).removeprefix(f'{path}: ')}; evaluate the run again")
    last = dict[tuple, int]()
    for path, name, facts, *_ in read:
        model = (_folder(path), name, facts["seed"])
        last[model] = max(last.get(model, -1), _step(facts))
    notes = []
    for path, name, facts, figures, without in read:
        seed, folder = facts["seed"], _folder(path)
        told = f"{path}: {name}" if seed is None else f"{path}: {name}, seed {seed}"
        if _step(facts) < (step := last[folder, name, seed]):
            notes.append(f"{told}: step {facts['step']} does not count beside step {step}")
            continue
        notes += [note for note in without if note not in notes]
        # Without a run, the checkpoint is all that tells two models apart.
        known = facts["settings"] or {"checkpoint": facts["checkpoint"]}
        settings = {**known, **{key: facts[key] for key in ("step", "tokenizer", "dtype")}}
        # Seeds may begin from runs of their own seeds, or all from one.
        whole = {key: x.replace("seed*", f"seed{seed}") if isinstance(x, str) else x for key, x in settings.items()}
        keys = [(name, _canonical(these)) for these in (settings, whole)]
        row = next((rows[key] for key in keys if key in rows), None) or Runs(name, settings)
        rows |= dict.fromkeys(keys, row)
        if not row.facts and facts["schema"] == 1:
            facts = facts | {"flops": _flops(facts, path)}
        if row.facts.setdefault(seed, facts).get("weights") != facts.get("weights"):
            notes.append(f"{told}: other weights than in {row.files[seed][0]}, which counts")
            continue
        if seed not in row.files:
            notes += [f"{told}: {part} is missing: {why}" for part, why in (facts.get("missing") or {}).items()]
        held = row.seeds.setdefault(seed, {})
        row.files.setdefault(seed, []).append(str(path))
        for figure in figures:
            before = held.setdefault(figure.place, figure)
            origin = origins.setdefault((id(row), seed, figure.place), folder)
            if before.value != figure.value and origin != folder:
                place = ", ".join(str(word) for word in figure.place if word is not None)
                notes.append(f"{told}, {place}: another value than in {origin}, which counts")
    found = list({id(row): row for row in rows.values()}.values())
    _label(found)
    return found, lines, notes


def _canonical(settings: Mapping[str, Any]) -> str:
    """The same for settings of equal effect, also of earlier versions, which lack some."""
    whole = {**flat(DEFAULTS), **settings}
    return repr([(key, float(x) if type(x) is int else x) for key, x in sorted(whole.items()) if x is not None])


def _folder(path: Path) -> Path:
    """The folder of a run's evaluations."""
    return next((place for place in path.parents if place.name in FOLDERS), path)


def _step(facts: Mapping[str, Any]) -> int:
    return -1 if facts["step"] is None else facts["step"]


def _models(path: Path) -> Iterator[tuple[str, dict[str, Any], list[Figure], list[str]]]:
    """Name, facts and figures of each model of results.json, and a line for each measure without figures."""
    results = files.read_json(path)
    fix = f"its schema is {results['schema']}, this version reads 1 to {storage.SCHEMA}"
    require(results["schema"] in range(1, storage.SCHEMA + 1), fix)
    evaluation = dict(results["evaluation"])
    seed, _ = evaluation.pop("seed"), evaluation.pop("memory_off")
    chosen = measures(evaluation)
    for name, model in results["models"].items():
        folder = path.parent / "records" / storage.file_name(name)

        def records(part: str, folder: Path = folder) -> list[dict[str, Any]]:
            file = folder / f"{storage.file_name(part)}.jsonl"
            return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

        about = {"seed": seed, "corpora": results["corpora"], "tokenizer": model["tokenizer"]}
        about["sources"] = results["data"].get("sources") or {}
        used = [measure for measure in chosen if model.get(measure.name)]
        figures = [figure for one in used for figure in one.figures(model[one.name], about, records)]
        bare = [one for one in used if type(one).figures is Measure.figures]
        left_out = [f"{one.name} is not compared: {one.apart}." for one in bare]
        control = re.fullmatch(r"control \((.*)\)", name)
        facts = model | {"schema": results["schema"]}
        yield control[1] if control else name, facts, figures, left_out


def _flops(facts: Mapping[str, Any], path: Path) -> float | None:
    """Those of a model of memlm whose checkpoint is here, counted again; path: of the results."""
    length = facts["settings"].get("data.seq_len")
    # The command ran in a folder above the run.
    places = (folder / facts["checkpoint"] for folder in (Path(), *path.parents))
    place = next((folder for folder in places if folder.is_dir()), None)
    if place is None or length is None:
        return None
    with suppress(ValueError):
        config = read_config(place)
        return count_flops(config, length) if isinstance(config, MemLMConfig) else None
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"not what this version's evaluate.py writes ({error.args[0]!r} is missing)"
    if isinstance(error, TypeError | AttributeError):
        return "not what this version's evaluate.py writes (its parts are of other types)"
    return " ".join(str(error).split()) or type(error).__name__


def _label(rows: Sequence[Runs]) -> None:
    """Names; rows of one name also have the settings in which they differ."""
    for name in dict.fromkeys(row.name for row in rows):
        alike = [row for row in rows if row.name == name]
        different = differences([row.settings for row in alike])
        for i, row in enumerate(alike):
            told = [f"{key.removeprefix('model.mixers.memory.')}={values[i]}" for key, values in different.items()]
            more = [f"and {len(told) - 3} more, row {i + 1}"] if len(told) > 3 else []
            row.label = ", ".join([name, *told[:3], *more])
