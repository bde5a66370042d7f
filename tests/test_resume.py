"""No work of a run is lost, and no run continues as another: faults, damage, signals, locks, compared settings."""

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from memlm import files
from memlm.data import byte_tokenizer
from memlm.hub import load_model
from memlm.training import checkpoint, loop, resume, run
from memlm.training.display import Display
from memlm.training.interrupt import Interrupt, Stopped
from memlm.training.settings import OptimSettings, TrainSettings
from memlm.training.tracking import read_metrics
from tests import processes
from tests.conftest import ROOT, build, composed
from tests.faults import every_fault
from tests.runs import SMALLEST, config, figures


def smallest(folder, *overrides):
    return config(folder, *overrides, small=SMALLEST)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    run(smallest(folder, "train.steps=6"))
    return folder / "run"


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


class SaveACheckpoint:
    """The second save of a run that keeps two drops the first."""

    def __init__(self, folder):
        self.model, self.tokenizer = build("none", torch.float32), byte_tokenizer()
        for step in (1, 2):
            self.save(folder, step)

    def save(self, folder, step=3):
        texts = {checkpoint.FACTS: json.dumps({"step": step}), "config.yaml": "seed: 0\n"}
        beside = checkpoint.Beside(self.tokenizer, {"step": step, "optimizers": []}, texts)
        checkpoint.save(folder, step, self.model, beside, 2)

    def check(self, folder, done):
        newest, damaged = checkpoint.newest_whole(folder)
        assert newest.name == "step_000003" or (newest.name == "step_000002" and not done)
        assert not damaged and checkpoint.load_trainer(newest)["step"] == int(newest.name[-1])
        assert (newest / "config.yaml").read_text() == "seed: 0\n"
        # The next start continues from the same checkpoint, and removes the files of the failed save.
        assert checkpoint.recover(folder) == (newest, [])
        assert not [p for p in (folder / "checkpoints").glob("step_*") if "partial" in p.name]


class GoOn:
    """All files that a run writes, from its start to its end."""

    def __init__(self, folder):
        self.folder = folder
        self.run(folder, "train.steps=2")
        self.metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()

    def run(self, folder, *overrides):
        # In a fork: the harness forks again, which often fails in a process that has trained.
        if (pid := os.fork()) == 0:
            run(smallest(folder, "train.save_every=1", "optim.schedule_steps=9", *overrides))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    def save(self, folder):
        run(smallest(folder, "train.save_every=1", "optim.schedule_steps=9", "train.steps=3"))

    def check(self, folder, done):
        newest, damaged = checkpoint.newest_whole(folder / "run")
        step = int(newest.name.removeprefix("step_"))
        assert not damaged and (step == 3 or (step == 2 and not done))
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        assert [line for line in lines if line in self.metrics][:2] == self.metrics[:2]
        # The checkpoint has its own settings, even if the run's copy is lost.
        assert resume.Record.read(folder / "run", newest).config["train"]["save_every"] == 1


def test_a_save_survives_faults(tmp_path):
    every_fault("tests.test_resume:SaveACheckpoint", tmp_path, at_most=12)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [SaveACheckpoint, GoOn])
def test_a_save_survives_every_fault(scenario, tmp_path):
    print(every_fault(f"tests.test_resume:{scenario.__name__}", tmp_path))


def test_a_signal_waits_until_flops_are_counted(tmp_path, monkeypatch):
    """torch calls the counter from C++, where an exception of a signal would end the process."""
    real, counted = loop.count_flops, []

    def and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        counted.append(real(*arguments))
        return counted[0]

    monkeypatch.setattr(loop, "count_flops", and_signal)
    with pytest.raises(Stopped):
        run(smallest(tmp_path))
    assert counted and not (tmp_path / "run" / "checkpoints").exists()


def interrupted(folder, signals):
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run("-m", "tests.interrupted", folder, signals, 0, cwd=ROOT, env=one)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_signals_at_random_times_change_nothing(tmp_path):
    assert interrupted(tmp_path, 2)["signals"] == 2


@pytest.mark.slow
def test_thirty_signals_change_nothing(tmp_path):
    print(interrupted(tmp_path, 30))


