"""Checkpoints that exist whole or not at all, and the run directory they live in.

runs/<name>/.../config.yaml  metrics.jsonl  checkpoints/step_000200/{model, tokenizer, trainer.pt}  checkpoints/latest
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.hub import load_model, load_tokenizer
from memlm.memory.base import SequenceMixer

_NAME = re.compile(r"step_\d{6,}")


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None. A folder with its final name is whole; the file ``latest`` names it."""
    return max(_whole(run_dir / "checkpoints"), key=_step, default=None)


def _whole(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def save(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trainer: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint ``step``, then point ``latest`` at it, then drop all but the newest ``keep``.

    A failure, a full disk among them, leaves the earlier checkpoints as they were.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        torch.save(trainer, partial / "trainer.pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder}: could not be written ({error}); free disk space and run the same command") from None
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    pointer = folder.parent / "latest"
    pointer.with_suffix(".tmp").write_text(folder.name)
    pointer.with_suffix(".tmp").replace(pointer)
    for old in sorted(_whole(folder.parent), key=_step)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_trainer(folder: Path) -> dict[str, Any]:
    """Optimiser state and step of a checkpoint. Raises ValueError if the file is damaged."""
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{folder / 'trainer.pt'}: damaged or missing ({type(error).__name__}); delete {folder} to go on from "
            "the checkpoint before it"
        ) from None


@torch.no_grad()
def copy_weights(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Give ``model`` the weights of ``source``, a run directory or a checkpoint's folder; returns that folder.

    Raises ValueError unless every parameter is there with the same shape, or starts silent (see ``SequenceMixer``),
    none is left over, and the tokens and what else the weights were made for are the same; mixers may have other
    settings, or be of another kind.
    """
    folder = latest(Path(source)) or Path(source)
    key = f"train.init_from={source}"
    if not folder.is_dir():
        raise ValueError(f"{key}: there is no run and no checkpoint there; name one, or null for a fresh start")
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{key}: its tokens are others than this run's; set data.tokenizer={folder}")
    source_model = load_model(folder)
    theirs, ours = (dict(m.named_parameters()) for m in (source_model, model))
    shapes = [{name: list(p.shape) for name, p in parameters.items()} for parameters in (theirs, ours)]
    silent = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, SequenceMixer)
        for name in module.starts_silent
    } - theirs.keys()
    differ = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if wrong := [name for name in differ if name not in silent]:
        there, here = (shape.get(wrong[0], "missing") for shape in shapes)
        others = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{key}: {wrong[0]} is {there} there and {here} here{others}; set model.* as in {folder / 'config.json'}"
        )
    for name in ("num_attention_heads", "rope_theta", "rms_norm_eps"):
        there, here = (getattr(m.config, name) for m in (source_model, model))
        if there != here:
            raise ValueError(f"{key}: its {name} is {there}, not {here}; set model.{name}={there}")
    for name in ours.keys() - silent:
        ours[name].copy_(theirs[name])
    return folder
