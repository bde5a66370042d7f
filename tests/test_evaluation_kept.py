"""Results are kept as they complete and never overwritten; what fails is told, and the rest goes on."""

import json
import signal
import sys

import pytest
import torch
from torch import nn

import memlm.evaluation.measures
from memlm import files
from memlm.evaluation import run as evaluate
from memlm.evaluation import storage
from memlm.evaluation.progress import Progress
from memlm.hub import load_model
from memlm.training import run as train
from memlm.training.interrupt import Stopped
from tests.conftest import composed
from tests.runs import SMALLEST, config

# A measure of one part and one of three, which count their measurements in a file.
COUNTED = """
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from memlm.evaluation.measures import Measure


def count(settings, one, part):
    one.subject.model(torch.zeros(1, 4, dtype=torch.long))
    with Path(settings["log"]).open("a") as log:
        log.write(f"{part}\\n")
    if settings.get("fails") in (part, "all"):
        raise ValueError(f"the model has\\n  no {part}")
    if part == settings.get("stops"):
        os.kill(os.getpid(), signal.SIGINT)
    return {"value": 0.1, part: (1, 2)}


class _Shown:
    def measures(self, source):
        return True

    def cost(self, sources):
        return 4

    def table(self, models):
        return [self.name], [[name] for name in models]

    def section(self, report, models, first):
        report.heading(f"{self.name} of {first.name}")


@dataclass(frozen=True)
class Whole(_Shown, Measure):
    name = "whole"
    counted: dict = field(default_factory=dict)

    def run(self, one, examined):
        return count(self.counted, one, "whole")


@dataclass(frozen=True)
class Parted(_Shown, Measure):
    name = "parted"
    whole = False
    nothing = {}
    counted: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)

    def run(self, one, examined):
        def make(part, records):
            records += [{"part": part, "place": i} for i in np.arange(2)]
            return count(self.counted, one, part)

        found = {}
        for part in "abc":
            own = {key: x for key, x in self.extra.items() if key == part}
            found[part] = one.parts.measure(part, own, lambda records, part=part: make(part, records))
        return {part: x for part, x in found.items() if x is not None}
"""


@pytest.fixture(scope="module")
def model_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    train(config(folder, "train.steps=1", small=SMALLEST))
    return folder / "run"


@pytest.fixture
def counted(model_run, tmp_path, monkeypatch):
    """Evaluate with settings of the counted measures: whether all was measured, the parts measured, the results."""
    (tmp_path / "measures").mkdir()
    (tmp_path / "measures" / "counted.py").write_text(COUNTED)
    paths = [*memlm.evaluation.measures.__path__, str(tmp_path / "measures")]
    monkeypatch.setattr(memlm.evaluation.measures, "__path__", paths)
    # Settings of a measurement that do not change its key.
    monkeypatch.setattr(
        storage, "content", lambda settings: {k: v for k, v in vars_of(settings).items() if k != "counted"}
    )
    log = tmp_path / "log"

    def run(*overrides, **settings):
        log.write_text("")
        given = ", ".join(f"{key}: {value}" for key, value in {"log": log, **settings}.items())
        cfg = composed(
            f"checkpoint={model_run}",
            "control=null",
            f"out={tmp_path}/out",
            "eval.factors=[]",
            "eval.depths=[]",
            f"+eval.counted={{{given}}}",
            *overrides,
            config="evaluate",
        )
        complete = evaluate(cfg)
        return complete, log.read_text().split(), json.loads((tmp_path / "out/latest/results.json").read_text())

    run.log, run.out = log, tmp_path / "out"
    return run


def vars_of(settings):
    return settings if isinstance(settings, dict) else vars(settings)


