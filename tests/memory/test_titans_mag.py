"""MAG's own promises: gates at their named start, an engineered start that is what it says, deep memories."""

import pytest
import torch

from memlm import MemLMForCausalLM
from memlm.memory import titans_mag
from memlm.memory.base import Dims
from memlm_kernels.testing import assert_close
from tests.conftest import build, model_config
from tests.kernels.test_neural_memory import token_by_token

VARIANTS = [
    ("titans_mag", {"memory_depth": 3, "memory_heads": 2, "memory_head_dim": 12}),
    ("titans_mag", {"chunk_size": 1, "persistent_tokens": 0}),
    ("titans_mag", {"chunk_size": 50, "conv_size": 1, "attention_conv_size": 0}),
    ("titans_mag", {"initialization": "recall", "window_size": 5}),
]


def metrics(**settings):
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config("titans_mag", **settings))
    return model(torch.randint(259, (2, 40))).metrics


def test_gates_start_where_the_configuration_says():
    got = metrics(initial_lr=0.1, initial_momentum=0.2, initial_decay=0.01)
    for layer in range(2):
        assert got[f"layer{layer}/lr"].item() == pytest.approx(0.1, rel=1e-5)
        assert got[f"layer{layer}/momentum"].item() == pytest.approx(0.2, rel=1e-5)
        assert got[f"layer{layer}/decay"].item() == pytest.approx(0.01, rel=1e-5)
        assert got[f"layer{layer}/gate"].item() == 0.5


def test_the_layer_is_its_equations():
    """Projections, convolution, SiLU, unit keys and queries, the memory, norm, gates: written out once more."""
    torch.manual_seed(0)
    mixer = build(memory_heads=2, memory_head_dim=6, memory_depth=2).model.layers[0].mixer
    memory, x = mixer.memory, torch.randn(2, 21, 64, dtype=torch.float64)
    streams = []
    for proj, taps in zip((memory.q_proj, memory.k_proj, memory.v_proj), memory.conv.weight.chunk(3), strict=True):
        y = torch.nn.functional.pad(proj(x).mT, (3, 0))
        y = torch.nn.functional.conv1d(y, taps[:, None], groups=len(taps)).mT
        streams.append((y * torch.sigmoid(y)).unflatten(-1, (2, 6)))
    q, k, v = streams
    q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
    lr, momentum, decay = torch.sigmoid(memory.store.gates(x)).unflatten(-1, (3, 2)).unbind(-2)
    o = token_by_token(q, k, v, lr, momentum, decay, *memory.store.memory, chunk_size=16)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * memory.norm.weight
    gate = memory.output_gate_proj(x)
    o = o * (gate * torch.sigmoid(gate)).unflatten(-1, (2, 6))
    recalled = memory.o_proj(o.flatten(2))
    assert_close("memory branch", recalled, memory(x).y_BTD, 1e-10)
    share = torch.sigmoid(mixer.gate.gate(x))
    seen = mixer.attention(x).y_BTD
    expected = share * mixer.gate.memory_norm(recalled) + (1 - share) * mixer.gate.attention_norm(seen)
    assert_close("layer", expected, mixer(x).y_BTD, 1e-10)


def test_an_empty_memory_says_nothing():
    torch.manual_seed(0)
    for depth in (1, 2):
        model = MemLMForCausalLM(model_config(memory_depth=depth))
        assert not model.model.layers[0].mixer.memory.store.memory[-1].any()


def test_metrics_show_a_memory_that_is_written():
    got = metrics()
    assert not any(value.requires_grad for value in got.values())
    assert all(got[f"layer{i}/{name}"] > 0 for i in range(2) for name in ("memory_norm", "surprise"))


def test_recall_initialization_ties_queries_to_keys_and_delays_keys():
    torch.manual_seed(0)
    memory = MemLMForCausalLM(model_config(initialization="recall")).model.layers[1].mixer.memory
    assert torch.equal(memory.q_proj.weight, memory.k_proj.weight)
    q, k, v = memory.conv.weight.detach().chunk(3)
    for taps in (q, v):
        assert (taps[:, :-1] == 0).all() and (taps[:, -1] == 1).all()
    assert (k > 0.5).sum(1).eq(1).float().mean() > 0.9
    assert set(k.argmax(1).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_depth": 5}, "memory_depth=5 must be 1, 2, 3 or 4"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"initial_lr": 1.0}, "initial_lr=1.0"),
        ({"initialization": "magic"}, "initialization='magic' must be one of default, recall"),
        ({"window_size": 0}, "window_size=0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        titans_mag.Mixer(titans_mag.Config(**settings), Dims(64, 2, 2, 32), 0)


def test_one_optimizer_step_with_several_heads_reaches_every_parameter():
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config(memory_heads=4, memory_head_dim=16, memory_depth=2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        ids = torch.randint(259, (2, 64))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
