"""Decoders of transformers, converted: equal logits, and the same model back."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, MemoryCache
from memlm.data import byte_tokenizer
from memlm.hub import families, load_model, shards
from memlm.roles import Roles
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import ROOT, composed, convert

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
ORIGINAL = {"rope_theta": 5e4, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 8.0, **ORIGINAL}
TUNED = {**YARN, "attention_factor": 1.4, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
WINDOWS = {"use_sliding_window": True, "sliding_window": 9}
CASES = {
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "attention_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "head_dim": 20}),
    "mistral-window": ("mistral", {"sliding_window": 9, "head_dim": 20}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2-windows": ("qwen2", {**WINDOWS, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": TUNED}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "qwen3-windows": (
        "qwen3",
        {
            **WINDOWS,
            "head_dim": 16,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "smollm3-yarn": ("smollm3", {"rope_parameters": YARN, "no_rope_layer_interval": 2}),
    "smollm3-windows": ("smollm3", {**WINDOWS, "no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False}),
    # Fields that the family does not have, as tools leave them behind.
    "llama-other-fields": ("llama", {"use_sliding_window": True, "no_rope_layers": [0] * 4}),
    "mistral-other-fields": ("mistral", {"attention_bias": True, "mlp_bias": True, "sliding_window": None}),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
}
EVERY = pytest.mark.parametrize("case", CASES)


def quick(*names, without=()):
    """All cases; only the named ones, of different forms, run by default."""
    cases = [case for case in CASES if case not in without]
    marked = [pytest.param(case, marks=[] if case in names else pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize("case", marked)


IDS = torch.randint(4, 131, (2, 75), generator=torch.Generator().manual_seed(0))


def foreign(folder, case):
    """A model of transformers, saved."""
    form, settings = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[form](**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return form, model


def converted(form, folder, memory="attention"):
    target = folder.with_name(f"{folder.name}-{memory}")
    code, said = convert("--from-format", form, "--memory", memory, "--source", folder, "--target", target)
    assert code == 0, said
    return load_model(target).eval()


@EVERY
def test_logits_are_equal(tmp_path, case):
    """Beyond the original length, with padding on the left, and in a stream."""
    form, theirs = foreign(tmp_path / "theirs", case)
    ours = converted(form, tmp_path / "theirs")
    mask = torch.ones_like(IDS)
    mask[1, :20] = 0
    with torch.no_grad():
        assert_close("logits", theirs(IDS).logits, ours(IDS).logits, 1e-5)
        expected, got = (m(IDS, attention_mask=mask, use_cache=False).logits for m in (theirs, ours))
        assert_close("padded", expected[mask.bool()], got[mask.bool()], 1e-5)
        cache = MemoryCache()
        pieces = [ours(piece, past_key_values=cache).logits for piece in IDS.split([40, 1, 33, 1], 1)]
        assert_close("stream", theirs(IDS).logits, torch.cat(pieces, 1), 1e-5)
        options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert torch.equal(*(m.generate(IDS, **options) for m in (theirs, ours)))


def test_a_window_that_the_family_ignores_is_none(tmp_path):
    """Not among the cases: with such a field, the cache of transformers' own model drops keys that it should see."""
    values = CONFIG_MAPPING["llama"](**SIZES, sliding_window=9).to_dict()
    mixers = families.config_from("llama", values, "attention").mixers
    assert [mixer["window_size"] for mixer in mixers.values()] == [None]


