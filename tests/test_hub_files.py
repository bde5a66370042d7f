"""Folders without a checkpoint or with a damaged one: a line names the folder or the file; nothing is unpickled."""

import errno
import json
import runpy
import shutil
import struct
import sys

import pytest
import torch

from memlm import files
from memlm.data import byte_tokenizer
from memlm.hub import load_model, load_tokenizer
from tests.conftest import ROOT, build

MOM = ROOT / "tests" / "reference" / "mom_tiny" / "shared"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    build(dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "broken")


def refused(call, folder):
    with pytest.raises(ValueError) as caught:
        call(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', DEEP, "\ufffe\x00"])
def test_configurations_that_are_none(broken, text):
    (broken / "config.json").write_text(text, encoding="utf-16" if "\x00" in text else "utf-8")
    assert "config.json" in refused(load_model, broken)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama"},
        {"hidden_size": "x"},
        {"hidden_size": 10**30},
        {"num_hidden_layers": 10**9},
        {"mixers": []},
        {"mixers": {"memory": 1}},
        {"mixer_pattern": [1]},
        {"vocab_size": 7},
        {"quantization_config": 3},
        {"auto_map": "x"},
        {"attn_implementation": "org/name"},
        {"dtype": "x"},
        {"architectures": 3},
    ],
)
def test_configurations_of_other_types(broken, values):
    before = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(before | values))
    refused(load_model, broken)


def header(change):
    """A safetensors file with a changed header."""

    def edit(data):
        length = struct.unpack("<Q", data[:8])[0]
        told = json.loads(data[8 : 8 + length])
        name = next(key for key in told if key != "__metadata__")
        told[name] |= change
        text = json.dumps(told).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: struct.pack("<Q", 4) + b"null",
        lambda data: struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        header({"dtype": "X"}),
        header({"dtype": 3}),
        header({"shape": [10**12]}),
        header({"shape": [-1]}),
        header({"shape": "x"}),
        header({"data_offsets": [0, 10**12]}),
        header({"data_offsets": [5, 1]}),
    ],
)
def test_weights_that_are_damaged(broken, edit):
    path = broken / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    refused(load_model, broken)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", DEEP, {"weight_map": 3}, {"metadata": 3}, "../whole/x.safetensors", "/x.safetensors", "x.bin", 3],
)
def test_an_index_that_points_elsewhere(broken, index):
    part = (broken / "model.safetensors").rename(broken / "model-00001-of-00001.safetensors")
    names = build(dtype=torch.float32).state_dict()
    right = {"metadata": {}, "weight_map": dict.fromkeys(names, part.name)}
    path = broken / "model.safetensors.index.json"
    path.write_text(json.dumps(right))
    load_model(broken)
    if isinstance(index, dict):
        text = json.dumps(right | index)
    elif index == 3 or str(index).endswith((".safetensors", ".bin")):
        text = json.dumps(right | {"weight_map": dict.fromkeys(names, index)})
    else:
        text = index
    path.write_text(text)
    assert path.name in refused(load_model, broken)


def test_nothing_is_unpickled(broken):
    (broken / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, broken / "pytorch_model.bin")
    refused(load_model, broken)


@pytest.mark.parametrize("text", ["", "[]", "3", DEEP, '{"a": 1}', '{"version": "1.0", "model": {"type": "X"}}'])
def test_tokenizers_that_are_none(broken, text):
    (broken / "tokenizer.json").write_text(text)
    refused(load_tokenizer, broken)


@pytest.fixture
def convert(monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "convert_checkpoint.py"))["main"]

    def run(source, target):
        command = ["convert", "--from-format", "fla-mom", "--source", str(source), "--target", str(target)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, str) and "\n" not in end.value.code
        return end.value.code

    return run


def test_a_conversion_leaves_what_is_there_and_nothing_half_done(convert, tmp_path, monkeypatch):
    target = tmp_path / "target"
    assert "holds files already" in convert(MOM, MOM)
    target.write_text("mine")
    assert "holds files already" in convert(MOM, target) and target.read_text() == "mine"
    target.unlink()

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "seal", full)
    assert "No space left" in convert(MOM, target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", DEEP, '{"model_type": 3}', '{"model_type": "mom"}'])
def test_foreign_configurations_that_are_none(convert, tmp_path, text):
    source = shutil.copytree(MOM, tmp_path / "source")
    (source / "config.json").write_text(text)
    assert "config.json" in convert(source, tmp_path / "target") and not (tmp_path / "target").exists()


def test_foreign_values_of_other_types(convert, tmp_path):
    right = json.loads((MOM / "config.json").read_text())
    source = shutil.copytree(MOM, tmp_path / "source")
    for name in right:
        for value in ("x", {"a": 1}):
            (source / "config.json").write_text(json.dumps(right | {name: value}))
            try:
                convert(source, tmp_path / "target")
            except pytest.fail.Exception:
                # Keys for which our model has no setting, or which it does not read.
                shutil.rmtree(tmp_path / "target")
