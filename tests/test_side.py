"""A side network beside a frozen decoder: its equations, its streams, its training, and what it leaves alone."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.autograd.graph import saved_tensors_hooks

from memlm import MemLMConfig, MemLMForCausalLM, MemoryCache
from memlm.evaluation import run as evaluate
from memlm.evaluation.ablation import memory_off
from memlm.flops import count_flops, count_flops_of, count_parameters, state_bytes
from memlm.hub import load_model, require_plain
from memlm.hub.families import config_to
from memlm.layers import Rope, rotary, rotary_angles
from memlm.memory.rows import Rows
from memlm.training import checkpoint, run
from memlm.training.model import BackboneSettings, checkpoint_layers
from memlm.training.trainable import choose
from memlm_kernels.testing import assert_close
from tests.conftest import composed
from tests.runs import config, figures, stopped, trainer
from tests.test_backbone import SMALL

WINDOW, CHUNK = 6, 3
BANK = {"form": "longmem", "chunk_size": CHUNK, "top_k": 2}
FORMS = {
    "bank": BANK,
    "few chunks": {**BANK, "max_chunks": 4},
    "no bank": {"form": "longmem", "top_k": 0},
    "ladder": {"form": "ladder", "reduction": 2},
}
forms = pytest.mark.parametrize("form", FORMS)
EXACT = 1e-10


def decoder(window=WINDOW, layers=4, **settings):
    torch.manual_seed(0)
    mixer = {"kind": "attention", "window_size": window, **settings}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return MemLMForCausalLM(MemLMConfig(num_hidden_layers=layers, mixers={"window": mixer}, vocab_size=50, **sizes))


def built(form, **settings):
    """With all parameters of the side network moved off the points where they start."""
    model = decoder(**settings)
    model.add_side(FORMS[form])
    with torch.no_grad():
        for p in model.model.side.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def tokens(batch=2, length=60, seed=0):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def window_reads(mixer, x_TD):
    """Queries, keys and values before rotation, [T, heads, 8], and each head's read of the window, [T][H][8]."""
    q, k, v = (proj(x_TD).unflatten(-1, (-1, 8)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    angles = rotary_angles(torch.arange(len(x_TD))[None], Rope(8))
    turned_q, turned_k = (rotary(z[None], angles)[0] for z in (q, k))
    near = [slice(max(0, t - WINDOW + 1), t + 1) for t in range(len(x_TD))]
    reads = [
        [attend(turned_q[t, h], turned_k[seen, h // 2], v[seen, h // 2]) for h in range(4)]
        for t, seen in enumerate(near)
    ]
    return (q, k, v), reads


def attend(query, keys, values):
    return (keys @ query / 8**0.5).softmax(0) @ values


def after_layer(layer, x_TD, reads):
    x_TD = x_TD + layer.mixer.o_proj(torch.stack([torch.cat(heads) for heads in reads]))
    return x_TD + layer.mlp(layer.post_attention_layernorm(x_TD))


def longmem(model, ids_T):
    """Logits of one row by the equations, token by token."""
    inner, side = model.model, model.model.side
    frozen, made = [inner.embed_tokens(ids_T)], []
    for layer in inner.layers:
        projected, reads = window_reads(layer.mixer, layer.input_layernorm(frozen[-1]))
        made.append(projected)
        frozen.append(after_layer(layer, frozen[-1], reads))
    s = frozen[0]
    for j, layer in enumerate(side.layers):
        (q, _, _), reads = window_reads(layer.mixer, layer.input_layernorm(s))
        if j == side.reads:
            _, k, v = made[2 * j + 1]
            for t in range(len(ids_T)):
                chunks = [slice(n, n + CHUNK) for n in range(0, t - WINDOW + 1 - CHUNK + 1, CHUNK)]
                chunks = chunks[-4:] if layer.mixer.chosen.max_chunks == 4 else chunks
                for h in range(4 if chunks else 0):
                    g = h // 2
                    scores = [(q[t, 2 * g] + q[t, 2 * g + 1]) @ k[chunk, g].mean(0) for chunk in chunks]
                    best = sorted(range(len(chunks)), key=lambda n: -scores[n].item())[:2]
                    far_k, far_v = (torch.cat([z[chunks[n], g] for n in best]) for z in (k, v))
                    gate = torch.sigmoid(layer.mixer.head_gate.bias[h])
                    reads[t][h] = (1 - gate) * reads[t][h] + gate * attend(q[t, h], far_k, far_v)
        s = after_layer(layer, s, reads) + frozen[2 * j + 2] - frozen[2 * j]
    return model.lm_head(inner.norm(s))


@pytest.mark.parametrize("form", ["bank", "few chunks", "no bank"])
def test_longmem_is_its_equations(form):
    """So are its gradients."""
    model, ids = built(form), tokens(1, 40)
    wanted, got = longmem(model, ids[0]), model(ids).logits[0]
    assert_close(form, wanted, got, EXACT)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = [torch.autograd.grad(logits.square().sum(), own.values()) for logits in (wanted, got)]
    for name, *pair in zip(own, *grads, strict=True):
        assert_close(name, *pair, EXACT)


@torch.no_grad()
def test_the_ladder_is_its_equations():
    model, ids = built("ladder"), tokens(1, 20)
    inner, side, h, s = model.model, model.model.side, model.model.embed_tokens(ids[0]), None
    for i, rung in enumerate(side.rungs):
        s = side.first_proj(h) if s is None else s
        _, reads = window_reads(inner.layers[i].mixer, inner.layers[i].input_layernorm(h))
        h = after_layer(inner.layers[i], h, reads)
        gate = torch.sigmoid(10 * rung.logit)
        s = gate * s + (1 - gate) * h @ rung.down_proj.weight.T
        assert s.shape[1] == 16 and side.layers[i].mixer.dims.head_dim == 4
        s = side.layers[i](s[None], side.layers[i].mixer.init_state(1, s.device, s.dtype), Rows.of(s[None])).y_BTD[0]
    expected = model.lm_head(
        inner.norm(
            h + s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() * side.norm.weight @ side.up_proj.weight.T
        )
    )
    assert_close("ladder", expected, model(ids).logits[0], EXACT)


def test_a_new_network_begins_as_the_decoder_or_with_copies_of_every_second_layer():
    ids, plain = tokens(), decoder().eval()
    with torch.no_grad():
        wanted = plain(ids).logits
        for form in FORMS:
            model = decoder().eval()
            model.add_side(FORMS[form])
            if form == "ladder":
                assert torch.equal(model(ids).logits, wanted)
                continue
            side = model.model.side
            for j, layer in enumerate(side.layers):
                own, of = layer.state_dict(), plain.model.layers[2 * j + 1].state_dict()
                assert own.keys() - of.keys() == ({"mixer.head_gate.bias"} if j == side.reads else set())
                assert all(torch.equal(own[name], of[name]) for name in of)
                # A layer that adds nothing leaves the sum of differences: the frozen decoder's last output.
                layer.mixer.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            assert_close(form, wanted, model(ids).logits, 1e-5)


@forms
def test_any_division_of_a_stream_gives_the_same_logits(form, tmp_path):
    """Also over a memory on disk, with gradients' paths, and by ``generate``."""
    model, ids = built(form, conv_size=3, persistent_tokens=2, qk_norm=True), tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for cuts in ([1] * 60, [7, 1, 1, 40, 11]):
            cache, parts = MemoryCache(), []
            for n, piece in enumerate(ids.split(cuts, 1)):
                if n == 3:
                    cache.save(tmp_path)
                    cache = MemoryCache.load(tmp_path)
                parts.append(model(piece, past_key_values=cache).logits)
            assert_close(str(cuts), whole, torch.cat(parts, 1), EXACT)
        if form != "bank":
            fixed = MemoryCache(fixed=True)
            parts = [model(piece, past_key_values=fixed).logits for piece in ids.split([9, 1, 50], 1)]
            assert_close("fixed", whole, torch.cat(parts, 1), EXACT)
    assert len(cache.states) == 4 + len(model.model.side.layers)
    assert_close("with gradients", whole, model.train()(ids).logits, EXACT)
    model.eval()
    answer = model.generate(ids[:, :40], max_new_tokens=6, do_sample=False)
    assert torch.equal(answer[:, 40:], model(answer).logits[:, 39:-1].argmax(-1))


@forms
def test_packed_documents_and_padded_rows_equal_those_alone(form):
    model, sizes, ids = built(form), (23, 1, 30, 6), tokens(1)
    places = torch.cat([torch.arange(n) for n in sizes])[None]
    with torch.no_grad():
        alone = [model(piece).logits for piece in ids.split(sizes, 1)]
        cache, cuts = MemoryCache(), [20, 9, 1, 30]
        for piece in (model(ids, position_ids=places).logits, model(ids, position_ids=places, max_documents=4).logits):
            assert_close("packed", torch.cat(alone, 1), piece, EXACT)
        parts = [
            model(piece, position_ids=place, past_key_values=cache).logits
            for piece, place in zip(ids.split(cuts, 1), places.split(cuts, 1), strict=True)
        ]
        assert_close("packed stream", torch.cat(alone, 1), torch.cat(parts, 1), EXACT)
        mask = torch.ones(2, 60)
        mask[0, :17] = mask[1, 40:] = 0
        cache = MemoryCache()
        padded = model(tokens(), attention_mask=mask, past_key_values=cache).logits
        after, first = model(tokens(2, 9, seed=1), past_key_values=cache).logits, tokens()[:1, 17:]
        joined = model(torch.cat([first, tokens(2, 9, seed=1)[:1]], 1)).logits
        assert_close("after padding", joined[:, -9:], after[:1], EXACT)
        assert_close("left", model(tokens()[:1, 17:]).logits, padded[:1, 17:], EXACT)
        assert_close("right", model(tokens()[1:, :40]).logits, padded[1:, :40], EXACT)


def test_without_its_memory_a_network_is_the_one_without_a_bank():
    """And with it, it is not: far chunks are read."""
    model, ids = built("bank"), tokens()
    other = built("no bank")
    other.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        on, wanted = model(ids), other(ids).logits
        with memory_off(model):
            assert torch.equal(model(ids).logits, wanted)
        # Layer 3 of the decoder sees 3 * 5 tokens more than its own window.
        edited = ids.clone()
        edited[:, 0] = (edited[:, 0] + 1) % 50
        assert (model(edited).logits - on.logits)[:, 40:].abs().max() > 1e-6
        assert (other(edited).logits - wanted)[:, 40:].abs().max() < 1e-12
    assert on.metrics["side1/memory_share"] > 0.01


@forms
def test_only_the_side_network_has_gradients_and_keeps_activations(form, tmp_path):
    model, ids = built(form).float().train(), tokens()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whole = kept(decoder().train(), ids)
    assert kept(model, ids) < (0.75 if form == "ladder" else 0.6) * whole
    own = choose(model, None)
    assert own == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(
        (p.grad is not None and p.grad.abs().sum() > 0) == (name in own) for name, p in model.named_parameters()
    )
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if name in own}
    model.zero_grad()
    checkpoint_layers(model, True)
    assert kept(model, ids) < 0.4 * whole
    for name, p in model.named_parameters():
        if name in own:
            assert_close(name, grads[name], p.grad, 1e-5)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == own
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def kept(model, ids):
    """Bytes that a forward keeps for its backward, without parameters; the backward runs, also to the embeddings."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes, embeds = {}, model.get_input_embeddings()(ids).detach().requires_grad_()

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss = model(inputs_embeds=embeds, labels=ids).loss
    loss.backward()
    return sum(sizes.values())


def test_costs_are_those_of_both_networks():
    model, plain, cache = built("bank", layers=2).float(), decoder(layers=2), MemoryCache()
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    assert state_bytes(model.config, 20) == cache.nbytes() > state_bytes(plain.config, 20)
    assert count_flops(model.config, 20) == count_flops_of(model, 20) > count_flops(plain.config, 20)


def test_a_frozen_mixture_trains_none_of_its_routers():
    """Its layers stay in evaluation mode, so they add no losses."""
    mixer = {"kind": "mom", "num_memories": 3, "top_k": 1, "head_dim": 8, "balance_bias": True}
    model = MemLMForCausalLM(MemLMConfig(num_hidden_layers=2, mixers={"memory": mixer}, vocab_size=50))
    with pytest.raises(ValueError, match=r"model\.side: layer 1 of the decoder has mixer 'memory', mom; a bank needs"):
        model.add_side(BANK)
    model.add_side(FORMS["no bank"])
    out = model.train()(tokens(), labels=tokens())
    assert out.aux_losses and all(name.startswith("side0/") for name in out.aux_losses)
    out.loss.backward()
    assert all((p.grad is None) == (".side." not in name) for name, p in model.named_parameters())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    sizes = ("model=tiny", "memory=none", "model.hidden_size=16", "model.num_hidden_layers=2", "match.parameters=null")
    run(config(folder, "train.steps=2", *sizes, "model.mixers.memory.window_size=8", small=SMALL[:-1]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return checkpoint.latest(folder / "run")


def settings(folder, source, side, *overrides):
    return config(folder, f"backbone={source}", f"side={side}", *overrides, small=SMALL)


def untouched(model, source):
    """Whether a model has all weights of the decoder, to the bit; and the names of its others."""
    weights, before = model.state_dict(), load_model(source).state_dict()
    return all(torch.equal(x, weights[name]) for name, x in before.items()), weights.keys() - before.keys()


def test_a_run_trains_the_side_network_alone_and_goes_on_exactly(source, tmp_path, capsys):
    run(settings(tmp_path / "straight", source, "longmem"))
    told = capsys.readouterr().out
    stopped(settings(tmp_path, source, "longmem"), 3)
    run(settings(tmp_path, source, "longmem"))
    assert figures(tmp_path) == figures(tmp_path / "straight")
    model, straight = (load_model(checkpoint.latest(place / "run")) for place in (tmp_path, tmp_path / "straight"))
    same, own = untouched(model, source)
    assert same and own == {name for name, p in model.named_parameters() if ".side." in name}
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in straight.named_parameters())
    trained = sum(p.numel() for name, p in model.named_parameters() if name in own)
    assert f"attention, longmem side network, {count_parameters(model):,} parameters ({trained:,} trained)" in told
    few = ("control=null", "eval.factors=[1]", "eval.recall_rows=2")
    evaluate(composed(f"checkpoint={tmp_path}/run", *few, config="evaluate"))
    found = (tmp_path / "run" / "evaluation" / "latest" / "results.json").read_text()
    assert '"longmem side network"' in found


def test_an_optimiser_has_the_side_network_alone(source, tmp_path):
    made = trainer(settings(tmp_path, source, "ladder", "model.side.reduction=4", "optim.weight_decay=0.1"))
    made._one_step(logged=False)
    same, own = untouched(made.model, source)
    optimised = {id(p) for of in made.optimizers for group in of.param_groups for p in group["params"]}
    assert same and optimised == {id(made.model.get_parameter(name)) for name in own}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.side.form=wide",), r"model\.side\.form='wide' must be one of longmem, ladder"),
        (("model.side.chunk_size=9",), r"layer 1 of the decoder: window_size=8 must be chunk_size=9 at least"),
        (("model.side.chunk_size=0",), r"model\.side\.chunk_size=0 must be at least 1"),
        (("model.side.top_k=-1",), r"model\.side\.top_k=-1 must be 0 \(no bank\) or more"),
        (("model.side.max_chunks=3",), r"model\.side\.max_chunks=3 must be top_k=16 at least"),
        (("side=ladder", "model.side.reduction=3"), r"reduction=3 must divide model\.hidden_size=16; choose"),
        (("side=ladder",), r"reduction=8 must divide model\.head_dim=8 into an even number; choose another"),
        (("side=ladder", "model.side.reduction=0"), r"model\.side\.reduction=0 must be at least 1"),
        (("memory=mom",), "use memory=none"),
        (("train.trainable=['model.layers.*']",), r"'model\.layers\.\*' matches no parameter"),
        (("train.gradient_checkpointing=[0]",), "use true or false"),
        (("train.carry=true",), r"needs a state of constant size; \['side'\] keeps every token"),
    ],
    ids=lambda x: x[-1] if isinstance(x, tuple) else "",
)
def test_a_mistake_is_one_line(source, tmp_path, overrides, message):
    kept = [o for o in overrides if not o.startswith("side=")]
    side = next((o.removeprefix("side=") for o in overrides if o.startswith("side=")), "longmem")
    with pytest.raises(ValueError, match=message) as caught:
        trainer(settings(tmp_path, source, side, *kept))
    assert "\n" not in str(caught.value)


def test_a_network_that_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match=r"side=\.\.\.: it stands beside a trained decoder; set backbone=PATH_OR_ID"):
        BackboneSettings.of({"hidden_size": 8, "side": BANK})
    for model, form, message in (
        (decoder(layers=3), BANK, "the decoder has 3 layers; longmem has a layer for every two"),
        (
            decoder(window=None),
            BANK,
            "layer 3 of the decoder has mixer 'window', attention; a bank needs attention with",
        ),
        (built("ladder"), BANK, "the model has a side network already"),
        (decoder(), {**BANK, "chunks": 2}, r"model\.side\.chunks=2 is not a setting"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_side(form)
    with pytest.raises(ValueError, match=r"model\.side: mistral has no side network; convert the decoder that"):
        config_to("mistral", built("ladder").config, {})
    with pytest.raises(ValueError, match=r"model\.side=\{'form': 'ladder', 'reduction': 2\}; only None can be"):
        require_plain(built("ladder").config)
    with pytest.raises(ValueError, match=r"model\.side\.form='wide' must be one of"):
        MemLMConfig(side={"form": "wide"})