@quick("llama-llama3", "llama-other-fields", "mistral-window", "qwen2-windows", "qwen3", "smollm3-windows", "olmo2")
def test_it_comes_back(tmp_path, case):
    """The same tensors and config.json; and without the copy of that config.json, one that means the same."""
    form, theirs = foreign(tmp_path / "theirs", case)
    converted(form, tmp_path / "theirs")
    for copy in (True, False):
        source, target = tmp_path / "theirs-attention", tmp_path / f"back-{copy}"
        if not copy:
            (source / f"config.{form}.json").unlink()
        code, said = convert("--to-format", form, "--source", source, "--target", target)
        assert code == 0, said
        before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", target))
        assert before.keys() == after.keys() and all(torch.equal(after[name], w) for name, w in before.items())
        if copy:
            texts = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "theirs", target)]
            assert texts[0] == texts[1]
        for file in ("tokenizer.json", "generation_config.json"):
            assert (target / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
        again = AutoModelForCausalLM.from_pretrained(target).eval()
        assert type(again) is type(theirs)
        with torch.no_grad():
            assert torch.equal(theirs(IDS).logits, again(IDS).logits)


# Its rope and biases are those of test_logits_are_equal.
@quick("llama-yarn", "qwen2-windows", "qwen3-windows", "smollm3-windows", "olmo2", without=["mistral-window"])
def test_memories_take_the_place_of_full_attention(tmp_path, case):
    """On plain text, msa equals the source, and so does chunk_sparse if all chunks are chosen."""
    form, theirs = foreign(tmp_path / "theirs", case)
    with torch.no_grad():
        expected = theirs(IDS).logits
        routing = converted(form, tmp_path / "theirs", "msa")
        assert_close("msa", expected, routing(IDS).logits, 1e-5)
        doc_ids = torch.tensor([1] * 22 + [2] * 29 + [0] * 14 + [-1] * 10).expand(2, -1)
        assert torch.isfinite(routing(IDS, roles=Roles(doc_ids)).logits).all()
        routers = [p for name, p in routing.named_parameters() if "router" in name]
        kinds = [mixer.split("_")[0] for mixer in routing.config.layer_mixers()]
        assert len(routers) == 2 * kinds.count("memory") > 0 and all(0.01 < p.std() < 0.03 for p in routers)
        if "windows" not in case:
            assert kinds == ["documents", "documents", "memory", "memory"]
        sparse = converted(form, tmp_path / "theirs", "chunk_sparse")
        for name, mixer in sparse.config.mixers.items():
            if mixer["kind"] == "chunk_sparse":
                sparse.config.mixers[name] |= {"chunk_size": 4, "window_size": 6, "top_k": 20}
        for top_k, same in ((20, True), (1, False)):
            for mixer in sparse.config.mixers.values():
                mixer |= {"top_k": top_k} if "top_k" in mixer else {}
            small = MemLMForCausalLM(sparse.config).eval()
            small.load_state_dict(sparse.state_dict())
            cache = MemoryCache()
            pieces = [small(piece, past_key_values=cache).logits for piece in IDS.split([40, 1, 34], 1)]
            for name, got in (("one call", small(IDS).logits), ("stream", torch.cat(pieces, 1))):
                assert (relative_error(expected, got) < 1e-5) == same, name


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(*arguments):
    code, said = convert(*arguments)
    assert code == 1 and said.count("\n") == 1, said
    return said


ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("form", "values", "message"),
    [
        ("qwen3", {}, "model_type='llama'; only 'qwen3' can be converted as such. memlm.attach gives any decoder"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights cannot be converted"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' can be converted"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True; only False"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1; only 0.0"),
        ("llama", {"hidden_size": "48"}, "config.json: "),
        ("llama", {"rope_parameters": ROPE}, "rope_type='dynamic' depends on the length of the input"),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "odd"}}, "rope_type='odd' is not supported; use one of"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "cannot be converted. memlm.attach"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "config.json: a value is not of the format (KeyError"),
        ("llama", {"num_hidden_layers": 5}, "weights: model.layers.4.input_layernorm.weight is missing"),
        ("llama", {"num_hidden_layers": 3}, "weights: model.layers.3.input_layernorm.weight is not a weight"),
        ("llama", {"attention_bias": True}, "weights: model.layers.0.self_attn.k_proj.bias is missing"),
        ("llama", {"vocab_size": 132}, "model.embed_tokens.weight is [131, 48]; by config.json it is [132, 48]"),
    ],
)
def test_models_that_ours_cannot_be_are_refused(tmp_path, form, values, message):
    foreign(tmp_path / "theirs", "llama-linear")
    change(tmp_path / "theirs", **values)
    target = tmp_path / "ours"
    assert message in refused("--from-format", form, "--source", tmp_path / "theirs", "--target", target)
    assert not target.exists()


def test_other_bad_sources_are_refused(tmp_path):
    foreign(tmp_path / "theirs", "mistral-window")
    ours = ("--source", tmp_path / "theirs", "--target", tmp_path / "ours")
    said = refused("--from-format", "mistral", *ours)
    assert "sliding_window=9 in every layer, and msa replaces full attention; use --memory attention" in said
    code, said = convert("--from-format", "mistral", "--memory", "titans_mag", *ours)
    assert code == 2 and "--memory titans_mag does not take the weights of an attention" in said
    assert "use memlm.attach" in said
    code, said = convert("--from-format", "msa", "--memory", "attention", *ours)
    assert code == 2 and "--memory attention is for --from-format llama, mistral" in said
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    assert "model.norm.weight is torch.int8" in refused("--from-format", "mistral", "--memory", "attention", *ours)
    text = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for name in ("model_type", "vocab_size", "num_hidden_layers"):
        with pytest.raises(ValueError, match=rf"config\.json: {name} is missing"):
            families.config_from("mistral", {key: value for key, value in text.items() if key != name})
    with pytest.raises(ValueError, match="'sliding_attention' in layer_types with sliding_window=None"):
        families.config_from("qwen2", {**SIZES, "model_type": "qwen2", "layer_types": ["sliding_attention"] * 4})


