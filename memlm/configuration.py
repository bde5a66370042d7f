"""The model configuration: sizes, and the mixer of each layer."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from memlm import side
from memlm.memory.base import Dims, complete_settings, load_kind
from memlm.memory.rope import scaled_rope
from memlm.settings import check_type, suggest


class MemLMConfig(PreTrainedConfig):
    """Configuration of a decoder whose layers hold mixers.

    >>> mixers = {"memory": {"kind": "titans_mag", "chunk_size": 32}, "full": {"kind": "attention"}}
    >>> config = MemLMConfig(hidden_size=64, mixers=mixers, mixer_pattern=["memory", "full"])  # alternating layers

    mixers: name -> {"kind": ..., its settings}. Defaults are written out, so ``config.json`` alone rebuilds the model.
        None: full attention in every layer
    mixer_pattern: names of mixers, repeated over the layers; None: the first mixer in every layer
    max_position_embeddings: the length at which tools such as lm-eval cut a text; the model has no such limit
    intermediate_size: None: 8/3 hidden_size, rounded up to a multiple of 8
    num_key_value_heads: None: num_attention_heads
    head_dim: None: hidden_size / num_attention_heads
    rope_scaling: {"rope_type": "linear", "llama3" or "yarn", its numbers} as in transformers; None: no scaling
    norm_outputs: norms on the outputs of mixer and MLP (OLMo 2), not on their inputs
    taps: names of reads, such as ["fast", "slow", "mixed"] of two_rate. The first layer whose mixer publishes reads
        gives them to the layers behind it, one to each: they add a projection of it to their input, zero at first.
        None: no layer does
    side: {"form": ..., its settings}, a network beside the frozen decoder (``memlm.side``); None: there is none

    Raises ValueError with the key, the value and a fix.
    """

    model_type = "memlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "hidden_states", "aux_losses", "metrics"]  # noqa: RUF012

    vocab_size: int = 259
    hidden_size: int = 64
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    norm_outputs: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    max_position_embeddings: int = 2**20
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mixers: dict[str, dict[str, Any]] | None = None
    mixer_pattern: list[str] | None = None
    taps: list[str] | None = None
    side: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in _INTERNAL:
                raise ValueError(f"model.{name}={value!r:.80} is not a setting; {suggest(name, _SETTINGS)}")
            if name != "name_or_path":
                check_type(value, _INTERNAL[name], f"model.{name}")
        for name, hint in (_HINTS | _INHERITED).items():
            check_type(getattr(self, name), hint, f"model.{name}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be at least 1")
            _require(value is None or value <= most, name, value, f"must be at most {most}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _require(0 <= value < 1e30, name, value, "must be a number from 0 on, and not infinite")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "must be above 0")
        self._check_transformers(kwargs)
        # An int and a float of equal value are the same setting.
        self.rope_theta, self.rms_norm_eps = float(self.rope_theta), float(self.rms_norm_eps)
        heads = self.num_attention_heads
        if self.head_dim is None:
            _require(
                self.hidden_size % heads == 0,
                "hidden_size",
                self.hidden_size,
                f"does not divide by num_attention_heads={heads}; change one of them or set head_dim",
            )
            self.head_dim = self.hidden_size // heads
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even (rotary positions turn pairs)")
        try:
            scaled_rope(self.head_dim, self.rope_theta, self.rope_scaling)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        for name, value in (self.rope_scaling or {}).items():
            if type(value) is int and name != "original_max_position_embeddings":
                self.rope_scaling = {**(self.rope_scaling or {}), name: float(value)}
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        _require(
            self.num_key_value_heads >= 1 and heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            heads,
            f"does not divide by num_key_value_heads={self.num_key_value_heads}",
        )
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 8) * 8
        self.mixers = {
            name: complete_settings(settings, f"model.mixers.{name}")
            for name, settings in (self.mixers or {"attention": {"kind": "attention"}}).items()
        }
        self.mixer_pattern = list(self.mixer_pattern or list(self.mixers)[:1])
        for name in self.mixer_pattern:
            _require(
                isinstance(name, str) and name in self.mixers,
                "mixer_pattern",
                name,
                f"is not in model.mixers ({', '.join(self.mixers)})",
            )
        self.taps = self.taps or None
        self.tapped()
        if self.side is not None:
            self.side = side.complete(self.side)
        super().__post_init__(**kwargs)
        # Not a given one: the file that it names is the one beside each saved config.json.
        self.auto_map = dict(_AUTO_MAP)

    def to_dict(self) -> dict[str, Any]:
        words = super().to_dict()
        # transformers' own class, by which its Trainer reads a checkpoint, warns of this name.
        later = ("rope_scaling", "taps", "side")
        return {name: value for name, value in words.items() if name not in later or value is not None}

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the configuration, and beside it the file that its ``auto_map`` names."""
        super().to_json_file(json_file_path, use_diff)
        shutil.copyfile(_CODE, Path(json_file_path).with_name(_CODE.name))

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """transformers calls this after ``trust_remote_code=True``; saves would then copy this file too."""
        if cls is not MemLMConfig:
            super().register_for_auto_class(auto_class)

    def _check_transformers(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for values of transformers' own keys that would crash it, or make it run foreign code."""
        for name in ("attn_implementation", "_attn_implementation"):
            value = kwargs.get(name)
            _require("/" not in (value or ""), name, value, "would run code of the hub; use 'sdpa' or 'eager' here")
        for name, value in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            dtype = getattr(torch, value, None) if isinstance(value, str) else value
            floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
            _require(value is None or floating, name, value, "must be a floating type, such as 'bfloat16'")
        _require(not self.is_encoder_decoder, "is_encoder_decoder", True, "must be false: this is a decoder")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                whole = type(token) is int and -(2**31) <= token < 2**31
                _require(token is None or whole, name, value, "must be a number of a token")
        for label in self.id2label or {}:
            _require(str(label).isdecimal(), "id2label", self.id2label, "must have numbers as keys")

    @classmethod
    def from_hydra(cls, settings: Mapping[str, Any]) -> "MemLMConfig":
        """The configuration of a composed ``model`` group. Raises ValueError for unknown keys."""
        return cls(**{name: _plain(value) for name, value in settings.items()})

    def dims(self) -> Dims:
        """The sizes that a mixer receives."""
        assert self.head_dim and self.num_key_value_heads
        rope = scaled_rope(self.head_dim, self.rope_theta, self.rope_scaling)
        return Dims(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            attn_implementation=self._attn_implementation or "sdpa",
            rope_frequencies=rope.frequencies,
            rope_scale=rope.scale,
        )

    def layer_mixers(self) -> list[str]:
        """Name of the mixer in each layer."""
        assert self.mixer_pattern
        return [self.mixer_pattern[i % len(self.mixer_pattern)] for i in range(self.num_hidden_layers)]

    def tapped(self) -> dict[int, str]:
        """The read that each of the layers of ``taps`` adds, by the layer's number."""
        if self.taps is None:
            return {}
        assert self.mixers
        published = {
            name: load_kind(settings["kind"], f"model.mixers.{name}").Mixer.publishes
            for name, settings in self.mixers.items()
        }
        names, taps = self.layer_mixers(), self.taps
        first = next((i for i, name in enumerate(names) if published[name]), None)
        _require(first is not None, "taps", taps, "needs a layer whose mixer publishes reads, such as kind two_rate")
        assert first is not None
        of, behind = names[first], len(names) - first - 1
        for name in taps:
            known = name in published[of]
            _require(known, "taps", name, f"is no read of model.mixers.{of}; {suggest(str(name), published[of])}")
        few = f"needs a layer for each behind layer {first}, not {behind}; name fewer, or raise num_hidden_layers"
        _require(len(taps) <= behind, "taps", taps, few)
        return dict(enumerate(taps, first + 1))

    def memory_signature(self) -> str:
        """A short hash of everything that a ``MemoryCache`` depends on; caches of models with another hash are
        refused.
        """
        assert self.mixers
        relevant = {name: getattr(self, name) for name in _SETTINGS if name not in _NOT_IN_STATE}
        relevant["mixers"] = {name: _without_later(settings) for name, settings in self.mixers.items()}
        relevant = _without_later(relevant)
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def _require(condition: bool, name: str, value: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"model.{name}={value!r:.80} {what}")


def _without_later(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, without newer ones that have their defaults."""
    return {name: value for name, value in settings.items() if name not in _LATER or value != _LATER[name]}


def _plain(value: Any) -> Any:
    """OmegaConf containers as dicts and lists, without importing OmegaConf."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or type(value).__name__ == "ListConfig":
        return [_plain(item) for item in value]
    return value


_SETTINGS = [name for name in MemLMConfig.__annotations__ if name not in ("model_type",)]
_HINTS = {name: MemLMConfig.__annotations__[name] for name in _SETTINGS}
_VOCABULARY = {"vocab_size", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
_NOT_IN_STATE = {"use_cache", "initializer_range", "max_position_embeddings", *_VOCABULARY}
# Settings newer than the first memories on disk, with their defaults: without them, those memories stay accepted.
_LATER = {
    "side": None,
    "taps": None,
    "rope_scaling": None,
    "norm_outputs": False,
    "qkv_bias": False,
    "output_bias": False,
    "rotary": True,
    "max_chunks": 0,
    "fusion": "joint",
    "router_dim": 0,
}
# Bounds far above any model, so that a damaged file cannot cause a huge allocation.
_MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**40,
}
_CODE = Path(__file__).with_name("modeling_memlm.py")
_AUTO_MAP = {
    "AutoConfig": f"{_CODE.stem}.MemLMConfig",
    "AutoModel": f"{_CODE.stem}.MemLMModel",
    "AutoModelForCausalLM": f"{_CODE.stem}.MemLMForCausalLM",
}
# Fields of every transformers configuration, and the keys that it passes to the constructor.
_INHERITED = {
    "transformers_version": str | None,
    "architectures": list | None,
    "output_hidden_states": bool | None,
    "return_dict": bool | None,
    "dtype": str | torch.dtype | None,
    "chunk_size_feed_forward": int,
    "is_encoder_decoder": bool,
    "id2label": dict | None,
    "label2id": dict | None,
    "problem_type": str | None,
}
_INTERNAL = {
    "model_type": str,
    "name_or_path": None,
    "_name_or_path": str,
    "_commit_hash": str | None,
    "auto_map": dict,
    "attn_implementation": str | None,
    "_attn_implementation": str | None,
    "_attn_implementation_autoset": bool,
    "experts_implementation": str | None,
    "torch_dtype": str | torch.dtype | None,
}