def test_every_damage_of_a_checkpoint_is_found(copied):
    """Every file is cut at each quarter, and 200 bits are flipped over all files: the checkpoint before is used.

    Not the card, which a user may edit.
    """
    newest, before = (copied / "checkpoints" / f"step_00000{step}" for step in (6, 3))
    contents = {path: path.read_bytes() for path in sorted(newest.iterdir()) if path.name != "README.md"}
    assert {"config.yaml", "run.json", "trainer.pt", "model.safetensors", "digests.json"} <= {p.name for p in contents}
    damages = [(path, content[: len(content) * q // 4]) for path, content in contents.items() for q in range(4)]
    draw, places = random.Random(0), [(p, i) for p, content in contents.items() for i in range(len(content))]
    for path, i in [*draw.sample(places, 120), *((p, draw.randrange(len(c))) for p, c in [*contents.items()] * 12)]:
        flipped = bytearray(contents[path])
        flipped[i] ^= 1 << draw.randrange(8)
        damages.append((path, bytes(flipped)))
    assert len(damages) >= 200 + 4 * len(contents)
    for path, damaged in damages:
        path.write_bytes(damaged)
        found, lines = checkpoint.newest_whole(copied)
        assert found == before and len(lines) == 1 and str(newest) in lines[0] and "using step_000003" in lines[0]
        path.write_bytes(contents[path])
    for path in contents:
        path.rename(path.with_suffix(".moved"))
        assert checkpoint.newest_whole(copied)[0] == before, path
        path.with_suffix(".moved").rename(path)
    assert checkpoint.newest_whole(copied) == (newest, [])


def test_a_damaged_checkpoint_is_set_aside_and_its_steps_taken_again(copied, saved, capsys):
    path = copied / "checkpoints" / "step_000006" / "trainer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    for name in ("config.yaml", "checkpoints/latest"):
        (copied / name).write_bytes(b"")
    run(smallest(copied.parent, "train.steps=6"))
    screen = capsys.readouterr().out
    assert f"{path}: damaged" in screen and "kept as step_000006.damaged, continuing from step_000003" in screen
    assert (path.parent.with_suffix(".damaged") / "trainer.pt").exists()
    weights = [folder / "checkpoints" / "step_000006" / "model.safetensors" for folder in (copied, saved)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert figures(copied.parent) == figures(saved.parent)
    assert OmegaConf.load(copied / "config.yaml").train.steps == 6


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(copied):
    for folder in (copied / "checkpoints").glob("step_*"):
        (folder / "model.safetensors").unlink()
    before = sorted(copied.rglob("*"))
    with pytest.raises(ValueError, match=r"none of its checkpoints is whole .*safetensors.*put one back") as caught:
        run(smallest(copied.parent, "train.steps=6"))
    assert "delete" not in str(caught.value) and sorted(copied.rglob("*")) == before


def as_of_before(run_dir, accumulation=1):
    """A run as written by the version before digests."""
    for folder in (run_dir / "checkpoints").glob("step_*"):
        for name in ("digests.json", "run.json", "config.yaml"):
            (folder / name).unlink()
    cfg = OmegaConf.load(run_dir / "config.yaml")
    del cfg.train["micro_batch_size"], cfg.optim["schedule_steps"]
    cfg.train.batch_size //= accumulation
    cfg.train.gradient_accumulation = accumulation
    OmegaConf.save(cfg, run_dir / "config.yaml")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpoints_of_before_digests_are_taken(copied, capsys, accumulation):
    as_of_before(copied, accumulation)
    with pytest.raises(ValueError, match=r"optim\.lr=0\.5, but the run in .* has 0\.003"):
        run(smallest(copied.parent, "train.steps=6", "optim.lr=0.5"))
    run(smallest(copied.parent, "train.steps=7", "optim.schedule_steps=6"))
    screen = capsys.readouterr().out
    assert "continuing from step 6" in screen
    line = "begun with train.gradient_accumulation=2 and train.batch_size=2 rows of a forward"
    assert (line in screen) == (accumulation == 2)


@pytest.mark.parametrize("damage", ["cut", "other step", "weights"])
def test_damage_of_checkpoints_of_before_digests_is_found(copied, damage):
    as_of_before(copied)
    newest, before = (copied / "checkpoints" / f"step_00000{step}" for step in (6, 3))
    if damage == "cut":
        (newest / "trainer.pt").write_bytes((newest / "trainer.pt").read_bytes()[:1000])
    elif damage == "other step":
        shutil.copy(before / "trainer.pt", newest)
    else:
        (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-8])
    found, (line,) = checkpoint.newest_whole(copied)
    assert found == before and str(newest) in line


def test_what_is_not_a_state_is_named(tmp_path):
    torch.save([1], tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match=r"trainer\.pt: holds no state of a run"):
        checkpoint.load_trainer(tmp_path)


FREE = {
    *("name", "run_dir", "data.cache_dir", "data.tokenizer", "tracker.name", "tracker.project"),
    *(
        f"hardware.{name}"
        for name in ("device", "mixed_precision", "compile", "kernels", "shard", "sequence_parallel")
    ),
    *(f"train.{name}" for name in ("micro_batch_size", "gradient_checkpointing", "validation_batches", "keep")),
    *("train.log_every", "train.validate_every", "train.save_every", "train.on_nan", "train.spike"),
}


def leaves(node, prefix=""):
    for key, value in node.items():
        yield from (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
        )


def test_only_settings_that_change_the_result_make_another_run():
    """Every key of the default run except the model's, whose configuration is compared as a whole."""
    cfg = OmegaConf.to_container(composed("run_dir=here"), resolve=True)
    del cfg["model"]
    record = resume.Record(cfg, {"text": {}}, {})
    refused = set()
    for key, value in leaves(cfg):
        other = copy.deepcopy(cfg)
        node = other
        *path, last = key.split(".")
        for name in path:
            node = node[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        node[last] = not value if isinstance(value, bool) else value + 1 if number else "another"
        try:
            record.compare_settings(Path("here"), other, 1)
        except ValueError as error:
            # The error names the way to continue.
            told = str(error)
            assert f"optim.schedule_steps={cfg['train']['steps']}" in told or f"set {key}=" in told, told
            assert "another name" in told and "delete" not in told
            refused.add(key)
    keys = {key for key, _ in leaves(cfg)}
    # paths are compared by content.
    assert keys - refused == FREE | {"data.sources.text.paths"}


def test_a_run_of_an_earlier_version_goes_on_without_newer_settings():
    """At the values that change nothing; another value is refused."""
    cfg = OmegaConf.to_container(composed("run_dir=here"), resolve=True)
    before = copy.deepcopy(cfg)
    newer = {"train": TrainSettings, "optim": OptimSettings}
    for group, of in newer.items():
        for setting in dataclasses.fields(of):
            if setting.default is not dataclasses.MISSING:
                before[group].pop(setting.name, None)
    assert before != cfg
    record = resume.Record(before, {}, {})
    assert record.compare_settings(Path("here"), cfg, 1) == []
    cfg["train"]["z_loss"] = 0.1
    with pytest.raises(
        ValueError, match=r"train\.z_loss=0\.1, but the run in here has 0\.0; set train\.z_loss=0\.0 to"
    ):
        record.compare_settings(Path("here"), cfg, 1)


def test_a_longer_run_keeps_to_its_schedule_or_says_how(copied, capsys):
    with pytest.raises(
        ValueError, match=r"train\.steps=8, .* falls until step 6; add optim\.schedule_steps=6 .*init_fr"
    ):
        run(smallest(copied.parent, "train.steps=8"))
    with pytest.raises(ValueError, match=r"optim\.schedule_steps=8, .* falls until step 6"):
        run(smallest(copied.parent, "train.steps=8", "optim.schedule_steps=8"))
    run(smallest(copied.parent, "train.steps=8", "optim.schedule_steps=6", "train.log_every=2", "train.save_every=1"))
    screen = capsys.readouterr().out
    assert "changed since: train.log_every 1 -> 2, train.save_every 3 -> 1, train.steps 6 -> 8" in screen
    assert checkpoint.latest(copied).name == "step_000008"


def test_a_constant_rate_has_no_end(tmp_path):
    run(smallest(tmp_path, "train.steps=2", "optim.final_lr=1.0"))
    run(smallest(tmp_path, "train.steps=3", "optim.final_lr=1.0"))
    assert sorted(figures(tmp_path)) == [0, 1, 2]


def test_models_are_compared_with_their_defaults(copied):
    run(smallest(copied.parent, "train.steps=6", "+model.rope_theta=10000", "+model.num_key_value_heads=1"))
    with pytest.raises(ValueError, match=r"model\.rope_theta=500000\.0, but the model .* has 10000\.0; set model"):
        run(smallest(copied.parent, "train.steps=6", "+model.rope_theta=5e5"))
    with pytest.raises(ValueError, match=r"model\.mixers\.memory\.window_size=8, but the model of the run"):
        run(smallest(copied.parent, "train.steps=6", "model.mixers.memory.window_size=8"))


def test_the_corpus_is_the_same_wherever_it_lies(tmp_path):
    """A moved corpus is the same. A changed file makes another one, and is named before anything is written."""
    for i in range(60):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"document {i}: it was the best of times " * 4)
    text = (*(o for o in SMALLEST if "mqar" not in o), "data=text")
    run(config(tmp_path, f"data.sources.text.paths=[{tmp_path}/corpus]", "train.steps=2", small=text))
    (tmp_path / "moved").mkdir()
    (tmp_path / "corpus").rename(tmp_path / "moved" / "corpus")
    moved = (f"data.sources.text.paths=[{tmp_path}/moved/corpus]", "optim.schedule_steps=2")
    run(config(tmp_path, *moved, "train.steps=3", small=text))
    manifest = (tmp_path / "run" / "manifest-text.json").read_text()
    with (tmp_path / "moved" / "corpus" / "7.txt").open("a") as file:
        file.write("and more")
    with pytest.raises(ValueError, match=r"data\.sources\.text: .*7\.txt changed"):
        run(config(tmp_path, *moved, "train.steps=4", small=text))
    assert (tmp_path / "run" / "manifest-text.json").read_text() == manifest


def test_one_process_writes_a_run(copied):
    with files.lock(copied), pytest.raises(ValueError, match=rf"^{copied}: process {os.getpid()} on .* writes there"):
        run(smallest(copied.parent, "train.steps=6"))
    with files.lock(copied):
        # Others may read.
        load_model(checkpoint.newest_whole(copied)[0])
    run(smallest(copied.parent, "train.steps=6"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_every_signal_stops_a_run_that_builds_its_data(tmp_path, monkeypatch, number):
    monkeypatch.setattr(loop, "build_data", lambda *_, **__: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as stopped:
        run(smallest(tmp_path, "train.steps=6"))
    assert stopped.value.number == number and checkpoint.latest(tmp_path / "run") is None


@pytest.mark.parametrize("place", ["build_data", "score", "save_trainer", "first step"])
def test_a_signal_anywhere_leaves_a_run_that_goes_on(tmp_path, monkeypatch, saved, place):
    """While data are built, in a validation, while a checkpoint is written, before the first checkpoint."""
    owner, name = {
        "build_data": (loop, "build_data"),
        "score": (loop, "score"),
        "save_trainer": (torch, "save"),
        "first step": (loop.Trainer, "_one_step"),
    }[place]
    real = getattr(owner, name)

    def and_signal(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, and_signal)
    with pytest.raises(Stopped) as stopped:
        run(smallest(tmp_path, "train.steps=6"))
    assert stopped.value.number == signal.SIGINT
    monkeypatch.undo()
    expected = {"build_data": None, "score": 4, "save_trainer": 3, "first step": 1}[place]
    newest = checkpoint.latest(tmp_path / "run")
    assert (newest and int(newest.name[-1])) == expected
    run(smallest(tmp_path, "train.steps=6"))
    for kind in ("loss", "validation/mqar/loss"):
        assert figures(tmp_path, kind) == figures(saved.parent, kind)
    weights = [folder / "checkpoints" / "step_000006" / "model.safetensors" for folder in (tmp_path / "run", saved)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_second_ctrl_c_stops_at_once():
    with Interrupt() as interrupt:
        interrupt.patient = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert interrupt.number == signal.SIGINT
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_a_run_draws_no_random_numbers_once_it_is_built(tmp_path, monkeypatch):
    """Otherwise a checkpoint would have to hold the states of random generators."""
    real, states = loop.Trainer._one_step, []

    def step(self, logged):
        before = torch.get_rng_state()
        figures = real(self, logged)
        states.append(torch.equal(before, torch.get_rng_state()))
        return figures

    monkeypatch.setattr(loop.Trainer, "_one_step", step)
    run(config(tmp_path, "train.steps=2", "memory=mom"))
    assert states == [True, True]


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 2.5}',
        "[1]",
        "3",
        '{"step": "2"}',
        '{"loss": 1}',
        "[" * 10**5,
        '{"step": 3, "loss": []}',
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n\xff\xfe\n{"step": 4, "loss": "1.0", "x": null}\n{"step": 5, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 3}, {"step": 4}]


def test_names_may_be_any(tmp_path, capsys, monkeypatch):
    """Markup, and a folder whose name Weights & Biases would refuse."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = smallest(tmp_path, "train.steps=1", "tracker=wandb")
    cfg.name, cfg.run_dir = "[red]x[/] ü", str(tmp_path / "a:b#[red]ü?" / "run")
    cfg.data.sources = {"[bold]ü": cfg.data.sources.mqar}
    run(cfg)
    assert "[bold]ü 4" in capsys.readouterr().out
    assert list(Path(cfg.run_dir, "wandb").glob("offline-run-*/*.wandb"))


def test_a_screen_that_is_gone_ends_no_run(monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = isatty = lambda self: False

    display = Display(3, True)
    display.console.file = Gone()
    with display:
        display.say("one")
        display.advance(1, {"loss": "2"})
