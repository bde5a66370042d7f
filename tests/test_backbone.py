"""``train.py backbone=...``: a memory is trained beside the attention of a model of transformers, in our loop."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import memlm
from memlm.cli import backbone_model
from memlm.data import byte_tokenizer, load_tokenizer
from memlm.evaluation import run as evaluate
from memlm.hub.causal import load_any
from memlm.training import checkpoint, run
from memlm.training.model import build as build_model
from tests import processes
from tests.conftest import ROOT, composed, convert
from tests.runs import SMALLEST, config, figures, stopped, trainer
from tests.test_any_model import GPT2, LLAMA

# Without sizes of a decoder of our own.
SMALL = (*(s for s in SMALLEST if not s.startswith(("model.", "memory="))), "model=backbone", "train.steps=4")
MEMORY = ("memory=mom", "model.mixers.memory.head_dim=4", "optim.lr=0.01")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    for name, settings in (("llama", LLAMA), ("gpt2", GPT2)):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def settings(folder, backbone, *overrides):
    return config(folder, f"backbone={backbone}", *overrides, small=SMALL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ("train.trainable=memory", "model.window=6", "model.sinks=1", "model.layers=[1]")),
        ("llama", ("model.dtype=bfloat16", "train.trainable=memory", "optim=adamw")),
        ("gpt2", ("train.gradient_checkpointing=true", "train.micro_batch_size=2")),
    ],
    ids=["memory", "bf16", "all"],
)
def test_a_memory_is_trained_beside_a_backbone_and_a_stopped_run_goes_on_exactly(
    backbones, tmp_path, capsys, name, options
):
    """The backbone is needed for the first step only. Its dropout is off."""
    source = shutil.copytree(backbones / name, tmp_path / "source")
    run(settings(tmp_path / "straight", source, *MEMORY, *options))
    told = capsys.readouterr().out
    stopped(settings(tmp_path, source, *MEMORY, *options), 2)
    shutil.rmtree(source)
    run(settings(tmp_path, source, *MEMORY, *options))
    assert figures(tmp_path) == figures(tmp_path / "straight")
    assert 0 in figures(tmp_path, "layer1/balance")
    folders = [checkpoint.latest(folder / "run") for folder in (tmp_path, tmp_path / "straight")]
    ends = [load_any(folder).state_dict() for folder in folders]
    assert all(torch.equal(x, ends[1][key]) for key, x in ends[0].items())
    before = AutoModelForCausalLM.from_pretrained(backbones / name).state_dict()
    frozen = "train.trainable=memory" in options
    same = all(torch.equal(x.to(ends[0][key].dtype), ends[0][key]) for key, x in before.items())
    gates = [x for key, x in ends[0].items() if key.endswith(".memlm.gate")]
    assert same == frozen and all(gate.abs().sum() > 0 for gate in gates)
    assert {key.split(".")[2] for key in ends[0] if ".memlm." in key} == (
        {"1"} if "model.layers=[1]" in options else {"0", "1"}
    )
    whole, trained = (
        json.loads((folders[0] / checkpoint.FACTS).read_text())[k] for k in ("parameters", "trained_parameters")
    )
    some = f" ({trained:,} trained)" if frozen else ""
    assert f"{name}, mom, {whole:,} parameters{some}, on cpu" in told and (trained < whole) == frozen


def test_a_converted_model_is_trained_as_it_is(tmp_path):
    """Its weights are in bf16, as those of most checkpoints; the run's are in fp32, as ``model.dtype`` has it."""
    foreign, source = tmp_path / "foreign", tmp_path / "source"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).to(torch.bfloat16).save_pretrained(foreign)
    byte_tokenizer().save_pretrained(foreign)
    given = ("--from-format", "llama", "--memory", "chunk_sparse", "--source", foreign, "--target", source)
    assert convert(*given)[0] == 0
    before = load_any(source)
    assert before.dtype == torch.bfloat16
    run(settings(tmp_path / "straight", source, "memory=none"))
    stopped(settings(tmp_path, source, "memory=none"), 2)
    shutil.rmtree(source)
    for wrong, message in (("memory=mom", "use memory=none"), ("model.dtype=bfloat16", "model.dtype=bfloat16, but")):
        with pytest.raises(ValueError, match=message):
            trainer(settings(tmp_path, source, "memory=none", wrong))
        AcceleratorState._reset_state(reset_partial_state=True)
    run(settings(tmp_path, source, "memory=none"))
    assert figures(tmp_path) == figures(tmp_path / "straight")
    after = load_any(checkpoint.latest(tmp_path / "run"))
    assert after.config.mixers == before.config.mixers and after.dtype == torch.float32
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight.float())


