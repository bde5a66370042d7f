"""Tiny random decoders of transformers, one of each family and form that matters to a memory."""

import copy
import functools
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    # Large, so that an error in a layer is seen in the logits.
    initializer_range=0.15,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
GEMMA: dict[str, Any] = dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
GPT2 = dict(n_positions=256, n_embd=32, n_layer=3, n_head=4)
# name -> configuration class, settings beside SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3_rope": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama_yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3_text": ("Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", {}),
}


@functools.cache
def _weights(family: str) -> PreTrainedModel:
    name, settings = FAMILIES[family]
    shared = dict(SIZES)
    if family == "gpt2":
        shared = {k: v for k, v in SIZES.items() if k.endswith("_id") or k in ("vocab_size", "initializer_range")}
    elif family == "gpt_neox":
        shared.pop("num_key_value_heads")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**shared, **settings})
    # Grouped products have no fp64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    torch.set_rng_state(state)
    return model


def backbone(family: str, exact: bool = False) -> PreTrainedModel:
    """A model of its own, in eval mode, equal for every call, in fp32.

    exact: in fp64, where the family can: in fp64 the masks of Gemma2 overflow the fp32 of its softmax
    """
    model = copy.deepcopy(_weights(family))
    return model.double() if exact and family != "gemma2" else model
