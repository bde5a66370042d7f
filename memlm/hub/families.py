"""Plain decoders of transformers as models of memlm, in both directions: a table of families, and one conversion.

The decoder here covers them by settings, so the logits are equal and only names change: ``self_attn`` is ``mixer``.
A memory takes the place of full attention; layers with a sliding window keep it. Memories that do not have the
weights of an attention, and models that are not in the table, are for ``memlm.attach``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from memlm.configuration import MemLMConfig
from memlm.hub import Fields
from memlm.modeling import MemLMForCausalLM


@dataclass(frozen=True)
class Family:
    """The differences from Llama that the family's config.json does not hold; see ``attention.Projections`` and
    ``MemLMConfig``.
    """

    qk_norm: bool | str = False
    qkv_bias: bool = False
    norm_outputs: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "smollm3": Family(),
    "olmo2": Family(qk_norm="all", norm_outputs=True),
}
# Kinds that take the weights of an attention.
MEMORIES = ("msa", "attention", "chunk_sparse")
# Values of fields that the decoder here has no setting for.
_FIXED = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SAME = (*_SIZES, "num_key_value_heads", "rms_norm_eps", "initializer_range", "tie_word_embeddings")
_SAME += ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_ATTACH = "memlm.attach gives any decoder of transformers a memory"


def config_from(form: str, values: dict[str, Any], memory: str = "msa") -> MemLMConfig:
    """form: a name of FAMILIES; values: a config.json of that family

    memory: one of MEMORIES: "msa", with the paper's settings and routers in the upper half of the layers; "attention",
        for the model as it is; or "chunk_sparse", with ``learning: distilled``, which adds no weights

    Raises ValueError if memlm has no equivalent.
    """
    kind = Fields(values)["model_type"]
    if kind != form:
        raise ValueError(f"config.json: model_type={kind!r:.80}; only {form!r} can be converted as such. {_ATTACH}")
    if values.get("quantization_config"):
        raise ValueError("config.json: quantization_config: quantised weights cannot be converted; use the original")
    for name in _SIZES:
        Fields(values)[name]
    theirs = _theirs(form, values)
    for name, value in _FIXED.items():
        if (found := _read(theirs, name, value)) != value:
            raise ValueError(f"config.json: {name}={found!r}; only {value!r} can be converted. {_ATTACH}")
    theta, scaling = _rope(theirs)
    mixers, pattern = _mixers(FAMILIES[form], theirs, memory)
    return MemLMConfig(
        **{name: getattr(theirs, name) for name in _SAME},
        head_dim=getattr(theirs, "head_dim", None),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_outputs=FAMILIES[form].norm_outputs,
        mixers=mixers,
        mixer_pattern=pattern,
    )


def config_to(form: str, config: MemLMConfig, before: dict[str, Any]) -> dict[str, Any]:
    """A config.json of the family; before: the one that the model was converted from, or empty.

    Raises ValueError if the family has no equivalent.
    """
    if config.side is not None:
        raise ValueError(f"model.side: {form} has no side network; convert the decoder that was trained without it")
    mixers = [_mixer(config, name) for name in config.layer_mixers()]
    for mixer in mixers:
        if mixer["kind"] != "attention":
            raise ValueError(f"model.mixers.*.kind={mixer['kind']!r} cannot go back: {form} has attention alone")
    if before and not _differs(config, _again(form, before)):
        return before
    windows = [mixer["window_size"] for mixer in mixers]
    values = {
        **{name: getattr(config, name) for name in (*_SAME, "head_dim")},
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "attention_bias": mixers[0]["output_bias"],
        "sliding_window": next((window for window in windows if window), None),
        "use_sliding_window": any(windows),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "no_rope_layers": [int(mixer["rotary"]) for mixer in mixers],
    }
    known = CONFIG_MAPPING[form]
    kept = {name: value for name, value in before.items() if name not in ("rope_scaling", "rope_theta")}
    values = {name: value for name, value in values.items() if name == "head_dim" or hasattr(known, name)}
    names = before.get("architectures", [f"{known.__name__.removesuffix('Config')}ForCausalLM"])
    theirs = _theirs(form, {**kept, **values}).to_dict() | {"architectures": names}
    if name := _differs(config, _again(form, theirs)):
        # The settings of all mixers would fill a screen.
        if name == "mixers":
            raise ValueError(f"model.mixers: attentions of these settings have no equivalent in {form}")
        raise ValueError(f"model.{name}={getattr(config, name)!r:.200} has no equivalent in {form}")
    return theirs


def weights_from(theirs: Mapping[str, Tensor], config: MemLMConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """memlm's weights, one at a time: the family's, and routers initialised as in a new model.

    Raises ValueError, before the first, if a weight is missing or left over.
    """
    with torch.device("meta"):
        names = dict(MemLMForCausalLM(config).named_parameters())
    old = {name: name.replace(".mixer.", ".self_attn.") for name in names if "router_" not in name}
    _check(theirs, set(old.values()), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in names.items():
        before, shape = old.get(name), list(parameter.shape)
        tensor = theirs[before or old[name.replace("router_", "")]]
        if not tensor.is_floating_point():
            raise ValueError(f"weights: {before} is {tensor.dtype}; quantised weights cannot be converted")
        if list(tensor.shape) != shape:
            raise ValueError(f"weights: {before} is {list(tensor.shape)}; by config.json it is {shape}")
        if before is None:
            tensor = (torch.randn(shape, generator=generator) * config.initializer_range).to(tensor.dtype)
        yield name, tensor


def weights_to(ours: Mapping[str, Tensor], config: MemLMConfig) -> Iterator[tuple[str, Tensor]]:
    return ((name.replace(".mixer.", ".self_attn."), ours[name]) for name in ours)


def _theirs(form: str, values: dict[str, Any]) -> PreTrainedConfig:
    """transformers' configuration, which has the family's defaults and the newest form of older fields."""
    try:
        return CONFIG_MAPPING[form].from_dict(dict(values))
    except Exception as error:
        # Its checks raise exceptions of any type.
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from None


def _read(theirs: PreTrainedConfig, name: str, otherwise: Any) -> Any:
    """A field of the family; a field that it does not have has no effect on its models."""
    return getattr(theirs, name) if hasattr(type(theirs), name) else otherwise


def _rope(theirs: PreTrainedConfig) -> tuple[float, dict[str, Any] | None]:
    rope = {name: value for name, value in theirs.rope_parameters.items() if value is not None and name != "type"}
    theta, scaled = rope.pop("rope_theta"), rope["rope_type"] != "default"
    if rope.get("rope_type") == "yarn" and "factor" not in rope:
        rope["factor"] = theirs.max_position_embeddings / rope["original_max_position_embeddings"]
    if not scaled and len(rope) > 1:
        raise ValueError(f"config.json: rope_parameters={rope!s:.200} cannot be converted. {_ATTACH}")
    return theta, rope if scaled else None


def _mixers(family: Family, theirs: PreTrainedConfig, memory: str) -> tuple[dict[str, Any], list[str]]:
    """Mixers by name, and the mixer of each layer."""
    layers, bias = theirs.num_hidden_layers, bool(_read(theirs, "attention_bias", False))
    shared = {"qk_norm": family.qk_norm, "qkv_bias": family.qkv_bias or bias, "output_bias": bias}
    windows = [_window(theirs, layer) for layer in range(layers)]
    full = [layer for layer, window in enumerate(windows) if not window]
    if memory != "attention" and not full:
        raise ValueError(
            f"config.json: sliding_window={windows[0]} in every layer, and {memory} replaces full attention; "
            f"use --memory attention. {_ATTACH}"
        )
    routing = [layer for layer in full if layer >= layers // 2] or full[len(full) // 2 :]
    mixers: dict[str, Any] = {}
    pattern = []
    for layer, window in enumerate(windows):
        rotary = bool(_read(theirs, "no_rope_layers", [True] * layers)[layer])
        if window:
            name, settings = "window", {"kind": "attention", "window_size": window}
        elif memory == "msa" and layer in routing:
            name, settings = "memory", {"kind": "msa", "routes": True, "loss_weight": 0.1 / len(routing)}
        elif memory == "msa":
            name, settings = "documents", {"kind": "msa", "routes": False}
        elif memory == "chunk_sparse":
            name, settings = "memory", {"kind": memory, "learning": "distilled", "loss_weight": 0.1 / len(full)}
        else:
            name, settings = "memory", {"kind": memory}
        name += "" if rotary else "_nope"
        mixers[name] = {**settings, **shared, "rotary": rotary}
        pattern.append(name)
    return mixers, pattern


def _window(theirs: PreTrainedConfig, layer: int) -> int | None:
    """The sliding window of a layer; None: full attention."""
    window = _read(theirs, "sliding_window", None)
    if not hasattr(type(theirs), "layer_types"):
        return window
    kind = theirs.layer_types[layer]
    if kind == "full_attention":
        return None
    if kind != "sliding_attention" or not window or not theirs.use_sliding_window:
        raise ValueError(f"config.json: {kind!r} in layer_types with sliding_window={window} cannot be converted")
    return window


def _mixer(config: MemLMConfig, name: str) -> dict[str, Any]:
    assert config.mixers
    return config.mixers[name]


def _again(form: str, values: dict[str, Any]) -> MemLMConfig:
    return config_from(form, values, "attention")


def _differs(config: MemLMConfig, other: MemLMConfig) -> str | None:
    """The first setting in which two models of attention differ."""
    names = (*_SAME, "head_dim", "rope_theta", "rope_scaling", "norm_outputs")
    layers = [[_mixer(c, name) for name in c.layer_mixers()] for c in (config, other)]
    differ = (name for name in names if getattr(config, name) != getattr(other, name))
    return next(differ, None if layers[0] == layers[1] else "mixers")


def _check(theirs: Mapping[str, Tensor], wanted: set[str], config: MemLMConfig) -> None:
    if missing := sorted(wanted - theirs.keys()):
        raise ValueError(f"weights: {missing[0]} is missing; config.json and weights are not of one model")
    for name in sorted(theirs.keys() - wanted):
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        # Old checkpoints hold this buffer.
        if not tied and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"weights: {name} is not a weight of this configuration")
