"""Evaluate a checkpoint and its control: measure, write the results, and print tables."""

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import memlm
from memlm import files
from memlm.data import Source, TextSource, fingerprint
from memlm.evaluation import storage
from memlm.evaluation.ablation import memory_off
from memlm.evaluation.compare import compare
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
from memlm.evaluation.parts import Parts
from memlm.evaluation.progress import Progress
from memlm.evaluation.screen import shown
from memlm.evaluation.subject import Subject, differences, load_subject
from memlm.hub.causal import longest
from memlm.settings import check_type, require
from memlm.training.interrupt import Interrupt
from memlm_kernels import set_backend


def run(cfg: DictConfig) -> bool:
    """Evaluate ``cfg.checkpoint``: a run directory, a checkpoint folder or a hub name; or compare ``cfg.compare``.

    With ``cfg.memory_off``, the model runs without its long-term memory, or without the named parts of it, and the
    results go to a separate folder.
    Returns whether every part could be measured. Raises ValueError, one line, for mistakes that the user can fix, and
    ``Stopped`` if a signal ends it.
    """
    if cfg.compare is not None:
        return compare(cfg)
    with set_backend(cfg.hardware.kernels, "hardware.kernels"):
        return _run(cfg)


def _run(cfg: DictConfig) -> bool:
    started = time.perf_counter()
    given = {key: OmegaConf.to_container(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key] for key in _KEYS}
    for key, hint in _KEYS.items():
        check_type(given[key], hint, key)
    require(0 <= cfg.seed < 2**63, f"seed={cfg.seed} must lie in [0, 2**63)")
    require(cfg.checkpoint != "", "checkpoint='' names no run, folder or hub name")
    options: dict[str, Any] = OmegaConf.to_container(cfg.eval, resolve=True)
    chosen = measures(options)
    device = _device(cfg.hardware)
    progress = Progress()
    subject = load_subject(cfg.checkpoint, device, ema=cfg.ema)
    if off := given["memory_off"]:
        words = "memory off" if off is True else f"memory off: {', '.join(map(str, off))}"
        subject = replace(subject, name=f"{subject.name} ({words})", memory_off=off)
        with _off(subject):
            pass
    data = data_config(cfg.data, subject, needed=not any(measure.applies({}) for measure in chosen))
    examined, left_out = [examine(subject, data, cfg.seed)], list[str]()
    sources = examined[0].sources
    _check_measurable(chosen, sources)
    if cfg.control and Path(cfg.control) != subject.run_dir:
        examined += _control(cfg, data, examined[0], device, progress, left_out)
    fit, examined = _measurable(chosen, examined, left_out)
    results: dict[str, Any] = {
        "schema": storage.SCHEMA,
        "command": storage.command(),
        "environment": {**_environment(device), "kernels": cfg.hardware.kernels, "code": storage.code()},
        "evaluation": {"seed": cfg.seed, "memory_off": off, **options},
        "data": data,
        "corpora": {n: s.corpus.folder.name for n, s in sources.items() if isinstance(s, TextSource)},
        "models": {one.subject.name: one.subject.facts() for one in examined},
    }
    abouts = [_about(one, examined, results) for one in examined]
    results["of"] = _of([results["models"], results["corpora"], storage.content(options), abouts], subject.step)
    results["notes"] = left_out + _notes(examined, chosen, data)
    for note in results["notes"]:
        progress.say(note)
    folder = "evaluation-memory_off" if off else "evaluation"
    out = Path(cfg.out) if cfg.out else (subject.run_dir or _place(subject.folder)) / folder
    _check_writable(out)
    for one, about in zip(examined, abouts, strict=True):
        one.parts = Parts(one.subject.name, out / storage.MEASURED, about, progress, one.subject.model)
    _measure(results, chosen, fit, examined, progress)
    models = results["models"]
    missing = [f"{name}: {part} is missing: {why}" for name, m in models.items() for part, why in m["missing"].items()]
    if missing and not any(model[measure.name] for model in models.values() for measure in fit):
        raise ValueError(f"nothing could be measured; {missing[0]}")
    results["notes"] += missing
    results["seconds"] = round(time.perf_counter() - started, 1)
    out = out / "-".join([*_choice(), results["of"]])
    report = page([one.subject for one in examined], results, chosen)
    for one in examined:
        storage.write_records(out / "records" / storage.file_name(one.subject.name), one.parts.records)
    path = report.write(out)
    files.write(out / "results.json", json.dumps(results, indent=1, default=str))
    storage.point_to(out)
    for header, rows in tables(results, chosen).values():
        for part in shown(header, rows, progress.console.width):
            progress.console.print(part)
    progress.say(f"{results['seconds']:.0f} s; results: {path}")
    return not missing and not left_out


