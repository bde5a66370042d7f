"""Schedules of the learning rate, and the moving average of the weights: over steps, and over a stop."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from memlm.evaluation.subject import load_subject
from memlm.training import checkpoint, loop, run
from memlm.training.optim import lr_factor
from memlm.training.settings import RunSettings
from tests.conftest import composed
from tests.runs import SMALLEST, config, figures, stopped, trainer


def factors(**changes):
    optim = dataclasses.replace(RunSettings.of(composed("run_dir=here")).optim, warmup_steps=10, **changes)
    return [lr_factor(step, 100, optim) for step in range(120)]


def test_learning_rate_warms_up_and_ends_where_it_says():
    for schedule in ("cosine", "wsd"):
        found = factors(schedule=schedule, final_lr=0.05)
        assert found[0] == pytest.approx(0.1) and found[9] == 1.0 and max(found) == 1.0
        assert found[10:] == sorted(found[10:], reverse=True) and found[100:] == [pytest.approx(0.05)] * 20


def test_wsd_is_constant_and_then_falls_linearly():
    found = factors(schedule="wsd", decay=0.25, final_lr=0.2)
    assert found[10:76] == [1.0] * 66
    assert found[75:101] == pytest.approx([1 - 0.8 * i / 25 for i in range(26)])
    # Without a constant part, and without a warm-up after its start.
    assert factors(schedule="wsd", decay=1.0, final_lr=0.1)[10:100] == pytest.approx([1 - i / 100 for i in range(90)])


def smallest(folder, *overrides):
    return config(folder, *overrides, small=SMALLEST)


def test_a_wsd_run_goes_on_to_more_steps_before_it_falls(tmp_path):
    wsd = ("optim.schedule=wsd", "optim.decay=0.5")
    run(smallest(tmp_path / "straight", *wsd, "train.steps=6"))
    stopped(smallest(tmp_path, *wsd, "train.steps=4"), 2)
    run(smallest(tmp_path, *wsd, "train.steps=6"))
    assert figures(tmp_path) == figures(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"train\.steps=20, .* falls until step 6; add optim\.schedule_steps=6"):
        run(smallest(tmp_path, *wsd, "train.steps=20"))


def test_the_average_follows_the_weights_also_after_a_stop(tmp_path, monkeypatch):
    weights, real = [], loop.Trainer._one_step

    def recorded(self, logged):
        out = real(self, logged)
        weights.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return out

    averaged = ("train.ema=0.5", "train.trainable=['lm_head.*', '*.mlp.*']", "train.steps=6", "train.keep=1")
    monkeypatch.setattr(loop.Trainer, "_one_step", recorded)
    expected = {n: p.detach().clone() for n, p in trainer(smallest(tmp_path, *averaged)).model.named_parameters()}
    run(smallest(tmp_path / "straight", *averaged))
    for step, now in enumerate(weights, 1):
        decay = min(0.5, (step + 1) / (step + 10))
        expected = {name: torch.lerp(x, now[name], 1 - decay) for name, x in expected.items()}
    straight = checkpoint.latest(tmp_path / "straight" / "run")
    found = load_file(straight / "ema.safetensors")
    assert sorted(found) == [
        "lm_head.weight",
        *(f"model.layers.0.mlp.{n}_proj.weight" for n in ("down", "gate", "up")),
    ]
    torch.testing.assert_close(found, {name: expected[name] for name in found})
    assert not torch.equal(found["lm_head.weight"], weights[-1]["lm_head.weight"])
    monkeypatch.undo()

    stopped(smallest(tmp_path, *averaged), 2)
    run(smallest(tmp_path, *averaged))
    again = load_file(checkpoint.latest(tmp_path / "run") / "ema.safetensors")
    assert all(torch.equal(again[name], x) for name, x in found.items())

    subject = load_subject(str(tmp_path / "run"), torch.device("cpu"), ema=True)
    assert subject.name == "run (ema)"
    held = dict(subject.model.named_parameters())
    assert all(torch.equal(held[name], x) for name, x in found.items())
    plain = load_subject(str(tmp_path / "run"), torch.device("cpu"))
    assert plain.facts()["weights"] != subject.facts()["weights"]
    for name in ("ema.safetensors", "digests.json"):
        (checkpoint.latest(tmp_path / "run") / name).unlink()
    with pytest.raises(
        ValueError, match=r"ema=true, checkpoint=.* has no ema\.safetensors; leave it out, or train with"
    ):
        load_subject(str(checkpoint.latest(tmp_path / "run")), torch.device("cpu"), ema=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.schedule=linear", r"optim\.schedule='linear' is unknown; use cosine or wsd"),
        ("optim.decay=0", r"optim\.decay=0 must lie in \(0, 1\]"),
        ("train.ema=1", r"train\.ema=1 must lie between 0 and 1, such as 0\.999, or be null"),
        ("train.z_loss=-1", r"train\.z_loss=-1 must not be negative"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RunSettings.of(composed("run_dir=here", change))