def test_every_evaluation_has_its_folder_and_measured_parts_are_measured_once(counted, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "name=a b"])
    complete, measured, first = counted()
    assert complete and measured == ["whole", "a", "b", "c"]
    (found,) = first["models"].values()
    assert (
        found["parted"]["a"]["a"] == [1, 2] and found["missing"] == {} and set(found["seconds"]) == {*"abc", "whole"}
    )
    assert first["schema"] == storage.SCHEMA and "evaluate.py 'name=a b'" in first["command"]
    (folder,) = [path for path in counted.out.glob("*-*") if path.is_dir()]
    assert (counted.out / "latest").resolve() == folder.resolve() and folder.name == first["of"]
    records = [json.loads(x) for x in (folder / "records" / "run" / "b.jsonl").read_text().splitlines()]
    assert records == [{"part": "b", "place": 0}, {"part": "b", "place": 1}]
    capsys.readouterr()
    complete, measured, again = counted()
    assert complete and measured == [] and again["models"] == first["models"] and again["of"] == first["of"]
    assert "run: measured before: whole, a, b, c" in capsys.readouterr().out
    before = (folder / "results.json").read_bytes()
    complete, measured, other = counted("+eval.extra={b: 1}")
    assert measured == ["b"]
    assert other["of"] != first["of"] and (folder / "results.json").read_bytes() == before
    assert (counted.out / "latest" / "records" / "run" / "a.jsonl").exists()
    assert counted("seed=1")[1] == ["whole", "a", "b", "c"]


def test_other_weights_and_damaged_files_are_measured_anew(counted, model_run):
    counted()
    kept = sorted((counted.out / "measured").iterdir())
    assert len(kept) == 4
    kept[0].write_text("{")
    kept[1].write_text("{}")
    assert len(counted()[1]) == 2
    (step,) = (model_run / "checkpoints").glob("step_*")
    before = {path: path.read_bytes() for path in step.iterdir()}
    model = load_model(step)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    try:
        model.save_pretrained(step)
        files.seal(step)
        assert counted()[1] == ["whole", "a", "b", "c"]
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_an_interrupted_evaluation_continues(counted, capsys):
    with pytest.raises(Stopped):
        counted(stops="b")
    assert counted.log.read_text().split() == ["whole", "a", "b"]
    assert "Stopped; the same command measures what is left." in capsys.readouterr().out
    assert not (counted.out / "latest").exists() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    complete, measured, _ = counted()
    assert complete and measured == ["b", "c"]
    assert "measured before: whole, a" in capsys.readouterr().out


def test_a_part_that_fails_is_a_line_and_the_rest_goes_on(counted, capsys):
    complete, measured, results = counted(fails="b")
    assert not complete and measured == ["whole", "a", "b", "c"]
    (found,) = results["models"].values()
    assert found["missing"] == {"b": "the model has no b"} and [*found["parted"]] == ["a", "c"] and found["whole"]
    line = "run: b is missing: the model has no b"
    assert line in capsys.readouterr().out and line in results["notes"]
    assert line in (counted.out / "latest" / "report.html").read_text()
    # It is tried again.
    complete, measured, results = counted()
    assert complete and measured == ["b"]
    complete, _, results = counted("seed=2", fails="whole")
    assert not complete and "whole of run" not in (counted.out / "latest" / "report.md").read_text()
    with pytest.raises(ValueError, match="nothing could be measured; run: whole is missing: the model has no whole"):
        counted("seed=3", fails="all")


def test_keys_hold_the_content_of_named_files(tmp_path):
    (tmp_path / "folder").mkdir()
    names = {"file": str(tmp_path / "a.txt"), "many": [str(tmp_path / "folder")]}
    keys = []
    for path, text in (("a.txt", "x"), ("a.txt", "y"), ("folder/b", "z"), ("folder/b", "w")):
        (tmp_path / path).write_text(text)
        keys.append(storage.digest(storage.content(names)))
    assert len(set(keys)) == 4 and storage.content({"kind": "folder"}) == {"kind": "folder"}


def test_progress_counts_the_tokens_of_forwards(capsys, monkeypatch):
    times = iter(range(0, 1000, 6))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    progress, model = Progress(), nn.Flatten()
    progress.total = 100
    with progress, progress.reading(model), progress.part("mine, recall", 60):
        for _ in range(4):
            model(torch.zeros(2, 10, dtype=torch.long))
    told = capsys.readouterr().out.splitlines()
    assert told and all("mine, recall" in line and "left" in line for line in told)
    # Four times 20 tokens are more than the 60 that were expected.
    assert told[-1].startswith("tokens 80/120 ")
    assert not model._forward_pre_hooks
