"""Where a decoder of transformers has its layers, their attention and its memory."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.attached.call import Settings
from memlm.memory.base import Dims
from memlm.settings import require

# The child of an attention that is its memory, and the attribute of a decoder with the settings.
NAME, SETTINGS = "memlm", "memlm_settings"


def of(model: nn.Module) -> Settings | None:
    """The settings of a model's memory; None if it has none."""
    return next((found for m in model.modules() if isinstance(found := getattr(m, SETTINGS, None), Settings)), None)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module that embeds tokens and runs the layers."""
    require(
        not getattr(model.config, "is_encoder_decoder", False),
        f"{type(model).__name__} is an encoder-decoder; a memory needs a decoder alone",
    )
    decoders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and _stack(m) is not None]
    found = model.get_decoder()
    # Some families' own answer is another module.
    return found if found in decoders or not decoders else decoders[0]


def attentions_of(decoder: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention of each layer that has one. Raises ValueError if none has."""
    found = {}
    for i, layer in enumerate(_stack(decoder) or []):
        for name, child in layer.named_children():
            if "attention" in type(child).__name__.lower() and "cross" not in name.lower():
                found[i] = child
                break
    require(bool(found), f"{type(decoder).__name__} has no layers with an attention, so nothing to attach a memory to")
    return found


def _stack(decoder: nn.Module) -> nn.ModuleList | None:
    """The layers of a decoder, if it has any."""
    layers = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
    return next((m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == layers), None)


def check_keywords(decoder: nn.Module, attention: nn.Module) -> None:
    """Raise ValueError unless keywords can reach the attention. Whether they do is seen in a call."""
    layer = next(m for m in decoder.modules() if attention in m.children())
    for module in (decoder, layer, attention):
        kinds = [p.kind for p in inspect.signature(type(module).forward).parameters.values()]
        require(inspect.Parameter.VAR_KEYWORD in kinds, no_keywords(module))


def no_keywords(module: nn.Module) -> str:
    return f"{type(module).__name__} does not hand keywords on, by which a memory gets its tokens; it cannot have one"


def dims_of(config: Any, attention: nn.Module) -> Dims:
    """Sizes for memories with heads of the backbone's size."""
    heads = config.num_attention_heads
    head_dim = getattr(attention, "head_dim", None)
    return Dims(
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim if isinstance(head_dim, int) else config.hidden_size // heads,
    )


def device_of(attention: nn.Module, embedding: Tensor) -> torch.device:
    """The device where an attention runs, also if accelerate offloads its weights."""
    for module in attention.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    held = [p.device for p in attention.parameters() if p.device.type != "meta"]
    return held[0] if held else embedding.device
