"""A mistake on the command line is one line with the key, the value and a fix, and exit code 2."""

import os
import runpy
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState
from hydra.core.global_hydra import GlobalHydra

from memlm.evaluation.run import _check_writable
from memlm.training.loop import Trainer
from tests import processes
from tests.conftest import ROOT


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """``python <script> *arguments`` in this process, without the training itself: exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(Trainer, "train", lambda self, interrupt: None)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return code, capsys.readouterr().err

    return run


def test_a_command_leaves_the_environment_as_it_was(command):
    assert command("train.py", "steps=1")[0] == 2
    assert os.environ["HYDRA_FULL_ERROR"] == "0"


# Arguments of train.py (behind "data=recall run_dir=run") or of evaluate.py, and a part of the error.
TRAIN = {
    "--steps 10": "--steps: settings are written key=value, without dashes; did you mean 'train.steps'?",
    "--steps=10": "without dashes; did you mean 'train.steps'?",
    "-x": "-x: settings are written key=value",
    "train.steps": "train.steps: cannot be read; write key=value",
    "train.steps=": "train.steps='' must be int",
    "train.steps=1.5": "train.steps=1.5 must be int",
    "train.steps=9999999999999999999": "train.steps=9999999999999999999 must be",
    "name=[~/x,/y]": """quote the value, as in 'name=["~/x", "/y"]'""",
    "name=a=b": """name=a=b: cannot be read; quote the value, as in 'name="a=b"'""",
    "name='": "name=': cannot be read; quote the value",
    "name={": "name={: cannot be read",
    "name=${x}": "name: Interpolation key 'x' not found",
    "name=": "name='' names no run",
    "name=null": "name=None must be str",
    "name=???": "name: Missing mandatory value",
    "seed=-1": "seed=-1 must lie in",
    "=1": "=1: names no key; write key=value",
    "~train": "~train: train.py needs train; leave this out",
    "~train.steps": "train.steps is missing; set it",
    "~memory": "~memory: train.py needs memory",
    "++zz=1": "++zz=1: there is no key 'zz'",
    "+zz.y=1": "+zz.y=1: there is no key 'zz.y'",
    "zz=1": "zz=1: there is no key 'zz'",
    "++train.zz=1": "train.zz=1 is not a setting",
    "train=null": "train=null: names no choice; one of: demo, gpu",
    "memory=": "memory=: names no choice; one of: attention,",
    "memory=[a]": "memory=[a]: names no choice",
    "experiment=a/b": "experiment=a/b: no such choice; one of: ",
    "model.mixers=1": "model.mixers=1 must be dict or null",
    "model.mixer_pattern=[[memory]]": "model.mixer_pattern=['memory'] is not in model.mixers",
    "model.mixers.memory.window_size=99999999999999999999": "window_size=99999999999999999999 must be a number below",
    "model.mixers.memory.initial_lr=inf": "initial_lr=inf must be a number below",
    "model.mixers.memory.conv_size=1000000000": "out of memory (can't allocate memory: you tried to allocate",
    "model.hidden_size=1000000000000": "model.hidden_size=1000000000000 must be at most",
    "model.num_hidden_layers=1000000000": "model.num_hidden_layers=1000000000 must be at most",
    "+model.vocab_size=x": "model.vocab_size='x' must be int",
    "+model.eos_token_id=7": "model.eos_token_id=7, but the tokenizer's is 258; leave it out",
    "+model.rope_theta=inf": "model.rope_theta=inf must be a number",
    "+model.rms_norm_eps=nan": "model.rms_norm_eps=nan must be a number",
    "model.initializer_range=-1": "model.initializer_range=-1 must be a number",
    "data.noise_ramp=null": "data.noise_ramp=None must be two steps",
    "data.noise_ramp=[-1,2]": "data.noise_ramp=[-1, 2] must be two steps",
    "data.sources.mqar.weight=nan": "data.sources.mqar.weight=nan is not a number",
    "train.stepz=5": "train.stepz=5: there is no key 'train.stepz'; did you mean 'train.steps'?",
    "data=text data.noise_ramp=[1,2]": "no key 'data.noise_ramp'; the default run has it, but a choice of",
    "backbone=x model.hidden_size=3": "no key 'model.hidden_size'; the default run has it, but a choice",
    "backbone=nowhere": "backbone=nowhere: there is no such folder; name a folder, or a hub name: OWNER/NAME",
    "backbone=x model=small": "backbone=x is read by model=backbone; leave other choices of model=... out",
    "train.trainable=memroy": "train.trainable='memroy' is unknown; use null, memory, a list",
    "memory=none train.trainable=memory": "train.trainable=memory, but the model has no long-term memory",
    "memroy=none": "memroy=none: there is no key 'memroy'; did you mean 'memory'?",
    "memory=titan_mag": "memory=titan_mag: no such choice; did you mean 'titans_mag'?",
    "model.mixers.memory.max_lr=2.0": "max_lr=2.0 must lie above 0",
    "model.mixers.memory.max_lrs=0.1": "did you mean 'max_lr'",
    "model.mixers.memory.kind=mem": "model.mixers.memory.kind='mem' is unknown",
    "train.steps=0": "train.steps=0 must be",
    "model.hidden_size=65": "model.hidden_size=65 does not divide",
    "+model.hiden_size=3": "did you mean 'hidden_size'",
    "data=text data.sources.text.paths=[/nowhere]": "/nowhere does not exist",
    "optim.name=sgd": "optim.name='sgd' is unknown",
    "hydra.zz=1": "hydra.zz=1: there is no key 'hydra.zz'",
    "of_memory=5": "of_memory=5 must be settings, {memory: {key: value}}",
    "+of_memory.mom=5": "of_memory.mom=5 must be settings, {key: value}",
    "+of_memory.moms.top_k=5": "of_memory.moms: no such memory; did you mean 'mom'?",
    "+of_memory.titans_mag.top_k=5": "model.mixers.memory.top_k=5 is not a setting",
    "model.mixers.memory=null": "model.mixers.memory=None must be the settings of a mixer",
    "experiment=mqar memory=mom ~model.mixers": "model.mixers",
    "experiment=mqar memory=mom model.mixers=null": "model.mixer_pattern='memory' is not in model.mixers",
}
EVALUATE = {
    "checkpoint=": "checkpoint='' names no run",
    "checkpoint=null": "checkpoint=None must be str",
    "checkpoint=nonsense": "checkpoint=nonsense: there is no run",
    "checkpoint=/etc/passwd": "/etc/passwd: cannot be loaded",
    "control=[1]": "control=[1] must be str or null",
    "memory_off=maybe": "memory_off='maybe' must be bool",
    "out=[1]": "out=[1] must be str or null",
    "seed=x": "seed='x' must be int",
    "seed=-1": "seed=-1 must lie in",
    "eval.factors=3": "eval.factors=3 must be list",
    "eval.factors=[0]": "eval.factors=[0] must be whole numbers in 1..",
    "eval.factors=[1000000000000]": "eval.factors=[1000000000000] must be whole numbers in 1..",
    "eval.recall_rows=1000000000000": "eval.recall_rows=1000000000000 must lie in 1..",
    "eval.needle_rows=x": "eval.needle_rows='x' must be int",
    "eval.depths=[2]": "eval.depths=[2] must be numbers in 0..1",
    "eval.depths=[nan]": "eval.depths=[nan] must be numbers in 0..1",
    "eval.text_documents=-1": "eval.text_documents=-1 must lie in 0..",
    "eval.text_length=1000000000000": "eval.text_length=1000000000000 must lie in 2..",
    "eval.bank_documents=[x]": "eval.bank_documents=['x'] must be whole numbers",
    "eval.bank_questions=0": "eval.bank_questions=0 must lie in 1..",
    "checkpoint=runs/none/there": "checkpoint=runs/none/there: there is no run",
    "eval.factor=[1]": "eval.factor=[1] is not a setting; did you mean 'factors'?",
    "eval.ask={mqarr:{}}": "eval.ask: 'mqarr' is unknown; did you mean 'mqar'?",
    "eval.policy={kind:keydiff}": "eval.policy.budget is missing; set it",
    "eval=policies eval.policy.decay=0.5": "eval.policy.decay=0.5 is not a setting",
    "~eval.factors": "eval.factors is missing; set it",
    "~eval": "~eval: evaluate.py needs eval",
    "eval=nothing": "eval=nothing: no such choice; one of: all, bank, demo",
    "memory=mom": "memory=mom: there is no key 'memory'; did you mean 'memory_off'?",
    "hardware.device=[1]": "hardware.device=[1] is unknown",
    "hardware.kernels=x": "hardware.kernels='x' is unknown",
    "hardware.mixed_precision=bf16": "hardware.mixed_precision='bf16': a model is evaluated as its checkpoint is",
}


def check(outcome, message):
    code, told = outcome
    lines = told.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], told


@pytest.mark.parametrize("arguments", TRAIN)
def test_mistakes_of_training(command, arguments):
    check(command("train.py", "data=recall", "run_dir=run", *arguments.split()), TRAIN[arguments])


@pytest.mark.parametrize("arguments", EVALUATE)
def test_mistakes_of_evaluation(command, arguments):
    check(command("evaluate.py", *arguments.split()), EVALUATE[arguments])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1", "mine.yaml, line 3: expected ',' or '}'"),
        ("name: a\nname: b", "mine.yaml, line 3: found duplicate key name"),
        ("train: !!python/object:os.system {}", "mine.yaml, line 2: could not determine a constructor"),
        ("train: " + "[" * 600, "nested too deep"),
        ("yy: 3", "yy=3 is not a setting"),
        ("defaults: 3", "defaults must be a list"),
        ("- a", "experiment/mine"),
        ("name: \udcff", "not text in UTF-8"),
    ],
)
def test_a_file_of_settings_that_is_wrong(command, tmp_path, text, message):
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_bytes(f"# @package _global_\n{text}\n".encode(errors="surrogateescape"))
    arguments = (f"--config-dir={folder.parent}", "experiment=mine", "data=recall", "run_dir=run")
    check(command("train.py", *arguments), message)


def real(*arguments, cwd):
    """processes.run, with a Python that has imported nothing."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("run", "script", "argument", "message"),
    [
        (real, "train.py", "--steps=10", "did you mean 'train.steps'?"),
        (processes.run, "evaluate.py", "checkpoint=runs/none/there", "there is no run"),
    ],
    ids=["train.py", "evaluate.py"],
)
def test_mistakes_as_a_user_sees_them(tmp_path, run, script, argument, message):
    done = run(ROOT / script, argument, cwd=tmp_path)
    # Packages may warn on import.
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and line.startswith(f"error: {argument}: ") and message in line, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_what_is_right_is_accepted(command):
    for arguments in (
        ("train.steps=3", "name=2024", "seed=7"),
        ("+model.vocab_size=300",),
        ("train={}",),
    ):
        assert command("train.py", *arguments, "data=recall", "run_dir=run")[0] == 0


def test_folders_that_cannot_be_written_are_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"out={out}: nothing can be written there"):
            _check_writable(out)
    _check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


SCRIPTS = [path.name for path in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_show_their_help_without_optional_packages(script, monkeypatch, capsys):
    # These are only for Triton's kernels.
    of_triton = script in ("compile_kernels.py", "predict_kernels.py", "roofline.py", "gpu_ceilings.py")
    packages = ("fla", "flash_attn", "matplotlib", "hydra", "wandb", "datasets", *(() if of_triton else ("triton",)))
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(os, "environ", {**os.environ})
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert not end.value.code and capsys.readouterr().out.startswith(f"usage: {script}")
