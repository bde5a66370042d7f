"""A run as a folder for the Hub: model, tokenizer, and a card with the results of ``evaluate.py``."""

import json
import shutil
from pathlib import Path

from transformers import AutoConfig

from memlm import card, files
from memlm.configuration import MemLMConfig
from memlm.settings import require
from memlm.training.checkpoint import newest_whole

# For a continuation of the run, and with directories of the machine.
_LEFT_OUT = ("trainer.pt", files.DIGESTS, "run.json", "config.yaml", files.CARD)


def export(source: str | Path, target: str | Path, name: str | None = None) -> Path:
    """Copy the newest checkpoint of a run, or a checkpoint, to the folder ``target`` and write its card; returns it.

    target: a folder of its own; it may hold an earlier export, which is renewed. A card that was edited there stays
    name: of the repository on the Hub, such as "me/titans_mag", for the card's example

    Raises ValueError if there is no whole checkpoint, if results are of another step, or if ``target`` is a checkpoint
    of a run or holds other files.
    """
    source, target = Path(source), Path(target)
    folder = newest_whole(source)[0] or source
    require((folder / "config.json").is_file(), f"{source}: neither a run with a checkpoint, nor a checkpoint")
    if files.is_sealed(folder):
        files.check_seal(folder)
    own = files.is_sealed(target) or target.resolve() == folder.resolve()
    require(not own, f"{target}: is a checkpoint itself, and an export would replace its weights; name another folder")
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else None
    reports = sorted(run_dir.glob("evaluation*/latest/report.md")) if run_dir else []
    for report in reports:
        _check_step(report.with_name("results.json"), folder)
    _make_room(target)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*_LEFT_OUT), dirs_exist_ok=True)
    for report in reports:
        place = target / report.parents[1].name
        shutil.copytree(report.parent / "plots", place / "plots")
        files.write(place / report.name, card.without_places(report.read_text(encoding="utf-8")))
    config = AutoConfig.from_pretrained(target)
    if isinstance(config, MemLMConfig):
        # Checkpoints of earlier versions lack ``auto_map`` and its file.
        config.save_pretrained(target)
    if (attached := target / card.ATTACHED).exists():
        # The backbone is in the folder too; its name is only a note.
        files.write(attached, json.dumps(card.without_places(files.read_json(attached)), indent=1))
    # Versions before run.json kept the record in the run's folder.
    card.write(target, name, run=folder if (folder / "run.json").exists() else run_dir)
    return target


def _make_room(target: Path) -> None:
    """Remove the weights and the results of an earlier export. Raises ValueError if ``target`` holds other files."""
    if target.exists():
        empty = target.is_dir() and not any(target.iterdir())
        require(empty or (target / "config.json").exists(), f"{target}: holds other files; name another folder")
    for old in [*target.glob("model*.safetensors*"), *target.glob("evaluation*")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _check_step(results: Path, folder: Path) -> None:
    """Raise ValueError unless results are of this checkpoint."""
    models = files.read_json(results).get("models") or {}
    measured = next(iter(models.values()), {}).get("checkpoint", "")
    require(
        Path(measured).name == folder.name,
        f"{results}: its results are of {measured}, not of {folder.name}; run evaluate.py again, or remove them",
    )
