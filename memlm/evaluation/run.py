"""Evaluate a checkpoint and its control; write results.json and report.html, and print a table."""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

import memlm
from memlm import files
from memlm.data import Source, TextSource, fingerprint
from memlm.evaluation.ablation import memory_off
from memlm.evaluation.data import (
    Examined,
    changed_files,
    data_config,
    examine,
    has_documents,
    untrained,
)
from memlm.evaluation.measures import Measure, measures
from memlm.evaluation.page import page, tables
from memlm.evaluation.subject import differences, load_subject
from memlm.hub.causal import longest
from memlm.settings import check_type, require
from memlm_kernels import set_backend


def run(cfg: DictConfig) -> None:
    """Evaluate ``cfg.checkpoint``: a run directory, a checkpoint folder or a hub name.

    With ``cfg.memory_off``, the model runs without its long-term memory, and the results go to a separate folder.
    Raises ValueError, one line, for mistakes that the user can fix. Earlier results stay until new ones are complete.
    """
    with set_backend(cfg.hardware.kernels, "hardware.kernels"):
        _run(cfg)


def _run(cfg: DictConfig) -> None:
    started = time.perf_counter()
    for key, hint in _KEYS.items():
        check_type(cfg[key], hint, key)
    require(0 <= cfg.seed < 2**63, f"seed={cfg.seed} must lie in [0, 2**63)")
    require(cfg.checkpoint != "", "checkpoint='' names no run, folder or hub name")
    options: dict[str, Any] = OmegaConf.to_container(cfg.eval, resolve=True)
    chosen = measures(options)
    device = _device(cfg.hardware)
    console = Console(highlight=False, soft_wrap=True)
    subject = load_subject(cfg.checkpoint, device)
    if cfg.memory_off:
        subject = replace(subject, name=f"{subject.name} (memory off)", memory_off=True)
        with memory_off(subject.model):
            pass
    data = data_config(cfg.data, subject, needed=not any(measure.applies({}) for measure in chosen))
    examined = [examine(subject, data, cfg.seed)]
    sources = examined[0].sources
    _check_measurable(chosen, sources)
    if cfg.control and Path(cfg.control) != subject.run_dir:
        examined += _control(cfg, data, examined[0], device, console)
    fit, examined, left_out = _measurable(chosen, examined, console)
    results: dict[str, Any] = {
        "environment": {**_environment(device), "kernels": cfg.hardware.kernels},
        "evaluation": {"seed": cfg.seed, "memory_off": cfg.memory_off, **options},
        "data": data,
        "corpora": {n: s.corpus.folder.name for n, s in sources.items() if isinstance(s, TextSource)},
        "models": {one.subject.name: one.subject.facts() for one in examined},
    }
    results["of"] = _of(results)
    results["notes"] = left_out + _notes(examined, chosen, data)
    for note in results["notes"]:
        console.print(note, markup=False)
    folder = "evaluation-memory_off" if cfg.memory_off else "evaluation"
    out = Path(cfg.out) if cfg.out else (subject.run_dir or _place(subject.folder)) / folder
    _check_writable(out)
    for one in examined:
        console.print(f"evaluating {one.subject.name}: {one.subject.folder}", markup=False)
        with memory_off(one.subject.model) if one.subject.memory_off else nullcontext():
            for measure in chosen:
                found = measure.run(one, examined) if measure in fit else measure.nothing
                results["models"][one.subject.name][measure.name] = found
    results["seconds"] = round(time.perf_counter() - started, 1)
    report = page([one.subject for one in examined], results, chosen)
    set_aside(out, results["of"])
    files.write(out / "results.json", json.dumps(results, indent=1, default=str))
    path = report.write(out)
    for header, rows in tables(results, chosen).values():
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"{results['seconds']:.0f} s; results: {path}", markup=False)


_KEYS = {"checkpoint": str, "control": str | None, "memory_off": bool, "out": str | None, "seed": int}


def _place(source: Path | str) -> Path:
    """The folder of the results of a model without a run, by its name."""
    name = Path(source).resolve().name if Path(source).exists() else str(source).replace("/", "--")
    return Path("runs") / "evaluation" / name


