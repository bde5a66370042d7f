"""Taps, by which later layers add reads of the first memory: their equations, streams, files and mistakes."""

import json
import re

import pytest
import torch
import torch.distributed as dist

from memlm import MemLMConfig, MemLMForCausalLM, MemoryCache
from memlm.data.tokenizer import byte_tokenizer
from memlm.evaluation.ablation import memory_off, recorded
from memlm.flops import count_flops, state_bytes
from memlm.hub import require_plain
from memlm.memory.base import kinds, load_kind
from memlm.memory.rows import Rows
from memlm.memory.stretches import Stretches
from memlm.modeling import Tap
from memlm.training.checkpoint import copy_weights
from memlm.training.model import checkpoint_layers
from memlm.training.trainable import memory_names
from memlm_kernels.testing import assert_close, relative_error
from tests import ranks
from tests.conftest import composed
from tests.memory.test_contract import assert_same_memory, stream

EXACT, VOCAB, TAPS = 1e-10, 259, ("fast", "slow", "mixed")
MIXERS = {
    "memory": {"kind": "two_rate", "chunk_size": 3, "slow_ratio": 2, "memory_head_dim": 8},
    "window": {"kind": "attention", "window_size": 5},
}
MEMORY_FIRST = ["memory", "window", "window", "window"]


def config(taps=TAPS, pattern=MEMORY_FIRST, **settings):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "initializer_range": 0.2, "mixers": MIXERS}
    given = None if taps is None else list(taps)
    return MemLMConfig(**{**sizes, "mixer_pattern": pattern, "taps": given, **settings})


