"""Attached memories from files (``memlm.attached.save``)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, cached_file, logging

from memlm import files
from memlm.attached.call import Settings, settings_of
from memlm.attached.layers import decoder_of
from memlm.attached.model import attach, detach
from memlm.attached.save import MEMORY, WEIGHTS, WORDS, fingerprint_of
from memlm.settings import require


def load_memory(model: PreTrainedModel, directory: str | Path, strict: bool = True) -> PreTrainedModel:
    """Attach the memory that ``save_memory`` wrote to the backbone that it was trained with. Returns the model.

    strict: if false, another backbone of equal sizes may take it, or the same one in another dtype

    Raises ValueError if the backbone is another, or the files are damaged.
    """
    settings, words = _read_words(Path(directory) / WORDS)
    _check_backbone(model, words, directory, strict)
    tensors = _tensors([Path(directory) / WEIGHTS])
    return _filled(model, settings, tensors, directory)


def from_pretrained(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model with its memory, or a causal language model without one.

    source: a folder, or a name on the hub, that ``save_pretrained`` or ``push_to_hub`` of a model with a memory wrote;
        a folder of ``save_memory``, whose backbone is then loaded by its name; or any other model
    kwargs: of ``AutoModelForCausalLM.from_pretrained``

    Raises ValueError if the files are damaged or do not fit each other.
    """
    place = {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name)}
    hub = place | {name: kwargs[name] for name in ("token", "cache_dir") if name in kwargs}
    words_path = _file(source, WORDS, hub)
    if words_path is None:
        return _backbone(AutoModelForCausalLM, source, kwargs)
    settings, words = _read_words(words_path)
    own = getattr(transformers, str(words.get("class")), None)
    known = own if isinstance(own, type) and issubclass(own, PreTrainedModel) else AutoModelForCausalLM
    alone = _file(source, WEIGHTS, hub)
    if alone is not None:
        _check_name(words, source)
        if _file(source, ADAPTER_CONFIG_NAME, hub):
            model = known.from_pretrained(source, **kwargs)
        else:
            others = {name: value for name, value in kwargs.items() if name not in place}
            model = known.from_pretrained(words["backbone"], **others)
        _check_backbone(model, words, source, strict=True)
        return _filled(model, settings, _tensors([alone]), source)
    weights = _weight_files(source, hub, kwargs.get("variant"))
    return _filled(_backbone(known, source, kwargs, settings), settings, _tensors(weights), source)


def backbone_of(source: str | Path) -> str | None:
    """The name of the backbone of a folder of ``save_memory``; None for another folder and for names on the hub.

    An adapter of PEFT in the folder has the backbone's name itself.
    """
    folder = Path(source)
    if not (folder / WEIGHTS).is_file() or (folder / ADAPTER_CONFIG_NAME).exists():
        return None
    words = _read_words(folder / WORDS)[1]
    _check_name(words, source)
    return words["backbone"]


def _check_name(words: dict[str, Any], source: str | Path) -> None:
    require(bool(words["backbone"]), f"{source}: the memory's backbone has no name; load it, then memlm.load_memory")


def _read_words(path: Path) -> tuple[Settings, dict[str, Any]]:
    require(path.is_file(), f"{path}: no such file; a memory is written by memlm.save_memory")
    words = files.read_json(path)
    require({"attached", "backbone", "fingerprint"} <= words.keys(), f"{path}: holds no attached memory")
    try:
        return settings_of(words["attached"]), words
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _check_backbone(model: PreTrainedModel, words: dict[str, Any], source: str | Path, strict: bool) -> None:
    if not strict or (found := fingerprint_of(model)) == words["fingerprint"]:
        return
    raise ValueError(
        f"{source}: this memory was trained with {words['backbone'] or 'a backbone'} of fingerprint "
        f"{words['fingerprint']}, not {found}; load that model in its dtype, or give memlm.load_memory strict=False"
    )


def _filled(
    model: PreTrainedModel, settings: Settings, tensors: dict[str, Tensor], source: str | Path
) -> PreTrainedModel:
    try:
        dtype = getattr(torch, settings.dtype)
        attach(model, settings.memory, settings.layers, window=settings.window, sinks=settings.sinks, dtype=dtype)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    wanted = {name: list(x.shape) for name, x in model.state_dict().items() if MEMORY in name}
    # A head around the decoder changes the first part of names, and so does transformers when it saves some families.
    decoder = decoder_of(model)
    first = next(f"{path}." if path else "" for path, module in model.named_modules() if module is decoder)
    known = {name.removeprefix(first) for name in wanted}
    tensors = {first + _within(name, known): x for name, x in tensors.items()}
    held = {name: list(x.shape) for name, x in tensors.items()}
    if differ := [name for name in wanted | held if wanted.get(name) != held.get(name)]:
        there, here = (shapes.get(differ[0], "missing") for shapes in (held, wanted))
        detach(model)
        raise ValueError(f"{source}: {differ[0]} is {there} there, and {here} in the model; they do not fit")
    model.load_state_dict(tensors, strict=False)
    return model


def _within(name: str, known: set[str]) -> str:
    """The last part of a name that is known; all of it if none is."""
    parts = name.split(".")
    return next((part for i in range(len(parts)) if (part := ".".join(parts[i:])) in known), name)


def _tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The memory's tensors of safetensors files."""
    tensors = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if MEMORY in name}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); restore it") from None
    return tensors


def _file(source: str | Path, name: str, hub: dict[str, Any]) -> Path | None:
    """A file of a folder or of the hub; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / hub.get("subfolder", "") / name
        return path if path.is_file() else None
    found = cached_file(
        str(source), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False, **hub
    )
    return None if found is None else Path(found)


def _weight_files(source: str | Path, hub: dict[str, Any], variant: str | None) -> list[Path]:
    """The files that hold the memory's weights: the whole file, which transformers prefers, or those of an index."""
    dot = f".{variant}" if variant else ""
    names = {f"model{dot}.safetensors"}
    if _file(source, *names, hub) is None and (index := _file(source, f"model.safetensors.index{dot}.json", hub)):
        names = {part for name, part in files.weight_map(index).items() if MEMORY in name}
    paths = {name: _file(source, name, hub) for name in sorted(names)}
    for name, path in paths.items():
        require(path is not None, f"{source}: {name} is missing")
    return [path for path in paths.values() if path is not None]


def _backbone(
    known: Any, source: str | Path, kwargs: dict[str, Any], settings: Settings | None = None
) -> PreTrainedModel:
    """A model of transformers, which reports the memory's weights as unexpected.

    known: its class; settings: of the memory in the same files; None: they hold none
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        model, report = known.from_pretrained(source, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    require(
        settings is not None or not any(MEMORY in str(name) for name in report["unexpected_keys"]),
        f"{source}: the weights hold a memory, and {WORDS} is missing; model.save_pretrained writes both",
    )
    for kind in ("mismatched_keys", "missing_keys", "unexpected_keys")[: None if settings else 2]:
        if names := sorted(str(name) for name in report[kind] if MEMORY not in str(name)):
            raise ValueError(f"{source}: {kind.removesuffix('_keys')} weights: {names[0]}, {len(names)} in all")
    return model
