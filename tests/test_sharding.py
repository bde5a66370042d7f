"""Processes that share parameters take the steps of a single one, and leave checkpoints for any number of them."""

import copy
import errno
import json
import os
import re
import runpy
import signal
import sys
import threading
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from memlm import files
from memlm.data import byte_tokenizer
from memlm.hub import load_model
from memlm.layers import GroupedLinear
from memlm.training import checkpoint, loop
from memlm.training.optim import build_optimizers
from memlm.training.settings import HardwareSettings, OptimSettings, RunSettings
from memlm.training.sharded_checkpoint import Saver, State, has_parts
from tests.conftest import ROOT, build, composed
from tests.ranks import run, train
from tests.runs import config, figures

TINY = (
    "data=mqar",
    "data.seq_len=32",
    "data.sources.mqar.num_pairs=4",
    "train.batch_size=4",
    "train.log_every=1",
    "train.validate_every=10",
    "train.validation_batches=1",
    "train.save_every=20",
    "model.hidden_size=32",
    "optim.warmup_steps=2",
)


def tiny(folder, *overrides):
    return config(folder, *overrides, small=TINY)


def assert_alike(one, two):
    for name, tolerance in {
        "loss": 1e-6,
        "grad_norm": 1e-5,
        "grad_norm/mlp": 1e-5,
        "validation/mqar/loss": 1e-6,
    }.items():
        assert figures(two, name) == pytest.approx(figures(one, name), rel=tolerance), name


# Tests below share titans_mag and msa.
@pytest.mark.parametrize(
    "memory", ["mom", *(pytest.param(m, marks=pytest.mark.slow) for m in ("titans_mag", "msa", "gated_delta_net"))]
)
def test_sharers_take_the_steps_of_one_process(tmp_path, memory):
    options = (f"memory={memory}", "train.steps=5")
    train(tiny(tmp_path / "one", *options))
    train(tiny(tmp_path / "two", *options, "hardware=fsdp2"), 2)
    assert_alike(tmp_path / "one", tmp_path / "two")


def kept_copies(rank, size, cfgs):
    """Shapes of bf16 tensors that wait for a step's backward, and are those of a weight of a product in a layer."""
    return [kept_by(cfg) for cfg in cfgs]


def kept_by(cfg):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = RunSettings.of(cfg)
    made = loop.Trainer(settings, loop.build_accelerator(settings.hardware))
    products = [m for m in made.model.model.layers.modules() if isinstance(m, nn.Linear | GroupedLinear)]
    shapes = {tuple(module.weight.shape)[::way] for module in products for way in (1, -1)}
    waiting = []
    for _, inputs in made.feed.inputs(0):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: waiting.append(x) or x, lambda x: x):
            loss, *_ = made.objective(**inputs)
        # FSDP2 frees the data of a parameter, not the tensor.
        alive = [x for x in waiting if x.dtype == torch.bfloat16 and x.untyped_storage().nbytes()]
        loss.backward()
    trained = [p for p in made.model.parameters() if p.grad is not None]
    assert {x.dtype for p in trained for x in (p, p.grad)} == {torch.float32}
    return sorted({tuple(x.shape) for x in alive} & shapes)


def test_sharers_keep_no_rounded_copies_of_weights(tmp_path):
    sizes = ("model.hidden_size=48", "data.seq_len=46", "train.steps=1")
    options = (*sizes, "hardware=fsdp2", "hardware.mixed_precision=bf16")
    cfgs = [tiny(tmp_path, f"memory={memory}", *options) for memory in ("titans_mag", "msa", "mom")]
    assert run(kept_copies, 2, tmp_path, cfgs) == [[[], [], []]] * 2


@pytest.mark.parametrize("memory", ["titans_mag", pytest.param("mom", marks=pytest.mark.slow)])
def test_sharers_in_bf16_take_the_steps_of_copies(tmp_path, memory):
    """The second loss shows the first gradients, which are sums of two forwards."""
    options = (f"memory={memory}", "train.steps=2", "train.micro_batch_size=1", "hardware.mixed_precision=bf16")
    train([tiny(tmp_path / sharing, *options, f"hardware={sharing}") for sharing in ("ddp", "fsdp2")], 2)
    for name in ("loss", "grad_norm"):
        assert figures(tmp_path / "fsdp2", name) == pytest.approx(figures(tmp_path / "ddp", name), rel=2e-5), name


def killed_before_whole_weights(patch):
    patch.setattr(loop, "consolidate", lambda folder: None)


