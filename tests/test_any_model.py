"""``evaluate.py`` on models of transformers, with an attached memory and without."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import memlm
from memlm.data import byte_tokenizer
from memlm.evaluation import run as evaluate
from memlm.evaluation.ablation import memory_off
from memlm.hub.causal import load_any, longest
from tests.conftest import composed, same_state
from tests.test_attached_forms import gemma3, llava

LLAMA = LlamaConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=256,
    bos_token_id=257,
    eos_token_id=258,
)
GPT2 = GPT2Config(
    vocab_size=259,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=128,
    initializer_range=0.2,
    bos_token_id=257,
    eos_token_id=258,
)
TITANS = {"kind": "titans_lmm", "memory_heads": 1, "memory_head_dim": 8, "chunk_size": 4}


def made(name):
    """A tiny model in fp64: ``llama``, ``gpt2``, or ``titans``, a llama with a memory whose gate is open."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2 if name == "gpt2" else LLAMA)
    if name == "titans":
        memlm.attach(model, TITANS)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if ".memlm." in parameter_name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2", "titans"):
        made(name).float().save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"document {i} " * 20)
    return folder


def evaluated(folder, *overrides):
    data = (
        "data=mixture",
        "data.seq_len=48",
        f"data.sources.text.paths=[{folder}/corpus]",
        f"data.cache_dir={folder}/c",
    )
    gaps = ("data.sources.mqar={kind: mqar, weight: 1, num_pairs: 2, gap: 8}", "data.sources.passkey.gap=8")
    few = (
        "eval.factors=[1,2]",
        "eval.recall_rows=4",
        "eval.needle_rows=2",
        "eval.depths=[0.5]",
        "eval.text_length=100",
    )
    return composed(*data, *gaps, *few, "eval.text_documents=2", *overrides, config="evaluate")


def test_an_attached_memory_is_silenced_as_a_whole():
    """The logits are the backbone's, to the bit, and the first layer's state is that with the memory on."""
    model, ids = made("titans"), torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    backbone = memlm.detach(copy.deepcopy(model))
    with torch.no_grad():
        on, alone = model(ids), backbone(ids)
        with memory_off(model):
            off = model(ids)
        again = model(ids)
    assert torch.equal(off.logits, alone.logits) and not torch.equal(on.logits, alone.logits)
    assert torch.equal(again.logits, on.logits)
    # Its input is the same in both.
    assert same_state(*(out.past_key_values.layers[-1].states["0"] for out in (on, off)))
    with pytest.raises(ValueError, match="the model has no long-term memory"), memory_off(backbone):
        pass


def test_any_model_is_evaluated(saved, capsys):
    """A model with a memory, beside a plain one; measures beyond a table of positions are left out."""
    every = ("eval.text_ways=[carried,reset,rolling]", "eval.text_memory_off=true")
    evaluate(evaluated(saved, f"checkpoint={saved}/titans", f"control={saved}/llama", f"out={saved}/out", *every))
    found = json.loads((saved / "out" / "latest" / "results.json").read_text())["models"]
    assert [m["kinds"] for m in found.values()] == [["llama", "titans_lmm"], ["llama"]]
    for model in found.values():
        assert len(model["recall"]) == 4 and len(model["needles"]["passkey"]) == 2 and model["bank"] == []
        assert model["text"]["text"]["carried"]["bits_per_byte"] != model["text"]["text"]["reset"]["bits_per_byte"]
    with_memory, without = (model["text"]["text"] for model in found.values())
    for way in ("carried", "reset", "rolling"):
        # The memory silenced leaves its backbone, which is the control.
        silent, control = with_memory[f"{way}_memory_off"]["all"], without[way]["all"]
        assert silent["nats"] == pytest.approx(control["nats"], rel=1e-6) and f"{way}_memory_off" not in without
        assert with_memory[way]["all"]["nats"] != pytest.approx(control["nats"], rel=1e-3)
    page = (saved / "out" / "latest" / "report.md").read_text()
    told = re.findall(r"titans beside (.*): with the memory carried, it saves (.*) bits .* saves it (.*) more; ", page)
    (itself, *own), (other, *same) = told
    assert (itself, other) == ("itself with memory off", "control (llama)") and own == same
    assert "text: 2 documents, " in page
    capsys.readouterr()
    short = ("eval.factors=[1,4]", f"checkpoint={saved}/gpt2", "control=null", f"out={saved}/short")
    evaluate(evaluated(saved, *short))
    assert (
        "recall is left out: gpt2 has 128 positions, recall needs 192; lower eval.factors" in capsys.readouterr().out
    )
    found = json.loads((saved / "short" / "latest" / "results.json").read_text())["models"]["gpt2"]
    assert found["recall"] == [] and found["needles"] == {} and found["text"]["text"]


