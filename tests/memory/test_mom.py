"""Mixture of memories: routing against dense memories and against flash-linear-attention's outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from memlm import MemLMForCausalLM, MemoryCache
from memlm.hub import fla_mom
from memlm.memory import mom
from memlm.memory.base import Dims
from memlm.memory.rows import Rows
from memlm.memory.rules import RULES
from memlm.memory.state import leaves, mapped, named
from memlm_kernels.testing import Watch, assert_close, relative_error
from tests.conftest import ROOT, build, step

VARIANTS = [
    ("mom", {"rule": "linear_attention", "top_k": 1, "shared_memory": False}),
    ("mom", {"rule": "retention", "conv": "none", "num_heads": 2, "head_dim": 16}),
    ("mom", {"rule": "simple_gla", "single_kv": True}),
    ("mom", {"rule": "gla", "head_dim": 16, "value_dim": 12, "conv": "before_routing"}),
    ("mom", {"rule": "delta_net", "top_k": 3, "balance_bias": True, "z_loss": 0.001}),
    ("mom", {"rule": "titans", "chunk_size": 4, "head_dim": 16, "num_memories": 3}),
    ("mom", {"rule": "kda", "head_dim": 16, "num_memories": 3}),
    ("mom", {"rule": "momentum_delta_net", "head_dim": 16, "num_memories": 3, "single_kv": True}),
    ("mom", {"window_size": 5, "num_memories": 7, "num_heads": 2, "head_dim": 16, "initial_decay": None}),
]
GOLDEN = ["shared", "noshared", "single_kv"]


def mixer_of(**settings) -> mom.Mixer:
    return build("mom", **{"head_dim": 16, **settings}).model.layers[0].mixer


def tokens(batch, length, seed=0):
    return torch.randn(batch, length, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choices(mixer, x):
    """Weights and memories of each token, [B, T, M], 0 where it is not sent."""
    weight, memory, *_ = mixer._choose(x, Rows.of(x))
    return torch.zeros(*x.shape[:2], mixer.config.num_memories, dtype=x.dtype).scatter(2, memory, weight)


@pytest.mark.parametrize("single_kv", [False, True])
@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("titans", "momentum_delta_net")])
def test_the_layer_is_dense_memories_that_ignore_what_others_get(rule, single_kv):
    """Without sorting: every memory sees every token; a token sent elsewhere neither writes nor decays."""
    mixer = mixer_of(rule=rule, conv="none", single_kv=single_kv, num_heads=2)
    config, x = mixer.config, tokens(2, 40)
    sent = choices(mixer, x)
    q, o = mixer.q_proj(x), 0
    sets = 1 if single_kv else config.num_memories
    kv = (x @ mixer.kv_proj.weight.T).unflatten(-1, (sets, -1))
    logits = (x @ mixer.gates.weight.T).unflatten(-1, (sets, -1)) if mixer.gates else x.new_zeros(2, 40, sets, 0)
    start = {"memory": torch.zeros(2, 1, 2, 16, 16, dtype=torch.float64)}
    for m in range(config.num_memories):
        of_memory, out = m % sets, []
        state = start
        for t in range(40):
            inputs = [torch.cat([q, kv[:, :, of_memory]], -1)[:, t : t + 1], logits[:, t : t + 1, of_memory]]
            read, new, _ = mixer.recurrence(*inputs, None, state)
            got = (sent[:, t, m] > 0)[:, None, None, None, None]
            state = {"memory": torch.where(got, new["memory"], state["memory"])}
            out.append(read)
        o = o + sent[..., m, None, None] * torch.cat(out, 1)
    shared_kv, shared_logits = mixer._shared_projections(x)
    o = o + mixer.recurrence(torch.cat([q, shared_kv], -1), shared_logits, None, start)[0]
    assert_close("layer", mixer.reading(o, x), step(mixer, x).y_BTD, 1e-10)


@pytest.mark.parametrize("settings", [{}, {"conv": "before_routing"}, {"top_k": 1}, {"rule": "titans"}], ids=str)
def test_the_last_token_changes_nothing_before_it_in_training_mode(settings):
    mixer = mixer_of(**settings).train()
    x = tokens(3, 60)
    other = x.clone()
    other[:, -1] += 1.0
    # Products of other sizes round differently.
    assert_close("before", step(mixer, x).y_BTD[:, :-1], step(mixer, other).y_BTD[:, :-1], 1e-14)


def test_convolving_across_segments_sees_the_future_and_only_in_training():
    """The option reproduces a defect; it must be exactly this defect, and not the default."""
    mixer, plain = mixer_of(conv_across_segments=True), mixer_of()
    x = tokens(2, 60)
    other = x.clone()
    other[:, -1] += 1.0
    assert torch.equal(step(mixer, x).y_BTD, step(plain, x).y_BTD)
    mixer.train()
    assert (step(mixer, x).y_BTD - step(plain, x).y_BTD).abs().max() > 1e-3
    assert (step(mixer, x).y_BTD - step(mixer, other).y_BTD)[:, :-1].abs().max() > 1e-3


def test_other_rows_change_nothing():
    mixer = mixer_of().train()
    x = tokens(3, 60)
    assert_close("row", step(mixer, x[1:2]).y_BTD, step(mixer, x).y_BTD[1:2], 1e-12)


@pytest.mark.parametrize("top_k", [1, 4])
def test_memories_with_no_token_one_token_and_all_tokens(top_k):
    mixer = mixer_of(top_k=top_k)
    x = tokens(1, 40)
    with torch.no_grad():
        # Memory 0 gets every token. With top_k=1 the others get none, except memory 1, which gets tokens like token 7.
        mixer.router.weight.zero_()
        mixer.router.weight[1] = 100 * x[0, 7] / x[0, 7].square().sum() - 0.6 * x[0].mean(0)
        sent = choices(mixer, x)
        whole = step(mixer, x)
        cut = step(mixer, x[:, 19:], step(mixer, x[:, :19]).state)
    if top_k == 4:
        assert (sent > 0).all()
    assert torch.isfinite(whole.y_BTD).all()
    assert_close("after a cut", whole.y_BTD[:, 19:], cut.y_BTD, 1e-12)


def test_equal_scores_take_the_first_memories():
    mixer = mixer_of(num_memories=6, top_k=3)
    with torch.no_grad():
        mixer.router.weight.zero_()
    assert (choices(mixer, tokens(2, 300)) == torch.tensor([1 / 3] * 3 + [0] * 3, dtype=torch.float64)).all()


@pytest.mark.parametrize("piece", [2, 3, 4, 5])
def test_continuation_by_a_few_tokens(piece):
    model = build("mom")
    ids = torch.randint(259, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = MemoryCache()
    with torch.no_grad():
        parts = [model(p, past_key_values=cache).logits for p in (ids[:, :20], *ids[:, 20:].split(piece, 1))]
        assert_close("logits", model(ids).logits, torch.cat(parts, 1), 1e-10)


# Dispatched operations of one token, of rules with momentum or with more gates than the delta rule.
MOST = {"titans": 195, "momentum_delta_net": 195, "comba": 190, "kda": 180}
TOKENS = [{"rule": rule} for rule in RULES] + [
    {"single_kv": True, "num_heads": 2},
    {"shared_memory": False, "top_k": 1, "conv": "before_routing"},
    {"rule": "titans", "shared_memory": False, "top_k": 3, "conv": "none"},
]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("settings", TOKENS, ids=str)
def test_one_token_meets_its_memories_alone_and_is_as_routed(settings, rows):
    """Compared with the same token and a given row length, which takes the path of many tokens."""
    mixer, x = mixer_of(**settings), tokens(rows, 10)
    before = step(mixer, x[:, :9])
    calls = []
    for facts in ({}, {"lengths_B": torch.ones(rows, dtype=torch.long)}):
        state = mapped(torch.Tensor.detach, before.state)
        place = {"before_B": torch.full((rows,), 9), "start": None if facts else 9, "metrics": False, **facts}
        token = x[:, 9:].clone().requires_grad_()
        with Watch() as watch:
            out = mixer(token, state, Rows.of(token, **place))
        loss = out.y_BTD.square().sum() + sum(t.square().sum() for t in leaves(out.state) if t.is_floating_point())
        gradients = torch.autograd.grad(loss, [token, *mixer.parameters()], allow_unused=True)
        calls.append((watch.operations, out, gradients))
    (few, got, gradients), (_, expected, routed) = calls
    assert few <= MOST.get(mixer.config.rule, 175)
    assert_close("y", expected.y_BTD, got.y_BTD, 1e-12)
    after = named(got.state)
    assert after.keys() == named(expected.state).keys()
    for name, t in named(expected.state).items():
        assert_close(name, t.double(), after[name].double(), 1e-12)
    for loss in expected.aux_losses:
        assert_close(loss, expected.aux_losses[loss], got.aux_losses[loss], 1e-12)
    assert [g is None for g in routed] == [g is None for g in gradients]
    # All gradients together: that of a router with one choice is 0, and rounding.
    expected, got = (torch.cat([g.flatten() for g in of_all if g is not None]) for of_all in (routed, gradients))
    assert_close("gradients", expected, got, 1e-12)


def test_many_tokens_take_few_operations():
    """Forward and backward: one recurrence takes the tokens of all memories."""
    mixer, x = mixer_of().float(), tokens(1, 256).float().requires_grad_()
    with Watch() as watch:
        step(mixer, x).y_BTD.sum().backward()
    assert watch.operations <= 1200


def test_a_second_weight_that_underflows_in_fp16_moves_no_token():
    mixer = mixer_of().half()
    x = tokens(2, 30)
    with torch.no_grad():
        mixer.router.weight.mul_(400)
        weight, *_ = mixer._choose(x.half(), Rows.of(x))
        assert (weight[..., 1].half() == 0).any()
        got, exact = step(mixer, x.half()).y_BTD, step(mixer.float(), x.half().float()).y_BTD
    assert_close("fp16", exact, got.float(), 5e-3)


def test_gradient_of_the_router_where_no_choice_turns():
    mixer = mixer_of()
    x, target = tokens(2, 20), tokens(2, 20, seed=1)
    (step(mixer, x).y_BTD * target).sum().backward()
    weight, small = mixer.router.weight, 1e-6
    before = choices(mixer, x) > 0
    for index in ((0, 3), (2, 60), (3, 11)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * small
                assert torch.equal(choices(mixer, x) > 0, before)
                values.append((step(mixer, x).y_BTD * target).sum().item())
                weight[index] -= sign * small
        assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * small), rel=1e-5)


def test_balance_loss_is_top_k_where_loads_are_even():
    mixer = mixer_of(num_memories=4, top_k=2, balance_loss=0.1, z_loss=0.01)
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[torch.arange(4), torch.arange(4)] = 50.0
        x = 0.01 * tokens(1, 32)
        for t in range(32):
            x[0, t, [t % 4, (t + 1) % 4]] += 0.1
        out = step(mixer, x)
    assert out.aux_losses["balance"].item() == pytest.approx(0.1 * 2, rel=0.02)
    assert [round(out.metrics[f"load_{m}"].item(), 6) for m in range(4)] == [0.5] * 4
    assert out.metrics["dead_memories"] == 0
    with torch.no_grad():
        mixer.router.weight[0] = 50 * x[0].sum(0) / x[0].sum(0).norm()
        assert step(mixer, x).aux_losses["balance"] > 0.2
        square = (x @ mixer.router.weight.T).logsumexp(-1).square().mean()
    assert step(mixer, x).aux_losses["router_z"].mean().item() == pytest.approx(0.01 * square.item())


def test_the_bias_is_driven_towards_even_loads_and_has_no_other_effect():
    mixer = mixer_of(balance_bias=True, balance_loss=0.0)
    x = tokens(2, 50)
    out = step(mixer, x)
    loads = torch.stack([out.metrics[f"load_{m}"] for m in range(4)])
    assert not out.aux_losses["balance_bias"].any()
    out.aux_losses["balance_bias"].mean().backward()
    assert torch.equal(mixer.bias.grad.sign(), (loads - 0.5).sign()) and mixer.bias.grad.any()
    with torch.no_grad():
        mixer.bias[2] = 10.0
    _, memory, *_ = mixer._choose(x, Rows.of(x))
    assert (memory == 2).any(-1).all()


def test_losses_of_a_row_are_its_own_whatever_else_is_in_the_call():
    """The routers' losses and gradients too: a mean over rows does not depend on the division into calls."""
    mixer, x = mixer_of(balance_bias=True, z_loss=0.01), tokens(4, 30)
    lengths = torch.tensor([30, 17, 1, 0])
    whole = step(mixer, x, lengths_B=lengths).aux_losses
    assert set(whole) == {"balance", "router_z", "balance_bias"} and all(x.shape == (4,) for x in whole.values())

    def gradients(losses, row):
        total = sum(loss[row] for loss in losses.values())
        return torch.autograd.grad(total, [mixer.router.weight, mixer.bias], retain_graph=True)

    for row, length in enumerate(lengths):
        alone = step(mixer, x[row : row + 1, :length]).aux_losses
        for name in whole:
            assert_close(name, alone[name], whole[name][row : row + 1], 1e-12)
        for expected, got in zip(gradients(alone, 0), gradients(whole, row), strict=True):
            assert_close("gradient", expected, got, 1e-12)
    assert all(loss[3] == 0 for loss in whole.values())


