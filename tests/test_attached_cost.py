"""A memory with closed gates costs its own operations and few more: those of the hooks and of the gate."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import memlm
from memlm.attached.call import Call
from memlm.memory.rows import Rows
from memlm_kernels.testing import Watch


def operations(call):
    with torch.no_grad(), Watch() as watch:
        call()
    return watch.operations


@pytest.mark.parametrize("memory", ["titans_lmm", "gated_delta_net"])
@pytest.mark.parametrize("length", [1, 64])
def test_a_closed_memory_costs_its_own_operations(memory, length):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    backbone, model = (LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval() for _ in "ab")
    memlm.attach(model, memory)
    ids, caches = torch.randint(64, (1, 65)), [DynamicCache(config=model.config) for _ in "ab"]
    if length == 1:
        with torch.no_grad():
            for x, cache in zip((backbone, model), caches, strict=True):
                x(ids[:, :64], past_key_values=cache)
    bare, whole = (
        operations(lambda x=x, cache=cache: x(ids[:, -length:], past_key_values=cache))
        for x, cache in zip((backbone, model), caches, strict=True)
    )
    start, x_BTD = 64 if length == 1 else 0, torch.randn(1, length, 64)
    states = {"0": {}, "1": {}} if start == 0 else caches[1].layers[-1].states
    call = Call(before=states, rows=Rows(length, torch.tensor([start]), start, metrics=False))
    memories = [m for name, m in model.named_modules() if name.endswith(".memlm")]
    alone = operations(lambda: [m(x_BTD, call) for m in memories])
    assert len(memories) == 2 and whole <= 1.05 * (bare + alone)
