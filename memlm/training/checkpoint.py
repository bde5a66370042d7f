"""Checkpoints that exist completely or not at all, and the run directory that holds them.

runs/<name>/.../config.yaml  manifest-<source>.json  metrics.jsonl  checkpoints/step_000200/  checkpoints/latest

A checkpoint holds everything that a run needs to continue: the model; the tokenizer; ``trainer.pt`` (optimisers);
with ``train.ema``, ``ema.safetensors``;
``config.yaml`` and ``manifest-<source>.json`` (settings and data of the run); ``run.json`` (its step, and where it
ran); ``README.md`` (the model card, which may be edited); and ``digests.json`` of all other files, written last.
Checkpoints of versions without digests have only the model, the tokenizer and ``trainer.pt``.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm import card, files
from memlm.attached.save import MEMORY
from memlm.configuration import MemLMConfig
from memlm.data import save_tokenizer
from memlm.hub import load_tokenizer
from memlm.hub.causal import load_any
from memlm.training.ema import WeightAverage

FACTS = "run.json"
_NAME = re.compile(r"step_\d{6,}")


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run by its name, or None; ``newest_whole`` checks the content."""
    return max(_checkpoints(run_dir), key=_step, default=None)


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and the reasons why newer ones were skipped; None if the run has no checkpoint.

    Raises ValueError if there are checkpoints and all are damaged.
    """
    found, damaged = _newest_whole(run_dir)
    return found, [f"{reason}; using {found.name}" for reason in damaged.values() if found]


def recover(run_dir: Path) -> tuple[Path | None, list[str]]:
    """``newest_whole`` for the process that writes there: damaged checkpoints are renamed, remains of killed saves
    removed.
    """
    found, damaged = _newest_whole(run_dir)
    for remains in [*(run_dir / "checkpoints").glob("*.partial-*"), *(run_dir / "checkpoints").glob("step_*.tmp")]:
        shutil.rmtree(remains, ignore_errors=True)
    lines = []
    for folder, reason in damaged.items():
        assert found
        lines.append(f"{reason}; kept as {_set_aside(folder).name}, continuing from {found.name}")
    return found, lines


def _newest_whole(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    damaged = {}
    for folder in sorted(_checkpoints(run_dir), key=_step, reverse=True):
        try:
            check(folder)
        except ValueError as error:
            damaged[folder] = str(error)
        else:
            return folder, damaged
    if damaged:
        raise ValueError(
            f"{run_dir}: none of its checkpoints is whole ({next(iter(damaged.values()))}); put one back from a copy, "
            "or choose another name=..."
        )
    return None, {}


def check(folder: Path) -> None:
    """Raise ValueError, with the file, unless a checkpoint is as written.

    A checkpoint without digests is from an earlier version: its files must then be readable and belong to its step.
    """
    try:
        if files.is_sealed(folder):
            files.check_seal(folder)
            step = files.read_json(folder / FACTS).get("step")
        elif (folder / FACTS).exists():
            raise ValueError(f"{folder / files.DIGESTS}: missing")
        else:
            files.read_json(folder / "config.json")
            if not (weights := [*folder.glob("*.safetensors")]):
                raise ValueError(f"{folder / 'model.safetensors'}: missing")
            for path in weights:
                # Compares the sizes in its header with the file.
                with safe_open(path, "pt"):
                    pass
            step = load_trainer(folder).get("step")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be read ({str(error).splitlines()[0]})") from None
    if step != _step(folder):
        raise ValueError(f"{folder}: holds step {step}")


def _checkpoints(run_dir: Path) -> list[Path]:
    return [p for p in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name)]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that nothing reads it; the user may still rescue its content."""
    names = (folder.with_name(f"{folder.name}.damaged{n or ''}") for n in count())
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    files.sync(folder.parent)
    return aside


