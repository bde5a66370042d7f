"""B'MOJO: the layer against its definition, token by token, and the choice of the slots."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from memlm import MemLMForCausalLM
from memlm.evaluation.ablation import memory_off
from memlm.layers import rotary, rotary_angles
from memlm.memory.eidetic import SlotChunks, slot_choices
from memlm.memory.rows import Rows
from memlm_kernels.recurrence.naive import recurrence
from memlm_kernels.testing import Watch, assert_close, grads_of
from tests.conftest import build, model_config, step

# Slots that all tokens fill, few slots with short chunks, and other numbers that choose them.
VARIANTS = [
    ("bmojo", {"window_size": 5, "chunk_size": 3, "eidetic_slots": 4}),
    ("bmojo", {"window_size": 7, "chunk_size": 7, "eidetic_slots": 200, "rule": "delta_net", "gate": "tanh"}),
    ("bmojo", {"innovation": "predictor", "window_size": 6, "chunk_size": 4, "rule": "linear_attention"}),
    ("bmojo", {"innovation": "none", "window_size": 6, "chunk_size": 4}),
    ("titans_mag", {"eidetic_slots": 5, "window_size": 6, "chunk_size": 4}),
    ("titans_mal", {"eidetic_slots": 5, "window_size": 6, "chunk_size": 4, "memory_depth": 2}),
]


def mixer_of(**settings):
    return build("bmojo", **settings).model.layers[-1].mixer


def convolved(x_BTC, weight_CW):
    """silu(sum_j w[W - 1 - j] x_{t - j})"""
    width = weight_CW.shape[1]
    past = F.pad(x_BTC, (0, 0, width - 1, 0))
    return F.silu(sum(weight_CW[:, j] * past[:, j : j + x_BTC.shape[1]] for j in range(width)))


def faded(layer, x_BTD):
    """The recurrence by its definition: f [B, T, D], and beta |v - k D| summed over heads."""
    config, rule = layer.config, layer.recurrence.rule
    qkv = convolved(torch.cat([layer.q_proj(x_BTD), layer.kv_proj(x_BTD)], -1), layer.recurrence.conv.weight)
    q, k, v = (x.unflatten(-1, (config.num_heads, -1)) for x in qkv.split(config.sizes, -1))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    beta, logits = layer.gates(x_BTD).split(config.num_heads, -1)
    q, beta, log_decay = q * config.head_dim**-0.5, beta.sigmoid(), rule.decay(logits)
    o, _ = recurrence(q, k, v, beta, log_decay)
    residual_BT = []
    M = x_BTD.new_zeros(len(x_BTD), config.num_heads, q.shape[-1], v.shape[-1])
    for t in range(x_BTD.shape[1]):
        M = log_decay[:, t, :, None, None].exp() * M
        d = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], M))
        M = M + k[:, t, :, :, None] * d[:, :, None]
        residual_BT.append(d.norm(dim=-1).sum(-1))
    return layer.reading(o, x_BTD), torch.stack(residual_BT, 1)


def definition(mixer, x_BTD):
    """The docstring's softmax, one query at a time."""
    config, (batch, length, _) = mixer.settings, x_BTD.shape
    window, size, slots = config.window_size, config.chunk_size, config.slots
    f_BTD, score_BT = faded(mixer.memory, x_BTD)
    qkv = torch.cat([mixer.q_proj(x_BTD), mixer.k_proj(x_BTD), mixer.v_proj(x_BTD)], -1)
    q, k, v = (
        x.unflatten(-1, (-1, mixer.dims.head_dim)) for x in convolved(qkv, mixer.conv.weight).split(mixer.sizes, -1)
    )
    fk, fv = (F.silu(proj(f_BTD)).unflatten(-1, (-1, mixer.dims.head_dim)) for proj in (mixer.k_proj, mixer.v_proj))
    q, k, fk = mixer.q_norm(q), mixer.k_norm(k), mixer.k_norm(fk)
    angles = rotary_angles(torch.arange(length)[None], mixer.dims.rope)
    turned_q, turned_k, turned_fk = (rotary(x, angles) for x in (q, k, fk))
    shared = q.shape[2] // k.shape[2]
    y = torch.zeros_like(q)
    for b in range(batch):
        for i in range(length):
            # All tokens that leave the window in this chunk compete, and those that have left it are seen.
            competing = range(max(0, (i // size + 1) * size - window))
            kept = sorted(competing, key=lambda t: (-score_BT[b, t].item(), t))[:slots]
            near = [(turned_q, turned_k, v, j) for j in range(max(0, i - window + 1), i + 1)]
            behind = [(turned_q, turned_fk, fv, j) for j in range(max(0, i - 2 * window + 1), i - window + 1)]
            exact = [(q, k, v, j) for j in kept if j <= i - window]
            seen = near + behind + exact
            for h in range(q.shape[2]):
                g = h // shared
                scores = torch.stack([qs[b, i, h] @ ks[b, j, g] for qs, ks, _, j in seen]) * q.shape[-1] ** -0.5
                values = torch.stack([vs[b, j, g] for _, _, vs, j in seen])
                y[b, i, h] = scores.softmax(-1) @ values
    return mixer.o_proj(y.flatten(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"window_size": 5, "chunk_size": 3, "eidetic_slots": 4, "num_heads": 2, "head_dim": 6},
        {"window_size": 8, "chunk_size": 8, "eidetic_slots": 11},
        {"window_size": 5, "chunk_size": 1, "eidetic_slots": 2},
        {"window_size": 6, "chunk_size": 4, "innovation": "none"},
    ],
    ids=str,
)
def test_the_layer_is_its_definition(settings):
    mixer = mixer_of(**settings)
    x_BTD = torch.randn(2, 36, mixer.dims.hidden_size, dtype=torch.float64)
    expected = definition(mixer, x_BTD)
    assert_close("at once", expected, step(mixer, x_BTD).y_BTD, 1e-12)
    state, parts = None, []
    for x in x_BTD.split([1] * 14 + [9, 2, 11], 1):
        out = step(mixer, x, state)
        state = out.state
        parts.append(out.y_BTD)
    assert_close("in calls", expected, torch.cat(parts, 1), 1e-12)
    layer = [lambda x: definition(mixer, x), lambda x: step(mixer, x).y_BTD]
    (by_definition,), (got,) = (grads_of(function, [x_BTD[:1, :20]]) for function in layer)
    assert_close("gradient", by_definition, got, 1e-11)


def test_slots_that_hold_all_tokens_and_none_that_fade_are_full_attention():
    """Without rotary positions: every token is in the window or in a slot."""
    mixer = mixer_of(window_size=6, chunk_size=4, eidetic_slots=64, rotary=False)
    x_BTD = torch.randn(2, 40, mixer.dims.hidden_size, dtype=torch.float64)
    mixer.faded.register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    q, k, v = (
        x.transpose(1, 2) for x in mixer.project(x_BTD, mixer.init_state(2, "cpu", torch.float64), Rows.of(x_BTD))[0]
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close("y", mixer.output(y), step(mixer, x_BTD).y_BTD, 1e-12)


@pytest.mark.parametrize("cuts", [[40], [13, 1, 26]], ids=str)
def test_the_choice_is_a_loop_over_chunks(cuts):
    """With ties, of which the earlier token stays, empty slots, and a document that starts anew."""
    size, window, slots, generator = 4, 6, 5, torch.Generator().manual_seed(0)
    score_BT = torch.randint(4, (3, 40), generator=generator).double()
    places_BT = torch.stack([torch.cat([torch.arange(n), torch.arange(40 - n)]) for n in (40, 21, 2)])
    expected = [[] for _ in range(3)]
    got = score_BT.new_full((3, slots), float("-inf")), torch.full((3, slots), -1)
    past_BS, token_BS, first = score_BT.new_zeros(3, window - 1), torch.full((3, window - 1), -1), 0
    for count in cuts:
        here = slice(first, first + count)
        positions, before = places_BT[:, here], places_BT[:, first]
        rows = Rows(count, before, None, positions, None, 2)
        layout = SlotChunks.of(rows, size, window)
        score_BL = torch.cat([past_BS, score_BT[:, here]], 1)
        token_BL = torch.cat([got[1], token_BS, torch.arange(first, first + count).expand(3, -1)], 1)
        entry_BNM = slot_choices(got[0], score_BL, layout, size)
        entry_BM = entry_BNM[torch.arange(3), layout.count_B]
        none_BM, at_BM = entry_BM == 2**62, entry_BM.masked_fill(entry_BM == 2**62, 0)
        score_BM = torch.cat([got[0], score_BL], 1).gather(1, at_BM).masked_fill(none_BM, float("-inf"))
        got = score_BM, token_BL.gather(1, at_BM).masked_fill(none_BM, -1)
        for b in range(3):
            for t in range(first, first + count):
                place = int(places_BT[b, t])
                expected[b] = [] if place == 0 else expected[b]
                if (place + 1) % size == 0:
                    leaving = range(max(place + 1 - window, 0), place + 1 - window + size)
                    offered = [(score_BT[b, t - place + p].item(), t - place + p) for p in leaving]
                    expected[b] = sorted([*expected[b], *offered], key=lambda x: (-x[0], x[1]))[:slots]
            assert [t for t in got[1][b].tolist() if t >= 0] == [t for _, t in expected[b]], (b, first)
        past_BS, token_BS = score_BL[:, -(window - 1) :], token_BL[:, -(window - 1) :]
        first += count


def test_a_predictor_learns_and_moves_nothing_else():
    model = build("bmojo", innovation="predictor", window_size=6, chunk_size=4).train()
    ids = torch.randint(259, (2, 60), generator=torch.Generator().manual_seed(0))
    mixer = model.model.layers[-1].mixer
    x_BTD = torch.randn(2, 60, mixer.dims.hidden_size, dtype=torch.float64)
    loss = step(mixer, x_BTD).aux_losses["predictor"]
    assert loss.shape == (2,)
    loss.sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is not None] == ["predictor.conv.weight"]
    with torch.no_grad():
        # A prediction that is f one token before makes constant f expected, from the second token on.
        mixer.predictor.conv.weight.zero_()
        mixer.predictor.conv.weight[:, -1] = 1.0
        error, _ = mixer.predictor(
            torch.ones_like(x_BTD), mixer.predictor.init_state(2, "cpu", torch.float64), Rows.of(x_BTD)
        )
    assert (error[:, 0] == 1).all() and (error[:, 1:] == 0).all()
    assert torch.isfinite(model(ids, labels=ids).loss)


def test_without_its_memory_the_layer_is_a_window():
    model = build("bmojo", window_size=6, chunk_size=4, eidetic_slots=3)
    window = build("attention", window_size=6, conv_size=4, qk_norm=True)
    window.load_state_dict(model.state_dict(), strict=False)
    ids = torch.randint(259, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = window(ids).logits
        with memory_off(model):
            assert_close("off", expected, model(ids).logits, 1e-12)
        assert (model(ids).logits - expected).abs().max() > 1e-6


@pytest.mark.parametrize("innovation", ["delta_residual", "predictor"])
def test_a_trained_window_is_a_start(innovation):
    """With gate=tanh the layer takes every weight of a window, and has its output until the gate opens."""
    window = build("attention", window_size=6, conv_size=4, qk_norm=True)
    model = MemLMForCausalLM(
        model_config("bmojo", window_size=6, chunk_size=4, eidetic_slots=3, gate="tanh", innovation=innovation)
    ).double()
    missing = model.load_state_dict(window.state_dict(), strict=False)
    mixers = [(f"model.layers.{i}.mixer", layer.mixer) for i, layer in enumerate(model.model.layers)]
    silent = {f"{path}.{name}" for path, mixer in mixers for name in mixer.starts_silent}
    assert set(missing.missing_keys) == silent and not missing.unexpected_keys
    ids = torch.randint(259, (2, 50), generator=torch.Generator().manual_seed(0))
    expected = window(ids).logits
    got = model.train()(ids, labels=ids)
    assert_close("closed", expected, got.logits, 1e-12)
    got.loss.backward()
    assert all((mixer.gate.grad.abs() > 1e-9).all() for _, mixer in mixers)
    with torch.no_grad():
        for _, mixer in mixers:
            mixer.gate.fill_(20.0)
    open_model = build("bmojo", window_size=6, chunk_size=4, eidetic_slots=3, innovation=innovation)
    open_model.load_state_dict({n: x for n, x in model.state_dict().items() if not n.endswith("mixer.gate")})
    assert_close("open", open_model(ids).logits, model.eval()(ids).logits, 1e-12)
    assert (model(ids).logits - expected).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "relu"}, "gate='relu' must be one of none, tanh"),
        ({"rule": "gla"}, "innovation='delta_residual' needs a delta rule, not rule='gla'"),
        ({"rule": "lstm"}, "rule='lstm' must be one of"),
        ({"chunk_size": 32}, "chunk_size=32 must be window_size=16 at most with eidetic_slots=16"),
        ({"attention_conv_size": 0}, "initialization='recall' delays keys by a convolution"),
        ({"innovation": "surprise"}, "innovation='surprise' must be one of"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build("bmojo", **settings)


def test_few_operations():
    """A long call takes few operations more than a short one; a decoded token takes few."""
    mixer = mixer_of(dtype=torch.float32)
    operations = []
    with torch.no_grad():
        for length in (128, 1024):
            x_BTD = torch.randn(2, length, mixer.dims.hidden_size)
            step(mixer, x_BTD)
            with Watch() as watch:
                out = step(mixer, x_BTD, metrics=False)
            operations.append(watch.operations)
            assert not watch.asked
        with Watch() as token:
            step(mixer, x_BTD[:, :1], out.state, metrics=False)
    assert operations[1] <= 790 and operations[1] - operations[0] <= 140 and token.operations <= 300


def test_a_layer_takes_at_most_half_more_operations_than_titans():
    benchmark = importlib.import_module("scripts.benchmark_dispatch")
    found = dict(benchmark.measure(["bmojo", "titans_mag"]))
    for case, operations in found["titans_mag"].items():
        assert found["bmojo"][case] <= 1.5 * operations, case
