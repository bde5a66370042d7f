"""The memory part of every Titans: its equations, options, caps and metrics."""

import pytest
import torch
import torch.nn.functional as F

from memlm import MemLMForCausalLM
from memlm.memory import titans, titans_lmm
from memlm.memory.base import Dims
from memlm.memory.state import in_order, mapped
from memlm_kernels import read_memory
from memlm_kernels.testing import assert_close
from tests.conftest import Stands, build, model_config, step
from tests.kernels.test_neural_memory import HUBER, token_by_token

VARIANTS = [
    ("titans_lmm", {"memory_depth": 2, "memory_activation": "silu"}),
    ("titans_lmm", {"inner_loss": "huber", "huber_delta": 0.3, "memory_heads": 2, "memory_head_dim": 16}),
    ("titans_lmm", {"inner_loss": "lp", "memory_depth": 2, "memory_norm": False, "initial_lr": 0.047}),
    ("titans_lmm", {"inner_loss": "dot_product", "initial_decay": 0}),
    ("titans_lmm", {"omega_window": 5, "chunk_size": 3, "initial_momentum": 0}),
    ("omeganet", {"memory_depth": 2}),
]


def memory_of(**settings) -> titans.NeuralMemory:
    return build("titans_lmm", **settings).model.layers[0].mixer


def written_out(memory, x, **options):
    """The layer, written out: projections, convolution, SiLU, unit keys and queries, the recurrence, norm, gates."""
    config, streams = memory.config, []
    for proj, taps in zip((memory.q_proj, memory.k_proj, memory.v_proj), memory.conv.weight.chunk(3), strict=True):
        y = F.pad(proj(x).mT, (config.conv_size - 1, 0))
        y = F.conv1d(y, taps[:, None], groups=len(taps)).mT
        streams.append((y * torch.sigmoid(y)).unflatten(-1, (config.memory_heads, -1)))
    q, k, v = streams
    q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
    if config.memory_norm:
        v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if config.polynomial_degree == 2:
        first, second = memory.feature_scales
        size = q.shape[-1]
        pairs = [(i, j) for i in range(size) for j in range(i, size)]
        q, k = (
            torch.cat(
                [
                    first * z,
                    second * torch.stack([z[..., i] * z[..., j] * (2**0.5 if i != j else 1) for i, j in pairs], -1),
                ],
                -1,
            )
            for z in (q, k)
        )
        q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
    names = list(config.gates)
    gates = dict(
        zip(names, torch.sigmoid(memory.store.gates(x)).unflatten(-1, (len(names), -1)).unbind(-2), strict=True)
    )
    for name, (_, cap) in config.gates.items():
        gates[name] = cap * gates[name]
    o = token_by_token(
        q,
        k,
        v,
        gates["lr"],
        gates.get("momentum"),
        gates.get("decay"),
        *memory.store.memory(),
        chunk_size=config.chunk_size,
        weight=gates.get("weight"),
        **options,
    )
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * memory.norm.weight
    gate = memory.output_gate_proj(x)
    return memory.o_proj((o * (gate * torch.sigmoid(gate)).unflatten(-1, (config.memory_heads, -1))).flatten(2))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"memory_depth": 2}, {"norm": True}),
        ({"memory_depth": 2, "memory_norm": False}, {}),
        ({"max_lr": 0.1, "max_momentum": 0.5, "max_decay": 0.01}, {}),
        ({"inner_loss": "huber", "huber_delta": 0.7, "initial_momentum": 0}, {"loss": HUBER}),
        ({"omega_window": 4, "polynomial_degree": 2, "memory_depth": 2}, {"window": 4}),
        ({"memory_norm": True, "memory_activation": "silu"}, {"activation": "silu", "norm": True}),
    ],
    ids=["depth", "depth without norm", "caps", "huber", "omega", "norm"],
)
def test_the_layer_is_its_equations(settings, options):
    memory = memory_of(memory_heads=2, memory_head_dim=6, **settings)
    if "norm" in options:
        options = {**options, "norm": memory.store.memory_norm()}
    x = torch.randn(2, 21, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close("layer", written_out(memory, x, **options), step(memory, x).y_BTD, 1e-10)


def metrics(**settings):
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config("titans_lmm", **settings))
    return model(torch.randint(259, (2, 40))).metrics


def test_gates_start_where_the_configuration_says():
    got = metrics(initial_lr=0.01, initial_momentum=0.2, initial_decay=0.01, max_lr=0.1, max_decay=0.5, omega_window=4)
    for layer in range(2):
        for name, start in (("lr", 0.01), ("momentum", 0.2), ("decay", 0.01), ("weight", 0.25)):
            assert got[f"layer{layer}/{name}"].flatten().tolist() == pytest.approx([start] * 80, rel=1e-5)


def test_gates_stay_below_their_caps():
    memory = memory_of(max_lr=0.1, max_momentum=0.5, max_decay=0.01, initial_lr=0.05)
    with torch.no_grad():
        memory.store.gates.bias.fill_(100.0)
    got = step(memory, torch.randn(1, 9, 64, dtype=torch.float64)).metrics
    assert [round(got[name].mean().item(), 9) for name in ("lr", "momentum", "decay")] == [0.1, 0.5, 0.01]


