"""The model of a run: a new decoder, a model of memlm as it is, or a backbone with a memory beside its attention."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm import attached, side
from memlm.configuration import MemLMConfig
from memlm.hub.causal import check_vocabulary, load_any, longest, read_config
from memlm.memory.base import complete_settings
from memlm.modeling import MemLMForCausalLM, MemLMPreTrainedModel
from memlm.settings import build_config, check_type, require

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BackboneSettings:
    """See configs/model/backbone.yaml."""

    backbone: str
    layers: list | None
    window: int | None
    sinks: int
    dtype: str | None
    mixers: dict
    side: dict | None = None

    def __post_init__(self) -> None:
        require(self.backbone != "", "backbone='' names no model; set backbone=PATH_OR_ID")
        known = self.dtype is None or self.dtype in DTYPES
        require(known, f"dtype={self.dtype!r} is unknown; use {', '.join(DTYPES)}, or null for the checkpoint's")
        others = [name for name in self.mixers if name != "memory"]
        require(not others, f"mixers.{others[:1]}: a backbone gets one memory, mixers.memory; leave it out")
        alone = self.memory is None and (self.layers, self.window, self.sinks) != (None, None, 0)
        require(not alone, "layers, window and sinks are of a memory; choose one with memory=..., or leave them out")

    @property
    def memory(self) -> dict[str, Any] | None:
        """The settings of the memory; None for ``memory=none``: the backbone alone."""
        if not self.mixers.get("memory"):
            return None
        settings = complete_settings(self.mixers["memory"], "mixers.memory")
        return None if settings["kind"] == "attention" else settings

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "BackboneSettings | None":
        """The settings of a model group; None if it describes a new decoder."""
        if "backbone" not in settings:
            require(not settings.get("side"), "side=...: it stands beside a trained decoder; set backbone=PATH_OR_ID")
            return None
        require(settings["backbone"] is not None, "model=backbone has no backbone; set backbone=PATH_OR_ID")
        of = build_config(cls, dict(settings), "model")
        return of if of.side is None else replace(of, side=side.complete(of.side))


def check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, before the data is read, if a backbone's settings are wrong or it is not there."""
    if (of := BackboneSettings.of(settings)) is not None:
        source = of.backbone
        there = Path(source).exists() or (source.count("/") == 1 and not source.startswith((".", "/", "runs/")))
        require(there, f"backbone={source}: there is no such folder; name a folder, or a hub name: OWNER/NAME")
        try:
            read_config(source)
        except ValueError as error:
            fix = "" if Path(source).exists() else "; name a folder, or a hub name in reach"
            raise ValueError(f"backbone={str(error).rstrip('.')}{fix}") from None