def built(taps=TAPS, moved=True, **settings):
    """moved: with all parameters off the points where they start."""
    torch.manual_seed(0)
    model = MemLMForCausalLM(config(taps, **settings)).double().eval()
    with torch.no_grad():
        for p in model.parameters() if moved else ():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(batch=2, length=40, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def by_hand(model, ids, taps, first):
    """Logits, with reads that are caught where the stores of layer ``first`` give them."""
    inner, added, caught = model.model, {}, {}
    x, mixer = inner.embed_tokens(ids), inner.layers[first].mixer
    hooks = [
        getattr(mixer, name).recalled.register_forward_hook(lambda m, x, out, name=name: caught.update({name: out}))
        for name in ("fast", "slow")
    ]
    rows = Rows.of(x)
    for i, layer in enumerate(inner.layers):
        if i in added:
            x = x + added[i] @ layer.tap_proj.weight.T
        h = layer.mixer_input(x)
        y = layer.mixer(h, layer.mixer.init_state(len(x), x.device, x.dtype), rows).y_BTD
        if i == first:
            z, w = caught["fast"], caught["slow"]
            g = torch.sigmoid(mixer.gate(torch.cat([h, z, w], -1)))
            reads = {"fast": z, "slow": w, "mixed": g * z + (1 - g) * w}
            added = {first + 1 + j: reads[name] for j, name in enumerate(taps)}
        if model.config.norm_outputs:
            x = x + layer.post_attention_layernorm(y)
            x = x + layer.post_feedforward_layernorm(layer.mlp(x))
        else:
            x = x + y
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    for hook in hooks:
        hook.remove()
    return model.lm_head(inner.norm(x))


PATTERNS = {
    "memory first": (TAPS, MEMORY_FIRST, {}),
    "memory second": (("slow", "slow"), ["window", "memory", "window", "window"], {"norm_outputs": True}),
    "memories alone": (("mixed", "fast"), ["memory"], {}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_taps_are_their_equations(name):
    """So are gradients, also with gradient checkpointing."""
    taps, pattern, settings = PATTERNS[name]
    model, ids = built(taps, pattern=pattern, **settings), tokens()
    first = pattern.index("memory")
    tapped = [i for i, layer in enumerate(model.model.layers) if layer.tap_proj is not None]
    assert tapped == [first + 1 + j for j in range(len(taps))]
    wanted, got = by_hand(model, ids, taps, first), model(ids).logits
    assert_close("logits", wanted, got, EXACT)
    model.train()
    names = [name for name, _ in model.named_parameters()]
    expected = torch.autograd.grad(wanted.square().sum(), model.parameters())
    plain = torch.autograd.grad(model(ids).logits.square().sum(), model.parameters())
    checkpoint_layers(model, True)
    again = torch.autograd.grad(model(ids).logits.square().sum(), model.parameters())
    for name, a, *others in zip(names, expected, plain, again, strict=True):
        assert a.any(), name
        for b in others:
            assert_close(name, a, b, EXACT)


def test_new_taps_change_nothing_and_learn():
    """Also the other weights are those of the same seed without taps."""
    plain, tapped, ids = built(None, moved=False), built(moved=False), tokens()
    own = {f"model.layers.{i}.tap_proj.weight" for i in (1, 2, 3)}
    weights = plain.state_dict()
    assert tapped.state_dict().keys() - weights.keys() == own
    assert all(torch.equal(x, weights[name]) for name, x in tapped.state_dict().items() if name not in own)
    assert torch.equal(plain(ids).logits, tapped(ids).logits)
    tapped(ids, labels=ids).loss.backward()
    assert all(p.grad.any() for name, p in tapped.named_parameters() if name in own)
    assert own < {*memory_names(tapped)}


def test_reads_that_no_layer_adds_end_in_their_layer():
    kept = {}
    for taps in (None, ("slow",)):
        model = built(taps)
        model.model.layers[0].register_forward_hook(lambda layer, x, out, taps=taps: kept.update({taps: out.reads}))
        model(tokens())
    assert [len(reads) for reads in kept.values()] == [0, 1]


@torch.no_grad()
def test_any_division_of_a_stream_gives_the_same_logits(tmp_path):
    model, ids = built(), tokens()
    whole = model(ids, use_cache=False).logits
    assert relative_error(whole, built(None)(ids).logits) > 0.01
    for cuts in ([40], [23, 17], [1, 8, 2, 3, 16, 9, 1], [1] * 40):
        cache, parts = MemoryCache(), []
        for n, piece in enumerate(ids.split(cuts, 1)):
            if n == 3:
                cache.save(tmp_path)
                cache = MemoryCache.load(tmp_path)
            parts.append(model(piece, past_key_values=cache).logits)
        assert_close(str(cuts), whole, torch.cat(parts, 1), EXACT)
    with pytest.raises(ValueError, match="made by a model of signature"):
        built(None)(ids, past_key_values=cache)


@torch.no_grad()
def test_packed_documents_and_padded_rows_equal_those_alone():
    model, sizes, ids = built(), (13, 1, 20, 6), tokens(1)
    places = torch.cat([torch.arange(n) for n in sizes])[None]
    alone = torch.cat([model(piece).logits for piece in ids.split(sizes, 1)], 1)
    assert_close("packed", alone, model(ids, position_ids=places).logits, EXACT)
    ids, mask = tokens(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :17] = mask[1, 30:] = 0
    padded, cache = MemoryCache(), MemoryCache()
    got = model(ids, attention_mask=mask, past_key_values=padded).logits
    assert_close("left", model(ids[:1, 17:]).logits, got[:1, 17:], EXACT)
    assert_close("right", model(ids[1:, :30], past_key_values=cache).logits, got[1:, :30], EXACT)
    padded.batch_select_indices(torch.tensor([1]))
    assert_same_memory(cache, padded, EXACT)
    nothing = model(ids[:, :0], past_key_values=stream(model, ids, [40])[1])
    assert nothing.logits.shape == (2, 0, VOCAB)


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in kinds() if load_kind(k, "kind").Mixer.publishes])
def test_without_its_memory_a_model_has_no_taps(kind):
    """Every kind that publishes gives zeros then."""
    names = load_kind(kind, "kind").Mixer.publishes
    model = built(names, mixers={**MIXERS, "memory": {"kind": kind}}, num_hidden_layers=len(names) + 1)
    ids, taps = tokens(), {name: m for name, m in model.named_modules() if isinstance(m, Tap)}
    with recorded(taps) as found:
        on = model(ids).logits
    assert len(found) == len(names) and all(x.any() for x in found.values())
    with memory_off(model), recorded(taps) as found:
        off = model(ids).logits
    assert not any(x.any() for x in found.values())
    for tap in taps.values():
        tap.weight.zero_()
    with memory_off(model):
        assert torch.equal(off, model(ids).logits)
    assert relative_error(on, off) > 0.01


@torch.no_grad()
def test_saved_models_keep_their_taps_and_earlier_ones_load(tmp_path):
    model, ids = built(), tokens()
    plain = built(None, moved=False)
    for name, saved in (("tapped", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    again = MemLMForCausalLM.from_pretrained(tmp_path / "tapped")
    assert again.config.taps == [*TAPS] and torch.equal(again(ids).logits, model(ids).logits)
    assert "their inputs, one each: fast, slow, mixed." in (tmp_path / "tapped" / "README.md").read_text()
    assert "taps" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not MemLMConfig(taps=[]).to_dict().get("taps")
    # New taps are silent, so weights without them are a start.
    copy_weights(str(tmp_path / "plain"), start := built(moved=False, initializer_range=0.3), byte_tokenizer())
    assert torch.equal(start(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match=r"tap_proj.weight is \[16, 16\] there and missing here"):
        copy_weights(str(tmp_path / "tapped"), built(None), byte_tokenizer())
    with pytest.raises(ValueError, match=r"model.taps=\['fast', 'slow', 'mixed'\]; only None can be converted"):
        require_plain(model.config)


def test_costs_are_those_of_the_projections():
    tapped, plain = (config(taps, num_hidden_layers=2) for taps in (["slow"], None))
    assert count_flops(tapped, 5) == count_flops(plain, 5) + 2 * 16**2
    assert state_bytes(tapped, 5) == state_bytes(plain, 5)


SIDE = {"form": "ladder", "reduction": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": ["fst"]}, "model.taps='fst' is no read of model.mixers.memory; did you mean 'fast'?"),
        ({"taps": [3]}, "model.taps=3 is no read of model.mixers.memory; one of: fast, slow, mixed"),
        ({"taps": ["fast"] * 4}, "needs a layer for each behind layer 0, not 3; name fewer, or raise num_hidden"),
        ({"num_hidden_layers": 1}, "needs a layer for each behind layer 0, not 0; name fewer, or raise num_hidden"),
        (
            {"pattern": ["window"]},
            "model.taps=['fast', 'slow', 'mixed'] needs a layer whose mixer publishes reads, such",
        ),
        ({"side": SIDE}, "model.side: the decoder has model.taps=['fast', 'slow', 'mixed']; name one without them"),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        built(**settings)
    assert "\n" not in str(caught.value)


def test_a_model_with_taps_gets_no_side_network():
    with pytest.raises(ValueError, match="name one without them"):
        built().add_side(SIDE)


def test_a_command_sets_taps():
    """And a model of another memory, whose size is matched, has none."""
    given = ("memory=two_rate", "model.num_hidden_layers=4", "match.parameters=default")
    cfg = composed(*given, f"model.taps=[{','.join(TAPS)}]")
    tapped, plain = MemLMConfig.from_hydra(cfg.model), MemLMConfig.from_hydra(composed(*given).model)
    assert tapped.taps == [*TAPS] and plain.taps is None and tapped.intermediate_size < plain.intermediate_size
    mixed = composed(
        *given[:2],
        "+model.mixers.window={kind: attention, window_size: 16}",
        f"model.mixer_pattern=[{','.join(MEMORY_FIRST)}]",
        "model.taps=[slow]",
    )
    assert MemLMConfig.from_hydra(mixed.model).tapped() == {1: "slow"}


def on_stretches(rank, size):
    """The largest error of this process's outputs, and of the gradients."""
    model, ids = built().train(), tokens(length=24)
    whole = model(ids).logits
    whole.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.model.stretches = Stretches(dist.group.WORLD)
    mine = model(ids.chunk(size, 1)[rank]).logits
    mine.square().sum().backward()
    errors = [relative_error(whole.chunk(size, 1)[rank], mine)]
    for name, p in model.named_parameters():
        # The start of a store is read by the first process alone.
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(grad)
        errors.append(relative_error(expected[name], grad))
    return max(errors)


@pytest.mark.slow
def test_stretches_on_two_processes_equal_whole_rows(tmp_path):
    assert max(ranks.run(on_stretches, 2, tmp_path)) < EXACT