def test_padding_counts_for_no_load():
    model = build("mom")
    ids = torch.randint(259, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    alone = [model(x) for x in (ids[:1, 20:], ids[1:])]
    got = model(ids, attention_mask=mask).metrics["layer0/load_1"]
    expected = [a.metrics["layer0/load_1"] * n for a, n in zip(alone, (10, 30), strict=True)]
    assert got.item() == pytest.approx(sum(expected).item() / 40)


@pytest.mark.parametrize("name", GOLDEN)
def test_parity_with_flash_linear_attention(name):
    """Within 1e-5; gradients within twice the change by one rounding of the weights, if that is more."""
    folder = ROOT / "tests" / "reference" / "mom_tiny" / name
    config = fla_mom.config_from_fla(json.loads((folder / "config.json").read_text()))
    weights = fla_mom.weights_from_fla(load_file(folder / "model.safetensors"), config)
    golden = torch.load(folder / "reference.pt", weights_only=True)
    expected = fla_mom.weights_from_fla(golden["grads"], config)
    ids, mask = golden["input_ids"], golden["attention_mask"].bool()

    def run(dtype, rounding_seed=None):
        model = MemLMForCausalLM(config).eval()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and missing in ([], ["lm_head.weight"] * config.tie_word_embeddings)
        model.tie_weights()
        model.to(dtype)
        if rounding_seed is not None:
            generator = torch.Generator().manual_seed(rounding_seed)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + (2 * torch.randint(2, p.shape, generator=generator) - 1) * 2**-23)
        logits = model(ids).logits
        (logits * golden["grad_out"]).sum().backward()
        return model, logits, {n: p.grad for n, p in model.named_parameters() if n in expected}

    _, _, exact = run(torch.float64)
    rounded = [run(torch.float64, seed)[2] for seed in range(4)]
    model, logits, gradients = run(torch.float32)
    assert_close("logits", golden["logits"], logits, 1e-5)
    padded = model(ids, attention_mask=mask).logits
    assert_close("left-padded logits", golden["padded_logits"][mask], padded[mask], 1e-5)
    assert gradients.keys() == expected.keys()
    for n in expected:
        if config.mixers["memory"]["top_k"] == 1 and "router" in n:
            # A single choice has weight 1 whatever its probability.
            assert exact[n].abs().max() < 1e-12
            continue
        rounding = max(relative_error(exact[n], r[n]) for r in rounded)
        assert relative_error(expected[n], gradients[n]) < max(1e-5, 2 * rounding), n
        assert rounding < 1e-4, n