def test_any_number_of_processes_goes_on_from_parts(tmp_path, monkeypatch, capsys):
    """Two that share, one, two that share: from parts to whole state and back. The final weights are one's; two take
    each row in a forward of its own. Weights of the last step are made whole later if they were not.
    """
    steps, one, many = (
        ("optim.schedule_steps=4", "train.validate_every=1", "train.ema=0.9"),
        tmp_path / "one",
        tmp_path / "many",
    )
    train(tiny(one, "train.steps=4", *steps))
    shared = ("hardware=fsdp2", "train.save_every=1", "train.micro_batch_size=1")
    train(tiny(many, "train.steps=2", *steps, *shared), 2, killed_before_whole_weights)
    first, second = (many / "run" / "checkpoints" / f"step_00000{step}" for step in (1, 2))
    assert has_parts(first) and has_parts(second)
    for folder in (first, second):
        with pytest.raises(ValueError, match=r"its weights are in parts; run python scripts/consolidate\.py"):
            load_model(folder)
    real = files.add_to_seal

    def add(folder, made):
        # The next start removes the remains of a killed process.
        assert {path.parent for path in made} <= {*folder.parent.glob("*.partial-*")}
        real(folder, made)

    monkeypatch.setattr(files, "add_to_seal", add)
    monkeypatch.setattr(sys, "argv", ["consolidate.py", str(first)])
    runpy.run_path(str(ROOT / "scripts" / "consolidate.py"), run_name="__main__")
    assert capsys.readouterr().out.endswith(f"\n{first}\n")
    train(tiny(many, "train.steps=2", *steps))
    for folder in (first, second):
        load_model(folder)
        checkpoint.check(folder)
        assert {"model.safetensors", "ema.safetensors"} <= json.loads((folder / files.DIGESTS).read_text()).keys()
    train(tiny(many, "train.steps=3", *steps))
    train(tiny(many, "train.steps=4", *steps, *shared), 2)
    assert_alike(one, many)
    whole, parts = (folder / "run" / "checkpoints" / "step_000004" for folder in (one, many))
    assert (whole / "config.json").read_text() == (parts / "config.json").read_text()
    assert (whole / "generation_config.json").read_text() == (parts / "generation_config.json").read_text()
    for file in ("model.safetensors", "ema.safetensors"):
        expected, found = load_file(whole / file), load_file(parts / file)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], x, atol=1e-4) for name, x in expected.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=fsdp2"], "hardware.shard=all: there is one process; start with torchrun"),
        (["hardware=hsdp"], "hardware.shard=node: there is one process; start with torchrun"),
        (["hardware=ddp"], "hardware.shard=1: there is one process; start with torchrun"),
        (["hardware.shard=some"], "hardware.shard='some' must be all, node, or a number of processes"),
        (["hardware.shard=0"], "hardware.shard=0 must be all, node, or a number"),
        (
            ["hardware=fsdp2", "hardware.mixed_precision=fp16"],
            "hardware.mixed_precision='fp16' cannot scale the loss of shared parameters; use bf16",
        ),
    ],
)
def test_one_process_shares_nothing(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train(tiny(tmp_path, "train.steps=1", *overrides))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("shard", "processes", "here", "message"),
    [
        (3, 8, 4, "hardware.shard=3: 8 processes cannot be divided into groups of 3; choose a divisor"),
        (16, 8, 4, "hardware.shard=16: 8 processes cannot be divided into groups of 16; choose a divisor"),
        ("node", 8, 8, "hardware.shard=node: one node has all 8 processes and no copies; use hardware=fsdp2"),
        ("node", 8, None, "hardware.shard=node: the launcher does not tell the processes of a node"),
    ],
)
def test_groups_that_do_not_fit_are_named(monkeypatch, shard, processes, here, message):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    hardware = HardwareSettings("cpu", "no", False, "auto", shard=shard)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        hardware.sharers(processes)
    if here == 4:
        assert [replace(hardware, shard=s).sharers(8) for s in (None, "all", "node", 2)] == [1, 8, 4, 2]


def eager_graphs(patch):
    patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_routers_that_some_rows_teach_learn_as_on_one_process(tmp_path, compiled):
    """Documents are in the row of one process, or in none: then the weights do not even decay. They do if the loss of
    a choice among one document has zeros as its gradient.
    """
    facts, beside = ("data=facts", "data.seq_len=64"), "+data.sources.mqar={kind: mqar, weight: 1.0, num_pairs: 4, "
    beside += "gap: 0, num_keys: 32, num_values: 32}"
    sources = {
        "three": (*facts, "data.sources.facts.num_documents=3", beside),
        "one": (*facts, "data.sources.facts.num_documents=1", beside),
        "none": ("data=mqar", "data.seq_len=64"),
    }
    kept = [option for option in TINY if "mqar" not in option and "seq_len" not in option]
    options = "memory=msa", "optim=adamw", "optim.weight_decay=5.0", "train.steps=2", "train.batch_size=2"

    def runs(folder):
        return [config(folder / name, *of, *options, small=kept) for name, of in sources.items()]

    shared = runs(tmp_path / "two")
    for cfg in shared:
        cfg.hardware.shard, cfg.hardware.compile = "all", compiled
    train(runs(tmp_path / "one"))
    train(shared, 2, eager_graphs)
    for name in sources:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert figures(two) == pytest.approx(figures(one), rel=1e-6), name
        first, second = (load_file(checkpoint.latest(of / "run") / "model.safetensors") for of in (one, two))
        for weight in first:
            assert torch.allclose(second[weight], first[weight], atol=1e-5, rtol=1e-3), (name, weight)


