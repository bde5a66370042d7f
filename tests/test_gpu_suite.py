"""gpu_suite.sh without a GPU: every line runs, on a CPU and with tiny sizes."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests import processes
from tests.conftest import ROOT, composed

SUITE = ROOT / "scripts" / "gpu_suite.sh"
LIMITS = {name: int(seconds) for name, seconds in re.findall(r"^ *part (\w+) (\d+) ", SUITE.read_text(), re.M)}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def test_the_parts_have_nine_minutes():
    order = ["ceilings", "tests", "again_mma", "again_ptxas", "accuracy", "goals", "step", "tuned"]
    assert [*LIMITS] == order and sum(LIMITS.values()) <= 540


def test_every_line_runs(tmp_path):
    # A test of the suite is none of this run's workers.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    with processes.command(tmp_path, "scripts/gpu_accuracy.py") as python:
        # The server has Triton's interpreter only where no GPU runs its kernels.
        forks = os.environ.get("TRITON_INTERPRET") == "1"
        environment |= {"PYTHON": str(python) if forks else sys.executable, "COMMIT": "abc"}
        done = subprocess.run([SUITE, "--dry-run", tmp_path], env=environment, capture_output=True, text=True)
    ended = re.findall(r"^(\w+): \d+ of \d+ s, exit (\d+)", done.stdout, re.M)
    # There is no other ptxas to try where nothing is compiled.
    assert ended == [(name, "0") for name in LIMITS if name != "again_ptxas"], done.stdout + done.stderr
    assert done.returncode == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [x for x in records if "error" in x and isinstance(x["error"], str)]
    assert all(x["commit"] == "abc" and x["torch"] and x["hardware"] and x["date"] for x in records)
    parts = [x.get("part", "bench") for x in records]
    assert {*parts} == {"ceilings", "tests", "tests again", "accuracy", "bench", "step"}
    assert [x["what"] for x in records if x.get("part") == "ceilings"][-1] == "a launch by torch"
    assert [x["DISABLE_MMA_V3"] for x in records if x.get("part") == "tests again"] == ["1"]
    assert [x["memory"] for x in records if x.get("part") == "step"] == ["attention", "titans_mag"]
    assert all(x["ms"] > 0 and x["profile"] for x in records if x.get("part") == "step")
    assert [x["tiles"] for x in records if "op" in x and "tiles" in x] == ["first", "tuned"]


@pytest.mark.parametrize("memory", ["titans_mag", "attention"])
def test_models_without_hydra_are_those_with_it(memory, scripts):
    model = OmegaConf.to_container(composed("model=titans_340m", f"memory={memory}").model, resolve=True)
    assert scripts("gpu_step").settings(memory) == model


def test_tests_have_their_order_and_failed_ones_run_again(tmp_path, monkeypatch, scripts):
    plugin = scripts("gpu_tests")
    names = [
        "tests/kernels/test_inputs.py::test_layouts[delta_rule-triton]",
        "tests/kernels/test_triton_routed.py::test_dispatch",
        "tests/kernels/test_triton.py::test_recurrence_of_any_size[delta]",
        "tests/kernels/test_triton.py::test_linear_memory[odd]",
        "tests/kernels/test_triton.py::test_linear_memory_in_16_bits[dtype0]",
    ]
    assert sorted(names, key=plugin.rank) == names[::-1]

    class Item:
        def __init__(self, name):
            self.nodeid = name

    out = tmp_path / "results.jsonl"
    lines = [("tests", names[0], "failed"), ("tests", names[1], "passed"), ("tests again", names[2], "failed")]
    out.write_text("".join(json.dumps({"part": p, "test": t, "outcome": o}) + "\n" for p, t, o in lines))
    monkeypatch.setattr(plugin, "OUT", out)
    monkeypatch.setattr(plugin, "AGAIN", True)
    items = [Item(name) for name in names]
    plugin.pytest_collection_modifyitems(None, items)
    assert [item.nodeid for item in items] == names[:1]
