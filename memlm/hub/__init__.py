"""Checkpoints: loading our own, with errors that name the file, and converting foreign ones. See README.md here.

Files:

    export              a run as a folder for the Hub
    families            plain decoders of transformers, both ways: Llama, Mistral, Qwen, SmolLM, OLMo
    shards              weights read and written a part at a time
    causal              any causal language model, with or without a memory
    fla_mom             flash-linear-attention's mixture of memories, both ways
    msa                 the released Memory Sparse Attention, both ways
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from memlm import files
from memlm.configuration import MemLMConfig
from memlm.data import read_tokenizer
from memlm.flops import count_parameters
from memlm.modeling import MemLMForCausalLM


class Fields(dict[str, Any]):
    """The content of a foreign config.json; a missing field raises ValueError."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"config.json: {self.where}{name} is missing; the folder holds no checkpoint of this format")


def require_plain(config: MemLMConfig) -> None:
    """Raise ValueError for settings of the decoder that Llama's own form lacks, and so do formats like it."""
    for name, value in {"rope_scaling": None, "norm_outputs": False, "taps": None, "side": None}.items():
        if (found := getattr(config, name)) != value:
            raise ValueError(f"model.{name}={found!r:.80}; only {value!r} can be converted to this format")


def load_model(source: str | Path, **kwargs: Any) -> MemLMForCausalLM:
    """A model from a checkpoint folder or a hub name; every weight must match.

    kwargs: of ``from_pretrained``

    Raises ValueError with the folder if configuration or weights are invalid or do not fit each other.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise ValueError(f"{source}: no config.json there; name a folder that save_pretrained wrote")
    if files.in_parts_alone(Path(source)):
        raise ValueError(f"{source}: its weights are in parts; run python scripts/consolidate.py {source}")
    # transformers would report this over many lines; below it is one error.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        if Path(source).is_dir():
            _check_files(Path(source))
        config = _configuration(source)
        _check_size(Path(source), config)
        # safetensors only: nothing is unpickled.
        model, report = MemLMForCausalLM.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **kwargs,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: cannot be loaded: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    for kind in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if names := sorted(str(name[0] if isinstance(name, tuple) else name) for name in report[kind]):
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{source}: {kind.removesuffix('_keys')} weights: {names[0]}{others}; config.json and "
                "model.safetensors are not of one model"
            )
    return model


def _configuration(source: str | Path) -> MemLMConfig:
    try:
        return MemLMConfig.from_pretrained(source)
    except Exception as error:
        # Some versions of transformers check types first, and raise errors of their own type.
        raise ValueError(_first_line(error)) from None


def _check_files(folder: Path) -> None:
    """Raise ValueError for JSON whose form would crash transformers."""
    kind = files.read_json(folder / "config.json").get("model_type", MemLMConfig.model_type)
    if kind != MemLMConfig.model_type:
        raise ValueError(f"config.json: model_type={kind!r:.80} is not {MemLMConfig.model_type!r}; convert it first")
    generation = folder / "generation_config.json"
    if generation.exists():
        settings = files.read_json(generation)
        try:
            GenerationConfig.from_dict(settings)
        except Exception as error:
            # Its checks raise exceptions of any type.
            raise ValueError(f"{generation}: {_first_line(error)}; repair it, or remove it for the defaults") from None
    if not (folder / files.WHOLE).exists() and (folder / files.INDEX).exists():
        files.weight_map(folder / files.INDEX)


def _check_size(folder: Path, config: MemLMConfig) -> None:
    """Raise ValueError, before any allocation, if a folder's weights cannot fill the model of its config."""
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not held:
        return
    with torch.device("meta"):
        needed = count_parameters(MemLMForCausalLM(config))
    # Quantised weights hold at most two numbers in a byte.
    if needed > 2 * held:
        raise ValueError(
            f"config.json describes {needed:,} parameters, and {held:,} bytes of safetensors cannot hold them; "
            "they are not of one model"
        )


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved with a model. Raises ValueError if there is none."""
    try:
        return read_tokenizer(AutoTokenizer, source)
    except ValueError as error:
        raise ValueError(f"{source}: no tokenizer there: {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