def killed_in_the_second_save(patch):
    real, saves = Saver._complete, []

    def complete(self, written, into):
        saves.append(written)
        if len(saves) == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, written, into)

    patch.setattr(Saver, "_complete", complete)


def test_a_process_that_dies_while_it_saves_loses_that_save_alone(tmp_path):
    """The other process ends too; one process goes on from the save before, to the same losses."""
    options = ("memory=none", "match.parameters=null", "train.steps=3")
    train(tiny(tmp_path / "one", *options))
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        train(tiny(tmp_path, *options, "hardware=fsdp2", "train.save_every=1"), 2, killed_in_the_second_save)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.newest_whole(tmp_path / "run") == (folder / "step_000001", [])
    train(tiny(tmp_path, *options))
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]
    assert_alike(tmp_path / "one", tmp_path)


def test_an_earlier_checkpoint_has_no_later_state(tmp_path):
    """A run that goes back leaves no state of optimisers from the steps after."""
    model = build("none", torch.float32)
    model.register_buffer("count", torch.ones(2))
    optimizers = build_optimizers(model, OptimSettings(**OmegaConf.to_container(composed().optim)))
    state, before = State(model, optimizers), copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state.tensors(), checkpoint_id=str(tmp_path / files.PARTS), no_dist=True)
    model.count += 1
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert all(optimizer.state for optimizer in optimizers)
    state.load(tmp_path)
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.fixture
def one_sharer(tmp_path):
    """A group of one process, and the content of its checkpoint."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield checkpoint.Beside(byte_tokenizer(), {"step": 1, "optimizers": []}, {checkpoint.FACTS: '{"step": 1}'})
    dist.destroy_process_group()


def test_a_full_disk_is_one_line(tmp_path, one_sharer, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write)
    message = r"step_000001: could not be written \(a process's part: .*No space left on device\); free disk space"
    with pytest.raises(OSError, match=message), Saver(State(build("none", torch.float32), [])) as saver:
        saver.save(tmp_path, 1, one_sharer, 1)
    assert not [*(tmp_path / "checkpoints").iterdir()]


def test_a_process_that_fails_alone_does_not_wait_for_others(tmp_path, one_sharer, monkeypatch):
    """Its thread does, and completes the save."""
    real, waits = dist.barrier, []

    def barrier(*group):
        waits.append(threading.current_thread() is threading.main_thread())
        real(*group)

    monkeypatch.setattr(dist, "barrier", barrier)
    with pytest.raises(ZeroDivisionError), Saver(State(build("none", torch.float32), [])) as saver:
        saver.save(tmp_path, 1, one_sharer, 1)
        _ = 1 / 0
    assert waits == [False]
    assert checkpoint.newest_whole(tmp_path)[0].name == "step_000001"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ("train.gradient_checkpointing=true", 1e-6),
        ("hardware.mixed_precision=bf16", 2e-3),
        ("hardware.compile=true", 1e-5),
    ],
)
def test_options_of_one_process_hold_for_sharers(tmp_path, option, tolerance):
    # One process compiles everything at once, which other tests cover.
    train(tiny(tmp_path / "one", "train.steps=5", *(() if "compile" in option else (option,))))
    train(tiny(tmp_path / "two", "train.steps=5", "hardware=fsdp2", option), 2)
    assert figures(tmp_path / "two") == pytest.approx(figures(tmp_path / "one"), rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["hardware=fsdp2", "hardware.shard=2"])
@pytest.mark.parametrize("memory", ["titans_mag", "msa", "gated_delta_net", "mom"])
def test_four_processes_go_on_as_two_and_as_one(tmp_path, memory, sharing):
    """Four share one model, or two share each of two."""
    options, many = (f"memory={memory}", "optim.schedule_steps=20"), tmp_path / "many"
    train(tiny(tmp_path / "one", *options, "train.steps=20"))
    train(tiny(many, *options, "train.steps=10", sharing), 4)
    train(tiny(many, *options, "train.steps=15", "hardware=fsdp2"), 2)
    train(tiny(many, *options, "train.steps=20"))
    for name, tolerance in {"loss": 1e-6, "grad_norm": 1e-5}.items():
        assert figures(many, name) == pytest.approx(figures(tmp_path / "one", name), rel=tolerance), name