def test_metrics_show_a_memory_that_is_written():
    got = metrics()
    assert not any(value.requires_grad for value in got.values())
    names = ("memory_norm", "momentum_norm", "update_norm", "surprise")
    assert all((got[f"layer{i}/{name}"] > 0).all() for i in range(2) for name in names)
    silent = metrics(initial_lr=1e-12)
    assert all(silent[f"layer{i}/update_norm"] < 1e-6 < silent[f"layer{i}/surprise"].mean() for i in range(2))


def norm_of(tensors):
    """The norm over layers of [B, H, in, out] each; root mean square over rows and heads."""
    return sum(x.square().sum() for x in tensors).sqrt() / tensors[0][..., 0, 0].numel() ** 0.5


@pytest.mark.parametrize("memory", ["titans_lmm", "titans_mac", "titans_mag", "titans_mal", "titans_tnt", "lact"])
def test_norms_are_of_the_calls_end_and_updates_of_all_the_call(memory):
    """Whether a row starts without a memory, with zeros, or with the memory of another document."""
    mixer = build(memory).model.layers[0].mixer
    part = {"titans_tnt": "global"}.get(memory, "memory")
    owner = getattr(mixer, "memory", mixer)
    learned = [w.expand(2, *w.shape) for w in (owner if memory == "lact" else owner.store).memory()]

    def weights(state):
        return in_order(state.get(part, state)["weights"])

    x = torch.randn(2, 75, 64, dtype=torch.float64)
    empty = mixer.init_state(2, x.device, x.dtype)
    first = step(mixer, x)
    places = torch.cat([torch.arange(30), torch.arange(45)]).expand(2, 75)
    packed = {"given_BT": places, "max_documents": 2}
    reset = mapped(lambda x: x.clone().index_fill_(0, torch.tensor([1]), 0), first.state)
    reset = Stands(reset, torch.tensor([75, 0]))
    for state, facts, start in (
        (None, {}, learned),
        (empty, {}, learned),
        (None, packed, learned),
        (first.state, packed, learned),
        (first.state, {}, weights(first.state)),
        (reset, {}, [torch.stack([a[0], b[1]]) for a, b in zip(weights(first.state), learned, strict=True)]),
    ):
        got = step(mixer, x, state, **facts)
        after = weights(got.state)
        assert_close("memory_norm", norm_of(after), got.metrics["memory_norm"], 1e-10)
        update = norm_of([a - b for a, b in zip(after, start, strict=True)])
        assert_close("update_norm", update, got.metrics["update_norm"], 1e-10)
    idle = step(mixer, x[:, :3], empty, lengths_B=torch.zeros(2, dtype=torch.long))
    assert idle.metrics["update_norm"] == 0


@pytest.mark.parametrize("memory", ["titans_lmm", "titans_mac", "titans_mag", "titans_mal", "titans_tnt", "lact"])
def test_a_gate_that_dies_shows(memory):
    """The gate behind the read is closed, as training might do."""
    model = build(memory)
    ids = torch.randint(259, (2, 40), generator=torch.Generator().manual_seed(0))
    mixer = model.model.layers[0].mixer
    part, name = getattr(mixer, "memory", mixer), "scale" if memory == "lact" else "output_gate"
    gate = part.scale if memory == "lact" else part.output_gate_proj
    alive = model(ids).metrics
    assert alive[f"layer0/{name}"].mean() > 1e-3 and alive["layer0/memory_share"] > 0.01
    with torch.no_grad():
        for p in gate.parameters():
            p.zero_()
    dead = model(ids).metrics
    assert dead[f"layer0/{name}"].mean() == 0 and dead["layer0/memory_share"] == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
def test_an_empty_memory_says_nothing_or_passes_its_query_through(depth, norm):
    torch.manual_seed(0)
    settings = dict(memory_depth=depth, memory_norm=norm)
    mixer = MemLMForCausalLM(model_config("titans_lmm", **settings)).model.layers[0].mixer
    q = torch.randn(1, 3, 1, 64)
    read = read_memory(q, [w[None] for w in mixer.store.memory()], **mixer.store.network())
    assert_close("read", q if norm else torch.zeros_like(q), read, 1e-6)