def test_an_evaluation_without_the_attached_memory_is_the_backbones(saved):
    options = (f"control={saved}/llama", "eval.text_documents=0", "eval.depths=[]", f"out={saved}/off")
    evaluate(evaluated(saved, f"checkpoint={saved}/titans", "memory_off=true", *options))
    off, control = json.loads((saved / "off" / "latest" / "results.json").read_text())["models"].values()
    # A silenced memory is written still.
    scores = [[{key: x for key, x in cell.items() if key != "bytes"} for cell in m["recall"]] for m in (off, control)]
    assert scores[0] == scores[1] and off["recall"][0]["bytes"] > control["recall"][0]["bytes"]


def test_a_memory_alone_is_evaluated_with_its_backbone(saved, tmp_path):
    """The backbone, its tokenizer and its length come by its name."""
    model = memlm.detach(memlm.from_pretrained(saved / "titans"))
    model.save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    memory = memlm.from_pretrained(saved / "titans")
    memory.config.name_or_path = str(tmp_path / "backbone")
    memlm.save_memory(memory, tmp_path / "alone")
    short = ("eval.text_documents=0", "eval.depths=[]", f"control={saved}/titans", f"out={tmp_path}/out")
    evaluate(evaluated(saved, f"checkpoint={tmp_path}/alone", *short))
    alone, whole = json.loads((tmp_path / "out" / "latest" / "results.json").read_text())["models"].values()
    assert alone["kinds"] == ["llama", "titans_lmm"] and alone["recall"] == whole["recall"]
    words = json.loads((tmp_path / "alone" / "memlm_memory.json").read_text())
    (tmp_path / "alone" / "memlm_memory.json").write_text(json.dumps(words | {"backbone": ""}))
    with pytest.raises(ValueError, match="alone: the memory's backbone has no name; load it"):
        load_any(tmp_path / "alone")


def test_each_bare_model_has_its_own_folder_of_results(saved, monkeypatch, tmp_path, capsys):
    """Beside the folders of runs, under the model's name."""
    monkeypatch.chdir(tmp_path)
    short = ("eval.text_documents=0", "eval.depths=[]", "eval.recall_rows=1", "control=null")
    for name, off in (("llama", False), ("titans", False), ("titans", True)):
        evaluate(evaluated(saved, *short, f"checkpoint={saved}/{name}", f"memory_off={off}"))
        out = Path("runs/evaluation", name, "evaluation-memory_off" if off else "evaluation")
        assert (out / "latest" / "results.json").exists() and f"results: {out}/" in capsys.readouterr().out
        assert len(list(out.glob("*/results.json"))) == 2, "one evaluation, and the link to it"


def test_the_tokenizer_of_a_family_is_read_from_its_own_files(saved, tmp_path):
    """GPT-2's first files, without tokenizer.json; only text can be measured in such tokens."""
    vocabulary = {
        sign: i for i, sign in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "do", "<|endoftext|>"])
    }
    shutil.copytree(saved / "gpt2", tmp_path / "gpt2", ignore=shutil.ignore_patterns("token*"))
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\nd o\n")
    text = (
        "data=text",
        f"data.sources.text.paths=[{saved}/corpus]",
        f"data.cache_dir={tmp_path}/cache",
        "data.seq_len=48",
    )
    sizes = ("eval.text_documents=2", "eval.text_length=100", "control=null", f"out={tmp_path}/out")
    evaluate(composed(*text, *sizes, f"checkpoint={tmp_path}/gpt2", config="evaluate"))
    (found,) = json.loads((tmp_path / "out" / "latest" / "results.json").read_text())["models"].values()
    assert found["tokenizer"].startswith("258 entries") and found["text"]["text"]["carried"]["bits_per_byte"] > 0


def test_a_table_of_positions_is_that_of_the_decoder():
    """Encoders of images have one too."""
    assert [longest(made(name)) for name in ("llama", "gpt2")] == [None, 128]
    assert [longest(make()[0]) for make in (gemma3, llava)] == [None, None]


def test_models_that_cannot_be_evaluated_are_named_in_a_line(saved, tmp_path):
    small = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=259)
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    BartConfig(d_model=16).save_pretrained(tmp_path / "bart")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing"}')
    for name, message in (
        ("t5", "a t5 is an encoder-decoder; name a causal language model"),
        ("bart", "a bart is an encoder-decoder"),
        ("empty", "no config.json there"),
        ("odd", "cannot be loaded: .*nothing"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_any(tmp_path / name)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{tmp_path / name}: ")
    made("llama").float().model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless: missing weights: lm_head\.weight"):
        load_any(tmp_path / "headless")
    path = saved / "llama"
    with pytest.raises(ValueError, match=r"llama: no readable config\.yaml names its data; add data=\.\.\."):
        evaluate(composed(f"checkpoint={path}", "control=null", config="evaluate"))
    facts = ("data=facts", "data.seq_len=300", "eval=bank", "control=null", f"out={tmp_path}/out")
    with pytest.raises(ValueError, match="llama has no bank: LlamaForCausalLM is a model of transformers"):
        evaluate(composed(f"checkpoint={path}", *facts, config="evaluate"))
