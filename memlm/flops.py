"""Sizes of a model: its parameters, the FLOPs of a token, and the bytes of its state."""

import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import PreTrainedModel

from memlm.cache import MemoryCache
from memlm.configuration import MemLMConfig
from memlm.memory.base import SequenceMixer
from memlm.memory.rows import Rows
from memlm.memory.state import leaves
from memlm.modeling import MemLMDecoderLayer, MemLMForCausalLM
from memlm_kernels import set_backend

# Ops of torch that may hold products, beside those of other libraries.
_PRODUCT = re.compile(r"^(?!aten\.|prims?\.)|(?<!cu)mm|mv_?$|dot|attention|conv|linear|matmul")


def count_parameters(model: nn.Module, trained: bool = False) -> int:
    """The number of parameters, or of those that are trained; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def count_active_parameters(model: nn.Module) -> int:
    """The number of parameters that one token uses."""
    mixers = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    return count_parameters(model) - sum(mixer.idle_parameters() for mixer in mixers)


def count_flops(config: MemLMConfig, seq_len: int) -> float:
    """FLOPs of one token's forward, averaged over a document of ``seq_len`` tokens.

    The matrix products of layers and head are counted by a run on tensors without data. A multiply-add counts as two.
    Masked scores count; elementwise work does not.
    """
    return _run(config.to_json_string(), seq_len)[0] / seq_len


def count_flops_of(model: PreTrainedModel, seq_len: int) -> float | None:
    """FLOPs as ``count_flops`` counts them, of any causal language model with all that is attached to it.

    The whole model runs on tensors without data, with eager attention. None, unknown, for a forward that depends on
    the tokens, such as that of a mixture of experts, and for products that torch's counter does not count, such as
    those of quantised weights.
    """
    before, mode = model.config._attn_implementation, FakeTensorMode()
    model.set_attn_implementation("eager")
    logging.disable(logging.ERROR)
    try:
        held = [*model.named_parameters(), *model.named_buffers()]
        tensors = {name: mode.from_tensor(x.detach()) for name, x in held}
        with mode, torch.no_grad(), set_backend("reference"):
            ids_BT = torch.zeros(1, seq_len, dtype=torch.long, device=model.device)
            flops, _, missed = _counted(functional_call, model, tensors, (ids_BT,), {"use_cache": False})
    # Forwards of other families raise anything.
    except Exception:
        return None
    finally:
        logging.disable(logging.NOTSET)
        model.set_attn_implementation(before)
    return None if missed else flops / seq_len


def state_bytes(config: MemLMConfig, seq_len: int) -> int:
    """Bytes of the memory of one stream after ``seq_len`` tokens, found by a run on tensors without data."""
    return _run(config.to_json_string(), seq_len)[1]


@functools.cache
def _run(settings: str, seq_len: int) -> tuple[int, int]:
    """FLOPs of a document, and bytes of the states after it. settings: of ``MemLMConfig``, as JSON"""
    config = MemLMConfig.from_dict(json.loads(settings))
    # Fused attention hides its products from the counter.
    config._attn_implementation = "eager"
    if config.side is not None or config.taps is not None:
        with FakeTensorMode(), torch.no_grad(), set_backend("reference"):
            model, memory = MemLMForCausalLM(config).eval(), MemoryCache()
            flops, *_ = _counted(partial(model, past_key_values=memory), torch.zeros(1, seq_len, dtype=torch.int64))
            return flops, memory.nbytes()
    names = config.layer_mixers()
    # Not the meta device: autocast, which every memory disables for its gates, does not support it.
    with FakeTensorMode(), torch.no_grad(), set_backend("reference"):
        x_BTD = torch.empty(1, seq_len, config.hidden_size)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        flops, *_ = _counted(head.requires_grad_(False), x_BTD)
        size = 0
        for name, layers in Counter(names).items():
            layer, rows = MemLMDecoderLayer(config, names.index(name)), Rows.of(x_BTD)
            state = layer.mixer.init_state(1, x_BTD.device, x_BTD.dtype)
            # The counter hooks the gradients of inputs that have one, which nothing makes here.
            of_layer, out, _ = _counted(layer.requires_grad_(False), x_BTD, state, rows)
            flops += layers * of_layer
            size += layers * sum(x.numel() * x.element_size() for x in leaves(out.state))
    return flops, size


class _Ops(TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in flop_registry:
            self.names.add(str(func._overloadpacket))
        return func(*args, **(kwargs or {}))


def _counted(run: Callable[..., Any], *inputs: Any) -> tuple[int, Any, list[str]]:
    """FLOPs and output of a call, and its ops whose products, if they have any, are not counted."""
    with _Ops() as ops, FlopCounterMode(display=False) as counter:
        out = run(*inputs)
    return counter.get_total_flops(), out, sorted(filter(_PRODUCT.search, ops.names))
