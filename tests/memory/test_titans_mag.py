"""Tests of MAG beside the contract: two branches and a gate between them."""

import pytest
import torch

from memlm import MemLMForCausalLM
from memlm.memory import titans_mag
from memlm.memory.base import Dims
from memlm_kernels.testing import assert_close
from tests.conftest import build, model_config, step

VARIANTS = [
    ("titans_mag", {"memory_depth": 3, "memory_heads": 2, "memory_head_dim": 12}),
    ("titans_mag", {"chunk_size": 1, "persistent_tokens": 0}),
    ("titans_mag", {"chunk_size": 50, "conv_size": 1, "attention_conv_size": 0}),
    ("titans_mag", {"initialization": "recall", "window_size": 5}),
]


def test_the_layer_is_its_equations():
    mixer = build().model.layers[0].mixer
    x = torch.randn(2, 21, 64, dtype=torch.float64)
    share = torch.sigmoid(mixer.gate.gate(x))
    recalled = mixer.gate.memory_norm(step(mixer.memory, x).y_BTD)
    seen = mixer.gate.attention_norm(step(mixer.attention, x).y_BTD)
    out = step(mixer, x)
    assert_close("layer", share * recalled + (1 - share) * seen, out.y_BTD, 1e-10)
    part, other = (share * recalled).norm(), ((1 - share) * seen).norm()
    assert out.metrics["memory_share"].item() == pytest.approx((part / (part + other)).item())
    assert_close("gate", share.mean(-1), out.metrics["gate"], 1e-10)


def test_both_branches_have_half_the_say_at_first_and_the_memory_shows_from_step_0():
    torch.manual_seed(0)
    got = MemLMForCausalLM(model_config("titans_mag"))(torch.randint(259, (2, 40))).metrics
    for layer in range(2):
        assert (got[f"layer{layer}/gate"] == 0.5).all()
        assert 0.3 < got[f"layer{layer}/memory_share"] < 0.7
        assert (got[f"layer{layer}/surprise"] > 0).all()


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="window_size=0"):
        titans_mag.Mixer(titans_mag.Config(window_size=0), Dims(64, 2, 2, 32), 0)
