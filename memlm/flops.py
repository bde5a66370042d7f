"""Sizes of a model: its parameters, the FLOPs of a token, and the bytes of its state."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from memlm.configuration import MemLMConfig
from memlm.memory.base import SequenceMixer
from memlm.memory.rows import Rows
from memlm.memory.state import leaves
from memlm.modeling import MemLMDecoderLayer
from memlm_kernels import set_backend


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
    return _run(config, seq_len)[0] / seq_len


def state_bytes(config: MemLMConfig, seq_len: int) -> int:
    """Bytes of the memory of one stream after ``seq_len`` tokens, found by a run on tensors without data."""
    return _run(config, seq_len)[1]


def _run(config: MemLMConfig, seq_len: int) -> tuple[int, int]:
    """FLOPs of a document, and bytes of the states after it."""
    config = copy.deepcopy(config)
    # Fused attention hides its products from the counter.
    config._attn_implementation = "eager"
    names = config.layer_mixers()
    # Not the meta device: autocast, which every memory disables for its gates, does not support it.
    with FakeTensorMode(), torch.no_grad(), set_backend("reference"):
        x_BTD = torch.empty(1, seq_len, config.hidden_size)
        flops, _ = _counted(nn.Linear(config.hidden_size, config.vocab_size, bias=False), x_BTD)
        size = 0
        for name, layers in Counter(names).items():
            layer, rows = MemLMDecoderLayer(config, names.index(name)), Rows.of(x_BTD)
            state = layer.mixer.init_state(1, x_BTD.device, x_BTD.dtype)
            of_layer, out = _counted(layer, x_BTD, state, rows)
            flops += layers * of_layer
            size += layers * sum(x.numel() * x.element_size() for x in leaves(out.state))
    return flops, size


def _counted(module: nn.Module, *inputs: Any) -> tuple[int, Any]:
    # The counter hooks the gradients of inputs that have one, which nothing makes here.
    module.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        out = module(*inputs)
    return counter.get_total_flops(), out
