"""The hooks of a model with a memory. They are functions of modules, never closures: a copy of the model then uses its
own memory.
"""

import inspect
from typing import Any

import torch
from torch import nn

from memlm.attached.call import KEY, Attached, Call
from memlm.attached.layers import NAME, SETTINGS, no_keywords
from memlm.loss import bound, weighted
from memlm.settings import require


def before_model(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = _by_name(model, args, kwargs)
    return (), {**kwargs, KEY: Call({"attention_mask": kwargs.get("attention_mask")})}


def before_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = _by_name(decoder, args, kwargs)
    call = kwargs.setdefault(KEY, Call())
    call.begin(decoder, getattr(decoder, SETTINGS), kwargs)
    return (), kwargs


def before_attention(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    call = _call(attention, kwargs)
    return (), {**_by_name(attention, args, kwargs), "attention_mask": call.mask}


def after_attention(attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    x_BTD = args[0] if args else kwargs["hidden_states"]
    y_BTD = output[0] if isinstance(output, tuple) else output
    recalled_BTD = getattr(attention, NAME)(x_BTD, _call(attention, kwargs))
    y_BTD = y_BTD + recalled_BTD.to(y_BTD.device, y_BTD.dtype)
    return (y_BTD, *output[1:]) if isinstance(output, tuple) else y_BTD


def after_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    call = kwargs[KEY]
    call.end(getattr(decoder, SETTINGS), output)
    if call.aux_losses and decoder.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Under reentrant checkpointing a layer runs without gradients first.
        require(
            all(x.requires_grad for x in call.aux_losses.values()) or not _trains(decoder),
            "gradient checkpointing with use_reentrant=True loses the memory's auxiliary losses; give use_reentrant="
            "False",
        )
        hidden, call.aux_losses = bound(output[0], call.aux_losses)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output[next(iter(output))] = hidden
    if call.aux_losses and not isinstance(output, tuple):
        # For a decoder that is called without a head.
        output["aux_losses"] = call.aux_losses
    return output


def after_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    call, labels = kwargs[KEY], kwargs.get("labels")
    if not call.aux_losses:
        return output
    if labels is None:
        if not isinstance(output, tuple):
            output["aux_losses"] = call.aux_losses
        return output
    losses = weighted(call.aux_losses, labels, kwargs.get("num_items_in_batch"))
    loss = output[0] + sum(x.to(output[0].device) for x in losses.values())
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


_HOOKS = (before_model, before_decoder, before_attention, after_attention, after_decoder, after_model)


# The arguments' names of each class's forward: to inspect it takes as long as a layer.
_names: dict[type[nn.Module], list[str]] = {}


def _trains(decoder: nn.Module) -> bool:
    return any(p.requires_grad for m in decoder.modules() if isinstance(m, Attached) for p in m.parameters())


def _call(module: nn.Module, kwargs: dict[str, Any]) -> Call:
    require(KEY in kwargs, no_keywords(module))
    return kwargs[KEY]


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward as keywords."""
    if not args:
        return kwargs
    kind = type(module)
    if kind not in _names:
        _names[kind] = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    return {**dict(zip(_names[kind], args, strict=False)), **kwargs}


def remove_hooks(module: nn.Module) -> None:
    """A handle of a hook would not survive a copy of the model, so hooks are found by their functions."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [n for n, function in hooks.items() if function in _HOOKS]:
            del hooks[number]
            for table in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                table.pop(number, None)
