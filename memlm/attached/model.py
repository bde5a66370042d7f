"""``attach`` and ``detach``."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from memlm.attached import hooks
from memlm.attached.call import Attached, Settings
from memlm.attached.layers import (
    NAME,
    SETTINGS,
    attentions_of,
    check_keywords,
    decoder_of,
    device_of,
    dims_of,
    of,
)
from memlm.attached.save import save_pretrained, upload
from memlm.attached.window import check_implementation, check_layers, full_layers
from memlm.configuration import MemLMConfig
from memlm.memory.base import complete_settings
from memlm.settings import check_type, require

# The attributes that a model with a memory has of its own.
_OWN = ("_upload_modified_files", "save_pretrained", "_is_stateful")


def attach(
    model: PreTrainedModel,
    memory: str | Mapping[str, Any],
    layers: Iterable[int] | None = None,
    *,
    window: int | None = None,
    sinks: int = 0,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Give a decoder of transformers a memory beside the attention of its layers, in place; returns the model.

    >>> model = AutoModelForCausalLM.from_pretrained("a/llama").requires_grad_(False)
    >>> memlm.attach(model, {"kind": "titans_lmm", "chunk_size": 32}, layers=[4, 12], window=512)

    The output of such an attention becomes attention(x) + gate * memory(norm(x)). The gate, one number per channel,
    is 0 at first: outputs do not change, and only the gate has a gradient in the first step. The class of the model
    and the names of its parameters stay; those of the memory contain ``.memlm.``. States live in the model's own
    cache (``memlm.fork``); auxiliary losses join the model's loss.

    model: of any family whose layers hand keywords on to their attention
    memory: a kind with its settings, as in ``configs/memory/*.yaml``, or the name of a kind
    layers: numbers of the layers that get it; None: all that have an attention
    window: the latest tokens that full attention then sees; sliding layers keep their own. None: all
    sinks: the first tokens of a document that it sees too
    dtype: of the memory; None: the model's, but at least fp32, because rounding loses small updates

    Raises ValueError, one line, if the model cannot have a memory, or the settings are wrong.
    """
    require(
        isinstance(model, PreTrainedModel), f"{type(model).__name__} is no PreTrainedModel; attach before wrapping"
    )
    require(
        not isinstance(model.config, MemLMConfig),
        f"{type(model).__name__} has a memory slot of its own in each layer; fill it by memory=... of train.py, or by "
        "mixers=... of MemLMConfig",
    )
    require(
        isinstance(memory, str | Mapping),
        f"memory={memory!r:.80} must be the name of a kind or {{kind: ..., settings}}",
    )
    require(layers is None or isinstance(layers, Iterable), f"layers={layers!r:.80} must be numbers, such as [0, 2]")
    require(dtype is None or isinstance(dtype, torch.dtype), f"dtype={dtype!r:.80} must be a torch.dtype")
    decoder = decoder_of(model)
    require(of(model) is None, f"{type(model).__name__} has a memory already; memlm.detach it first")
    settings = complete_settings({"kind": memory} if isinstance(memory, str) else dict(memory), "memory")
    attentions = attentions_of(decoder)
    chosen = list(attentions) if layers is None else list(layers)
    for i in chosen:
        check_type(i, int, "layers")
        numbers = f"{min(attentions)} to {max(attentions)}" if len(attentions) > 1 else str(min(attentions))
        require(
            i in attentions, f"layers: layer {i} of {type(model).__name__} has no attention; choose from {numbers}"
        )
    require(len(chosen) == len(set(chosen)) > 0, f"layers={chosen} must be different numbers, one at least")
    _check_window(window, sinks)
    if window is not None:
        check_implementation(decoder.config)
        check_layers(decoder.config, attentions)
    for i in chosen:
        check_keywords(decoder, attentions[i])
    embedding = model.get_input_embeddings().weight
    wide = torch.promote_types(embedding.dtype if embedding.is_floating_point() else torch.float32, torch.float32)
    dtype = wide if dtype is None else dtype
    require(dtype.is_floating_point, f"dtype={dtype} must be a floating type")
    config = decoder.config.get_text_config(decoder=True)
    dims, std = dims_of(config, attentions[chosen[0]]), getattr(config, "initializer_range", 0.02)
    made = {i: Attached(settings, dims, i, std) for i in chosen}
    if not any(getattr(module, "long_term", False) for module in made[chosen[0]].modules()):
        raise ValueError(
            f"memory.kind={settings['kind']!r} is attention alone; it replaces a model's attention, which "
            "scripts/convert_checkpoint.py does"
        )
    for i, new in made.items():
        attentions[i].add_module(NAME, new.to(device_of(attentions[i], embedding), dtype).train(model.training))
        attentions[i].register_forward_hook(hooks.after_attention, with_kwargs=True)
    if window is not None:
        for i in set(attentions).intersection(full_layers(decoder.config)):
            attentions[i].register_forward_pre_hook(hooks.before_attention, with_kwargs=True)
    setattr(decoder, SETTINGS, Settings(settings, chosen, window, sinks, str(dtype).removeprefix("torch.")))
    decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True)
    decoder.register_forward_hook(hooks.after_decoder, with_kwargs=True)
    if model is not decoder:
        model.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
        model.register_forward_hook(hooks.after_model, with_kwargs=True)
    # States cannot be cropped, so transformers must refuse assisted decoding.
    model._is_stateful = True
    # Not bound methods, which a pickled model could not find again.
    model.save_pretrained = functools.partial(save_pretrained, model)
    model._upload_modified_files = functools.partial(upload, model)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the memory and its window, in place: the model is again as it was loaded. Returns the model.

    model: the one that got the memory, or one around it

    Raises ValueError if it has no memory.
    """
    require(of(model) is not None, f"{type(model).__name__} has no memory")
    require(
        any(_OWN[0] in vars(module) for module in model.modules()),
        f"{type(model).__name__} is a part of the model that got the memory; detach it from that model",
    )
    for module in list(model.modules()):
        hooks.remove_hooks(module)
        if isinstance(getattr(module, NAME, None), Attached):
            delattr(module, NAME)
        for name in (SETTINGS, *_OWN):
            vars(module).pop(name, None)
    return model


def _check_window(size: int | None, sinks: int) -> None:
    check_type(size, int | None, "window")
    check_type(sinks, int, "sinks")
    require(size is None or size >= 1, f"window={size} must be at least 1, or None for all tokens")
    require(sinks >= 0, f"sinks={sinks} must not be negative")
    require(size is not None or sinks == 0, f"sinks={sinks} are the first tokens beside a window; give window too")