def test_a_run_is_evaluated_and_is_the_start_of_another(backbones, tmp_path):
    """The tokens are the backbone's own; init_from also takes a run of the backbone alone."""
    run(settings(tmp_path / "alone", backbones / "llama", "memory=none", "train.steps=2"))
    start = f"train.init_from={tmp_path}/alone/run"
    made = trainer(settings(tmp_path / "second", backbones / "llama", *MEMORY, start, "train.steps=2"))
    trained = load_any(checkpoint.latest(tmp_path / "alone" / "run"))
    assert memlm.attached.of(trained) is None
    ids = torch.arange(12)[None]
    assert torch.equal(made.model.eval()(ids).logits, trained(ids).logits)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(settings(tmp_path / "second", backbones / "llama", *MEMORY, start, "train.steps=2"))
    few = ("eval.factors=[1,2]", "eval.recall_rows=4", f"control={tmp_path}/alone/run")
    evaluate(composed(f"checkpoint={tmp_path}/second/run", *few, config="evaluate"))
    found = json.loads((tmp_path / "second" / "run" / "evaluation" / "latest" / "results.json").read_text())["models"]
    assert [(m["kinds"], m["step"], len(m["recall"])) for m in found.values()] == [
        (["llama", "mom"], 2, 2),
        (["llama"], 2, 2),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.layers=[0]"], r"model\.layers=\[0\], but the model of the run in .* has \[0, 1\]"),
        (["model.window=8"], r"model\.window=8, but .* has null"),
        (["model.mixers.memory.num_memories=3"], r"model\.mixers\.memory\.num_memories=3, but .* has 4"),
        (["backbone={other}"], r"^backbone=.*gpt2, but the run in .* has .*llama; set backbone="),
        (["memory=none"], r"model\.mixers\.memory=null, but the model of the run"),
        (["model=tiny", "backbone=null"], r"^backbone=null, but the run in .* has .*llama; set backbone="),
    ],
)
def test_another_model_is_another_run(backbones, tmp_path_factory, options, message):
    folder = tmp_path_factory.getbasetemp() / "another"
    if not folder.exists():
        run(settings(folder, backbones / "llama", *MEMORY, "train.steps=1"))
        AcceleratorState._reset_state(reset_partial_state=True)
    given = [option.format(other=backbones / "gpt2") for option in options]
    memory = MEMORY if "memory=none" not in given else MEMORY[2:]
    with pytest.raises(ValueError, match=message):
        run(settings(folder, backbones / "llama", *memory, "train.steps=1", *given))


def test_a_hub_name_out_of_reach_is_named_as_the_backbone(tmp_path, monkeypatch):
    def unreachable(source, **_):
        raise OSError(f"{source} is not a local folder.\nSee 'https://huggingface.co/{'docs/' * 60}'.")

    for kind in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", unreachable)
    with pytest.raises(ValueError) as caught:
        trainer(settings(tmp_path, "me/typo", *MEMORY))
    fix = "name a folder, or a hub name in reach"
    assert str(caught.value) == f"backbone=me/typo: cannot be loaded: me/typo is not a local folder; {fix}"
    with pytest.raises(ValueError) as caught:
        load_tokenizer("me/typo")
    assert str(caught.value).startswith("data.tokenizer: 'me/typo'") and "docs/" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["backbone=nowhere"], "backbone=nowhere: there is no such folder; name a folder, or a hub name: OWNER/NAME"),
        (["backbone=null"], "^model=backbone has no backbone; set backbone=PATH_OR_ID"),
        (["backbone=''"], "model.backbone='' names no model"),
        (["backbone={folder}/own"], "^backbone=.*/own: it has a memory already; use memory=none, which trains"),
        (["backbone={folder}/t5"], "a t5 is an encoder-decoder"),
        (["model.mixers.memory.top_k=9"], "^model.mixers.memory.top_k=9 "),
        (["memory=none", "train.trainable=memory"], "train.trainable=memory, but the model has no long-term memory"),
        (["memory=attention"], "^memory=attention beside backbone=.*llama: it has its own attention; use memory=none"),
        (["memory=none", "model.window=4"], "layers, window and sinks are of a memory"),
        (["model.layers=[7]"], "model.layers: layer 7 of LlamaForCausalLM has no attention"),
        (["model.sinks=2"], "model.sinks=2 are the first tokens"),
        (["model.dtype=int8"], "model.dtype='int8' is unknown; use float32"),
        (["+model.hidden_size=4"], "model.hidden_size=4 is not a setting"),
        (["train.trainable={{condition: 99}}"], "train.trainable.condition=99 is more than the model's"),
        (["model=tiny"], "is read by model=backbone; leave other choices of model=... out"),
        (["backbone={folder}/gpt2", "data.seq_len=200"], "data.seq_len=200 is more than the backbone's 128 positions"),
    ],
)
def test_mistakes_are_one_line(backbones, tmp_path, options, message):
    if not (backbones / "own").exists():
        from transformers import T5Config, T5ForConditionalGeneration

        from tests.conftest import build

        build("gla").save_pretrained(backbones / "own")
        T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
            backbones / "t5"
        )
        for name in ("own", "t5"):
            byte_tokenizer().save_pretrained(backbones / name)
    given = [option.format(folder=backbones) for option in options]
    memory = () if any(option.startswith("memory=") for option in options) else MEMORY
    with pytest.raises(ValueError, match=message) as caught:
        trainer(settings(tmp_path, backbones / "llama", *memory, *given))
    assert "\n" not in str(caught.value)


def test_the_tokenizer_must_fit_the_backbone(backbones, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    group = composed("model=backbone", f"backbone={backbones}/llama").model
    with pytest.raises(ValueError, match=r"data\.tokenizer has 261 entries, backbone=.*llama embeds 259; leave"):
        build_model(OmegaConf.to_container(group, resolve=True), tokenizer)


def test_a_backbone_on_the_command_line_chooses_its_model_group(backbones, tmp_path):
    assert backbone_model(["backbone=my/llama", "memory=mom"])[2:] == ["model=backbone"]
    for argv in (["memory=mom"], ["backbone=null"], ["backbone=x", "model=small"]):
        assert backbone_model(argv) == argv
    options = [o for o in (*SMALL, *MEMORY) if o != "model=backbone"]
    given = [f"backbone={backbones}/llama", *options, "train.trainable=memory", f"run_dir={tmp_path}/run"]
    done = processes.run(ROOT / "train.py", *given, "train.steps=1")
    assert done.returncode == 0 and "llama, mom, " in done.stdout, done.stderr
    assert memlm.attached.of(memlm.from_pretrained(checkpoint.latest(tmp_path / "run"))).layers == [0, 1]
