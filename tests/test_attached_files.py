"""Folders of models with an attached memory: written over one another, wrapped models, parts of a hub's address."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import memlm
from tests.backbones import backbone
from tests.test_attached import ids, logits, opened, settings

LORA = dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.memlm\..*", r=2)
SHARDED = {"max_shard_size": "20KB"}


@pytest.fixture
def model(tmp_path):
    """A model with a memory that matters; its backbone has a name, and its memory another value at each call."""
    backbone("llama").save_pretrained(tmp_path / "backbone")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    return opened(memlm.attach(loaded, settings("titans_lmm"), [0, 2])).eval()


def trained_further(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.memlm.gate.add_(1.0)
    return model


@pytest.mark.parametrize(
    "first",
    [
        lambda model, folder: memlm.save_memory(model, folder),
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: model.save_pretrained(folder, **SHARDED),
    ],
    ids=["memory", "whole", "sharded"],
)
@pytest.mark.parametrize("second", [{}, SHARDED], ids=["whole", "sharded"])
def test_the_later_of_two_saves_in_a_folder_counts(model, tmp_path, first, second):
    first(model, tmp_path / "both")
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    trained_further(model).save_pretrained(tmp_path / "both", **second)
    assert torch.equal(logits(memlm.from_pretrained(tmp_path / "both"), ids()), logits(model, ids()))


def test_a_save_that_fails_at_once_leaves_the_earlier_one(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "both", **SHARDED)
    before = logits(model, ids())

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space"):
        trained_further(model).save_pretrained(tmp_path / "both", **SHARDED)
    assert torch.equal(logits(memlm.from_pretrained(tmp_path / "both"), ids()), before)


def test_a_memory_saved_beside_its_model_counts(model, tmp_path):
    model.save_pretrained(tmp_path / "both")
    again = trained_further(memlm.from_pretrained(tmp_path / "both"))
    memlm.save_memory(again, tmp_path / "both")
    assert torch.equal(logits(memlm.from_pretrained(tmp_path / "both"), ids()), logits(again, ids()))


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize("save", [memlm.save_memory, lambda model, folder: model.save_pretrained(folder)])
def test_a_file_in_the_place_of_the_folder_is_named(model, tmp_path, save, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=f"{tmp_path}/{place}: .*is a file; name another folder") as caught:
        save(model, tmp_path / place)
    assert "partial" not in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_weights_of_a_memory_without_its_settings_are_not_left_out_in_silence(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "memlm_memory.json").unlink()
    with pytest.raises(ValueError, match=r"the weights hold a memory, and memlm_memory\.json is missing"):
        memlm.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"metadata": {}, "weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(model, tmp_path, text):
    model.save_pretrained(tmp_path / "model", **SHARDED)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (must hold|cannot be read)") as raised:
        memlm.from_pretrained(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_the_parts_of_an_address_are_followed(model, tmp_path):
    expected = logits(model, ids())
    model.save_pretrained(tmp_path / "models" / "small", variant="new", **SHARDED)
    loaded = memlm.from_pretrained(tmp_path / "models", subfolder="small", variant="new")
    assert torch.equal(logits(loaded, ids()), expected)
    # The backbone is in a place of its own.
    memlm.save_memory(model, tmp_path / "memories" / "first")
    loaded = memlm.from_pretrained(tmp_path / "memories", subfolder="first", revision="main")
    assert torch.equal(logits(loaded, ids()), expected)


def test_a_memory_keeps_the_dtype_that_its_model_has_when_it_is_saved(model, tmp_path):
    memlm.save_memory(model.bfloat16(), tmp_path / "memory")
    again = memlm.from_pretrained(tmp_path / "memory", dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:You have passed exclude_modules"
)
def test_an_adapter_of_the_backbone_is_saved_with_the_memory(model, tmp_path):
    # transformers 5.24 wants a peft that PyPI does not have yet.
    pytest.importorskip("peft", MIN_PEFT_VERSION)
    model.add_adapter(LoraConfig(**LORA, init_lora_weights=False))
    expected = logits(model, ids())
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(memlm.from_pretrained(tmp_path / "both"), ids()), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.nn.DataParallel, "DataParallel is no PreTrainedModel; give the model inside it"),
        (
            lambda model: get_peft_model(model, LoraConfig(**LORA)),
            "PeftModel is no PreTrainedModel; give the model inside",
        ),
        (
            lambda model: get_peft_model(model, LoraConfig(**LORA, modules_to_save=["memlm"])).get_base_model(),
            "the memory has adapters of PEFT or is one of its modules_to_save",
        ),
        (
            lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).get_base_model(),
            "the memory has adapters of PEFT",
        ),
    ],
    ids=["parallel", "peft", "modules_to_save", "adapters"],
)
def test_a_wrapped_memory_is_not_saved_under_names_that_cannot_be_loaded(model, tmp_path, wrap, message):
    with pytest.raises(ValueError, match=message) as raised:
        memlm.save_memory(wrap(model), tmp_path / "memory")
    assert "\n" not in str(raised.value) and not (tmp_path / "memory").exists()


def test_a_memory_whose_backbone_has_no_name_is_loaded_by_load_memory_alone(tmp_path):
    memlm.save_memory(memlm.attach(backbone("llama"), "mom"), tmp_path)
    assert json.loads((tmp_path / "memlm_memory.json").read_text())["backbone"] == ""
    with pytest.raises(ValueError, match=r"the memory's backbone has no name; load it, then memlm.load_memory"):
        memlm.from_pretrained(tmp_path)
    memlm.load_memory(backbone("llama"), tmp_path)
