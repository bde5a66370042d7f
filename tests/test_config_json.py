"""A wrong config.json gives an error of one line with the key, the value and a fix, and allocates no memory."""

import json
import resource

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.hub import load_model


@pytest.fixture
def folder(tmp_path):
    MemLMForCausalLM(MemLMConfig()).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


HUGE = 10**12
WRONG = [
    *(({name: value}, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
      for value in (HUGE, -1, 0, "5", 2.5, None, [3], {"a": 1}, True)),
    *(({name: value}, name) for name in ("head_dim", "num_key_value_heads", "intermediate_size")
      for value in (HUGE, -2, "5", [])),
    *(({name: value}, name) for name in ("rope_theta", "rms_norm_eps", "initializer_range")
      for value in (-1.0, float("inf"), float("nan"), 10**400, "1", None)),
    *(({name: value}, name) for name in ("pad_token_id", "eos_token_id") for value in (2.5, "a", HUGE, {})),
    ({"eos_token_id": [1, "a"]}, "eos_token_id"),
    *(({"rope_scaling": value}, "rope_scaling") for value in (
        3, {}, {"rope_type": ["yarn"]}, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0.5}, {"rope_type": "linear", "factor": float("nan")},
        {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": 1},
        {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64, "low_freq_factor": 4.0,
         "high_freq_factor": 1.0})),
    ({"mixers": {"m": {"kind": "attention", "qk_norm": "head"}}}, "mixers.m.qk_norm"),
    *(({name: 3}, name) for name in ("tie_word_embeddings", "use_cache", "output_hidden_states", "return_dict")),
    *(({"mixers": value}, "mixers") for value in (3, [], {"m": 3}, {"m": {"kind": []}}, {"m": {"kind": "../x"}})),
    ({"mixers": {"m": {"kind": "titans_mag", "chunk_size": HUGE}}}, "mixers.m.chunk_size"),
    ({"mixers": {"m": {"kind": "mom", "z_loss": float("nan")}}}, "mixers.m.z_loss"),
    *(({"mixer_pattern": value}, "mixer_pattern") for value in (3, "attention", [3], [["attention"]], [{}])),
    *(({name: value}, name) for name in ("dtype", "torch_dtype") for value in (3, "flot32", "int8", "nn", ["half"])),
    *(({"id2label": value}, "id2label") for value in (3, {"a": "b"}, [1])),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"architectures": 3}, "architectures"),
    ({"transformers_version": 5}, "transformers_version"),
    ({"hiden_size": 3}, "hiden_size"),
    ({"_hidden_size": 3}, "_hidden_size"),
    ({"__class__": "x"}, "__class__"),
    *(({name: "some-org/some-kernel"}, name) for name in ("_attn_implementation", "attn_implementation")),
    ({"_attn_implementation": ["sdpa"]}, "_attn_implementation"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "key"), WRONG, ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else "")
def test_a_wrong_value_is_named(folder, settings, key):
    change(folder, **settings)
    for load in (load_model, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=rf"model\.{key}") as caught:
            load(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    if not any(isinstance(value, dict) for value in settings.values()):
        with pytest.raises(ValueError, match=rf"model\.{key}"):
            MemLMConfig(**settings)


def test_sizes_that_the_weights_cannot_fill_allocate_nothing(folder):
    change(folder, vocab_size=2**24, hidden_size=2**17, head_dim=2**10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"config\.json describes [\d,]{10,} parameters, and [\d,]+ bytes"):
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_the_old_name_of_dtype_is_taken(folder):
    assert AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert MemLMForCausalLM.from_pretrained(folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("dtype") == "float32"
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": "bfloat16"}))
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert load_model(folder).dtype == torch.bfloat16


def test_switches_of_the_configuration_are_obeyed(folder):
    ids = torch.arange(9)[None]
    shown = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True)
    assert len(shown(ids).hidden_states) == 3 and shown(ids, output_hidden_states=False).hidden_states is None
    plain = AutoModelForCausalLM.from_pretrained(folder, return_dict=False)
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert type(plain(ids)) is tuple and torch.equal(plain(ids)[0], logits)
    assert torch.equal(plain(ids, return_dict=True).logits, logits)
    change(folder, output_hidden_states=True, return_dict=False)
    assert type(load_model(folder)(ids)) is tuple
