"""The stages of the training of Memory Sparse Attention, starting from a Qwen3."""

import json
import re
import shlex

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from transformers import Qwen3Config, Qwen3ForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.flops import count_parameters
from memlm.training import run
from tests import processes
from tests.conftest import ROOT, composed
from tests.data.test_questions import chat_tokenizer, records

STAGES = ("msa_warmup", "msa_main", "msa_8k", "msa_64k")
SMALL = (
    "hardware=cpu",
    "train.steps=2",
    "train.batch_size=2",
    "train.micro_batch_size=null",
    "train.log_every=1",
    "train.validation_batches=1",
)


def trained(stage, *overrides):
    """The figures of a run in the working folder, at the path of its configuration."""
    run(composed(f"experiment={stage}", *SMALL, f"run_dir=runs/{stage}/msa-seed0", "data.cache_dir=cache", *overrides))
    with open(f"runs/{stage}/msa-seed0/metrics.jsonl") as lines:
        return [line for line in map(json.loads, lines) if "loss" in line]


def test_stages_are_the_papers():
    configs = [composed(f"experiment={stage}") for stage in STAGES]
    with torch.device("meta"):
        model = MemLMForCausalLM(MemLMConfig.from_hydra(OmegaConf.to_container(configs[0].model)))
    routers = [p for name, p in model.named_parameters() if "router" in name]
    assert count_parameters(model) == 4_258_397_696 and sum(p.numel() for p in routers) == 235_929_600
    assert model.config.layer_mixers() == ["documents"] * 18 + ["memory"] * 18
    settings = model.config.mixers["memory"]
    assert (settings["chunk_size"], settings["top_k"], settings["similarity"]) == (64, 16, "cosine")
    tokens = [c.train.batch_size * c.data.seq_len * c.train.steps for c in configs]
    assert sum(tokens[:2]) == pytest.approx(158.95e9, rel=1e-3)
    assert [c.data.seq_len for c in configs[2:]] == [2**13, 2**16]
    weights = [(c.train.lm_weight, 18 * c.model.mixers.memory.loss_weight) for c in configs]
    assert [w for pair in weights for w in pair] == pytest.approx([0.1, 1.0, 1.0, 0.1, 1.0, 0.1, 1.0, 0.1], rel=1e-4)
    ends = [(c.optim.lr, c.optim.lr * c.optim.final_lr) for c in configs]
    assert [lr for pair in ends for lr in pair] == pytest.approx([1e-4, 1e-4, 1e-4, *[6e-6] * 5])
    for c, before in zip(configs[1:], STAGES, strict=False):
        assert c.train.init_from == f"runs/{before}/msa-seed0"


def test_two_stages_on_facts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for stage, lm_weight in (("msa_tiny", 0.1), ("msa_tiny_main", 1.0)):
        lines = trained(stage)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert [line["step"] for line in lines] == [0, 1]
        for line in lines:
            assert line["loss"] == pytest.approx(lm_weight * line["loss/facts"] + line["layer1/router"], rel=1e-5)
            assert {"layer1/hit@1", "layer1/recall@1", "layer1/precision"} <= line.keys()
            assert not any(name.startswith("layer0/") for name in line)
    assert "weights: runs/msa_tiny/msa-seed0/checkpoints/step_000002" in capsys.readouterr().out
    # Eight documents and an untrained router: about ln 8, and a tenth of it.
    assert 1.5 < trained_loss("msa_tiny") < 3 and 0.15 < trained_loss("msa_tiny_main") < 0.3


def test_how_routers_choose_is_logged_over_all_of_a_step_and_when_validated(tmp_path, monkeypatch):
    """Micro-batches together give the figures of all rows; rows with nothing to find do not count."""
    monkeypatch.chdir(tmp_path)
    mqar = "+data.sources.mqar={kind:mqar,weight:1.0,num_pairs:4,gap:10}"
    told = []
    for rows in (4, 2):
        options = ("train.batch_size=4", f"train.micro_batch_size={rows}", mqar)
        run(composed("experiment=facts", *SMALL, f"run_dir=runs/{rows}", "data.cache_dir=cache", *options))
        AcceleratorState._reset_state(reset_partial_state=True)
        with open(f"runs/{rows}/metrics.jsonl") as lines:
            first, *_, last = map(json.loads, lines)
        told.append({name: value for name, value in first.items() if name.startswith("layer1/")})
        validated = {
            name.removeprefix("validation/facts/") for name in last if name.startswith("validation/facts/layer")
        }
        assert validated == {"layer1/hit@1", "layer1/recall@1", "layer1/precision"}
        assert not any(name.startswith("validation/mqar/layer") for name in last)
    assert told[0] == pytest.approx(told[1], rel=1e-4) and len(told[0]) == 4


def trained_loss(stage):
    with open(f"runs/{stage}/msa-seed0/metrics.jsonl") as lines:
        return json.loads(next(lines))["layer1/router"]


def test_a_qwen3_is_given_a_memory_by_the_commands_of_its_page(tmp_path, monkeypatch, capsys):
    """Its commands, on a model, a tokenizer and questions made here."""
    commands = next(
        b for b in re.findall(r"```bash\n(.*?)```", (ROOT / "memlm/hub/README.md").read_text(), re.S) if "qwen3" in b
    )
    conversion, *stages = map(shlex.split, commands.splitlines())
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    source, target = (conversion[conversion.index(name) + 1] for name in ("--source", "--target"))
    sizes = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    rope = {"rope_type": "default", "rope_theta": 5e6}
    torch.manual_seed(0)
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, rope_parameters=rope, tie_word_embeddings=True))
    qwen3.save_pretrained(source)
    tokenizer.save_pretrained(source)
    questions = re.search(r"\[(.*)\]", stages[0][-1])[1]
    (tmp_path / questions).write_text("\n".join(map(json.dumps, records())))
    done = processes.run(ROOT / conversion[1], *conversion[2:])
    assert done.returncode == 0, done.stderr
    small = [f"model.{name}={size}" for name, size in sizes.items()]
    small += ["model.mixer_pattern=[documents,memory]", "model.mixers.memory.chunk_size=4", "data.seq_len=512"]
    assert [arguments[:3] for arguments in stages] == [["python", "train.py", f"experiment={s}"] for s in STAGES]
    for stage, arguments in zip(STAGES, stages, strict=True):
        first, _ = trained(stage, *arguments[3:], *small)
        AcceleratorState._reset_state(reset_partial_state=True)
        weight = 0.1 if stage == "msa_warmup" else 1.0
        assert first["loss"] == pytest.approx(weight * first["loss/questions"] + first["layer1/router"], rel=1e-5)
        assert 0 < first["layer1/recall@16"] <= first["layer1/hit@16"] <= 1
    told = capsys.readouterr().out
    for place in (target, *(f"runs/{stage}/msa-seed0/checkpoints/step_000002" for stage in STAGES[:-1])):
        assert f"weights: {place}\n" in told
