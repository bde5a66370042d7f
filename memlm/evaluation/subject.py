"""The evaluated model, with the information in its checkpoint and its run."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memlm import attached, files
from memlm.configuration import MemLMConfig
from memlm.data import fingerprint, is_byte_tokenizer
from memlm.evaluation.storage import weights
from memlm.flops import count_flops, count_flops_of, count_parameters
from memlm.hub import load_tokenizer
from memlm.hub.causal import kinds, load_any
from memlm.reader import bytes_after
from memlm.training import checkpoint
from memlm.training.ema import use_average
from memlm.training.resume import FREE, Record


@dataclass
class Subject:
    """A model under evaluation and its origin.

    record: information on its run, empty if there is no run
    step: of the checkpoint, None if unknown
    lines: messages on newer, damaged checkpoints
    memory_off: whether it is measured without its long-term memory, or patterns of the parts that it lacks
    """

    name: str
    folder: Path | str
    run_dir: Path | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    record: Record
    step: int | None
    lines: list[str]
    memory_off: bool | list[str] = False

    @property
    def place_of_tokenizer(self) -> str:
        """A memory alone has the tokenizer of its backbone."""
        return str(attached.backbone_of(self.folder) or self.folder)

    @property
    def steps(self) -> int | None:
        """The configured number of steps of its run."""
        return _at(self.record.config, "train.steps", int)

    @property
    def trained_length(self) -> int | None:
        """Tokens of a row in its training."""
        return _at(self.record.config, "data.seq_len", int)

    def facts(self) -> dict[str, Any]:
        """Facts that distinguish it from other models, ready for JSON."""
        seed = _at(self.record.config, "seed", int)
        return {
            "checkpoint": str(self.folder),
            "kinds": kinds(self.model),
            "parameters": count_parameters(self.model),
            **self._sizes,
            "weights": weights(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_name(self.tokenizer),
            "step": self.step,
            "steps": self.steps,
            "tokens_seen": self._tokens_seen(),
            "begun_from": _at(self.record.config, "train.init_from", str),
            "seed": seed,
            "settings": without_seed(self.record.config, seed),
        }

    @cached_property
    def _sizes(self) -> dict[str, float | None]:
        """FLOPs of a token, and bytes of the memory of a text, in texts of the trained length; None if unknown."""
        if (length := self.trained_length) is None:
            return {"flops": None, "state_bytes": None}
        config = self.model.config
        own = isinstance(config, MemLMConfig)
        flops = count_flops(config, length) if own else count_flops_of(self.model, length)
        return {"flops": flops, "state_bytes": bytes_after(self.model, length)}

    def _tokens_seen(self) -> int | None:
        known = [_at(self.record.config, key, int) for key in ("train.batch_size", "data.seq_len")]
        if None in known or self.step is None:
            return None
        # In an earlier version, batch_size counted the rows of a forward.
        parts = _at(self.record.config, "train.gradient_accumulation", int) or 1
        return math.prod([*known, parts, self.step])


def load_subject(source: str, device: torch.device, key: str = "checkpoint", ema: bool = False) -> Subject:
    """The last checkpoint of a run directory, a checkpoint folder, or a hub name. Raises ValueError if there is none.

    ema: with the moving averages of the weights
    """
    path = Path(source)
    folder, lines = checkpoint.newest_whole(path)
    run_dir = path if folder else None
    if folder is None and files.is_sealed(path):
        try:
            files.check_seal(path)
        except ValueError as error:
            fix = f"put it back from a copy, or remove {files.DIGESTS} to take the folder as it is"
            raise ValueError(f"{key}={source}: {error}; {fix}") from None
    if path.is_dir() and path.parent.name == "checkpoints":
        run_dir = path.parent.parent
    elif not path.exists() and (source.startswith(("runs", ".", "/")) or source.count("/") != 1):
        raise ValueError(f"{key}={source}: there is no run; train it first, or name a run, a folder or a hub name")
    place = folder or source
    model = load_any(place)
    if ema:
        use_average(model, place, f"ema=true, {key}={source}")
    model = model.to(device).eval()
    name = (run_dir.name.split("-seed")[0] if run_dir else path.name) + (" (ema)" if ema else "")
    record = Record.read(run_dir or Path(place), Path(place))
    named = re.fullmatch(r"step_(\d+)", Path(place).name)
    step = int(named[1]) if named else _at(record.facts, "step", int)
    tokenizer = load_tokenizer(attached.backbone_of(place) or place)
    return Subject(name, place, run_dir, model, tokenizer, record, step, lines)


def tokenizer_name(tokenizer: PreTrainedTokenizerFast) -> str:
    if is_byte_tokenizer(tokenizer):
        return "byte"
    return f"{len(tokenizer):,} entries ({fingerprint(tokenizer)[:8]})"


def without_seed(settings: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """Settings that change the result, by full key, with the seed removed from paths."""
    kept = {key: value for key, value in flat(settings).items() if key != "seed" and not FREE.fullmatch(key)}
    return {key: re.sub(rf"seed{seed}\b", "seed*", x) if isinstance(x, str) else x for key, x in kept.items()}


def differences(models: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Settings that differ between the models: key -> each model's value."""
    keys = dict.fromkeys(key for model in models for key in model)
    found = {key: [model.get(key) for model in models] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as full key -> value."""
    leaves = {}
    for key, value in node.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _at(settings: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of a key; None if it is missing or has another type."""
    value = flat(settings).get(key)
    return value if type(value) is kind else None
