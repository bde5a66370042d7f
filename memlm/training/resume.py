"""Checks whether a checkpoint belongs to the requested run: settings that change the result, the model, the data."""

import json
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedTokenizerBase
from yaml import YAMLError

from memlm import files
from memlm.data import check_manifest
from memlm.data.tokenizer import fingerprint
from memlm.hub import load_tokenizer
from memlm.training.checkpoint import FACTS
from memlm.training.optim import stable_steps
from memlm.training.settings import OptimSettings, TrainSettings

CONFIG = "config.yaml"
# Settings that do not change the result: places, the division of rows, display and saving.
_PLACES = r"name|run_dir|tracker\..*|data\.cache_dir"
FREE = re.compile(
    rf"{_PLACES}|hardware\..*|train\.(micro_batch_size|gradient_checkpointing|keep)"
    r"|train\.((log|validate|save)_every|validation_batches|on_nan|spike)"
    r"|data\.sources\.[^.]+\.probe_(every|steps)"
)
# Compared by their effect: the schedule, the model's configuration, the tokens. A backbone is compared by its name,
# because its weights are in the checkpoint.
_ELSEWHERE = re.compile(r"train\.steps|optim\.schedule_steps|model\.(?!backbone$).*|data\.tokenizer(\..*)?")

# Settings that a run of an earlier version may lack, at the values that change nothing.
DEFAULTS = {
    group: {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    for group, settings in {"train": TrainSettings, "optim": OptimSettings}.items()
}


@dataclass(frozen=True)
class Record:
    """A checkpoint's information on its run. Parts that earlier versions did not keep are empty.

    config: the settings; manifests: the files of each source that has any; facts: the step, and where it ran
    """

    config: dict[str, Any]
    manifests: dict[str, Any]
    facts: dict[str, Any]

    def texts(self) -> dict[str, str]:
        """The record's files, name -> content."""
        manifests = {f"manifest-{name}.json": json.dumps(m, indent=1) for name, m in self.manifests.items()}
        config = OmegaConf.to_yaml(OmegaConf.create(self.config))
        return {CONFIG: config, **manifests, FACTS: json.dumps(self.facts, indent=1)}

    @classmethod
    def read(cls, run_dir: Path, folder: Path) -> "Record":
        """The record of a checkpoint; for one of an earlier version, as far as the run directory has it."""
        facts = files.read_json(folder / FACTS) if (folder / FACTS).exists() else {}
        place = folder if facts else run_dir
        try:
            config = OmegaConf.to_container(OmegaConf.load(place / CONFIG))
        except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException):
            config = None
        if not isinstance(config, dict) or not all(
            isinstance(config.get(g), dict) for g in ("data", "optim", "train")
        ):
            config = {}
        manifests = {}
        for path in place.glob("manifest-*.json"):
            try:
                manifests[path.stem.removeprefix("manifest-")] = files.read_json(path)
            except ValueError:
                if facts:
                    raise
        return cls(config, manifests, facts)

    def compare_settings(self, run_dir: Path, now: dict[str, Any], processes: int) -> list[str]:
        """Lines on settings that differ and may differ.

        Raises ValueError, with the key and a fix, for the first difference that changes the result.
        """
        if not self.config:
            return [f"{run_dir / CONFIG}: cannot be read; continuing without a comparison of settings"]
        before, lines = _with_global_batch(self.config, processes)
        before = _with_defaults(before)
        changed = []
        for key, old, new in _differences(before, now, ""):
            source = re.fullmatch(r"data\.sources\.([^.]+)\.paths", key)
            if FREE.fullmatch(key):
                changed += [] if re.fullmatch(_PLACES, key) else [f"{key} {_as_typed(old)} -> {_as_typed(new)}"]
            elif not _ELSEWHERE.fullmatch(key) and not (source and source[1] in self.manifests):
                known = _has(before, key)
                # model.backbone is the copy of a key that users set.
                key = "backbone" if key == "model.backbone" else key
                said = f"has {_as_typed(old)}" if known else "was begun without it"
                fix = f"set {key}={_as_typed(old)}" if known else "leave it out"
                raise ValueError(
                    f"{key}={_as_typed(new)}, but the run in {run_dir} {said}; {fix} to continue that run, or "
                    "choose another name=..."
                )
        _compare_schedules(run_dir, before, now, self.facts.get("step"))
        if (old := before["train"]["steps"]) != (new := now["train"]["steps"]):
            changed.append(f"train.steps {old} -> {new}")
        if (old := self.facts.get("processes", processes)) != processes:
            changed.append(f"processes {old} -> {processes}, each step still of {now['train']['batch_size']} rows")
        return [*lines, *([f"changed since: {', '.join(changed)}"] if changed else [])]

    def data(self, folder: Path, now: dict[str, Any]) -> dict[str, Any]:
        """The data settings of ``now``. A backbone's own tokenizer is that of the checkpoint in ``folder``, as its
        weights are: its folder may be gone.
        """
        source = now["model"].get("backbone")
        own = source is not None and source == now["data"]["tokenizer"]
        return {**now["data"], "tokenizer": str(folder)} if own else now["data"]

    def compare_data(self, folder: Path, tokenizer: PreTrainedTokenizerBase, manifests: dict[str, Any]) -> None:
        """Raise ValueError, with the source, if texts or tokens differ from those that the run began with."""
        if fingerprint(load_tokenizer(folder)) != fingerprint(tokenizer):
            raise ValueError(
                f"data.tokenizer: its tokens differ from those of {folder}; set data.tokenizer={folder} to "
                "continue that run, or choose another name=..."
            )
        for name, now in manifests.items():
            if name in self.manifests:
                check_manifest(name, self.manifests[name], now)