@contextmanager
def new(run_dir: Path, step: int, keep: int) -> Iterator[Path]:
    """A folder to fill with checkpoint ``step``. After the block it is complete, ``latest`` points at it, and all but
    the newest ``keep`` are removed.

    If the block fails, for example on a full disk, the earlier checkpoints are unchanged.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    try:
        if folder.exists():
            _set_aside(folder)
        with files.new_folder(folder) as partial:
            yield partial
        files.write(folder.parent / "latest", folder.name)
    except Exception as error:
        # Libraries wrap system errors in their own exceptions; tokenizers raises a bare Exception.
        raise OSError(f"{folder}: could not be written ({error}); free disk space and run the same command") from error
    for old in sorted(_checkpoints(run_dir), key=_step)[:-keep]:
        # A partly removed checkpoint must not keep its name.
        shutil.rmtree(old.rename(old.with_name(f"{old.name}.partial-old")), ignore_errors=True)


class Beside(NamedTuple):
    """The content of a checkpoint beside the model. trainer: its step, and the state of optimisers; record: further
    text files, among them ``run.json``
    """

    tokenizer: PreTrainedTokenizerBase
    trainer: dict[str, Any]
    record: Mapping[str, str]


def save(
    run_dir: Path, step: int, model: PreTrainedModel, beside: Beside, keep: int, ema: WeightAverage | None = None
) -> Path:
    """Write checkpoint ``step``, and return its folder; see ``new``."""
    with new(run_dir, step, keep) as partial:
        model.save_pretrained(partial)
        if ema:
            ema.save(partial)
        describe(partial, beside)
    return run_dir / "checkpoints" / f"step_{step:06d}"


def describe(partial: Path, beside: Beside) -> None:
    """Write all files of a checkpoint but those of the model."""
    save_tokenizer(beside.tokenizer, partial)
    torch.save(beside.trainer, partial / "trainer.pt")
    for name, text in beside.record.items():
        (partial / name).write_text(text, encoding="utf-8")
    card.write(partial, run=partial)


def load_trainer(folder: Path) -> dict[str, Any]:
    """Optimiser state and step of a checkpoint. Raises ValueError if the file is damaged."""
    path = folder / "trainer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: damaged or missing ({type(error).__name__})") from None
    if not isinstance(state, dict) or not {"step", "optimizers"} <= state.keys():
        raise ValueError(f"{path}: holds no state of a run")
    return state


@torch.no_grad()
def copy_weights(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, list[str]]:
    """Copy the weights of ``source``, a run directory or a checkpoint's folder, to ``model``.

    Returns that folder, and the reasons why newer checkpoints were skipped. Mixers may have other settings or kinds.

    Raises ValueError unless parameters match by name and shape, tokens are the same, and the models' other settings
    agree. A parameter may be missing in ``source`` only if it starts silent (``SequenceMixer``), as those of taps and
    of an attached memory do.
    """
    key = f"train.init_from={source}"
    newest, passed_over = newest_whole(Path(source))
    folder = newest or Path(source)
    if not folder.is_dir():
        raise ValueError(f"{key}: there is no run and no checkpoint there; name one, or null for a fresh start")
    if newest is None and files.is_sealed(folder):
        files.check_seal(folder)
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{key}: its tokens differ from this run's; set data.tokenizer={folder}")
    source_model = load_any(folder)
    theirs, ours = (dict(m.named_parameters()) for m in (source_model, model))
    shapes = [{name: list(p.shape) for name, p in parameters.items()} for parameters in (theirs, ours)]
    silent = {
        f"{path}.{name}" for path, module in model.named_modules() for name in getattr(module, "starts_silent", ())
    }
    silent = (silent | {name for name in ours if MEMORY in name}) - theirs.keys()
    differ = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if wrong := [name for name in differ if name not in silent]:
        there, here = (shape.get(wrong[0], "missing") for shape in shapes)
        others = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{key}: {wrong[0]} is {there} there and {here} here{others}; set model.* as in {folder / 'config.json'}"
        )
    for name in ("num_attention_heads", "rope_theta", "rope_scaling", "norm_outputs", "rms_norm_eps"):
        there, here = (getattr(m.config, name, None) for m in (source_model, model))
        if there != here:
            own = isinstance(model.config, MemLMConfig)
            fix = f"set model.{name}={there}" if own else "set backbone=... to that of the run"
            raise ValueError(f"{key}: its {name} is {there}, not {here}; {fix}")
    for name in ours.keys() - silent:
        ours[name].copy_(theirs[name])
    return folder, passed_over
