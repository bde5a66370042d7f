"""Small runs for tests: their configuration and their files."""

import json
import os
import signal

import pytest

from memlm.training import loop, run
from memlm.training.interrupt import Stopped
from memlm.training.settings import RunSettings
from tests.conftest import composed

SMALL = (
    "data=recall",
    "train.batch_size=4",
    "train.log_every=1",
    "train.validate_every=4",
    "train.validation_batches=1",
    "train.save_every=3",
    "model.hidden_size=32",
    "optim.warmup_steps=2",
)
# As small as a run can be.
SMALLEST = (
    *SMALL,
    "data=mqar",
    "data.seq_len=8",
    "data.sources.mqar.num_pairs=2",
    "memory=none",
    "model.hidden_size=8",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=1",
)


def config(folder, *overrides, small=SMALL):
    # These interpolations are given, because only a Hydra job resolves them.
    return composed(*small, f"run_dir={folder}/run", f"data.cache_dir={folder}/cache", *overrides)


def trainer(cfg):
    settings = RunSettings.of(cfg)
    return loop.Trainer(settings, loop.build_accelerator(settings.hardware))


def stopped(cfg, after):
    """Train until a SIGTERM in step ``after``; returns the signal of ``Stopped``."""
    real = loop.Trainer._one_step

    def step_then_stop(self, logged):
        out = real(self, logged)
        if self.step == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as caught:
        patch.setattr(loop.Trainer, "_one_step", step_then_stop)
        run(cfg)
    return caught.value.number


def figures(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}