def build(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a run's first step. Raises ValueError with the key if the settings do not fit."""
    of = BackboneSettings.of(settings)
    if of is None:
        return MemLMForCausalLM(model_config(settings, tokenizer))
    key, source = f"backbone={of.backbone}", of.backbone
    model = load_any(source, dtype="auto" if of.dtype is None else getattr(torch, of.dtype))
    if isinstance(model, MemLMPreTrainedModel):
        _require_none(of)
    if of.side is not None:
        try:
            model.add_side(of.side)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    fix = "name its backbone, and give its weights by train.init_from"
    require(attached.of(model) is None, f"{key}: it has a memory already; {fix}")
    check_vocabulary(model, tokenizer, key)
    if of.memory is not None:
        try:
            attached.attach(model, of.memory, of.layers, window=of.window, sinks=of.sinks)
        except ValueError as error:
            place = re.match(r"(memory\.|layers|window|sinks)", str(error))
            prefix = f"{key}: " if place is None else "model.mixers." if place[1] == "memory." else "model."
            raise ValueError(f"{prefix}{error}") from None
    return model


def _require_none(of: BackboneSettings) -> None:
    """Raise ValueError if a decoder of memlm would get a memory."""
    none = "use memory=none, which trains it as it is"
    require(of.memory is None, f"backbone={of.backbone}: it has a memory already; {none}")


def described(model: PreTrainedModel) -> dict[str, Any]:
    """The settings of a model, defaults included."""
    found, dtype = attached.of(model), str(model.dtype).removeprefix("torch.")
    if isinstance(model.config, MemLMConfig):
        return {**_values(model.config), "dtype": dtype}
    if found is None:
        return {"layers": None, "window": None, "sinks": 0, "dtype": dtype, "mixers": {}}
    places = {"layers": found.layers, "window": found.window, "sinks": found.sinks}
    return {**places, "dtype": dtype, "mixers": {"memory": found.memory}}


def expected(
    settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, before: PreTrainedModel
) -> dict[str, Any]:
    """The result of ``described`` for a model of these settings; a backbone's settings that are null are as before.

    Raises ValueError if a model of transformers has no backbone here, or one with memories gets another.
    """
    of = BackboneSettings.of(settings)
    own = isinstance(before.config, MemLMConfig)
    require(own or of is not None, f"the run's model is a {before.config.model_type}; choose another name=...")
    here = described(before)
    if of is None:
        return {**_values(model_config(settings, tokenizer)), "dtype": here["dtype"]}
    given = {"layers": of.layers, "dtype": of.dtype}
    chosen = {name: value for name, value in given.items() if value is not None}
    if own:
        _require_none(of)
        return {**here, **chosen, **({} if of.side is None else {"side": of.side})}
    mixers = {"memory": of.memory} if of.memory else {}
    return {**here, **chosen, "window": of.window, "sinks": of.sinks, "mixers": mixers}


def _values(config: MemLMConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in MemLMConfig.__annotations__ if name != "use_cache"}


def checkpoint_layers(model: PreTrainedModel, chosen: bool | list) -> None:
    """Let the backward compute the activations of layers again. chosen: all, or those of ``layers_of``

    Raises ValueError if a model has no such layers.
    """
    if not chosen:
        return
    # Renamed in transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    if isinstance(chosen, list):
        own = isinstance(model, MemLMPreTrainedModel)
        key = f"train.gradient_checkpointing={chosen}"
        own = own and model.config.side is None
        require(own, f"{key} names layers of memlm's decoder, and this is a backbone; use true or false")
        model.base_model.checkpointed_layers = layers_of(model.config, chosen)


def layers_of(config: MemLMConfig, chosen: list) -> list[int]:
    """Numbers of the layers with these numbers, or with mixers of these names. Raises ValueError if there are none."""
    mixers = config.layer_mixers()
    for name in chosen:
        known = f"use {', '.join(dict.fromkeys(mixers))}, or numbers from 0 to {len(mixers) - 1}"
        there = name in mixers or name in range(len(mixers))
        require(there, f"train.gradient_checkpointing: {name!r} names no mixer of a layer, and no layer; {known}")
    return [i for i, name in enumerate(mixers) if i in chosen or name in chosen]


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off, which some backbones have: a step would then depend on more than its number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """Raise ValueError if rows are longer than a table of positions."""
    most = longest(model)
    fits = most is None or seq_len <= most
    require(fits, f"data.seq_len={seq_len} is more than the backbone's {most} positions; lower it")


def model_config(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> MemLMConfig:
    """The model group as a configuration, with the tokenizer's vocabulary size unless it is set."""
    entries = len(tokenizer)
    check_type(settings.get("vocab_size"), int | None, "model.vocab_size")
    size = settings.get("vocab_size") or entries
    if size < entries:
        raise ValueError(f"model.vocab_size={size} is less than the tokenizer's {entries} entries; leave it out")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for name, token in special.items():
        if settings.get(name, token) != token:
            raise ValueError(f"model.{name}={settings[name]!r}, but the tokenizer's is {token}; leave it out")
    return MemLMConfig.from_hydra({**settings, **special, "vocab_size": size})
