"""The one model schema: sizes, and which mixer stands in which layer."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from memlm.memory.base import Dims, check_type, complete_settings, suggest


class MemLMConfig(PreTrainedConfig):
    """Configuration of a decoder whose layers hold mixers.

    mixers: name -> {"kind": ..., its settings}; defaults are written out, so ``config.json`` alone
        rebuilds the model
    mixer_pattern: names of mixers, tiled over the layers
    intermediate_size, num_key_value_heads, head_dim: None for 8/3 hidden_size rounded up to a
        multiple of 8, num_attention_heads, and hidden_size / num_attention_heads

    Raises ValueError naming the key, the value and a fix.
    """

    model_type = "memlm"
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "aux_losses", "metrics"]  # noqa: RUF012

    vocab_size: int = 259
    hidden_size: int = 64
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mixers: dict[str, dict[str, Any]] | None = None
    mixer_pattern: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in _INTERNAL and not name.startswith("_"):
                raise ValueError(f"model.{name}={value!r} is not a setting; {suggest(name, _SETTINGS)}")
        for name in _SETTINGS:
            check_type(getattr(self, name), _HINTS[name], f"model.{name}")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "intermediate_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be at least 1")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "must be above 0")
        # An int and a float of one value are one setting.
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
                name in self.mixers,
                "mixer_pattern",
                name,
                f"is not in model.mixers ({', '.join(self.mixers)})",
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_hydra(cls, settings: Mapping[str, Any]) -> "MemLMConfig":
        """The configuration that a composed ``model`` group describes; unknown keys are refused."""
        return cls(**{name: _plain(value) for name, value in settings.items()})

    def dims(self) -> Dims:
        """Sizes as a mixer is given them."""
        assert self.head_dim and self.num_key_value_heads
        return Dims(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            attn_implementation=self._attn_implementation or "sdpa",
        )

    def layer_mixers(self) -> list[str]:
        """Name of the mixer in each layer."""
        assert self.mixer_pattern
        return [self.mixer_pattern[i % len(self.mixer_pattern)] for i in range(self.num_hidden_layers)]

    def memory_signature(self) -> str:
        """A short hash of all that a ``MemoryCache`` depends on: caches of other models are refused by it."""
        relevant = {name: getattr(self, name) for name in _SETTINGS if name not in _NOT_IN_STATE}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def _require(condition: bool, name: str, value: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"model.{name}={value!r} {what}")


def _plain(value: Any) -> Any:
    """OmegaConf containers as dicts and lists, without importing OmegaConf."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or type(value).__name__ == "ListConfig":
        return [_plain(item) for item in value]
    return value


_SETTINGS = [name for name in MemLMConfig.__annotations__ if name not in ("model_type",)]
_HINTS = MemLMConfig.__annotations__
_VOCABULARY = {"vocab_size", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
_NOT_IN_STATE = {"use_cache", "initializer_range", *_VOCABULARY}
# What transformers itself passes through a configuration's constructor.
_INTERNAL = {"model_type", "transformers_version", "architectures", "attn_implementation", "name_or_path", "auto_map"}
