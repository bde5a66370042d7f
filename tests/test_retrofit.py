"""experiment=retrofit: a plain Llama, a memory beside it, and LoRA as the control of the memory."""

import json
import runpy

import pytest
import torch

import memlm
from memlm.data import MQAR, Passkey
from memlm.evaluation import run as evaluate
from memlm.flops import count_parameters
from memlm.hub.causal import load_any
from memlm.training import run
from tests.conftest import ROOT, composed

LAYERS = 2
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "retrofit.py"))["main"]


@pytest.fixture(scope="module")
def new(tmp_path_factory, script):
    folder = tmp_path_factory.mktemp("new")
    script(["llama", "--out", str(folder)])
    return folder


def test_the_backbone_cannot_see_the_answers_beyond_its_window(new):
    cfg = composed("experiment=retrofit")
    reach = LAYERS * (cfg.model.window - 1)
    mqar, passkey = (dict(cfg.data.sources[name]) for name in ("mqar", "passkey"))
    assert MQAR(cfg.data.seq_len, mqar["num_pairs"], mqar["gap"]).min_distance > reach
    assert Passkey(cfg.data.seq_len, passkey["digits"], passkey["gap"]).min_distance > reach
    inside = composed("data=retrofit").data
    assert inside.seq_len == cfg.model.window and cfg.data.seq_len == 4 * inside.seq_len
    for name in ("mqar", "passkey"):
        assert cfg.data.sources[name].gap == 4 * inside.sources[name].gap
    model = memlm.attach(load_any(new).double().eval(), "gated_delta_net", window=cfg.model.window)
    ids = torch.randint(256, (1, reach + 20))
    edited = ids.clone()
    edited[:, 0] += 1
    with torch.no_grad():
        change = (model(ids).logits - model(edited).logits).abs().sum(-1)[0]
    assert change[: reach + 1].min() > 0 and change[reach + 1 :].max() == 0


def test_settings_without_an_effect_are_refused(tmp_path, script, capsys):
    with pytest.raises(SystemExit):
        script(["llama", "--out", str(tmp_path / "new"), "model.window=8"])
    assert "model.window=8: settings are of experiment=retrofit, for lora" in capsys.readouterr().err


def test_its_steps_run_and_lora_is_as_large_as_the_memory(tmp_path, new, script, capsys, monkeypatch):
    """The commands of the README, with two steps each and a small corpus."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"The {i}th day was long, and the night was longer. " * 8)
    few = [
        f"data.cache_dir={tmp_path}/cache",
        f"data.sources.text.paths=[{text}]",
        "train.steps=2",
        "train.batch_size=8",
        "train.validation_batches=1",
    ]
    run(composed("experiment=retrofit_backbone", f"backbone={new}", "run_dir=none", *few))
    backbone = tmp_path / "none/checkpoints/step_000002"
    run(composed("experiment=retrofit", f"backbone={backbone}", "run_dir=memory", *few))
    script(["lora", "--out", "lora", f"backbone={backbone}", *few])
    said = capsys.readouterr().out
    assert "llama, gated_delta_net" in said
    memory, control = (load_any(tmp_path / name / "checkpoints/step_000002") for name in ("memory", "lora"))
    trained = sum(p.numel() for name, p in memory.named_parameters() if ".memlm." in name)
    lora = int(said.split("LoRA of ")[1].split()[0].replace(",", ""))
    assert 0.98 < lora / trained < 1.02
    frozen = dict(load_any(backbone).named_parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in memory.named_parameters() if ".memlm." not in n)
    opened = [p.abs().max() > 0 for n, p in memory.named_parameters() if n.endswith("memlm.gate")]
    assert len(opened) == LAYERS and all(opened)
    assert all(not p.any() for n, p in control.named_parameters() if n.endswith("memlm.gate"))
    assert memlm.attached.of(control).window == 32 and count_parameters(control) == count_parameters(memory)
    asked = ["eval=retrofit", "eval.recall_rows=4", "eval.factors=[1,4]", "eval.text_documents=1", "data=retrofit"]
    asked += ["data.seq_len=32", f"data.sources.text.paths=[{text}]", f"data.cache_dir={tmp_path}/cache"]
    evaluate(composed("checkpoint=memory", "control=lora", *asked, config="evaluate"))
    models = json.loads((tmp_path / "memory/evaluation/latest/results.json").read_text())["models"]
    assert [*models] == ["memory", "control (lora)"]
    found = [[(r["task"], r["length"]) for r in m["recall"]] for m in models.values()]
    assert found == [[("mqar", 32), ("mqar", 128), ("passkey", 32), ("passkey", 128)]] * 2
