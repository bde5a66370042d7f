"""A night on a cluster, small: a corpus prepared in parallel, a run that loses a process, and goes on with fewer."""

import os
import signal
import subprocess
import sys
import time

import pytest

from memlm.training.tracking import read_metrics
from tests.conftest import ROOT

STEPS = 40
SETTINGS = (
    "data=text",
    "data.tokenizer={bpe: 512}",
    "data.seq_len=64",
    "model=tiny",
    "model.hidden_size=32",
    "train.batch_size=8",
    "train.save_every=3",
    "train.validate_every=20",
    "train.validation_batches=1",
    "train.log_every=1",
    "optim.warmup_steps=4",
    f"train.steps={STEPS}",
)


def command(folder, name, processes, *settings):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    places = [f"data.sources.text.paths=[{folder}/corpus]", f"data.cache_dir={folder}/cache"]
    return [*start, "train.py", *SETTINGS, *places, f"run_dir={folder}/{name}", *settings]


def begin(folder, name, processes, *settings):
    with told(folder, name, processes).open("w") as log:
        return subprocess.Popen(
            command(folder, name, processes, *settings),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def told(folder, name, processes):
    return folder / f"{name}-{processes}.log"


def wait_for(folder, name, step):
    """Wait until the run has logged a step."""
    log = folder / name / "metrics.jsonl"
    for _ in range(3000):
        if log.exists() and any(line["step"] >= step for line in read_metrics(log)):
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} did not come")


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in found.split()]


def losses(folder, name):
    """The last figure of each step: steps after a checkpoint that a kill lost are taken again."""
    found = {}
    for line in read_metrics(folder / name / "metrics.jsonl"):
        found |= {(line["step"], key): x for key, x in line.items() if key == "loss" or key.startswith("validation/")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["titans_mag", "mom"])
def test_a_run_of_4_processes_that_loses_one_and_goes_on_with_2_and_1_equals_an_undisturbed_one(tmp_path, memory):
    (tmp_path / "corpus").mkdir()
    source = (ROOT / "README.md").read_text() + (ROOT / "LOG.md").read_text()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_text(source[i * 2500 : (i + 1) * 2500])
    prepared = subprocess.run(
        [
            *(sys.executable, "scripts/prepare_data.py", "--workers", "2", *SETTINGS[:2]),
            *(f"data.sources.text.paths=[{tmp_path}/corpus]", f"data.cache_dir={tmp_path}/cache"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert prepared.returncode == 0, prepared.stderr
    undisturbed = begin(tmp_path, "undisturbed", 1, f"memory={memory}")
    assert undisturbed.wait(600) == 0, told(tmp_path, "undisturbed", 1).read_text()
    expected = losses(tmp_path, "undisturbed")
    assert len({step for step, _ in expected}) > STEPS

    four = begin(tmp_path, "night", 4, f"memory={memory}", "hardware=fsdp2")
    wait_for(tmp_path, "night", 10)
    os.kill(children(four.pid)[2], signal.SIGKILL)
    assert four.wait(120) == 1, told(tmp_path, "night", 4).read_text()
    two = begin(tmp_path, "night", 2, f"memory={memory}", "hardware=fsdp2")
    wait_for(tmp_path, "night", 24)
    two.send_signal(signal.SIGTERM)
    two.wait(120)
    assert "the same command goes on from there" in told(tmp_path, "night", 2).read_text()
    one = begin(tmp_path, "night", 1, f"memory={memory}")
    assert one.wait(600) == 0, told(tmp_path, "night", 1).read_text()
    found = losses(tmp_path, "night")
    assert found.keys() == expected.keys()
    worst = max(abs(found[key] / x - 1) for key, x in expected.items() if x)
    print(f"largest relative difference of losses: {worst:.2e}")
    assert worst < 1e-4
