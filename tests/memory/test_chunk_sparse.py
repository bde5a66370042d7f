"""Tests beside the contract: the layer's equations, all chunks equal full attention, and the choice is taught."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memlm import MemLMForCausalLM, MemoryCache
from memlm.evaluation.ablation import memory_off
from memlm.layers import Rope, rotary, rotary_angles
from memlm.memory import attention, chunk_sparse
from memlm.memory.base import Dims
from memlm.memory.rows import Rows
from memlm.memory.state import named
from memlm_kernels import set_backend
from memlm_kernels.attention import chunks_reference
from memlm_kernels.testing import Watch, assert_close, relative_error
from tests.conftest import build, model_config, step

VARIANTS = [
    ("chunk_sparse", {"far_positions": True}),
    ("chunk_sparse", {"learning": "distilled"}),
    (
        "chunk_sparse",
        {
            "chunk_size": 3,
            "window_size": 3,
            "top_k": 1,
            "learning": "distilled",
            "far_positions": True,
            "conv_size": 0,
            "initialization": "default",
        },
    ),
    ("chunk_sparse", {"chunk_size": 1, "window_size": 5, "gate": "tanh", "qk_norm": True}),
    ("chunk_sparse", {"chunk_size": 50, "window_size": 64}),
    ("chunk_sparse", {"qkv_bias": True, "rotary": False}),
    ("chunk_sparse", {"max_chunks": 7, "top_k": 6, "far_positions": True}),
    ("chunk_sparse", {"fusion": "head_gate", "top_k": 2}),
    ("chunk_sparse", {"fusion": "head_gate", "far_positions": True, "top_k": 2, "max_chunks": 3, "chunk_size": 3}),
    ("chunk_sparse", {"fusion": "relevance", "router_dim": 5, "top_k": 2}),
    ("chunk_sparse", {"fusion": "relevance", "router_dim": 4, "top_k": 3, "max_chunks": 4, "chunk_size": 1}),
]
EXACT = 1e-10
SMALL = dict(chunk_size=4, window_size=6, top_k=2)
DIMS = Dims(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def mixer_of(dims=DIMS, **settings):
    torch.manual_seed(0)
    mixer = chunk_sparse.Mixer(chunk_sparse.Config(**{**SMALL, **settings}), dims, 0).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def inputs(length, batch=1, seed=0):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(mixer, x):
    """One row, token by token: the output, and the distilling loss before its weight."""
    config = mixer.chunked
    size, window = config.chunk_size, config.window_size
    positions = torch.arange(len(x))[None]
    plain = [proj(x)[None].unflatten(-1, (-1, 8)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    if config.qk_norm:
        plain[:2] = (
            z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for z, norm in zip(plain[:2], (mixer.q_norm, mixer.k_norm), strict=True)
        )
    turned = [rotary(z, rotary_angles(positions, Rope(8)))[0] for z in plain[:2]]
    (q, k, v), (turned_q, turned_k) = (z[0] for z in plain), turned
    far_q, far_k = (turned_q, turned_k) if config.far_positions else (q, k)
    rows, nats = [], []
    for t in range(len(x)):
        heads, chunks = [], [n for n in range(len(x) // size) if n * size <= t - window]
        for h in range(4):
            g = h // 2
            means = [
                (k[n * size : (n + 1) * size, g].mean(0), v[n * size : (n + 1) * size, g].mean(0)) for n in chunks
            ]
            of_group = q[t, 2 * g : 2 * g + 2].sum(0)
            best = sorted(range(len(chunks)), key=lambda n: (-(of_group @ means[n][0]).item(), n))[: config.top_k]
            scores, values = [], []
            for j in range(t + 1):
                if t - j < window:
                    scores.append(turned_q[t, h] @ turned_k[j, g])
                elif j // size in best:
                    scores.append(far_q[t, h] @ far_k[j, g])
                else:
                    continue
                values.append(v[j, g])
            y = (torch.stack(scores) / 8**0.5).softmax(0) @ torch.stack(values)
            if chunks:
                routed = torch.stack([q[t, h] @ key for key, _ in means]) / 8**0.5
                if config.learning == "compressed":
                    share = (torch.tanh if config.gate == "tanh" else torch.sigmoid)(
                        mixer.gate.weight[h] @ x[t] + mixer.gate.bias[h]
                    )
                    y = y + share * (routed.softmax(0) @ torch.stack([value for _, value in means]))
                else:
                    far = torch.stack([far_q[t, h] @ far_k[j, g] for j in range(t - window + 1)]) / 8**0.5
                    share = torch.zeros(len(chunks), dtype=x.dtype)
                    share = share.index_add(0, torch.arange(len(far)) // size, far.detach().softmax(0))
                    nats.append(-(share * routed.log_softmax(0)).sum())
            heads.append(y)
        rows.append(torch.cat(heads))
    return mixer.o_proj(torch.stack(rows)), torch.stack(nats).mean() if nats else None


@pytest.mark.parametrize(
    ("learning", "settings"),
    [
        ("compressed", dict(far_positions=True)),
        ("compressed", dict(far_positions=False, gate="tanh")),
        ("distilled", dict(far_positions=True, qk_norm=True)),
        ("distilled", dict(far_positions=False)),
    ],
)
def test_the_layer_is_its_equations(learning, settings):
    mixer, x = mixer_of(learning=learning, loss_weight=0.5, **settings), inputs(31)
    gradients = []

    def whole(mixer, x):
        out = step(mixer, x[None])
        return out.y_BTD[0], sum(loss.mean() for loss in out.aux_losses.values()) / 0.5

    for run in (loop, whole):
        copied = copy.deepcopy(mixer)
        y, loss = run(copied, x[0])
        total = (y * inputs(31, seed=1)[0]).sum()
        if learning == "distilled":
            total = total + 3.0 * loss
        total.backward()
        gradients.append((y, loss, {name: p.grad for name, p in copied.named_parameters()}))
    (y, loss, expected), (got_y, got_loss, got) = gradients
    assert_close("y", y, got_y, EXACT)
    if learning == "distilled":
        assert_close("loss", loss, got_loss, EXACT)
    for name, grad in expected.items():
        assert_close(name, grad, got[name], EXACT)


@pytest.mark.parametrize("shared", [{"conv_size": 0}, {"conv_size": 4}, {"qk_norm": True}], ids=str)
def test_all_chunks_are_full_attention_with_its_weights(shared):
    """It fits a trained backbone: it takes every weight of ``attention``, and with all chunks gives its output."""
    torch.manual_seed(0)
    dense = attention.Mixer(attention.Config(**shared), DIMS, 0).double()
    settings = dict(top_k=20, far_positions=True, **shared)
    distilled = mixer_of(learning="distilled", **settings)
    distilled.load_state_dict(dense.state_dict())
    compressed = mixer_of(learning="compressed", gate="tanh", **settings)
    missing = compressed.load_state_dict(dense.state_dict(), strict=False)
    assert missing.missing_keys == list(compressed.starts_silent) and not missing.unexpected_keys
    compressed.reset_parameters()
    x = inputs(75, batch=2)
    expected = step(dense, x).y_BTD
    for mixer in (distilled, compressed):
        assert_close("y", expected, step(mixer, x).y_BTD, 1e-12)
    # The gate is closed, but it learns.
    assert not compressed.gate(x).any()
    step(compressed, x).y_BTD.square().sum().backward()
    assert (compressed.gate.bias.grad.abs() > 1e-6).all() and (compressed.gate.weight.grad.abs().amax(1) > 1e-6).all()
    sparse = mixer_of(learning="distilled", **settings | {"top_k": 3})
    sparse.load_state_dict(dense.state_dict())
    assert relative_error(expected, step(sparse, x).y_BTD) > 1e-3


def test_queries_and_keys_start_tied_for_each_group():
    mixer = mixer_of(conv_size=4, initialization="recall")
    mixer.reset_parameters()
    q, k = mixer.q_proj.weight.unflatten(0, (2, 2, 8)), mixer.k_proj.weight.unflatten(0, (2, 1, 8))
    assert torch.equal(q, k.expand_as(q))


def test_the_distilling_loss_knows_documents_padding_and_pieces():
    """It is the mean over the real tokens of a row that have a choice, over all calls."""
    mixer, lengths = mixer_of(learning="distilled"), [31, 9, 22, 3]
    pieces = [inputs(n, seed=n) for n in lengths]

    def total(x, state=None, **facts):
        out = step(mixer, x, state, **facts)
        return out.aux_losses["router"].item(), out.state

    # Tokens may choose from position window_size on.
    taught = [max(0, n - SMALL["window_size"]) for n in lengths]
    alone = sum(total(x)[0] * n for x, n in zip(pieces, taught, strict=True)) / sum(taught)
    x = torch.cat([*pieces, torch.full((1, 5, 32), 3.0, dtype=torch.float64)], 1)
    positions = torch.cat([*(torch.arange(n) for n in lengths), torch.full((5,), 9)])[None]
    packed, _ = total(x, given_BT=positions, lengths_B=torch.tensor([sum(lengths)]), max_documents=4)
    assert packed == pytest.approx(alone, rel=1e-10)
    state, loss = None, 0.0
    for piece, places in zip(
        x[:, :-5].split([3, 26, 5, 31], 1), positions[:, :-5].split([3, 26, 5, 31], 1), strict=True
    ):
        part, state = total(piece, state, given_BT=places, max_documents=3)
        loss += part * (places >= SMALL["window_size"]).sum().item()
    assert loss / sum(taught) == pytest.approx(alone, rel=1e-10)


def test_only_training_pays_for_dense_attention():
    assert not step(mixer_of(learning="distilled").eval(), inputs(31)).aux_losses


def test_choosing_reaches_where_the_windows_do_not():
    """Two layers with windows of 16 and a convolution of 4 reach 36 tokens back; with the memory off, no further."""
    model, ids = build("chunk_sparse"), torch.arange(60)[None]
    other = ids.clone()
    other[0, 0] += 100
    with torch.no_grad():
        assert relative_error(model(ids).logits[0, -10:], model(other).logits[0, -10:]) > 1e-9
        with memory_off(model):
            before, after = model(ids).logits, model(other).logits
            assert torch.equal(before[0, 37:], after[0, 37:])
            assert relative_error(before[0, :37], after[0, :37]) > 1e-6


@pytest.mark.parametrize("learning", chunk_sparse.LEARNING)
def test_memory_off_is_the_window_alone(learning):
    mixer = mixer_of(learning=learning).eval()
    window = attention.Mixer(attention.Config(SMALL["window_size"]), DIMS, 0).double()
    window.load_state_dict({name: w for name, w in mixer.state_dict().items() if "gate" not in name})
    with memory_off(mixer):
        assert_close("y", step(window, inputs(31)).y_BTD, step(mixer, inputs(31)).y_BTD, 1e-12)


def test_the_state_keeps_one_mean_a_chunk():
    """However the stream was read, also token by token, where only the device has the ends of chunks."""
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config("chunk_sparse")).eval()
    shapes = []
    for cuts in ([83], [1] * 83):
        cache = MemoryCache()
        with torch.no_grad():
            for piece in torch.arange(83)[None].split(cuts, 1):
                model(piece, past_key_values=cache)
        shapes.append({name: x.shape for name, x in named(cache.states[1]).items()})
    assert shapes[0] == shapes[1]
    assert shapes[0]["pooled.k"][1] == 83 // 4 and shapes[0]["k"][1] == 83


def test_no_tensor_of_all_tokens_with_all_tokens_or_chunks():
    length, size = 2048, 16
    with Watch() as watch:
        step(mixer_of(chunk_size=size, window_size=size), inputs(length)).y_BTD.sum().backward()
    assert watch.largest < length * length // size


@torch.no_grad()
def check_cost(mixer):
    """FLOPs of a token: routing takes one product per chunk and group, and two per head if means are read. All other
    FLOPs do not depend on the past. This is exact for calls that continue; in one call of a whole stream, the first
    tokens take less.
    """
    size, heads, groups, dim = 16, 4, 2, 8
    products = groups + (2 * heads if mixer.chunked.learning == "compressed" else 0)

    def others(past, new):
        state = step(mixer, inputs(past)).state
        with FlopCounterMode(display=False) as counter:
            step(mixer, inputs(new), state)
        routing = 2 * dim * products * ((past + new) // size)
        return counter.get_total_flops() / new - routing

    assert others(256, 32) == others(512, 32) == others(1024, 32) > 0
    assert others(256, 1) == others(1024, 1) > 0
    assert others(0, 1024) == pytest.approx(others(0, 512), rel=0.01)


COST = dict(chunk_size=16, window_size=16, top_k=2)


@pytest.mark.parametrize("far_positions", [True, False])
@pytest.mark.parametrize("learning", chunk_sparse.LEARNING)
def test_cost_is_linear_in_chunks_for_routing_and_constant_for_attention(learning, far_positions):
    check_cost(mixer_of(learning=learning, far_positions=far_positions, **COST).eval())


@pytest.mark.parametrize("wrong", ["scores all keys", "chooses all chunks", "distils", "is attention"])
def test_cost_that_grows_otherwise_is_found_out(wrong, monkeypatch):
    mixer = mixer_of(**COST | {"top_k": 300 if wrong == "chooses all chunks" else 2}).eval()
    if wrong == "scores all keys":
        monkeypatch.setattr(chunks_reference, "_DENSE", 10**9)
    elif wrong == "distils":
        mixer = mixer_of(**COST, learning="distilled").train()
    elif wrong == "is attention":
        dims = dataclasses.replace(DIMS, attn_implementation="eager")
        mixer = attention.Mixer(attention.Config(), dims, 0).double()
        mixer.chunked = chunk_sparse.Config(**COST)
    with pytest.raises(AssertionError, match="others"):
        check_cost(mixer)


@pytest.mark.parametrize("length", [40, 43])
def test_a_token_takes_few_operations(length):
    """One token inside a chunk, and one that ends a chunk."""
    mixer = mixer_of(conv_size=4, far_positions=False).eval()
    with torch.no_grad():
        state = step(mixer, inputs(length), metrics=False).state
        facts = {"before_B": state.position, "start": state.start, "metrics": False}
        x = inputs(1)
        rows = Rows.of(x, **facts)
        mixer(x, state, rows)
        # Tensors that all layers share are made before.
        with Watch() as watch:
            mixer(x, state, rows)
    assert watch.operations <= (150 if length == 40 else 160)


def test_few_tokens_take_few_operations_in_training():
    """Tiles are as wide as their few numbers allow."""
    mixer, x = mixer_of(conv_size=4, far_positions=False), inputs(256).requires_grad_()
    with Watch() as watch:
        step(mixer, x).y_BTD.sum().backward()
    assert watch.operations <= 820


def test_autocast_chooses_in_fp32():
    model = build("chunk_sparse", dtype=torch.float32).train()
    ids = torch.arange(75)[None]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.past_key_values.states[0]["pooled"]["k"].dtype == torch.float32
    assert_close("logits", model(ids).logits, out.logits.float(), 5e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window_size=3), "window_size=3 must be chunk_size=4 at least"),
        (dict(chunk_size=0), "chunk_size=0 must be at least 1"),
        (dict(top_k=0), "top_k=0 must be at least 1"),
        (dict(learning="no"), "learning='no' must be one of compressed, distilled"),
        (dict(gate="relu"), "gate='relu' must be one of sigmoid, tanh"),
        (dict(loss_weight=-1.0), "loss_weight=-1.0 must not be negative"),
        (dict(conv_size=-1), "conv_size=-1 must be 0"),
        (dict(initialization="recall"), "set conv_size"),
        (dict(fusion="mean"), "fusion='mean' must be one of joint, relevance, head_gate"),
        (dict(fusion="relevance", far_positions=False), "fusion='relevance' has a router, and router_dim=0; set 64"),
        (dict(fusion="relevance", router_dim=8), "far_positions=True: fusion='relevance' encodes places in chunks"),
        (dict(fusion="relevance", router_dim=8, far_positions=False, top_k=1), "top_k=1: the router of fusion="),
        (dict(router_dim=8), "router_dim=8 is of fusion='relevance'; leave it out with fusion='joint'"),
        (dict(fusion="head_gate", learning="distilled"), "learning='distilled' is of fusion='joint'; leave it out"),
        (
            dict(fusion="relevance", router_dim=8, far_positions=False, gate="tanh"),
            "gate='tanh' is of fusion='joint' or 'head_gate'; leave it out",
        ),
        (dict(max_chunks=-1), r"max_chunks=-1 must be 0 \(all\) or more"),
        (dict(max_chunks=1), "max_chunks=1 must be top_k=2 at least"),
        (
            dict(max_chunks=4, learning="distilled"),
            "max_chunks=4: learning='distilled' compares with attention to all",
        ),
        (dict(initialization="best"), "initialization='best' must be one of default, recall"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        chunk_sparse.Config(**{**SMALL, **settings})


FUSED = dict(relevance=dict(fusion="relevance", router_dim=5), head_gate=dict(fusion="head_gate"))


def fused_loop(mixer, x):
    """One row of fusion "relevance" or "head_gate", token by token."""
    config, size, window = mixer.chunked, mixer.chunked.chunk_size, mixer.chunked.window_size
    positions = torch.arange(len(x))[None]
    q, k, v = (proj(x).unflatten(-1, (-1, 8)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    turned_q, turned_k = (rotary(z[None], rotary_angles(positions, Rope(8)))[0] for z in (q, k))
    rows = []

    def attend(query, keys, values):
        return (torch.stack([query @ key for key in keys]) / 8**0.5).softmax(0) @ torch.stack(values)

    def placed(key, j):
        back = size - 1 - j % size
        angles = [back / 10000 ** (2 * i / 8) for i in range(4)]
        return key + torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)], dtype=x.dtype)

    for t in range(len(x)):
        last, heads = max(0, (t - window + 1) // size), []
        chunks = [range(n * size, (n + 1) * size) for n in range(last)]
        chunks = chunks[-config.max_chunks :] if config.max_chunks else chunks
        if config.fusion == "relevance":
            means = [torch.stack([mixer.router_k_proj(x[s]) for s in chunk]).mean(0) for chunk in chunks]
            scores = [mixer.router_q_proj(x[t]) @ mean / config.router_dim**0.5 for mean in means]
            best = sorted(range(len(chunks)), key=lambda n: (-scores[n].item(), n))[: config.top_k]
            weights = torch.stack([scores[n] for n in best]).softmax(0) if best else []
        for h in range(4):
            g, far_q, far_k = h // 2, turned_q if config.far_positions else q, turned_k if config.far_positions else k
            near = range(max(0, t - window + 1), t + 1)
            y = attend(turned_q[t, h], [turned_k[j, g] for j in near], [v[j, g] for j in near])
            if config.fusion == "relevance":
                for weight, n in zip(weights, best, strict=True):
                    keys = [placed(k[j, g], j) for j in chunks[n]]
                    y = y + weight * attend(q[t, h], keys, [v[j, g] for j in chunks[n]])
            elif chunks:
                means = [torch.stack([k[j, g] for j in chunk]).mean(0) for chunk in chunks]
                of_group = q[t, 2 * g : 2 * g + 2].sum(0)
                best = sorted(range(len(chunks)), key=lambda n: (-(of_group @ means[n]).item(), n))[: config.top_k]
                seen = [j for n in best for j in chunks[n]]
                chosen = attend(far_q[t, h], [far_k[j, g] for j in seen], [v[j, g] for j in seen])
                gate = (torch.tanh if config.gate == "tanh" else torch.sigmoid)(mixer.head_gate.bias[h])
                y = (1 - gate) * y + gate * chosen
            heads.append(y)
        rows.append(torch.cat(heads))
    return mixer.o_proj(torch.stack(rows))


@pytest.mark.parametrize(
    "settings",
    [
        dict(fusion="relevance", router_dim=5),
        dict(fusion="relevance", router_dim=5, max_chunks=3, window_size=9),
        dict(fusion="head_gate"),
        dict(fusion="head_gate", far_positions=True, max_chunks=2, gate="tanh"),
        dict(fusion="head_gate", window_size=4, max_chunks=4),
    ],
    ids=str,
)
def test_fusions_are_their_equations(settings):
    mixer, x, weight = mixer_of(**{"far_positions": False, **settings}), inputs(43), inputs(43, seed=1)[0]
    gradients = []
    for run in (fused_loop, lambda mixer, x: step(mixer, x[None]).y_BTD[0]):
        copied = copy.deepcopy(mixer)
        y = run(copied, x[0])
        (y * weight).sum().backward()
        gradients.append((y, {name: p.grad for name, p in copied.named_parameters()}))
    (y, expected), (got_y, got) = gradients
    assert_close("y", y, got_y, EXACT)
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        assert_close(name, grad, got[name], EXACT)
    # Any division into calls, also after the state has reached its size.
    state, parts = None, []
    for piece in x.split([1, 6, 17, 1, 1, 1, 9, 7], 1):
        out = step(mixer, piece, state)
        state, parts = out.state, [*parts, out.y_BTD[0]]
    assert_close("pieces", y, torch.cat(parts), EXACT)


@pytest.mark.parametrize("fusion", chunk_sparse.FUSIONS)
def test_a_state_of_limited_chunks_has_a_fixed_size(fusion):
    mixer = mixer_of(**{"far_positions": False, "max_chunks": 3, **FUSED.get(fusion, {})}).eval()
    whole = mixer_of(**{"far_positions": False, **FUSED.get(fusion, {})}).eval()
    sizes, x = set(), inputs(90)
    with torch.no_grad():
        state = step(mixer, x[:, :40]).state
        for t in range(40, 90):
            state = step(mixer, x[:, t : t + 1], state).state
            sizes.add(tuple((name, y.shape) for name, y in named(state).items()))
        assert len(sizes) == 1
        # As long as there are few chunks, the limit has no effect; then it has.
        few, many = (step(it, x).y_BTD for it in (whole, mixer))
        assert_close("few chunks", few[:, : 3 * 4], many[:, : 3 * 4], 1e-12)
        assert relative_error(few[:, 40:], many[:, 40:]) > 1e-3


@pytest.mark.parametrize("fusion", FUSED)
def test_memory_off_is_the_window_alone_in_other_fusions(fusion):
    mixer = mixer_of(far_positions=False, **FUSED[fusion]).eval()
    window = attention.Mixer(attention.Config(SMALL["window_size"]), DIMS, 0).double()
    window.load_state_dict(mixer.state_dict(), strict=False)
    with memory_off(mixer):
        assert_close("y", step(window, inputs(31)).y_BTD, step(mixer, inputs(31)).y_BTD, 1e-12)
    assert relative_error(step(window, inputs(31)).y_BTD, step(mixer, inputs(31)).y_BTD) > 1e-6


@pytest.mark.parametrize(("form", "start"), [("sigmoid", 0.5), ("tanh", 0.0)])
def test_a_head_gate_starts_half_open_or_closed_and_learns(form, start):
    mixer = mixer_of(far_positions=False, gate=form, **FUSED["head_gate"])
    mixer.reset_parameters()
    assert mixer.head_gate().tolist() == [start] * 4
    step(mixer, inputs(31)).y_BTD.square().sum().backward()
    assert mixer.head_gate.bias.grad.abs().min() > 1e-3


# A token without chunks has a low log-sum-exp, beside which scores that are masked afterwards overflow.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("fusion", FUSED)
def test_triton_reads_chosen_chunks_alone(fusion):
    mixer = mixer_of(**{"far_positions": False, **FUSED[fusion]}).float()
    found = []
    for backend in ("reference", "triton"):
        copied, x = copy.deepcopy(mixer), inputs(31).float().requires_grad_()
        with set_backend(backend):
            y = step(copied, x).y_BTD
            y.square().sum().backward()
        found.append({"y": y, "x": x.grad, **{name: p.grad for name, p in copied.named_parameters()}})
    for name, expected in found[0].items():
        assert_close(name, expected, found[1][name], 1e-5 if name == "y" else 1e-4)
