"""Checkpoints of flash-linear-attention's MoM (model type ``mom``, gated delta rule), in both directions.

fla has a projection for each memory and each of k, v, beta and decay; memlm stacks them in one matrix.
"""

from typing import Any

import torch
from torch import Tensor

from memlm.configuration import MemLMConfig
from memlm.hub import Fields, require_plain

Weights = dict[str, Tensor]

_OUTSIDE = {
    "model.embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
    "attn.gate.weight": "mixer.router.weight",
    "attn.q_proj.weight": "mixer.q_proj.weight",
    "attn.A_log": "mixer.recurrence.rule.decay.A_log",
    "attn.dt_bias": "mixer.recurrence.rule.decay.dt_bias",
    "attn.g_proj.weight": "mixer.reading.output_gate_proj.weight",
    "attn.o_norm.weight": "mixer.reading.norm.weight",
    "attn.o_proj.weight": "mixer.reading.o_proj.weight",
}
_CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")
# Fields with only one supported value; fla itself ignores capacity and the last one.
_FIXED = {"mom_backend": "gated_deltanet", "attn": None, "use_output_gate": True, "hidden_act": "swish"}


def config_from_fla(theirs: dict[str, Any]) -> MemLMConfig:
    """theirs: fla's config.json. Raises ValueError if it is not a MoM, or memlm has no equivalent."""
    theirs = Fields(theirs)
    for name, value in {"model_type": "mom", **_FIXED}.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"config.json: {name}={theirs[name]!r}; only {value!r} can be converted")
    hidden_size, intermediate_size = theirs["hidden_size"], theirs.get("intermediate_size")
    if intermediate_size is None:
        intermediate_size = -(-int(hidden_size * theirs["hidden_ratio"] * 2 / 3) // 256) * 256
    head_dim = theirs["head_dim"]
    mixer = {
        "kind": "mom",
        "rule": "gated_delta_net",
        "num_memories": theirs["num_memories"],
        "top_k": theirs["topk"],
        "shared_memory": theirs["shared_mem"],
        "single_kv": theirs.get("single_kv_proj", False),
        "num_heads": theirs["num_heads"],
        "head_dim": head_dim,
        "value_dim": int(head_dim * theirs["expand_v"]),
        "conv": "per_memory" if theirs["use_short_conv"] else "none",
        "conv_size": theirs["conv_size"],
        "balance_loss": float(theirs["aux_loss_scale"]),
    }
    return MemLMConfig(
        vocab_size=theirs["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=theirs["num_hidden_layers"],
        num_attention_heads=theirs["num_heads"],
        head_dim=head_dim,
        rms_norm_eps=theirs["norm_eps"],
        initializer_range=theirs["initializer_range"],
        tie_word_embeddings=theirs["tie_word_embeddings"],
        bos_token_id=theirs["bos_token_id"],
        eos_token_id=theirs["eos_token_id"],
        pad_token_id=theirs["pad_token_id"],
        mixers={"memory": mixer},
        mixer_pattern=["memory"],
    )


def config_to_fla(config: MemLMConfig) -> dict[str, Any]:
    """fla's config.json. Raises ValueError if fla has no equivalent."""
    require_plain(config)
    mixers = [config.mixers[name] for name in config.layer_mixers()]
    mixer = mixers[0]
    wanted = {"kind": "mom", "rule": "gated_delta_net", "balance_bias": False, "window_size": None}
    for name, value in wanted.items():
        if any(m.get(name) != value for m in mixers):
            raise ValueError(f"model.mixers.*.{name} must be {value!r} in every layer; fla has no other MoM")
    if mixer["conv"] == "before_routing":
        raise ValueError("model.mixers.*.conv='before_routing'; fla's MoM convolves after routing")
    return {
        "architectures": ["MomForCausalLM"],
        "model_type": "mom",
        **_FIXED,
        "attn_mode": "chunk",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "hidden_ratio": 4,
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": mixer["num_heads"],
        "head_dim": mixer["head_dim"],
        "expand_v": (mixer["value_dim"] or mixer["head_dim"]) / mixer["head_dim"],
        "num_memories": mixer["num_memories"],
        "topk": mixer["top_k"],
        "shared_mem": mixer["shared_memory"],
        "single_kv_proj": mixer["single_kv"],
        "use_short_conv": mixer["conv"] == "per_memory",
        "conv_size": mixer["conv_size"],
        "capacity": 1.0,
        "aux_loss_scale": mixer["balance_loss"],
        "use_layer_wise_balance": True,
        "norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def weights_from_fla(theirs: Weights, config: MemLMConfig) -> Weights:
    """memlm's weights from fla's (or gradients from gradients). Raises ValueError if a weight is missing or
    left over.
    """
    rest = dict(theirs)

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ValueError(f"model.safetensors: {name} is missing; config.json and weights are not of one model")
        return rest.pop(name)

    ours = {new: take(old) for old, new in _outside(config).items()}
    for layer, mixer in enumerate(config.mixers[name] for name in config.layer_mixers()):
        old, new = f"model.layers.{layer}.", f"model.layers.{layer}."
        ours |= {new + b: take(old + a) for a, b in _OF_LAYER.items()}
        if mixer["conv"] == "per_memory":
            taps = [take(f"{old}attn.{name}.weight").squeeze(1) for name in _CONVOLUTIONS]
            ours[new + "mixer.recurrence.conv.weight"] = torch.cat(taps)
        for name, parts in _stacks(mixer).items():
            ours[f"{new}mixer.{name}.weight"] = torch.cat([take(f"{old}attn.{part}.weight") for part in parts])
    if rest:
        raise ValueError(f"model.safetensors: {next(iter(rest))} is not a weight of this configuration")
    return ours


def weights_to_fla(ours: Weights, config: MemLMConfig) -> Weights:
    theirs = {old: ours[new] for old, new in _outside(config).items()}
    for layer, mixer in enumerate(config.mixers[name] for name in config.layer_mixers()):
        old, new = f"model.layers.{layer}.", f"model.layers.{layer}."
        theirs |= {old + a: ours[new + b] for a, b in _OF_LAYER.items()}
        heads, keys = mixer["num_heads"], mixer["num_heads"] * mixer["head_dim"]
        values = heads * (mixer["value_dim"] or mixer["head_dim"])
        sizes = {"k": keys, "v": values, "b": heads, "a": heads}
        if mixer["conv"] == "per_memory":
            taps = ours[new + "mixer.recurrence.conv.weight"].split([keys, keys, values])
            theirs |= {f"{old}attn.{n}.weight": w[:, None] for n, w in zip(_CONVOLUTIONS, taps, strict=True)}
        for name, parts in _stacks(mixer).items():
            rows = [sizes[part.removeprefix("shared_")[0]] for part in parts]
            pieces = ours[f"{new}mixer.{name}.weight"].split(rows)
            theirs |= {f"{old}attn.{p}.weight": w for p, w in zip(parts, pieces, strict=True)}
    return {name: w.contiguous() for name, w in theirs.items()}


def _outside(config: MemLMConfig) -> dict[str, str]:
    tied = config.tie_word_embeddings
    return {old: new for old, new in _OUTSIDE.items() if not (tied and old == "lm_head.weight")}


def _stacks(mixer: dict[str, Any]) -> dict[str, list[str]]:
    """memlm's weights, each with fla's weights that are stacked in it."""
    if mixer["single_kv"]:
        return {"kv_proj": ["shared_k", "shared_v"], "gates": ["shared_b", "shared_a"]}
    memories = range(mixer["num_memories"])
    stacks = {
        "kv_proj": [f"{part}_proj.{m}" for m in memories for part in "kv"],
        "gates": [f"{part}_proj.{m}" for m in memories for part in "ba"],
    }
    if mixer["shared_memory"]:
        stacks |= {"shared_kv_proj": ["shared_k", "shared_v"], "shared_gates": ["shared_b", "shared_a"]}
    return stacks
