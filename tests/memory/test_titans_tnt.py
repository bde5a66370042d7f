"""Tests of TNT beside the contract: two levels, independent shards, a second stage with smaller chunks."""

import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.memory import titans_tnt
from memlm.memory.base import Dims
from memlm.memory.rows import Rows
from memlm_kernels.testing import assert_close
from tests.conftest import build, model_config, step

VARIANTS = [
    ("titans_tnt", {"local_chunk_sizes": [4, 12], "shard_size": 24, "chunk_size": 10, "memory_depth": 2}),
    ("titans_tnt", {"shard_size": 7, "local_chunk_sizes": [1], "memory_heads": 2, "memory_head_dim": 16}),
]


def test_the_layer_is_its_equations():
    settings = dict(shard_size=8, local_chunk_sizes=[2, 5], chunk_size=16, memory_depth=2, memory_head_dim=12)
    mixer = build("titans_tnt", **settings).model.layers[0].mixer
    x = torch.randn(2, 27, 64, dtype=torch.float64)
    rows, empty = Rows.of(x), mixer.init_state(2, x.device, x.dtype)
    q, k, v, _ = mixer.project(x, empty, rows)
    o, *_ = mixer.store(x, q, k, v, empty["global"], rows)
    for start in range(0, 27, 8):
        at = slice(start, start + 8)
        scores = (q[:, at, None] * k[:, None, at]).sum(-1)  # query, key
        causal = torch.ones(scores.shape[1:3], dtype=torch.float64).tril()[..., None]
        projected = ((scores * causal)[..., None] * k[:, None, at]).sum(2)
        length = projected.norm(dim=-1, keepdim=True)
        projected = torch.where(length > 1, projected / length, projected)
        for store in mixer.local_stores:
            local, *_ = store(x[:, at], projected, k[:, at], v[:, at], {}, Rows.of(x[:, at]))
            o[:, at] = o[:, at] + local
    assert_close("layer", mixer.output(o, mixer.output_gate(x)), step(mixer, x).y_BTD, 1e-10)


def test_local_memories_start_afresh_and_the_global_one_goes_on():
    mixer = build("titans_tnt", shard_size=8, local_chunk_sizes=[4], chunk_size=16).model.layers[0].mixer
    x = torch.randn(1, 24, 64, dtype=torch.float64)
    state = step(mixer, x[:, :17]).state
    fresh = mixer.local_stores[0](*_inputs(mixer, x[:, 16:17]), {}, Rows.of(x[:, 16:17]))[1]
    assert state["local0"]["weights"]["0"].shape == fresh["weights"]["0"].shape
    other = x.clone()
    other[:, :8] += 1.0
    changed = step(mixer, other[:, :17]).state
    conv_sees = 16 - (mixer.config.conv_size - 1) >= 8
    assert conv_sees and torch.equal(state["local0"]["weights"]["0"], changed["local0"]["weights"]["0"])
    assert not torch.equal(state["global"]["weights"]["0"], changed["global"]["weights"]["0"])


def _inputs(mixer, x):
    q, k, v, _ = mixer.project(x, mixer.init_state(len(x), x.device, x.dtype), Rows.of(x))
    return x, q, k, v


def test_a_second_stage_goes_on_with_smaller_chunks(tmp_path):
    torch.manual_seed(0)
    first = MemLMForCausalLM(model_config("titans_tnt"))
    first.save_pretrained(tmp_path)
    config = MemLMConfig.from_pretrained(tmp_path)
    config.mixers["memory"]["local_chunk_sizes"] = [4]
    second = MemLMForCausalLM.from_pretrained(tmp_path, config=config)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.randint(259, (1, 100))
    assert (first(ids).logits - second(ids).logits).abs().max() > 1e-6


def test_local_memories_start_with_smaller_steps():
    config = titans_tnt.Config(chunk_size=32, local_chunk_sizes=[8, 16])
    mixer = titans_tnt.Mixer(config, Dims(24, 2, 2, 12), 0)
    starts = [store.gates.bias[0].sigmoid().item() for store in (mixer.store, *mixer.local_stores)]
    assert starts == pytest.approx([0.0235, 0.0235 / 4, 0.0235 / 4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 0}, "shard_size=0"),
        ({"local_chunk_sizes": []}, r"local_chunk_sizes=\[\] must name one chunk size"),
        ({"local_chunk_sizes": [128]}, r"local_chunk_sizes=\[128\] must lie between 1 and shard_size=64"),
        ({"omega_window": 4}, "omega_window=4 must be 1"),
        ({"initial_local_lr": 1.0}, "initial_local_lr=1.0 must lie between 0 and max_lr=1.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        titans_tnt.Config(**settings)
