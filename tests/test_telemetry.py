"""Figures of speed, gradients and alerts; trackers; the bar."""

import io
import json
import sys
import time
import types

import pytest
import torch
import wandb
from rich.console import Console

from memlm.training import display, run, settings, telemetry
from memlm.training.alerts import Alerts
from memlm.training.settings import RunSettings
from tests.runs import SMALLEST, config, figures, trainer


def test_a_run_logs_its_speed_and_its_gradients(tmp_path):
    run(config(tmp_path, "train.steps=4", "train.log_every=2", "optim=muon", small=SMALLEST))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second, third = (line for line in lines if "loss" in line)
    assert (first["tokens"], second["tokens"], third["tokens"]) == (32, 96, 128)
    # Two warm-up steps, then a cosine.
    assert [line["lr/adamw"] / line["lr/muon"] for line in (first, second)] == pytest.approx([3e-3 / 0.02] * 2)
    assert first["lr/adamw"] == pytest.approx(1.5e-3) and second["lr/adamw"] == pytest.approx(3e-3)
    for line in (first, second, third):
        split = [line[f"seconds/{part}"] for part in ("data", "forward", "backward", "optimizer")]
        assert min(split) > 0 and 0.3 * line["seconds/step"] < sum(split) < line["seconds/step"]
        assert line["tokens_per_second"] == pytest.approx(32 / line["seconds/step"], rel=1e-3)
        assert 0.05 < line["peak_memory"] < 100 and "mfu" not in line
        parts = [line[f"grad_norm/{part}"] ** 2 for part in ("embed_tokens", "lm_head", "mixer", "mlp", "norm")]
        others = [v**2 for k, v in line.items() if k.startswith("grad_norm/")]
        assert sum(others) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-4) and set(parts) <= set(others)


def test_gradient_norms_are_those_before_clipping(tmp_path):
    """With ``accumulate`` too; the norm of all parts is far above ``clip`` here."""
    made = trainer(config(tmp_path, "optim.clip=1e-3", "train.micro_batch_size=2", small=SMALLEST))
    step = made._one_step(True)
    parts = torch.stack([x for name, x in step.items() if name.startswith("grad_norm/")])
    assert step["grad_norm"] > 0.1 and torch.allclose(parts.norm(), step["grad_norm"], rtol=1e-3)


def test_a_part_is_a_kind_of_module_in_the_layers_or_a_module_outside():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.ones(1))
    model.head = torch.nn.Linear(2, 1, bias=False)
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": torch.nn.Linear(1, 1)}) for _ in range(2)])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = telemetry.gradient_norms(model, torch.tensor(0.5), 1.0)
    assert {name: round(x.item() ** 2) for name, x in found.items()} == {
        "grad_norm/scale": 1,
        "grad_norm/head": 2,
        "grad_norm/mlp": 4,
    }


def test_utilisation_is_of_the_peak_of_the_device_by_its_whole_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    found = telemetry.rates(1e6, 1e9, torch.device("cuda", 0), 8)
    assert found["tflops"] == pytest.approx(375) and found["mfu"] == pytest.approx(375 / 756)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 something else")
    assert "mfu" not in telemetry.rates(1e6, 1e9, torch.device("cuda", 0), 8)
    assert telemetry.rates(10.0, None, torch.device("cpu"), 1) == {"tokens_per_second": 10.0}


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("layer0/gate", [0.5, 0.3, 0.005, 0.004, 0.5, 0.001], [2, 5]),
        ("layer0/gate", [0.005, 0.004, 0.003], []),
        ("layer0/gate", [0.0, -0.3, -0.6, -0.001], [3]),
        ("layer1/router_entropy", [1.0, 0.9, 0.04], [2]),
        ("layer1/load_2", [0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.1], [4]),
        ("layer0/memory_norm", [1.0, 1.1, 1.0, 1.2, 1.0, 30.0, 900.0, 1.0], [5]),
        ("layer0/memory_norm", [1.1**i for i in range(80)], [73]),
        ("loss", [5.0, 4.0, 3.0, 3.0, 3.0, 7.0, 3.0], [5]),
        ("loss", [9.0, 5.0, 2.0, 1.0, 0.5, 0.6], []),
    ],
)
def test_alerts(name, values, told):
    alerts = Alerts()
    lines = [alerts.of(step, {name: value, "other": 1.0}) for step, value in enumerate(values)]
    assert [step for step, found in enumerate(lines) if found] == told
    assert all(f"alert, step {step}: {name}=" in lines[step][0] for step in told)


def test_several_trackers_get_the_same_figures(tmp_path, monkeypatch):
    """One of them is the real one, offline; the other writes nothing here."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flushed")

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(config(tmp_path, "train.steps=2", "tracker=wandb", "tracker.name=[wandb,tensorboard,wandb]", small=SMALLEST))
    assert written[0] == (str(tmp_path / "run" / "tensorboard"), 0) and written[-1] == "closed"
    logged = {of[2]: of[1] for of in written[1:-1] if of[0] == "loss"}
    assert logged == pytest.approx(figures(tmp_path)) and [*(tmp_path / "run" / "wandb").glob("offline-run-*")]
    # A checkpoint is not ahead of what is on the disk, and the validation at its step is not lost when a run goes on.
    assert written[-2] == "flushed"
    (validated,) = (of for of in written[1:-2] if of[0] == "validation/mqar/loss")
    written.clear()
    options = ("train.steps=3", "optim.schedule_steps=2", "tracker=tensorboard")
    run(config(tmp_path, *options, small=SMALLEST))
    assert written[0][1] == 2 and [of[2] for of in written if of[0] == "loss"] == [2]
    again = [of for of in written if of[0] == "validation/mqar/loss"]
    assert [of[2] for of in again] == [2, 3] and again[0][1] == pytest.approx(validated[1], rel=1e-5)


def test_a_tracker_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    def refuse(**options):
        raise wandb.errors.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ValueError, match=r"tracker\.name=wandb: No API key configured\.; log in, .*WANDB_MODE=offline"
    ):
        run(config(tmp_path, "tracker=wandb", small=SMALLEST))


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"tracker\.name=tensorboard: .* not installed; pip install -e '\.\[tensorboard\]'"
    ):
        RunSettings.of(config(tmp_path, "tracker=tensorboard", small=SMALLEST))


def test_the_bar_moves_between_logs_and_knows_the_time_left_from_the_first_step_on(monkeypatch):
    """A run that goes on from step 100."""
    out = io.StringIO()
    screen = Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr(display, "Screen", lambda **options: screen)
    shown = display.Display(200, True)
    with shown:
        shown.begin(100)
        time.sleep(0.1)
        shown.advance(101)
        task = shown._bar.tasks[0]
        left = display.Left().render(task).plain
        assert task.completed == 101 and left in ("0:00:09", "0:00:10", "0:00:11", "0:00:12")
        shown.advance(102, {"loss": "1.000"})
    assert "step 102/200" in out.getvalue() and "loss 1.000" in out.getvalue()
