"""Tests of MAC beside the contract: its equations, one token at a time, and no read of later tokens."""

import pytest
import torch

from memlm.memory import titans_mac
from memlm.memory.rows import Rows
from memlm.memory.state import in_order
from memlm_kernels.testing import Watch, assert_close
from tests.conftest import build, step

VARIANTS = [
    ("titans_mac", {"memory_depth": 2, "segment_size": 8, "chunk_size": 4, "persistent_tokens": 0}),
    ("titans_mac", {"segment_size": 16, "attention_conv_size": 3, "memory_heads": 2, "memory_head_dim": 16}),
]


def written_out(mixer, x):
    """Token by token: h from the memory before the segment, attention to h_i and x_i of i <= j of the segment, write
    and second read. Each part gets only the inputs that the equations name, and nothing later.
    """
    size, empty = mixer.config.segment_size, mixer.memory.init_state(len(x), x.device, x.dtype)
    weights = tuple(w.expand(len(x), *w.shape) for w in mixer.memory.store.memory())
    conv, memory, seen, recalled = empty["conv"][..., : mixer.memory.q_proj.out_features], None, [], []
    for t in range(x.shape[1]):
        if t % size == 0:
            pairs = []
            if memory is not None:
                weights = in_order(memory["weights"])
        q, gate, conv = mixer.memory(x[:, t : t + 1], conv, Rows.of(x[:, t : t + 1]), step="ask")
        pairs += [mixer.memory.recall(q, gate, weights), x[:, t : t + 1]]
        seen.append(step(mixer.attention, torch.cat(pairs, 1)).y_BTD[:, -1:])
        out = step(mixer.memory, mixer.norm(x[:, t : t + 1] + seen[-1]), memory)
        memory = out.state
        recalled.append(out.y_BTD)
    seen, recalled = torch.cat(seen, 1), torch.cat(recalled, 1)
    share = torch.sigmoid(mixer.gate.gate(x))
    return share * mixer.gate.memory_norm(recalled) + (1 - share) * mixer.gate.attention_norm(seen)


@pytest.mark.parametrize("length", [1, 8, 27])
def test_the_layer_is_its_equations(length):
    mixer = build("titans_mac", segment_size=8, chunk_size=4, memory_depth=2).model.layers[0].mixer
    x = torch.randn(2, length, 64, dtype=torch.float64)
    assert_close("layer", written_out(mixer, x), step(mixer, x).y_BTD, 1e-10)


def test_the_first_read_is_of_the_memory_before_the_segment():
    """A change in one segment reaches the attention of the next one through h, but not that of its own."""
    mixer = build("titans_mac", segment_size=8, chunk_size=4).model.layers[0].mixer
    x = torch.randn(1, 24, 64, dtype=torch.float64)
    edited = x.clone()
    edited[:, 3] += 1.0
    seen = []
    mixer.gate.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    with torch.no_grad():
        for z in (x, edited):
            step(mixer, z)
    one, two = seen
    assert torch.equal(one[:, :3], two[:, :3])
    assert (one[:, 8:16] - two[:, 8:16]).abs().amin(-1).all(), "the next segment recalls what was written"


@pytest.mark.parametrize("last", [7, 8, 20, 23])
def test_nothing_leaks_from_later_tokens_of_a_segment(last):
    mixer = build("titans_mac", segment_size=8, chunk_size=4).model.layers[0].mixer
    x = torch.randn(1, 24, 64, dtype=torch.float64)
    edited = x.clone()
    edited[:, last] += 1.0
    with torch.no_grad():
        assert torch.equal(step(mixer, x).y_BTD[:, :last], step(mixer, edited).y_BTD[:, :last])


def test_a_segment_takes_few_operations():
    """Forward and backward of one more segment."""
    mixer = build("titans_mac").model.layers[0].mixer

    def training(segments):
        x = torch.randn(1, 32 * segments, 64, dtype=torch.float64, requires_grad=True)
        with Watch() as watch:
            step(mixer, x).y_BTD.sum().backward()
        return watch.operations

    assert training(4) - training(2) <= 2 * 670


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="segment_size=24 must be a multiple of chunk_size=16"):
        titans_mac.Config(segment_size=24)
