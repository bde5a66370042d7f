"""The model's interface to transformers: Auto classes, saving, wrong kinds of caches, wrong shapes of inputs."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import memlm
from memlm import MemLMConfig, MemLMForCausalLM, MemoryCache
from memlm.flops import count_flops
from memlm.hub import load_model
from memlm.memory.base import MixerOutput
from memlm.memory.state import leaves
from memlm.training.objective import Objective
from tests.conftest import build, model_config


def ids(batch=2, length=20):
    return torch.randint(259, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
def test_auto_classes_rebuild_the_model_from_its_folder_to_the_bit(tmp_path, tied):
    torch.manual_seed(0)
    config = model_config("titans_mag")
    config.tie_word_embeddings = tied
    model = MemLMForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is MemLMForCausalLM and type(AutoConfig.from_pretrained(tmp_path)) is MemLMConfig
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype
    assert again.config.memory_signature() == model.config.memory_signature()


def test_the_later_of_two_saves_in_a_folder_counts(tmp_path):
    """transformers leaves the file, or the index, of the earlier one."""
    model = build(dtype=torch.float32)
    for size in ("1GB", "20KB", "1GB"):
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        model.save_pretrained(tmp_path, max_shard_size=size)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight), size


@pytest.mark.parametrize(
    ("kind", "signature"),
    [("attention", "3a080ae11b389ae2"), ("msa", "512950a2ae0fc80f"), ("chunk_sparse", "a0db1d8ba63bd671")],
)
def test_memories_of_earlier_versions_stay_accepted(kind, signature):
    """A setting that came later and has its default does not change the signature; another value does."""
    config = MemLMConfig(mixers={"memory": {"kind": kind}})
    assert config.memory_signature() == signature
    other = MemLMConfig(mixers={"memory": {"kind": kind, "qkv_bias": True}})
    scaled = MemLMConfig(mixers={"memory": {"kind": kind}}, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert len({c.memory_signature() for c in (config, other, scaled)}) == 3
    again = MemLMConfig(mixers={"memory": {"kind": kind}}, rope_scaling={"rope_type": "linear", "factor": 2})
    assert again.memory_signature() == scaled.memory_signature()


def test_the_model_has_no_buffers():
    """Non-persistent buffers have arbitrary content after from_pretrained, so there are none."""
    assert not list(build().buffers())


def test_config_json_spells_out_every_default(tmp_path):
    MemLMConfig(mixers={"m": {"kind": "titans_mag"}}).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["mixers"]["m"]
    assert settings["chunk_size"] == 16 and settings["memory_depth"] == 1 and len(settings) > 10


def test_patterns_tile_over_layers():
    mixers = {"attention": {"kind": "attention"}, "memory": {"kind": "titans_mag"}}
    model = MemLMForCausalLM(
        MemLMConfig(num_hidden_layers=5, mixers=mixers, mixer_pattern=["memory", "memory", "attention"])
    )
    kinds = [type(layer.mixer).__module__.rsplit(".", 1)[-1] for layer in model.model.layers]
    assert kinds == ["titans_mag", "titans_mag", "attention", "titans_mag", "titans_mag"]


def test_grouped_query_attention_backends_agree():
    torch.manual_seed(0)
    config = MemLMConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        mixers={"a": {"kind": "attention", "window_size": 7}},
    )
    model = MemLMForCausalLM(config).double().eval()
    outputs = []
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        assert all(layer.mixer.dims.attn_implementation == backend for layer in model.model.layers)
        with torch.no_grad():
            outputs.append(model(ids()).logits)
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)


def test_loss_is_the_shifted_cross_entropy_over_scored_tokens():
    model, x = build(), ids()
    labels = x.clone()
    labels[:, :7] = -100
    out = model(x, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_logits_to_keep_and_hidden_states():
    model, x = build(), ids()
    with torch.no_grad():
        out = model(x, output_hidden_states=True)
        assert torch.allclose(model(x, logits_to_keep=3).logits, out.logits[:, -3:], rtol=0, atol=1e-12)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (2, 20, 64)


def test_a_memory_fills_once_and_then_refuses_other_models_and_batches():
    cache = MemoryCache()
    model = build()
    model(ids(), past_key_values=cache)
    with pytest.raises(ValueError, match="signature"):
        build(chunk_size=8)(ids(), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows, the input 3"):
        model(ids(3), past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_other_caches_are_refused():
    with pytest.raises(ValueError, match=r"must be a memlm.MemoryCache, not DynamicCache"):
        build()(ids(), past_key_values=DynamicCache())


def test_memory_cannot_be_cropped():
    with pytest.raises(ValueError, match="fork"):
        MemoryCache().crop(-1)


def test_fork_is_independent():
    model, cache = build(), MemoryCache()
    with torch.no_grad():
        model(ids(), past_key_values=cache)
        fork = cache.fork()
        first = model(ids(), past_key_values=fork).logits
        assert cache.get_seq_length() == 20 and fork.get_seq_length() == 40
        assert torch.equal(first, model(ids(), past_key_values=cache).logits)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_memory_files_are_named(tmp_path, damage):
    cache = MemoryCache()
    build()(ids(), past_key_values=cache)
    cache.save(tmp_path)
    file = tmp_path / "memory.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(ValueError, match=r"memory\.safetensors: (damaged|no such file)"):
        MemoryCache.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hiden_size=3), r"model\.hiden_size=3 is not a setting; did you mean 'hidden_size'"),
        (dict(hidden_size=65), r"model\.hidden_size=65 does not divide by num_attention_heads=2"),
        (dict(num_attention_heads=3, head_dim=8, num_key_value_heads=2), r"num_attention_heads=3 does not divide"),
        (dict(head_dim=7), r"model\.head_dim=7 must be even"),
        (dict(num_hidden_layers=0), r"model\.num_hidden_layers=0"),
        (dict(mixers={"m": {}}), r"model\.mixers\.m\.kind is missing"),
        (dict(mixers={"m": {"kind": "titan_mag"}}), r"kind='titan_mag' is unknown; did you mean 'titans_mag'"),
        (dict(mixers={"m": {"kind": "titans"}}), r"kind='titans' is unknown"),
        (dict(mixers={"m": {"kind": "attention", "windw_size": 4}}), "did you mean 'window_size'"),
        (dict(mixers={"m": {"kind": "attention", "window_size": "4"}}), "window_size='4' must be int or null"),
        (dict(mixers={"m": {"kind": "attention", "window_size": True}}), "window_size=True must be int or null"),
        (dict(mixers={"m": {"kind": "titans_mag", "chunk_size": 0}}), r"model\.mixers\.m\.chunk_size=0"),
        (dict(mixers={"m": "attention"}), r"model\.mixers\.m='attention' must be the settings of a mixer"),
        (dict(mixers={"m": {"kind": 5}}), r"kind=5 is unknown"),
        (dict(mixer_pattern="attention"), r"mixer_pattern='attention' must be list or null"),
        (dict(intermediate_size=0), r"model\.intermediate_size=0 must be at least 1"),
        (dict(head_dim=-2), r"model\.head_dim=-2"),
        (dict(hidden_size="abc"), r"model\.hidden_size='abc' must be int"),
        (dict(rope_theta=0), r"model\.rope_theta=0"),
        (dict(mixer_pattern=["memory"]), r"mixer_pattern='memory' is not in model\.mixers"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MemLMConfig(**settings)


@pytest.mark.parametrize("damage", ["truncated", "config", "other kind", "missing"])
def test_bad_checkpoints_are_named(tmp_path, damage):
    build(dtype=torch.float32).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "missing":
        weights.unlink()
    else:
        settings = json.loads(config.read_text())
        if damage == "config":
            settings["hidden_size"], settings["head_dim"] = 128, 64
        else:
            settings["mixers"]["memory"] = {"kind": "attention"}
        config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_inputs_are_one_of_two():
    with pytest.raises(ValueError, match="exactly one"):
        build()()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(attention_mask=torch.ones(2, 15)), r"attention_mask \[2, 15\] must be \[batch, 20\]"),
        (dict(attention_mask=torch.ones(2, 1, 20, 20)), "attention_mask"),
        (dict(position_ids=torch.arange(20) % 2, max_documents=3), "max_documents=3 is less than the documents"),
        (dict(position_ids=torch.arange(19)), r"position_ids \[19\] must be \[batch, tokens\] = \[2, 20\]"),
        (dict(position_ids=torch.arange(5, 25)), "position_ids: 5 in row 0 must be 0, to continue, or 0, to start"),
        (dict(position_ids=2 * torch.arange(20)), "position_ids: 2 in row 0 must be 1, to continue"),
        (dict(position_ids=torch.arange(20).clamp(max=18).expand(2, 20)), "position_ids: 18 in row 0 must be 19"),
        (dict(position_ids=torch.arange(0, -20, -1)), "position_ids: -1 in row 0 must be 1"),
        (dict(output_attentions=True), "output_attentions=True"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        build(dtype=torch.float32)(ids(), **inputs)


def test_positions_that_contradict_the_memory_are_refused():
    model, cache = build(), MemoryCache()
    model(ids(), past_key_values=cache)
    for start in (7, 21):
        with pytest.raises(ValueError, match=f"position_ids: {start} in row 0 must be 20, to continue"):
            model(ids(), position_ids=torch.arange(start, start + 20), past_key_values=cache)
    right = model(ids(), position_ids=torch.arange(20, 40), past_key_values=cache, write=False).logits
    assert torch.equal(right, model(ids(), past_key_values=cache).logits)


def test_a_memory_of_another_dtype_is_refused():
    cache = MemoryCache()
    build(dtype=torch.bfloat16)(ids(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"signature \w+-bfloat16, not \w+-float32; load the model that made it"):
        build(dtype=torch.float32)(ids(), past_key_values=cache)


def test_misspelt_arguments_are_refused():
    with pytest.raises(TypeError, match="atention_mask"):
        build()(ids(), atention_mask=None)


def test_a_query_leaves_an_empty_memory_empty():
    cache = MemoryCache()
    build()(ids(), past_key_values=cache, write=False)
    assert not cache.states and cache.get_seq_length() == 0 and cache


def test_saved_memories_know_how_much_they_have_seen(tmp_path):
    cache = MemoryCache()
    build()(ids(), past_key_values=cache)
    cache.save(tmp_path)
    assert MemoryCache.load(tmp_path).get_seq_length() == 20
    assert all(not x.requires_grad for state in cache.detach().states for x in leaves(state))
    cache.reset([0])
    assert cache.position.tolist() == [0, 20]
    cache.reset()
    assert not cache.states and cache.signature is None and cache.get_seq_length() == 0


class WithAuxiliaryLoss(torch.nn.Module):
    """A mixer that adds 0.25 to the loss."""

    def init_state(self, batch_size, device, dtype):
        return {}

    def forward(self, x_BTD, state, rows):
        loss = torch.full((len(x_BTD),), 0.25, dtype=x_BTD.dtype)
        return MixerOutput(torch.zeros_like(x_BTD), state, {"balance": loss}, {})


def test_auxiliary_losses_are_named_and_trained():
    model = build(dtype=torch.float32)
    for layer in model.model.layers:
        layer.mixer = WithAuxiliaryLoss()
    x = ids()
    out = model(x, labels=x)
    assert list(out.aux_losses) == ["layer0/balance", "layer1/balance"]
    alone = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(alone.item() + 0.5, rel=1e-5)
    loss, rows, metrics = Objective(model)(x, x, None, 1)
    assert loss.item() == pytest.approx(rows.mean().item() + 0.5, rel=1e-5)
    assert metrics["layer1/balance"].item() == 0.25


@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda x, out: out.y_BTD, r"memlm\.memory\.titans_mag\.Mixer\.forward returned Tensor; return MixerOutput\("),
        (lambda x, out: tuple(out), r"forward returned tuple; return MixerOutput\("),
        (
            lambda x, out: out._replace(y_BTD=x[:, :1]),
            r"returned y_BTD \[2, 1, 64\]; make it \[2, 9, 64\], as",
        ),
        (lambda x, out: out._replace(state=[x]), "returned a state that is a list; make it a dict of tensors"),
        (lambda x, out: out._replace(aux_losses={"own": x.mean()}), r"returned aux_losses own \[\]; make it \[B\]"),
        (
            lambda x, out: out._replace(reads=(x,)),
            r"returned reads \[\[2, 9, 64\]\]; make it .* each of publishes=\(\)",
        ),
    ],
    ids=["a tensor", "a tuple", "one token", "no dict", "a loss of all rows", "a read without a name"],
)
def test_a_mixer_that_returns_something_else_is_named(returned, message):
    model = build("titans_mag")
    model.model.layers[1].mixer.register_forward_hook(lambda mixer, given, out: returned(given[0], out))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 9, dtype=torch.long))


def test_loss_can_be_a_sum_over_a_larger_batch():
    model, x = build(dtype=torch.float32), ids()
    whole = model(x, labels=x).loss
    part = model(x, labels=x, num_items_in_batch=2 * 2 * 19).loss
    assert part.item() == pytest.approx(whole.item() / 2, rel=1e-5)


def test_trainer_takes_a_step(tmp_path):
    """transformers' Trainer works with the model as it is."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(4)]
    options = dict(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    model = build(dtype=torch.float32)
    before = model.lm_head.weight.detach().clone()
    Trainer(model, TrainingArguments(disable_tqdm=True, save_strategy="no", **options), train_dataset=rows).train()
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize(
    ("pattern", "tied", "length"), [(["memory"], False, 75), (["full", "memory", "window"], True, 200)], ids=str
)
def test_flops_are_those_of_a_forward_of_the_whole_model(pattern, tied, length):
    """The count over one layer of each kind, without data, is the count over all layers as they run."""
    mixers = {
        "memory": {"kind": "titans_mag", "memory_depth": 2},
        "full": {"kind": "attention"},
        "window": {"kind": "attention", "window_size": 16},
    }
    sizes = dict(num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    config = MemLMConfig(mixers=mixers, mixer_pattern=pattern, **sizes)
    before = torch.get_rng_state()
    counted = count_flops(config, length)
    assert torch.equal(torch.get_rng_state(), before) and config._attn_implementation != "eager"
    model = MemLMForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids(1, length), use_cache=False)
    assert counted == counter.get_total_flops() / length


def test_flops_of_attention_are_the_formula():
    """Two per weight of projections and head; two products of T x K scores per head, also masked ones."""
    config = MemLMConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    assert count_flops(config, 64) == 2 * (3 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 100) + 3 * 2 * 2 * 64 * 32


def test_version_is_known():
    assert memlm.__version__
