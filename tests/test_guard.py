"""Steps that are not finite or spike: stopped, skipped, rewound; and the waits of a step between logs."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlm.training import checkpoint, loop, run
from memlm.training.guard import keep_batches
from memlm.training.objective import Objective
from memlm.training.settings import RunSettings
from tests import ranks
from tests.runs import SMALLEST, config, figures, trainer

NAN = float("nan")


@pytest.fixture
def broken(monkeypatch):
    """Multiplies the loss of the training forwards of these numbers."""
    real, factors, count = Objective.forward, {}, [0]

    def forward(self, *args, **inputs):
        loss, *rest = real(self, *args, **inputs)
        count[0] += 1
        return loss * factors.get(count[0] - 1, 1.0), *rest

    monkeypatch.setattr(Objective, "forward", forward)
    return factors


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, two):
    return all(torch.equal(x, two[name]) for name, x in one.items())


@pytest.mark.parametrize(("factor", "spike"), [(NAN, "null"), (50.0, 4)])
def test_a_skipped_step_changes_nothing(tmp_path, broken, capsys, factor, spike):
    broken[22] = factor
    made = trainer(config(tmp_path, "train.on_nan=skip", f"train.spike={spike}", small=SMALLEST))
    for _ in range(22):
        made._one_step(False)
    before = weights(made.model)
    moments = [x.clone() for o in made.optimizers for of in o.state.values() for x in of.values()]
    made._one_step(False)
    assert same(before, weights(made.model)) and made.step == 23
    after = [x for o in made.optimizers for of in o.state.values() for x in of.values()]
    assert moments and all(map(torch.equal, moments, after))
    made._one_step(False)
    assert not same(before, weights(made.model))
    path = tmp_path / "run" / "bad_batches" / "step_000022-rank0.pt"
    assert f"its batch is in {path}" in capsys.readouterr().out
    (kept,), batch = torch.load(path), next(made.feed.batches(22, "train"))
    assert torch.equal(kept["input_ids"], batch.input_ids) and torch.equal(kept["labels"], batch.labels)


def test_a_run_goes_on_after_skipped_steps(tmp_path, broken):
    """Also if the last step is one; a skipped step has no line of metrics."""
    broken.update({1: NAN, 4: NAN})
    run(config(tmp_path, "train.steps=5", "train.on_nan=skip", "train.save_every=2", small=SMALLEST))
    assert [*figures(tmp_path)] == [0, 2, 3]
    assert checkpoint.latest(tmp_path / "run").name == "step_000005"


def test_a_rewound_run_has_the_weights_of_its_checkpoint(tmp_path, broken, monkeypatch, capsys):
    broken[5] = NAN
    seen, real = {}, loop.Trainer._rewind

    def rewind(self):
        real(self)
        seen.update(weights(self.model))

    monkeypatch.setattr(loop.Trainer, "_rewind", rewind)
    options = ("train.steps=8", "train.on_nan=rewind", "train.save_every=3", "train.keep=9", "train.ema=0.9")
    run(config(tmp_path, *options, small=SMALLEST))
    folder = tmp_path / "run" / "checkpoints" / "step_000003"
    assert same(dict(loop.load_any(folder).named_parameters()), seen)
    assert [*figures(tmp_path)] == [0, 1, 2, 3, 4, 6, 7]
    assert "step 6: goes on with the weights of step_000003" in capsys.readouterr().out


def breaks(patch):
    """Breaks the losses of the second and the fifth forward, of two processes on one of them."""
    real, count = Objective.forward, [0]

    def forward(self, *args, **inputs):
        loss, *rest = real(self, *args, **inputs)
        count[0] += 1
        return loss * (NAN if count[0] in (2, 5) and os.environ.get("RANK") != "0" else 1.0), *rest

    patch.setattr(Objective, "forward", forward)


@pytest.mark.parametrize("hardware", ["fsdp2", pytest.param("auto", marks=pytest.mark.slow)])
def test_processes_rewind_together(tmp_path, hardware):
    """As one process does; first to its checkpoint, then to one of their own."""
    options, one, two = (
        ("train.on_nan=rewind", "train.save_every=5", "train.ema=0.9"),
        tmp_path / "one",
        tmp_path / "two",
    )
    for folder in (one, two):
        run(config(folder, *options, "train.steps=2", "optim.schedule_steps=8", small=SMALLEST))
    more = (*options, "train.steps=8", "optim.schedule_steps=8")
    ranks.train(config(one, *more, small=SMALLEST), 1, breaks)
    ranks.train(config(two, *more, f"hardware={hardware}", small=SMALLEST), 2, breaks)
    assert [*figures(two)] == [0, 1, 2, 4, 5, 7]
    assert figures(two) == pytest.approx(figures(one), rel=1e-4)
    kept = {path.name for path in (two / "run" / "bad_batches").iterdir()}
    assert kept == {f"step_00000{step}-rank{rank}.pt" for step in (3, 6) for rank in (0, 1)}


@pytest.mark.parametrize(
    ("options", "bad", "message"),
    [
        ((), range(2, 6), r"since step 2; .* or set train.on_nan=skip; the batch of that step is in .*step_000002"),
        (("train.on_nan=rewind", "train.save_every=2"), [3, 4], r"step 4: loss is nan.*step 2 in a row; lower optim"),
        (("train.on_nan=rewind",), [1], r"on_nan=rewind, but the run has no checkpoint yet; lower train.save_every"),
        (("train.on_nan=skip", "train.steps=20"), range(1, 20), r"step 11: loss is nan.*in step 11 in a row"),
        (("train.spike=3", "train.steps=30"), [25], r"step 25: .*more than train.spike=3 times its median"),
    ],
)
def test_a_run_that_cannot_go_on_stops(tmp_path, broken, options, bad, message):
    broken.update(dict.fromkeys(bad, 100.0 if "train.spike=3" in options else NAN))
    runs = ("train.steps=6", "train.log_every=100", "train.validate_every=100", "train.save_every=100", *options)
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path, *runs, small=SMALLEST))
    assert [*(tmp_path / "run" / "bad_batches").iterdir()]


def test_a_kept_batch_is_complete(tmp_path):
    """Rows of documents too, with the tokens' roles."""
    made = trainer(config(tmp_path, "data=facts", "memory=none", "train.batch_size=2", small=()))
    (batch,) = made.feed.batches(0, "train")
    (kept,) = torch.load(keep_batches(tmp_path, 3, 0, [batch]))
    held = {n: x for part in (batch, batch.roles) for n, x in vars(part).items() if isinstance(x, torch.Tensor)}
    assert {"input_ids", "labels", "doc_ids", "positives"} <= held.keys() == kept.keys()
    assert all(torch.equal(kept[name], x) for name, x in held.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("train.on_nan=ignore",), "train.on_nan='ignore' is unknown; use stop, skip or rewind"),
        (("train.spike=1",), "train.spike=1 must be above 1"),
        (("train.spike=-1",), "train.spike=-1 must be above 1"),
        (("train.on_nan=skip", "hardware.mixed_precision=fp16"), "fp16 skips steps that overflow by itself"),
        (("train.spike=3", "hardware.mixed_precision=fp16"), "train.spike: fp16 skips steps that overflow by itself"),
    ],
)
def test_wrong_policies_are_named(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        RunSettings.of(config(tmp_path, *given, small=SMALLEST))


class Waits(TorchDispatchMode):
    """Counts the values that the host asks for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_between_logs_waits_for_nothing(tmp_path):
    """The host asks for as many values as in a bare step: AdamW's counts of steps, which are its own."""
    made = trainer(config(tmp_path, "train.micro_batch_size=2", "train.ema=0.9", small=SMALLEST))
    made._one_step(False)
    with Waits() as ours:
        made._one_step(False)
    with Waits() as bare:
        for optimizer in made.optimizers:
            for p in made.model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.optimizer.step()
    assert ours.count == bare.count
