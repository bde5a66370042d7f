"""scripts/launch: preemption by a signal, requeue, exit codes; and sweeps under Hydra's launchers."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from memlm.cli import one_line
from tests.conftest import ROOT
from tests.runs import SMALLEST

# Stands for torchrun: keeps its arguments, has one rank, which saves at SIGUSR1, and fails as the rank does.
TORCHRUN = """
import json, os, subprocess, sys
json.dump([sys.argv[1:], dict(os.environ)], open("torchrun.json", "w"))
sys.exit(subprocess.run([sys.executable, "rank.py"]).returncode != 0)
"""
RANK = """
import os, pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path("saved").touch()
    sys.exit(0 if pathlib.Path("last").exists() else 128 + number)
signal.signal(signal.SIGUSR1, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""
TOOLS = {
    "torchrun": f'exec {sys.executable} torchrun.py "$@"',
    "srun": 'shift; exec "$@"',
    "scontrol": '[ "$1" = show ] && printf "first\\nsecond\\n" || echo "$@" >> requeued',
}


@pytest.fixture
def machine(tmp_path):
    """A folder where a script of scripts/launch starts with stand-ins for torchrun and Slurm."""
    shutil.copytree(ROOT / "scripts" / "launch", tmp_path / "scripts" / "launch")
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    (tmp_path / "rank.py").write_text(RANK)
    for name, line in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def start(script, *arguments, **variables):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        return subprocess.Popen([f"scripts/launch/{script}", *arguments], cwd=tmp_path, env=environment)

    return start


def wait_for(path: Path, process: subprocess.Popen, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def test_a_preempted_node_saves_and_tells(machine, tmp_path):
    process = machine("node.sh", "train.steps=3", "name=a b")
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 138 and (tmp_path / "saved").exists()
    arguments, environment = json.loads((tmp_path / "torchrun.json").read_text())
    script = str(tmp_path / "train.py")
    assert arguments == ["--standalone", "--nproc-per-node", "auto", script, "train.steps=3", "name=a b"]
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 60


def test_a_node_has_the_exit_code_of_torchrun(machine, tmp_path):
    (tmp_path / "rank.py").write_text("")
    assert machine("node.sh", NODES="2", HEAD="first").wait(30) == 0
    arguments, _ = json.loads((tmp_path / "torchrun.json").read_text())
    assert arguments[:6] == ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29500"]
    (tmp_path / "rank.py").write_text("raise SystemExit(3)")
    assert machine("node.sh").wait(30) == 1
    assert machine("node.sh", NODES="2").wait(30) != 0


@pytest.mark.parametrize("last", [False, True])
def test_a_preempted_job_is_put_into_the_queue_unless_it_is_done(machine, tmp_path, last):
    if last:
        (tmp_path / "last").touch()
    slurm = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "first,second"}
    process = machine("slurm.sh", "experiment=recall", **slurm)
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == (0 if last else 138)
    arguments, environment = json.loads((tmp_path / "torchrun.json").read_text())
    assert environment["HEAD"] == "first" and "first:20007" in arguments and arguments[-1] == "experiment=recall"
    requeued = tmp_path / "requeued"
    assert not requeued.exists() if last else requeued.read_text() == "requeue 20007\n"


def test_a_job_that_fails_is_not_put_into_the_queue(machine, tmp_path):
    (tmp_path / "rank.py").write_text("raise SystemExit(2)")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "first"}
    assert machine("slurm.sh", **slurm).wait(30) == 1
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_a_preempted_run_of_two_ranks_goes_on_equal_to_the_bit(tmp_path):
    """With torchrun itself."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    source = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": source, "PROCESSES": "2"}

    def start(folder):
        settings = ("hardware=cpu", "train.steps=400", "train.save_every=1000", "train.validate_every=1000")
        command = [ROOT / "scripts" / "launch" / "node.sh", *SMALLEST, *settings, f"run_dir={folder}"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert start(straight).wait(300) == 0
    process = start(stopped)
    wait_for(stopped / "metrics.jsonl", process, 200)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(100) == 138
    assert 1 <= int((stopped / "checkpoints" / "latest").read_text().removeprefix("step_")) < 400
    assert start(stopped).wait(300) == 0
    weights = [folder / "checkpoints" / "step_000400" / "model.safetensors" for folder in (straight, stopped)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="the extra cluster is not installed"
)


@needs_submitit
def test_a_sweep_on_slurm_composes():
    cfg = composed_hydra("hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    assert cfg.launcher.additional_parameters == {"requeue": True} and cfg.launcher.partition == "gpu"
    assert cfg.launcher._target_.endswith("SlurmLauncher") and cfg.launcher.gpus_per_node == 8


def composed_hydra(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", [*overrides], return_hydra_config=True).hydra


@pytest.mark.skipif(importlib.util.find_spec("submitit") is not None, reason="submitit is installed")
def test_a_launcher_that_is_not_installed_is_named():
    with pytest.raises(HydraException) as caught:
        composed_hydra("hydra/launcher=slurm")
    told = "hydra/launcher: submitit is not installed; pip install -e '.[cluster]', or leave it out"
    assert one_line(caught.value, ROOT / "configs", "train") == told


@pytest.mark.slow
@needs_submitit
def test_members_run_at_once_and_a_failure_is_told(tmp_path):
    settings = (*SMALLEST, "optim=adamw", "optim.lr=1e30,1e-3", "optim.warmup_steps=0", "train.steps=4")
    run_dir = f"run_dir={tmp_path}/run"
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=local", *settings, run_dir, "name=sweep"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "run,optim.lr=1e+30: exit code 2, see failed.txt there" in done.stderr
    failed = (tmp_path / "run,optim.lr=1e+30" / "failed.txt").read_text()
    assert "loss is nan" in failed and "Traceback" not in failed
    assert (tmp_path / "run,optim.lr=0.001" / "checkpoints" / "step_000004").exists()
