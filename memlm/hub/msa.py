"""Checkpoints of the released Memory Sparse Attention (model type ``msa``, MSA-4B), in both directions.

Released weights are Qwen3's, plus ``router_q_proj.0`` and ``router_k_proj.0`` in the layers that route. Another tensor
is ``temperature`` (a setting here), or with the loss BCE ``b`` (one per layer here). The release trains routers only
in the upper half of the layers, memlm trains all.

memlm has no settings for ``aux_loss``, ``ansloss_weight``, ``recloss_weight`` and ``lmloss_weigth``. The conversion
back takes them from a copy of the original config.json beside the converted checkpoint, or else the released values.
The release has no setting for the similarity: with the losses INFONCE_* it trains by cosine and serves by dot product.
So both are written alike, and read as cosine.
"""

from typing import Any

import torch
from torch import Tensor

from memlm.configuration import MemLMConfig
from memlm.hub import Fields, require_plain

Weights = dict[str, Tensor]

_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_OF_LAYER = {
    **{f"self_attn.{name}.weight": f"mixer.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"self_attn.{name}.weight": f"mixer.{name}.weight" for name in ("q_norm", "k_norm")},
    **{f"{name}.weight": f"{name}.weight" for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
    **{f"{name}.weight": f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")},
}
_ROUTERS = {f"self_attn.{name}.0.weight": f"mixer.{name}.weight" for name in ("router_q_proj", "router_k_proj")}
# Required values of a backbone's fields, if present.
_FIXED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}
# Defaults of a released config.json.
_WRITTEN = {
    "architectures": ["MSAForCausalLM"],
    "model_type": "msa",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rope_scaling": None,
    "sliding_window": False,
    "use_cache": False,
    "use_sliding_window": False,
}
_RULES = {"ansloss_weight": 1.0, "aux_loss": False, "lmloss_weigth": 1.0, "recloss_weight": 0.0}
_TEMPERATURES = (0.001, 0.5)
# Fields of equal names in both.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SIZES += ("head_dim", "vocab_size", "rope_theta", "rms_norm_eps", "initializer_range", "tie_word_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_from_msa(theirs: dict[str, Any], weights: Weights) -> MemLMConfig:
    """theirs: a released config.json. Raises ValueError if it is of another kind, or memlm has no equivalent."""
    theirs = Fields(theirs)
    _expect(theirs, {"model_type": "msa", **_FIXED}, "")
    rules = Fields(theirs["msa_config"], "msa_config.")
    _expect(rules, {"decouple_router": True, "decouple_pooling_mode": "mean", "rewrite_position": True}, "msa_config.")
    method = rules["aux_loss_method"]
    temperature = float(weights.get("temperature", rules["infonce_loss_temp"]))
    routing = [int(layer) for layer in rules["router_layer_idx"].split(",") if layer.strip()]
    settings = {
        "chunk_size": rules["pooling_kernel_size"],
        "top_k": rules["top_k_docs"],
        "routing": "query",
        "similarity": "cosine" if "INFONCE" in method else "dot",
        "head_reduce": rules["head_reduce_method"],
        "query_reduce": rules["query_reduce_method"],
        "chunk_reduce": rules["chunk_reduce_method"],
        "router_loss": method.lower(),
        # The release averages over layers, memlm sums.
        "loss_weight": rules["auxloss_weight"] / max(1, len(routing)),
        "temperature": min(max(temperature, _TEMPERATURES[0]), _TEMPERATURES[1]),
    }
    if theirs.get("rope_scaling"):
        raise ValueError(f"config.json: rope_scaling={theirs['rope_scaling']!r}; only null can be converted")
    shared = {name: settings[name] for name in ("chunk_size", "top_k")}
    mixers = {
        "memory": {"kind": "msa", "routes": True, **settings},
        "documents": {"kind": "msa", "routes": False, **shared},
    }
    pattern = ["memory" if layer in routing else "documents" for layer in range(theirs["num_hidden_layers"])]
    return MemLMConfig(
        **{name: theirs[name] for name in (*_SIZES, "max_position_embeddings")},
        **{name: theirs.get(name) for name in _TOKENS},
        mixers={name: mixer for name, mixer in mixers.items() if name in pattern},
        mixer_pattern=pattern,
    )


def config_to_msa(config: MemLMConfig, before: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the release; before: the one that the model was converted from, or empty.

    Raises ValueError if the release has no equivalent.
    """
    mixers = [config.mixers[name] for name in config.layer_mixers()]
    wanted: dict[str, Any] = {"kind": "msa", "qk_norm": True, "positions": "template", "rotary": True}
    wanted |= {"qkv_bias": False, "output_bias": False}
    require_plain(config)
    for mixer in mixers:
        for name, value in wanted.items():
            if mixer.get(name) != value:
                raise ValueError(f"model.mixers.*.{name} must be {value!r} in every layer; the release has no other")
    routing = [layer for layer, mixer in enumerate(mixers) if mixer["routes"]]
    if not routing:
        raise ValueError("model.mixers.*.routes is false in every layer; the release routes in one at least")
    rule = mixers[routing[0]]
    for mixer in mixers:
        for name in rule if mixer["routes"] else ("chunk_size", "top_k"):
            if mixer[name] != rule[name]:
                raise ValueError(f"model.mixers.*.{name} is {mixer[name]!r} and {rule[name]!r}; the release has one")
    similarities = {"bce": ("dot",), "infonce": ("cosine",)}.get(rule["router_loss"], ("cosine", "dot"))
    if rule["similarity"] not in similarities:
        raise ValueError(
            f"model.mixers.*.similarity={rule['similarity']!r}; with router_loss={rule['router_loss']!r} the release "
            f"trains and serves by {similarities[0]!r}"
        )
    return {
        **_WRITTEN,
        "max_position_embeddings": config.max_position_embeddings,
        **before,
        **{name: getattr(config, name) for name in (*_SIZES, *_TOKENS)},
        "msa_config": {
            **_RULES,
            **before.get("msa_config", {}),
            "aux_loss_method": rule["router_loss"].upper(),
            "auxloss_weight": rule["loss_weight"] * len(routing),
            "chunk_reduce_method": rule["chunk_reduce"],
            "decouple_pooling_mode": "mean",
            "decouple_router": True,
            "head_reduce_method": rule["head_reduce"],
            "infonce_loss_temp": rule["temperature"],
            "pooling_kernel_size": rule["chunk_size"],
            "query_reduce_method": rule["query_reduce"],
            "rewrite_position": True,
            "router_layer_idx": ",".join(map(str, routing)),
            "top_k_docs": rule["top_k"],
        },
    }


def weights_from_msa(theirs: Weights, config: MemLMConfig) -> Weights:
    """memlm's weights from the release's (or gradients from gradients). Raises ValueError if a weight is missing or
    left over.
    """
    rest = dict(theirs)
    rest.pop("temperature", None)
    if config.tie_word_embeddings:
        rest.pop("lm_head.weight", None)
    bias = rest.pop("b", None)
    ours = {name: _taken(rest, old) for old, name in _names(config)}
    if bias is not None:
        ours |= {name: bias.clone() for name in _biases(config)}
    _all_taken(rest)
    return ours


def weights_to_msa(ours: Weights, config: MemLMConfig) -> Weights:
    theirs = {old: ours[name].contiguous() for old, name in _names(config)}
    rule = next(config.mixers[name] for name in config.layer_mixers() if config.mixers[name]["routes"])
    like = ours["model.norm.weight"]
    if rule["router_loss"] != "bce":
        theirs["temperature"] = torch.tensor(rule["temperature"], dtype=like.dtype)
        return theirs
    biases = [ours[name] for name in _biases(config)]
    if any(not torch.equal(b, biases[0]) for b in biases):
        raise ValueError("router_bias differs between layers; the release has one for all")
    return {**theirs, "b": biases[0]}


def _expect(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for name, value in wanted.items():
        if found.get(name, value) != value:
            raise ValueError(f"config.json: {where}{name}={found[name]!r}; only {value!r} can be converted")


def _names(config: MemLMConfig) -> list[tuple[str, str]]:
    """The release's name and memlm's name of every weight."""
    names = [(name, name) for name in _OUTSIDE if not (config.tie_word_embeddings and name == "lm_head.weight")]
    for layer, mixer in enumerate(config.mixers[name] for name in config.layer_mixers()):
        of_layer = {**_OF_LAYER, **(_ROUTERS if mixer["routes"] else {})}
        names += [(f"model.layers.{layer}.{old}", f"model.layers.{layer}.{new}") for old, new in of_layer.items()]
    return names


def _biases(config: MemLMConfig) -> list[str]:
    layers = enumerate(config.mixers[name] for name in config.layer_mixers())
    return [
        f"model.layers.{i}.mixer.router_bias"
        for i, mixer in layers
        if mixer["routes"] and mixer["router_loss"] == "bce"
    ]


def _taken(rest: Weights, name: str) -> Tensor:
    if name not in rest:
        raise ValueError(f"model.safetensors: {name} is missing; config.json and weights are not of one model")
    return rest.pop(name)


def _all_taken(rest: Weights) -> None:
    if rest:
        raise ValueError(f"model.safetensors: {next(iter(rest))} is not a weight of this configuration")
