"""Any causal language model: the project's own, one with an attached memory, or one of transformers alone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from memlm import attached, files
from memlm.attached.layers import decoder_of
from memlm.cache import MemoryCache
from memlm.configuration import MemLMConfig
from memlm.hub import _first_line, load_model
from memlm.modeling import MemLMPreTrainedModel


def read_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a causal language model in a folder or under a hub name.

    Raises ValueError, one line, if there is none.
    """
    folder = Path(source)
    backbone = attached.backbone_of(source)
    if folder.is_dir() and not backbone and not (folder / "config.json").exists():
        raise ValueError(f"{source}: no config.json there; name a folder that save_pretrained wrote")
    with _one_line(source):
        if folder.is_dir() and not backbone:
            files.read_json(folder / "config.json")
        config = AutoConfig.from_pretrained(backbone or source)
        if config.is_encoder_decoder:
            raise ValueError(f"a {config.model_type} is an encoder-decoder; name a causal language model")
        return config


def load_any(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A causal language model from a folder or a hub name, with its memory if it has one.

    kwargs: of ``AutoModelForCausalLM.from_pretrained``

    Raises ValueError, one line, if there is none, or its files do not fit each other.
    """
    config = read_config(source)
    with _one_line(source):
        if isinstance(config, MemLMConfig):
            return load_model(source, **kwargs)
        # safetensors only: nothing is unpickled.
        return attached.from_pretrained(source, use_safetensors=True, **kwargs)


@contextmanager
def _one_line(source: str | Path) -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    # Configurations and models of many families raise anything.
    except Exception as error:
        line = _first_line(error)
        raise ValueError(line if line.startswith(f"{source}: ") else f"{source}: cannot be loaded: {line}") from error
    finally:
        logging.set_verbosity(verbosity)


def of_model(model: nn.Module, **words: Any) -> dict[str, Any]:
    """The keywords of ``MemLMModel.forward`` that others have not, for a model that has them; otherwise none."""
    return words if isinstance(model, MemLMPreTrainedModel) else {}


def new_memory(model: PreTrainedModel) -> Cache:
    """An empty memory of a model: without a long-term memory, its keys and values alone.

    Raises ValueError if the model takes no cache of transformers' usual kind.
    """
    if isinstance(model, MemLMPreTrainedModel):
        return MemoryCache()
    if not model._supports_default_dynamic_cache():
        raise ValueError(f"{type(model).__name__} takes no DynamicCache, so its memory cannot be carried on")
    return DynamicCache(config=model.config)


def kinds(model: PreTrainedModel) -> list[str]:
    """The kinds of a model's memories; behind the family, if it is of transformers."""
    if isinstance(model.config, MemLMConfig):
        beside = [] if model.config.side is None else [f"{model.config.side['form']} side network"]
        return [*dict.fromkeys(mixer["kind"] for mixer in model.config.mixers.values()), *beside]
    settings = attached.of(model)
    return [model.config.model_type, *([settings.memory["kind"]] if settings else [])]


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError if the tokenizer has more entries than the model, whose name is given, embeds."""
    entries, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if entries > rows:
        raise ValueError(f"data.tokenizer has {entries:,} entries, {name} embeds {rows:,}; leave data.tokenizer out")


def longest(model: PreTrainedModel) -> int | None:
    """The most tokens of a stream, if the model's decoder has a table of positions; None: any number."""
    # Not the whole model: an encoder of images has such a table too.
    decoder = decoder_of(model)
    names = (name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Embedding))
    return decoder.config.max_position_embeddings if any(re.search("pos|wpe", name) for name in names) else None