def test_another_family_than_the_models_own_names_its_own_in_a_short_line(tmp_path):
    form, _ = foreign(tmp_path / "theirs", next(iter(CASES)))
    converted(form, tmp_path / "theirs")
    source, other = tmp_path / "theirs-attention", next(f for f in ("qwen2", "llama") if f != form)
    code, said = convert("--to-format", other, "--source", source, "--target", tmp_path / "back")
    assert code == 1 and f"in {other}; it was converted from {form}: use --to-format {form}" in said
    assert len(said.splitlines()[-1].removeprefix(str(source))) < 200


def test_a_model_that_the_family_cannot_be_stays():
    """Two windows in one model, a memory, and norms of outputs."""
    narrow, wide = ({"kind": "attention", "window_size": n, "qk_norm": True} for n in (5, 9))
    for settings, message in (
        (
            {"mixers": {"a": narrow, "b": wide}, "mixer_pattern": ["a", "b"]},
            "model.mixers: attentions of these settings have no equivalent in qwen3$",
        ),
        ({"mixers": {"a": {"kind": "msa"}}}, "kind='msa' cannot go back: qwen3 has attention alone"),
        ({"mixers": {"a": narrow}, "norm_outputs": True}, "model.norm_outputs=True has no equivalent in qwen3"),
    ):
        with pytest.raises(ValueError, match=message):
            families.config_to("qwen3", MemLMConfig(**SIZES, **settings), {})
    written = families.config_to("qwen3", MemLMConfig(**SIZES, mixers={"a": wide}), {})
    assert written["layer_types"] == ["sliding_attention"] * 4 and written["sliding_window"] == 9
    assert written["architectures"] == ["Qwen3ForCausalLM"]


OLD = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
OLD_QWEN = {"model_type": "qwen2", "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_scaling": None}, None),
        (
            {"rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"}},
            {name: value for name, value in LLAMA3.items() if name != "rope_theta"},
        ),
        ({**OLD_QWEN, "rope_scaling": OLD_YARN}, {**OLD_YARN, "type": None, "rope_type": "yarn"}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "factor": 2}),
    ],
)
def test_configurations_of_older_transformers(values, expected):
    """With rope_theta and rope_scaling at the top, and ``type`` for rope_type."""
    config = families.config_from(values.get("model_type", "llama"), {**OLD, **values}, "attention")
    expected = expected and {name: value for name, value in expected.items() if value is not None}
    assert config.rope_theta == 500000.0 and config.rope_scaling == expected
    assert config.head_dim == 64 and config.max_position_embeddings == 131072 and config.tie_word_embeddings
    assert config.layer_mixers() == ["memory"] * 16 and config.mixers["memory"]["window_size"] is None
    assert config.mixers["memory"]["qkv_bias"] == ("model_type" in values)


def test_weights_in_several_files(tmp_path, monkeypatch):
    form, theirs = foreign(tmp_path / "theirs", "qwen3")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    (tmp_path / "theirs" / "model.safetensors").unlink(missing_ok=True)
    # Some repositories hold the same weights in their authors' form too.
    save_file({"tok_embeddings.weight": torch.zeros(1)}, tmp_path / "theirs" / "consolidated.safetensors")
    monkeypatch.setattr(shards, "_LEAST", 1)
    ours = converted(form, tmp_path / "theirs")
    parts = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    assert len(parts) > 3 and len(list((tmp_path / "theirs-attention").glob("model-*.safetensors"))) > 3
    with torch.no_grad():
        assert_close("logits", theirs(IDS).logits, ours(IDS).logits, 1e-5)
    parts[1].unlink()
    said = refused("--from-format", form, "--source", tmp_path / "theirs", "--target", tmp_path / "ours")
    assert f"{parts[1].name} is missing" in said


@pytest.mark.parametrize("memory", sorted(p.stem for p in (ROOT / "configs/memory/of_model/qwen3").glob("*.yaml")))
def test_the_presets_of_qwen3_have_the_settings_that_the_conversion_writes(memory):
    """Sizes too: none differs on purpose. Only the upper layers of msa route, in its experiments as in the conversion;
    ``model=qwen3_4b memory=msa`` itself has the paper's loss weight, of one layer.
    """
    chosen = "experiment=msa_main" if memory == "msa" else "model=qwen3_4b"
    group = OmegaConf.to_container(composed(chosen, f"memory={memory}").model, resolve=True)
    written = families.config_from("qwen3", CONFIG_MAPPING["qwen3"](num_hidden_layers=36).to_dict(), memory)
    preset, converted = (
        [dict(config.mixers[name]) for name in config.layer_mixers()]
        for config in (MemLMConfig.from_hydra(group), written)
    )
    weights = [[settings.pop("loss_weight", 0) for settings in layers] for layers in (preset, converted)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)
    assert preset == converted