def _about(one: Examined, examined: Sequence[Examined], results: Mapping[str, Any]) -> list[Any]:
    """Everything but a part's settings that determines its result."""
    data = {key: value for key, value in results["data"].items() if key not in ("cache_dir", "tokenizer")}
    texts = {
        name: getattr(source, "manifest", None) or storage.content(data["sources"][name])
        for name, source in one.sources.items()
    }
    # Models read the same bytes in the tokens of all.
    tokens = sorted({storage.tokens(other.tokenizer) for other in examined})
    model = [results["models"][one.subject.name]["weights"], one.subject.memory_off, storage.tokens(one.tokenizer)]
    return [*model, one.seed, data, texts, tokens, results["environment"]]


def _measure(
    results: dict[str, Any],
    chosen: Sequence[Measure],
    fit: Sequence[Measure],
    examined: Sequence[Examined],
    progress: Progress,
) -> None:
    """Add the results of each model. Raises ``Stopped`` at a signal; parts that are complete are then kept."""
    progress.total = sum(measure.cost(one.sources) for one in examined for measure in fit)
    with Interrupt(), progress:
        try:
            for one in examined:
                subject, found = one.subject, results["models"][one.subject.name]
                progress.say(f"evaluating {subject.name}: {subject.folder}")
                with (
                    _off(subject) if subject.memory_off else nullcontext(),
                    progress.reading(subject.model),
                ):
                    for measure in chosen:
                        result = _result(measure, one, examined) if measure in fit else None
                        found[measure.name] = measure.nothing if result is None else result
                if one.parts.kept:
                    progress.say(f"{subject.name}: measured before: {', '.join(one.parts.kept)}")
                found["missing"], found["seconds"] = one.parts.missing, one.parts.seconds
        except KeyboardInterrupt:
            progress.say("Stopped; the same command measures what is left.")
            raise


def _off(subject: Subject) -> AbstractContextManager[None]:
    return memory_off(subject.model, None if subject.memory_off is True else subject.memory_off)


def _result(measure: Measure, one: Examined, examined: Sequence[Examined]) -> Any:
    """The result of a measure on a model; None if it cannot be measured."""
    if not measure.whole:
        return measure.run(one, examined)
    cost = measure.cost(one.sources)
    return one.parts.measure(measure.name, measure, lambda records: measure.run(one, examined), cost)


def _choice() -> list[str]:
    """The choice of the group ``eval``, if this is a command."""
    return [HydraConfig.get().runtime.choices["eval"]] if HydraConfig.initialized() else []


_KEYS = {"checkpoint": str, "control": str | None, "out": str | None, "seed": int}
_KEYS |= {"memory_off": bool | list, "ema": bool}


def _place(source: Path | str) -> Path:
    """The folder of the results of a model without a run, by its name."""
    name = Path(source).resolve().name if Path(source).exists() else str(source).replace("/", "--")
    return Path("runs") / "evaluation" / name


def _check_writable(out: Path) -> None:
    """Raise ValueError before the measurements, not after them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write(out / ".writable", "")
        # Another evaluation may have removed it.
        (out / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"out={out}: nothing can be written there ({error.strerror}); name another folder") from None


def _of(what: Any, step: int | None) -> str:
    """A name for everything that determines results: the step, and a hash."""
    return (f"step_{step:06d}-" if step is not None else "") + storage.digest(what)[:8]


def _control(
    cfg: DictConfig,
    data: dict[str, Any],
    first: Examined,
    device: torch.device,
    progress: Progress,
    left_out: list[str],
) -> list[Examined]:
    """The control, if it exists; a line in ``left_out`` if it cannot be compared."""
    if not Path(cfg.control).exists():
        progress.say(f"no control at {cfg.control}; 'python train.py memory=none' trains it")
        return []
    try:
        control = load_subject(cfg.control, device, "control", cfg.ema)
    except ValueError as error:
        left_out.append(f"control={cfg.control} is left out: {error}")
        return []
    control = replace(control, name=f"control ({control.name})")
    if cfg.data.tokenizer is None and fingerprint(control.tokenizer) != fingerprint(first.tokenizer):
        data = {**data, "tokenizer": control.place_of_tokenizer}
    try:
        return [examine(control, data, cfg.seed)]
    except ValueError as error:
        left_out.append(f"{control.name} cannot be compared and is left out: {error}")
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
    chosen: Sequence[Measure], examined: list[Examined], left_out: list[str]
) -> tuple[list[Measure], list[Examined]]:
    """The measures that fit the first model and its data, and the models that all of these fit; ``left_out`` gets
    lines on the others.

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
            left_out.append(f"{one.subject.name} is left out: it {reasons[0]}")
        else:
            able.append(one)
    left_out += [f"{name} is left out: {first.subject.name} {reason}" for name, reason in unfit.items()]
    return fit, able


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
    for key, kept in (("mixed_precision", ("auto", "no")), ("compile", (False,)), ("shard", (None,))):
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
        # It draws the texts.
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": processor,
    }
