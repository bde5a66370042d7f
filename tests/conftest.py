"""Helpers of all tests: configurations, composed in the way of the scripts, and small models."""

import copy
import functools
import gc
import importlib
import io
import os
import random
import runpy
import signal
import sys
import tracemalloc
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

# Set before anything imports Triton: without a GPU that can run its kernels, they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from accelerate.state import AcceleratorState
from hydra._internal.hydra import Hydra
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from memlm import MemLMConfig, MemLMForCausalLM, cli, plugins
from memlm.memory.rows import Rows
from memlm.memory.state import named

# nohup, and a shell that starts the tests in the background, ignore signals, and processes inherit this.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Before a run, Hydra composes everything once more for hydra.mode, which no YAML sets.
Hydra.get_mode = lambda *_, **__: None

ROOT = Path(__file__).parent.parent
MEMORIES = sorted(path.stem for path in (ROOT / "configs" / "memory").glob("*.yaml"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Before pytest leaves out what is slow."""
    for item in items:
        if item.get_closest_marker("kinds") and item.callspec.params["variant"][1]:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Objects of imports and collection stay: the garbage collector need not visit half a million objects again."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process, whatever the precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Drawing is a quarter of an evaluation; tests with the marker ``pictures`` draw."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(Figure, "savefig", lambda _, to, **__: to.touch() if isinstance(to, Path) else None)


@pytest.fixture(autouse=True)
def seeded():
    """A test's random numbers do not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_stays_switched_on():
    """A test that leaves tracing or another precision behind changes the tests after it, or makes them slow."""
    before = switches()
    yield
    assert not tracemalloc.is_tracing() and torch.is_grad_enabled()
    assert switches() == before


def switches():
    return (
        sys.gettrace(),
        sys.getprofile(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def composed(*overrides: str, config: str = "train"):
    """The configuration that ``python <config>.py *overrides`` runs."""
    return cli.composed(ROOT / "configs", config, overrides)


def model_config(memory: str = "titans_mag", **settings) -> MemLMConfig:
    """``model=tiny memory=...`` with settings of the memory changed."""
    model = copy.deepcopy(_tiny(memory))
    model["mixers"]["memory"] |= settings
    return MemLMConfig.from_hydra(model)


@functools.cache
def _tiny(memory: str) -> dict:
    # Composing takes longer than most tests.
    own = memory in MEMORIES
    plain = composed("model=tiny", f"memory={memory if own else 'none'}", "match.parameters=null")
    model = OmegaConf.to_container(plain.model, resolve=True)
    if not own:
        model["mixers"]["memory"] = {"kind": memory}
    return model


def build(memory: str = "titans_mag", dtype=torch.float64, seed: int = 0, **settings) -> MemLMForCausalLM:
    """A tiny model at its initialisation, with all parameters moved off the points where they are symmetric."""
    torch.manual_seed(seed)
    model = MemLMForCausalLM(model_config(memory, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.to(dtype).eval()


def variants() -> list:
    """Every YAML of configs/memory, the ``VARIANTS`` (changed settings) of tests/memory/test_<kind>.py, and the
    memories of installed packages.
    """
    found = [pytest.param((name, {}), id=name) for name in (*MEMORIES, *plugins.names("memlm.memory"))]
    for path in sorted((ROOT / "tests" / "memory").glob("test_*.py")):
        if path.stem == "test_contract":
            continue
        module = importlib.import_module(f"tests.memory.{path.stem}")
        for name, settings in getattr(module, "VARIANTS", []):
            label = "-".join(f"{key}={value}" for key, value in settings.items())
            found.append(pytest.param((name, settings), id=f"{name}-{label}"))
    return found


def run_script(name, *arguments):
    """Exit code and output of a script, run in this process: another Python would take longer to start."""
    script, said = ROOT / "scripts" / name, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        # As Python does; some scripts import others.
        patch.syspath_prepend(str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as done:
            # As Python exits: a text means an error.
            return (
                (1, f"{said.getvalue()}{done.code}\n") if isinstance(done.code, str) else (done.code, said.getvalue())
            )
    return 0, said.getvalue()


def convert(*arguments):
    return run_script("convert_checkpoint.py", *arguments)


def same_state(a, b) -> bool:
    """Whether two states have equal keys and, to the bit, equal tensors."""
    a, b = named(a), named(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stands(dict):
    """A mixer's state and the positions of its rows, which a cache keeps too."""

    def __init__(self, state, position, start=None):
        super().__init__(state)
        self.position, self.start = position, start

    def like(self, state):
        """Another state of rows with the same positions."""
        return Stands(state, self.position, self.start)


def step(mixer, x, state=None, **facts):
    """Call a mixer as the decoder does. ``facts`` are arguments of ``Rows``; the state is a ``Stands``."""
    if isinstance(state, Stands):
        facts = {"before_B": state.position, "start": state.start, **facts}
    rows = Rows.of(x, **facts)
    state = mixer.init_state(len(x), x.device, x.dtype) if state is None else state
    out = mixer(x, state, rows)
    return out._replace(state=Stands(out.state, rows.after_B, rows.next_start))
