"""The files of evaluations: one folder each, a link to the newest, and results that are kept as they complete."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memlm import attached, files
from memlm.cli import typed
from memlm.data import fingerprint
from memlm.fingerprint import digest_of, stored

# Version of the form of results.json. 1 left products in place out of a model's FLOPs.
SCHEMA = 2
LATEST, MEASURED = "latest", "measured"


def command() -> str:
    """The command line of this process, quoted for a shell."""
    words = typed(sys.argv)
    return shlex.join(["python", *words] if words[0].endswith(".py") else words)


def point_to(folder: Path) -> None:
    """Make ``latest``, beside an evaluation's folder, a link to it."""
    latest, link = folder.parent / LATEST, folder.parent / f".{LATEST}-{os.getpid()}"
    if latest.is_dir() and not latest.is_symlink():
        # A tool that follows links has copied the run.
        latest.rename(latest.with_name(f"{LATEST}-copied-{os.getpid()}"))
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(latest)


def write_records(folder: Path, records: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """One file for each part, one line for each record."""
    for name, lines in records.items():
        text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
        files.write(folder / f"{file_name(name)}.jsonl", text)


def file_name(name: str) -> str:
    return name.replace("/", "--")


def plain(x: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as text."""
    return x.item() if hasattr(x, "item") else str(x)


def digest(words: Any) -> str:
    """A short hash of anything ready for JSON."""
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights(model: PreTrainedModel) -> str:
    """A hash of a model's weights and of the settings that its outputs and its generation depend on."""
    configs = [config.to_dict() for config in (model.config, getattr(model, "generation_config", None)) if config]
    apart = ("_name_or_path", "transformers_version")
    settings = [{key: value for key, value in config.items() if key not in apart} for config in configs]
    memory, adapters = attached.of(model), getattr(model, "peft_config", None)
    return digest_of(stored(model), digest([settings, str(memory), str(adapters)]))


def tokens(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of a tokenizer's texts and special tokens."""
    special = [sorted(tokenizer.all_special_ids), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return digest([fingerprint(tokenizer), special, tokenizer.clean_up_tokenization_spaces])


@functools.cache
def code() -> str:
    """A hash of the code that results depend on: this package, its kernels, and packages with parts for it."""
    groups = ("memlm.memory", "memlm.data", "memlm.measure")
    outside = {point.module.partition(".")[0] for group in groups for point in entry_points(group=group)}
    found = hashlib.sha256()
    for name in sorted({"memlm", "memlm_kernels", *outside}):
        spec = importlib.util.find_spec(name)
        places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        sources = [path for place in places for path in sorted(place.rglob("*.py"))]
        if spec and spec.origin and not places:
            sources = [Path(spec.origin)]
        for path in sources:
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def content(settings: Any) -> Any:
    """Settings ready for JSON, each name of a file or folder with the hashes of its files."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return content({field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)})
    if isinstance(settings, Mapping):
        return {str(key): content(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [content(value) for value in settings]
    if isinstance(settings, str | Path) and len(str(settings)) < 4096:
        path = Path(settings).expanduser()
        if path.is_file():
            return [str(settings), files.digest(path)]
        if path.is_dir():
            return [str(settings), *(files.digest(file) for file in sorted(path.rglob("*")) if file.is_file())]
    return settings if isinstance(settings, str | int | float | bool | None) else str(settings)