def _check_writable(out: Path) -> None:
    """Raise ValueError before the measurements, not after them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write(out / ".writable", "")
        (out / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"out={out}: nothing can be written there ({error.strerror}); name another folder") from None


def set_aside(out: Path, of: str) -> None:
    """Move results of another checkpoint, other data or other settings from ``out`` to ``out/earlier/<their
    name>``.
    """
    before = out / "results.json"
    if not before.exists():
        return
    try:
        earlier = files.read_json(before).get("of")
    except ValueError:
        earlier = None
    if earlier == of:
        return
    named = isinstance(earlier, str) and re.fullmatch(r"[\w-]+", earlier)
    kept = out / "earlier" / (earlier if named else files.digest(before)[:8])
    kept.mkdir(parents=True, exist_ok=True)
    # The results move last: after a kill, the next evaluation moves the rest.
    for file in ("plots", "report.md", "report.html", "results.json"):
        if (out / file).exists():
            shutil.rmtree(kept / file, ignore_errors=True)
            (out / file).rename(kept / file)


def _of(results: dict[str, Any]) -> str:
    """A name for everything that determines results, except machine and code: the step, and a hash."""
    what = json.dumps(
        [results[key] for key in ("evaluation", "data", "corpora", "models")], sort_keys=True, default=str
    )
    step = next(iter(results["models"].values()))["step"]
    return (f"step_{step:06d}-" if step is not None else "") + hashlib.sha256(what.encode()).hexdigest()[:8]


def _control(cfg: DictConfig, data: dict[str, Any], first: Examined, device: torch.device, console: Console) -> list:
    """The control, if it exists and is comparable; otherwise prints a line."""
    if not Path(cfg.control).exists():
        console.print(f"no control at {cfg.control}; 'python train.py memory=none' trains it", markup=False)
        return []
    control = load_subject(cfg.control, device, "control")
    control = replace(control, name=f"control ({control.name})")
    if cfg.data.tokenizer is None and fingerprint(control.tokenizer) != fingerprint(first.tokenizer):
        data = {**data, "tokenizer": control.place_of_tokenizer}
    try:
        return [examine(control, data, cfg.seed)]
    except ValueError as error:
        console.print(f"{control.name} cannot be compared and is left out: {error}", markup=False)
        return []


def _check_measurable(chosen: Sequence[Measure], sources: Mapping[str, Source]) -> None:
    """Raise ValueError if no measure applies to the data, or one does not fit it."""
    for measure in chosen:
        measure.check(sources)
    if not any(measure.applies(sources) for measure in chosen):
        held = any(has_documents(source) for source in sources.values())
        fix = "use eval=bank, which asks banks of its documents" if held else "use eval=demo"
        raise ValueError(f"eval measures nothing of data.sources.{next(iter(sources))}; {fix}")


def _notes(examined: list[Examined], chosen: Sequence[Measure], data: dict[str, Any]) -> list[str]:
    """Notes for readers of the results, one line each."""
    subjects = [one.subject for one in examined]
    notes = [f"{s.name}: {line}" for s in subjects for line in s.lines]
    notes += [
        f"{s.name} is at step {s.step:,} of {s.steps:,}: its training has not ended"
        for s in subjects
        if s.step is not None and s.steps is not None and s.step < s.steps
    ]
    for one in examined:
        if others := untrained(data, one.subject):
            notes.append(f"{one.subject.name} was trained on other data: {_told(others, 'here', 'in training')}")
        else:
            notes += [f"{one.subject.name}: {changed}" for changed in changed_files(one)]
    # Mixers are compared on purpose, and data has its own line.
    first, *others = (
        {"tokens": facts["tokenizer"], "dtype": facts["dtype"]}
        | {key: value for key, value in facts["settings"].items() if not key.startswith(("model.mixers.", "data."))}
        for facts in (subject.facts() for subject in subjects)
    )
    for subject, theirs in zip(subjects[1:], others, strict=True):
        if pair := differences([first, theirs]):
            notes.append(f"{subject.name} differs: {_told(pair, subjects[0].name, subject.name)}")
    return notes + [note for measure in chosen for note in measure.notes(examined[0].sources)]


def _told(pairs: Mapping[str, list[Any]], here: str, there: str) -> str:
    first = [f"{key}: {values[0]} {here}, {values[1]} {there}" for key, values in pairs.items()]
    return "; ".join(first[:4]) + (f"; and {len(first) - 4} more" if len(first) > 4 else "")


def _measurable(
    chosen: Sequence[Measure], examined: list[Examined], console: Console
) -> tuple[list[Measure], list[Examined], list[str]]:
    """The measures that fit the first model and its data, the models that all of these fit, and lines on measures that
    are left out.

    Raises ValueError if no measure is left.
    """
    first = examined[0]
    used = [measure for measure in chosen if measure.applies(first.sources)]
    unfit = {measure.name: reason for measure in used if (reason := _unfit(measure, first)) is not None}
    fit = [measure for measure in used if measure.name not in unfit]
    require(bool(fit), f"{first.subject.folder} {next(iter(unfit.values()), '')}")
    able = [first]
    for one in examined[1:]:
        if reasons := [reason for measure in fit if (reason := _unfit(measure, one)) is not None]:
            console.print(f"{one.subject.name} {reasons[0]}", markup=False)
        else:
            able.append(one)
    return fit, able, [f"{name} is left out: {first.subject.name} {reason}" for name, reason in unfit.items()]


def _unfit(measure: Measure, one: Examined) -> str | None:
    """The reason why a measure does not fit a model; it follows the model's name."""
    model, needed = one.subject.model, measure.tokens(one.sources)
    try:
        measure.check_model(model)
    except ValueError as error:
        return str(error)
    most = longest(model)
    if most is not None and needed > most:
        return f"has {most:,} positions, {measure.name} needs {needed:,}; lower eval.factors or eval.text_length"
    return None


def _device(hardware: DictConfig) -> torch.device:
    for key, kept in (("mixed_precision", ("auto", "no")), ("compile", (False,))):
        value = hardware[key]
        require(value in kept, f"hardware.{key}={value!r}: a model is evaluated as its checkpoint is; leave it out")
    if hardware.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"hardware.device={hardware.device!r} is unknown; use auto, cpu or cuda")
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("hardware.device='cuda' but torch sees no GPU; use hardware.device=auto")
    return torch.device("cuda" if hardware.device != "cpu" and torch.cuda.is_available() else "cpu")


def _environment(device: torch.device) -> dict[str, str]:
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    processor = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "memlm": memlm.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": processor,
    }