def test_what_a_memory_knows_is_told_apart_from_what_it_passes_through():
    memory = memory_of(memory_depth=2, initial_lr=1e-12)
    with torch.no_grad():
        memory.store.memory()[-1].zero_()
        memory.store.memory_norm()[1].zero_()
    x = torch.randn(1, 21, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = step(memory, x).metrics
    assert got["known_share"].max() < 1e-6 and got["memory_share"] > 0.01
    assert step(memory_of(memory_depth=2), x).metrics["known_share"].mean() > 0.01


def test_recall_initialization_ties_queries_to_keys_and_delays_keys():
    torch.manual_seed(0)
    memory = MemLMForCausalLM(model_config("titans_lmm", initialization="recall")).model.layers[1].mixer
    assert torch.equal(memory.q_proj.weight, memory.k_proj.weight)
    q, k, v = memory.conv.weight.detach().chunk(3)
    for taps in (q, v):
        assert (taps[:, :-1] == 0).all() and (taps[:, -1] == 1).all()
    assert (k > 0.5).sum(1).eq(1).float().mean() > 0.9
    assert set(k.argmax(1).tolist()) == {0, 1, 2, 3}


def test_defaults_follow_depth_and_chunk():
    """A deep memory diverges where a linear one learns, so by default it has a norm, a smaller lr and a smaller decay.
    Long chunks have a smaller lr, because a repeated token overshoots there."""
    for settings, norm, lr, decay in (
        ({}, False, 0.047, 0.001),
        ({"chunk_size": 64}, False, 0.047 / 4, 0.001),
        ({"memory_depth": 2, "chunk_size": 32}, True, 0.01, 0.0003),
        ({"memory_depth": 4, "chunk_size": 64}, True, 0.005, 0.0003),
        ({"memory_depth": 2, "polynomial_degree": 2}, False, 0.01, 0.0003),
        ({"memory_depth": 2, "memory_norm": False, "initial_lr": 0.01, "initial_decay": 0}, False, 0.01, 0),
        ({"memory_norm": True, "initial_lr": 0.02}, True, 0.02, 0.001),
    ):
        config = model_config("titans_lmm", **settings).mixers["memory"]
        assert (config["memory_norm"], config["initial_lr"], config["initial_decay"]) == (norm, lr, decay)
    assert model_config("titans_mac").mixers["memory"]["initial_lr"] == 0.025


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_depth": 5}, "memory_depth=5 must be 1, 2, 3 or 4"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": 1018}, "chunk_size=1018 must be at most 64, or a multiple of a number from 16 to 64"),
        ({"initial_lr": 1.0}, "initial_lr=1.0 must lie between 0 and max_lr=1.0"),
        ({"max_lr": 1.5}, "max_lr=1.5 must lie above 0, and 1 at most"),
        ({"max_decay": 0.0005}, "initial_decay=0.001 must lie between 0 and max_decay=0.0005"),
        ({"initialization": "magic"}, "initialization='magic' must be one of default, recall"),
        ({"inner_loss": "l1"}, "inner_loss='l1' must be one of squared_error, huber, lp, dot_product"),
        ({"memory_activation": "relu"}, "memory_activation='relu' must be one of gelu, silu"),
        ({"polynomial_degree": 3}, "polynomial_degree=3 must be one of 1, 2"),
        ({"polynomial_degree": 2, "memory_norm": True}, "memory_norm=true needs polynomial_degree=1"),
        ({"omega_window": 0}, "omega_window=0"),
        ({"huber_delta": 0.0}, "huber_delta=0.0 must be positive"),
        ({"lp_power": 0.5}, "lp_power=0.5 must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        titans_lmm.Mixer(titans_lmm.Config(**settings), Dims(64, 2, 2, 32), 0)


def test_optimizer_steps_with_several_heads_reach_every_parameter():
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config("titans_lmm", memory_heads=4, memory_head_dim=16, memory_depth=2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        ids = torch.randint(259, (2, 64))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def trained(memory, depth, marks=()):
    return pytest.param(memory, {"memory_depth": depth}, marks=marks, id=f"{memory} {depth}")


TRAINED = [trained("titans_lmm", 1), trained("titans_lmm", 2)]
MORE = (("titans_mac", 3), ("titans_mag", 3), ("titans_mal", 4), ("titans_tnt", 2), ("omeganet", 2))
TRAINED += [trained(m, d, pytest.mark.slow) for m, d in MORE]


@pytest.mark.parametrize(("memory", "settings"), TRAINED)
@pytest.mark.parametrize("length", [1024, pytest.param(16384, marks=pytest.mark.slow)])
def test_finite_after_training(memory, settings, length):
    """50 steps at the default caps, then far beyond the trained length, with one repeated token or random ones."""
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config(memory, memory_head_dim=16, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        ids = torch.randint(259, (4, 48))
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ids in (torch.randint(259, (1, length)), torch.full((1, length), 7)):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"chunk_size": 50}, {"memory_depth": 2, "chunk_size": 64}, {"memory_depth": 4, "chunk_size": 32}],
    ids=str,
)
def test_gradients_do_not_grow_with_16k_tokens(settings):
    """One repeated token, at initialisation. This overflowed with a smaller floor under the norm, and with the same lr
    for long chunks as for short ones.
    """
    torch.manual_seed(0)
    config = titans_lmm.Config(memory_head_dim=16, memory_expansion=1, **settings)
    mixer = titans_lmm.Mixer(config, Dims(16, 1, 1, 16), 0)
    x, largest = torch.randn(1, 1, 16), []
    for length in (2048, 16384):
        y = step(mixer, x.expand(1, length, 16)).y_BTD
        grads = torch.autograd.grad(y.square().mean(), list(mixer.parameters()))
        largest.append(max(g.abs().max().item() for g in grads))
    assert 0 < largest[1] < 4 * largest[0]