def compare_models(run_dir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError for the first setting of the model that differs (``memlm.training.model.described``)."""
    for key, old, new in _differences(before, now, "model"):
        raise ValueError(
            f"{key}={_as_typed(new)}, but the model of the run in {run_dir} has {_as_typed(old)}; set "
            f"{key}={_as_typed(old)} to continue that run, or choose another name=..."
        )


def _compare_schedules(run_dir: Path, before: dict[str, Any], now: dict[str, Any], step: int | None) -> None:
    """step: of the checkpoint"""
    old, new = (c["optim"].get("schedule_steps") or c["train"]["steps"] for c in (before, now))
    # A final share of 1 is a constant rate.
    if old == new or now["optim"]["final_lr"] == 1:
        return
    # As long as neither has begun to fall, the steps so far are the same.
    constant = stable_steps(min(old, new), now["optim"]["decay"]) if now["optim"]["schedule"] == "wsd" else 0
    if step is not None and step <= constant:
        return
    key = "optim.schedule_steps" if now["optim"].get("schedule_steps") else "train.steps"
    raise ValueError(
        f"{key}={new}, but the learning rate of the run in {run_dir} falls until step {old}; add "
        f"optim.schedule_steps={old} to keep to that, and to its last rate from there, or begin a run of another name "
        f"with train.init_from={run_dir}"
    )


def _with_global_batch(config: dict[str, Any], processes: int) -> tuple[dict[str, Any], list[str]]:
    """Settings from before ``train.batch_size`` counted all rows of a step, converted; and a line if rows change."""
    train = dict(config["train"])
    if "gradient_accumulation" not in train:
        return config, []
    parts, rows = train.pop("gradient_accumulation"), train["batch_size"]
    train |= {"batch_size": rows * parts * processes, "micro_batch_size": None}
    line = (
        f"begun with train.gradient_accumulation={parts} and train.batch_size={rows} rows of a forward: from here on "
        f"train.batch_size={train['batch_size']} counts all rows of a step, and these may be others"
    )
    return {**config, "train": train}, [line] if parts > 1 else []


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version, plus those that it did not have."""
    return config | {name: values | config[name] for name, values in DEFAULTS.items()}


def _differences(a: Any, b: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{key}.{k}" if key else k)]
    return [] if a == b else [(key, a, b)]


def _has(config: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return False
        config = config[name]
    return True


def _as_typed(value: Any) -> str:
    """A value as typed on a command line."""
    return value if isinstance(value, str) else json.dumps(value)
