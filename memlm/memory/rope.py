"""Rotary positions of models whose context was extended, by the functions of transformers.

Types that depend on the length of the input (dynamic, longrope) are refused: a key is rotated once, when it is read.
"""

import functools
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from memlm.layers import Rope
from memlm.settings import require, suggest

_FACTORS = ("factor", "original_max_position_embeddings")
REQUIRED = {
    "linear": ("factor",),
    "llama3": (*_FACTORS, "low_freq_factor", "high_freq_factor"),
    "yarn": _FACTORS,
}
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def scaled_rope(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Rope:
    """The rotary embedding of a model.

    scaling: ``rope_type`` and its numbers, as in transformers' ``rope_parameters``; None: no scaling

    Raises ValueError with the key, the value and a fix.
    """
    if scaling is None:
        return Rope(head_dim, theta)
    kind, known = str(scaling.get("rope_type")), ", ".join(REQUIRED)
    require(
        kind not in ("dynamic", "longrope"),
        f"rope_scaling.rope_type={kind!r} depends on the length of the input, so kept keys would have to be rotated "
        f"again; use one of {known}, or null for none",
    )
    require(
        kind in REQUIRED,
        f"rope_scaling.rope_type={kind!r:.80} is not supported; use one of {known}, or null for none",
    )
    allowed = (*REQUIRED[kind], *_OPTIONAL.get(kind, ()))
    for name in REQUIRED[kind]:
        require(name in scaling, f"rope_scaling.{name} is missing; rope_type={kind!r} needs it")
    for name, value in scaling.items():
        if name == "rope_type":
            continue
        require(name in allowed, f"rope_scaling.{name}={value!r:.80} is not a setting; {suggest(name, allowed)}")
        if name == "truncate":
            require(type(value) is bool, f"rope_scaling.{name}={value!r:.80} must be true or false")
            continue
        number = type(value) in (int, float) and 0 < value < 1e9
        require(number, f"rope_scaling.{name}={value!r:.80} must be a number above 0")
    require(scaling["factor"] >= 1, f"rope_scaling.factor={scaling['factor']} must be at least 1")
    low, high = (scaling.get(f"{name}_freq_factor", n) for name, n in (("low", 0), ("high", 1)))
    require(low < high, f"rope_scaling.low_freq_factor={low} must be below high_freq_factor={high}")
    return _scaled(head_dim, float(theta), tuple(sorted(scaling.items())))


@functools.cache
def _scaled(head_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]) -> Rope:
    parameters = {**dict(scaling), "rope_theta": theta}
    original = parameters.get("original_max_position_embeddings", 1)
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=int(original * parameters["factor"]),
        rope_parameters=parameters,
    )
    # Models are also built on the meta device.
    with torch.device("cpu"):
        frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
        return Rope(head_dim, theta, tuple(frequencies.tolist()), float(scale))
