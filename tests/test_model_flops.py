"""FLOPs of a token and bytes of a memory, found without weights: no product escapes the counter, and models of
transformers are counted as the project's own.
"""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import memlm
import memlm.flops
from memlm import MemLMConfig, MemLMForCausalLM
from memlm.flops import _counted, count_flops, count_flops_of, state_bytes
from memlm.reader import Reader
from memlm_kernels import set_backend
from tests.backbones import backbone
from tests.conftest import MEMORIES, model_config

SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


@pytest.mark.parametrize("memory", MEMORIES)
def test_no_product_of_a_memory_is_left_out_and_its_bytes_are_those_after_reading(memory, monkeypatch):
    """Past the window, and inside of a chunk."""
    config, left = model_config(memory), []
    config.num_hidden_layers = 1

    def counted(*given):
        found = _counted(*given)
        left.append(found[2])
        return found

    monkeypatch.setattr(memlm.flops, "_counted", counted)
    memlm.flops._run.cache_clear()
    size = state_bytes(config, 37)
    # The head, and the layer.
    assert left == [[], []]
    reader = Reader(MemLMForCausalLM(config).eval())
    reader(torch.arange(37)[None])
    assert size == reader.nbytes() > 0


def test_products_in_place_count_as_others():
    x, a, b = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    assert _counted(x.baddbmm_, a, b)[::2] == (2 * 3 * 4 * 5 * 2, [])
    assert _counted(x[0].addmm_, a[0], b[0])[::2] == (2 * 3 * 4 * 5, [])
    assert _counted(x[0, :, 0].addmv_, a[0], b[0, :, 0])[::2] == (0, ["aten.addmv_"])


@pytest.mark.parametrize("groups", [4, 2])
def test_a_decoder_of_transformers_counts_as_our_own_of_equal_sizes(groups):
    sizes = dict(num_key_value_heads=groups, **SIZES)
    own = MemLMConfig(mixers={"memory": {"kind": "attention"}}, **sizes)
    assert count_flops_of(LlamaForCausalLM(LlamaConfig(**sizes)), 64) == count_flops(own, 64)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "phi3", "gpt2"])
def test_flops_of_a_backbone_and_its_memory_are_those_of_its_forward(family):
    model = backbone(family)
    before = model.config._attn_implementation, [p.clone() for p in model.parameters()]
    alone = count_flops_of(model, 40)
    assert all(map(torch.equal, before[1], model.parameters()))
    memlm.attach(model, {"kind": "titans_lmm", "chunk_size": 8}, layers=[1])
    both = count_flops_of(model, 40)
    assert model.config._attn_implementation == before[0]
    if family == "qwen3_moe":
        # Its experts run one after the other, each on the tokens that chose it.
        assert alone is both is None
        return
    model.set_attn_implementation("eager")
    with torch.no_grad(), set_backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, 40, dtype=torch.long), use_cache=False)
    assert both == counter.get_total_flops() / 40 > alone > 0


def test_products_of_other_libraries_are_unknown(monkeypatch):
    @torch.library.custom_op("foo::product", mutates_args=())
    def product(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    product.register_fake(torch.empty_like)
    model = backbone("llama")
    assert count_flops_of(model, 8) > 0
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: product(nn.functional.linear(x, self.weight)))
    assert count_flops_of(model, 8) is None