@pytest.mark.parametrize("name", GOLDEN)
def test_conversion_goes_back(name):
    folder = ROOT / "tests" / "reference" / "mom_tiny" / name
    theirs = json.loads((folder / "config.json").read_text())
    config, weights = fla_mom.config_from_fla(theirs), load_file(folder / "model.safetensors")
    back = fla_mom.weights_to_fla(fla_mom.weights_from_fla(weights, config), config)
    assert back.keys() == weights.keys() and all(torch.equal(back[n], w) for n, w in weights.items())
    written = fla_mom.config_to_fla(config)
    kept = set(theirs) & set(written) - {"intermediate_size", "hidden_ratio"}
    assert {n: theirs[n] for n in kept} == {n: written[n] for n in kept}
    assert fla_mom.config_from_fla(written).to_dict() == config.to_dict()


def test_checkpoints_of_another_model_are_refused():
    folder = ROOT / "tests" / "reference" / "mom_tiny" / "shared"
    theirs = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match="mom_backend='gla'; only 'gated_deltanet' can be converted"):
        fla_mom.config_from_fla({**theirs, "mom_backend": "gla"})
    with pytest.raises(ValueError, match=r"a weight of this configuration"):
        fla_mom.weights_from_fla(weights, fla_mom.config_from_fla({**theirs, "num_memories": 3}))
    with pytest.raises(ValueError, match=r"k_proj\.4\.weight is missing"):
        fla_mom.weights_from_fla(weights, fla_mom.config_from_fla({**theirs, "num_memories": 5}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k=5 must lie between 1 and num_memories=4"),
        ({"top_k": 0}, "top_k=0 must lie between 1 and num_memories=4"),
        ({"num_memories": 0}, "num_memories=0"),
        ({"rule": "delta_nett"}, "rule='delta_nett' is unknown; did you mean 'delta_net'"),
        ({"conv": "after"}, "conv='after' must be one of per_memory, before_routing, none"),
        ({"balance_loss": -1.0}, "balance_loss=-1.0 must not be negative"),
        ({"window_size": 0}, "window_size=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"initial_decay": 1.0}, "initial_decay=1.0 must lie between 0 and 1"),
        ({"initialization": "magic"}, "initialization='magic' must be one of default, recall"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        mom.Mixer(mom.Config(**settings), Dims(64, 2, 2, 32), 0)
