"""Checkpoints in processes that have not imported memlm, and tools that know transformers alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from memlm import MemLMConfig, MemLMForCausalLM, MemLMModel
from memlm.data import byte_tokenizer
from tests.conftest import ROOT, build


@pytest.fixture
def folder(tmp_path):
    build(dtype=torch.float32).save_pretrained(tmp_path / "made")
    byte_tokenizer().save_pretrained(tmp_path / "made")
    # A copy in another place has all that it needs.
    return shutil.copytree(tmp_path / "made", tmp_path / "copied here" / "model-1.5")


FRESH = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, = sys.argv[1:]
for name in ("hydra", "omegaconf", "wandb", "datasets", "lm_eval", "matplotlib", "triton", "memlm"):
    sys.modules[name] = None
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print("missing:", error)
del sys.modules["memlm"]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
import memlm, memlm_kernels
from memlm import configuration, modeling
assert type(config) is memlm.MemLMConfig is configuration.MemLMConfig is AutoConfig.for_model("memlm").__class__
assert type(model) is modeling.MemLMForCausalLM and type(base) is modeling.MemLMModel
memory = memlm.MemoryCache()
model(**tokenizer("read", return_tensors="pt"), past_key_values=memory)
assert len(pipeline("text-generation", folder, trust_remote_code=True)("ask", max_new_tokens=2)) == 1
model.save_pretrained(folder + "-again")
"""


def test_a_process_that_did_not_import_memlm_gets_its_classes(folder, tmp_path):
    """Without the tools of training too."""
    offline = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", FRESH, str(folder)]
    done = subprocess.run(command, env=offline, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "missing: this checkpoint needs the package memlm: pip install memlm"
    again = folder.with_name(folder.name + "-again")
    assert {p.name for p in again.iterdir()} | {"tokenizer.json", "tokenizer_config.json"} == {
        p.name for p in folder.iterdir()
    }
    for name in ("config.json", "modeling_memlm.py", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("trust", [None, False, True])
def test_where_memlm_is_imported_nothing_is_asked_and_no_code_of_the_folder_runs(folder, trust, monkeypatch):
    (folder / "modeling_memlm.py").write_text("raise SystemError")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is MemLMConfig
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is MemLMModel
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)) is MemLMForCausalLM
    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)


def test_a_save_names_its_own_code_whatever_the_source_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    right = config["auto_map"]
    config["auto_map"] = {name: f"someone/model--{place}" for name, place in right.items()} | {"AutoModelForX": "x.Y"}
    (folder / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == right
    module = (tmp_path / "saved" / "modeling_memlm.py").read_text()
    assert {place.split(".")[0] for place in right.values()} == {"modeling_memlm"}
    assert all(place.split(".")[1] in module for place in right.values())


class Derived(MemLMConfig):
    model_type = "derived"


def test_a_derived_configuration_may_name_its_own_code(tmp_path):
    Derived.register_for_auto_class()
    Derived().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"] == "test_remote_code.Derived"
    MemLMConfig.register_for_auto_class()
    MemLMConfig().save_pretrained(tmp_path / "plain")
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {"config.json", "modeling_memlm.py"}


def test_tools_do_not_cut_texts_at_their_own_length():
    config = MemLMConfig()
    assert config.max_position_embeddings == 2**20 and not hasattr(config, "n_positions")
    assert config.get_text_config().max_position_embeddings == 2**20
    # It is not a limit of the model, and its memories do not depend on it.
    shorter = MemLMConfig(max_position_embeddings=4)
    assert shorter.memory_signature() == config.memory_signature()
    model = MemLMForCausalLM(shorter)
    assert model(torch.arange(9)[None]).logits.shape[1] == 9
    assert model.generate(torch.arange(9)[None], max_new_tokens=2, min_new_tokens=2).shape[1] == 11
    with pytest.raises(ValueError, match=r"model\.max_position_embeddings=0 must be at least 1"):
        MemLMConfig(max_position_embeddings=0)
