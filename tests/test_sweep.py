"""Members of a sweep: a folder for each, failures recorded, a signal passed on."""

import os
import signal
import subprocess
import sys

import pytest

from memlm.training.sweep import _passed_on, end_sweep, member_dir
from tests.conftest import ROOT
from tests.processes import Python
from tests.runs import SMALLEST

# A member that needs no torch: x=1 fails, x=9 waits for its signal. The sweep itself is memlm's.
SCRIPT = """
import sys, time
from pathlib import Path
import hydra

COMMAND = sys.argv

@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg):
    from hydra.core.hydra_config import HydraConfig
    if HydraConfig.get().mode.name == "MULTIRUN":
        from memlm.training.sweep import run_member
        run_member(cfg, COMMAND)
        return
    Path(cfg.run_dir, "here").write_text(str(cfg.x))
    if cfg.x == 1:
        sys.exit("error: one is refused")
    try:
        time.sleep(60 if cfg.x == 9 else 0)
    except KeyboardInterrupt:
        Path(cfg.run_dir, "saved").touch()
        sys.exit(130)

if __name__ == "__main__" and "-m" not in sys.argv:
    main()
elif __name__ == "__main__":
    from memlm.cli import user_errors
    with user_errors(Path("configs"), "train"):
        main()
        from memlm.training.sweep import end_sweep
        end_sweep()
"""
CONFIG = """
defaults: [_self_, {override hydra/job_logging: none}, {override hydra/hydra_logging: none}]
x: 0
seed: 0
run_dir: runs/seed${seed}
hydra: {run: {dir: "${run_dir}"}, sweep: {dir: runs, subdir: .}, output_subdir: null, job: {chdir: false}}
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text(CONFIG)
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}

    def start(*arguments):
        return Python("train.py", "-m", *arguments, cwd=tmp_path, env=environment)

    return start


def test_a_failure_ends_no_sweep_and_a_signal_does(sweep, tmp_path):
    process = sweep("x=0,1,9,2", "seed=3")
    folders = {x: tmp_path / "runs" / f"seed3,x={x}" for x in (0, 1, 9, 2)}
    process.until((folders[9] / "here").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.said()[1]
    assert (folders[9] / "saved").exists() and not folders[2].exists()
    assert [(folders[x] / "failed.txt").exists() for x in (0, 1, 9)] == [False, True, False]
    record = (folders[1] / "failed.txt").read_text()
    assert "exit code 1" in record and "x=1" in record and "error: one is refused" in record


@pytest.mark.parametrize("given", [None, "60"])
def test_members_have_time_to_save(monkeypatch, given):
    """Those under torchrun too, which kills its processes after this time."""
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    program = f"import os, sys; print(os.environ[{name!r}], file=sys.stderr); sys.exit(3)"
    code, told = _passed_on([sys.executable, "-S", "-c", program], traced=False)
    assert code == 3 and int(told.split()[-1]) == int(given or 300)


def test_failures_are_told_at_the_end(monkeypatch):
    end_sweep()
    monkeypatch.setattr("memlm.training.sweep._failed", ["runs/a", "runs/b"])
    with pytest.raises(ValueError, match=r"^2 of the sweep's runs failed, see failed\.txt in each: runs/a, runs/b$"):
        end_sweep()


@pytest.mark.parametrize(
    ("overrides", "arguments", "folder"),
    [
        (["seed=1", "memory=none"], ["-m", "seed=1,2", "memory=none,mom"], "r"),
        (["seed=1", "optim.lr=0.1"], ["seed=1", "optim.lr=0.1,0.2", "--multirun"], "r,optim.lr=0.1"),
        (["seed=1", "run_dir=r"], ["-m", "seed=1,2", "run_dir=r"], "r,seed=1"),
        (
            ["++model.mixers.memory.top_k=2"],
            ["-m", "++model.mixers.memory.top_k=2,4"],
            "r,model.mixers.memory.top_k=2",
        ),
        (["data=text"], ["-m", "data=text,recall"], "r,data=text"),
    ],
)
def test_folders_are_named_by_what_differs(overrides, arguments, folder):
    assert member_dir("r", overrides, arguments) == folder


def test_folders_of_odd_values_differ_and_stay_in_place():
    paths = [[f"data.sources.text.paths=[{name}]"] for name in ("../a/b", "../a_b", "x" * 300, "x" * 299)]
    swept = ["data.sources.text.paths=[a],[b]"]
    folders = [member_dir("runs/r", path, swept) for path in paths]
    assert len({*folders}) == 4 and all(f.count("/") == 1 and len(f) < 150 for f in folders)


@pytest.mark.slow
def test_a_diverging_run_ends_no_sweep(tmp_path):
    """Run as users run it."""
    rates = ("optim=adamw", "optim.lr=1e30,1e-3", "optim.warmup_steps=0", "train.steps=4")
    run_dir = f"run_dir={tmp_path}/run"
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALLEST, *rates, run_dir, f"name={tmp_path.name}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "loss is nan" in (tmp_path / "run,optim.lr=1e+30" / "failed.txt").read_text()
    assert (tmp_path / "run,optim.lr=0.001" / "checkpoints" / "step_000004").exists()
