"""Tests of MAL beside the contract: the memory first, then attention on its output."""

import torch

from memlm_kernels.testing import assert_close
from tests.conftest import build, step

VARIANTS = [("titans_mal", {"memory_depth": 2, "memory_heads": 2, "memory_head_dim": 16, "window_size": 5})]


def test_the_layer_is_its_equations():
    mixer = build("titans_mal").model.layers[0].mixer
    x = torch.randn(2, 21, 64, dtype=torch.float64)
    h = step(mixer.memory, x).y_BTD
    mixed = x + h
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    assert_close("layer", h + step(mixer.attention, normed).y_BTD, step(mixer, x).y_BTD, 1e-10)
