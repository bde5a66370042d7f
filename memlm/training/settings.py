"""The settings of a run, as dataclasses. Types and ranges are checked before anything is built."""

import importlib.util
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from memlm.memory.base import PACKAGE
from memlm.settings import build_config, check_type, require, suggest
from memlm.training import lengths, trainable
from memlm.training.budget import in_steps

# Names of trackers, and what pip installs for them.
TRACKERS = {"wandb": "wandb", "tensorboard": "-e '.[tensorboard]'"}
# The largest number of steps, rows or batches; more is a typing mistake.
_MOST = 10**9


@dataclass(frozen=True)
class OptimSettings:
    """lr, muon_lr: peak learning rates of AdamW and Muon
    schedule: cosine, falling from the warm-up on; or wsd, constant until the last share ``decay`` of the steps, then
        falling linearly
    final_lr: share of the peak at the last step, or from ``schedule_steps`` on if set
    clip: largest gradient norm
    """

    name: str
    lr: float
    muon_lr: float | None
    betas: list
    weight_decay: float
    warmup_steps: int
    final_lr: float
    clip: float
    schedule_steps: int | None = None
    schedule: str = "cosine"
    decay: float = 0.2

    def __post_init__(self) -> None:
        require(self.name in ("adamw", "muon"), f"name={self.name!r} is unknown; use adamw or muon")
        require(self.name != "muon" or self.muon_lr is not None, "muon_lr=null; give Muon a learning rate")
        known = self.schedule in ("cosine", "wsd")
        require(known, f"schedule={self.schedule!r} is unknown; use cosine or wsd (warm-up, stable, decay)")
        require(
            0 < self.decay <= 1, f"decay={self.decay} must lie in (0, 1]: the share of the steps at the end of wsd"
        )
        for name in ("lr", "muon_lr", "clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be above 0")
        numbers = all(isinstance(b, float) and 0 <= b < 1 for b in self.betas)
        require(len(self.betas) == 2 and numbers, f"betas={list(self.betas)} must be two numbers in [0, 1)")
        for name in ("weight_decay", "warmup_steps", "final_lr"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("lr", "muon_lr", "weight_decay", "final_lr"):
            value = getattr(self, name)
            require(value is None or math.isfinite(value), f"{name}={value} must be a finite number")
        require(self.warmup_steps <= _MOST, f"warmup_steps={self.warmup_steps} must be at most {_MOST:,}")
        steps = self.schedule_steps
        require(steps is None or 1 <= steps <= _MOST, f"schedule_steps={steps} must lie in [1, {_MOST:,}], or be null")


@dataclass(frozen=True)
class TrainSettings:
    """steps: optimiser steps
    batch_size: rows of one step, over all processes
    micro_batch_size: the most rows of one forward on one device; null: all rows of the device
    gradient_checkpointing: for all layers, for none, or a list of mixers' names and numbers of layers
    lm_weight, z_loss: weights of the language model's loss and of its z-loss, beside the mixers' losses
    log_every, validate_every, save_every: intervals in steps
    validation_batches: batches of each validation
    keep: number of checkpoints that are kept
    init_from: the run, or checkpoint folder, whose weights a new run starts with
    lengths: a curriculum of lengths, [[length, tokens], ...] (``memlm.training.lengths``); null: all rows are whole
    truncate: tokens through which gradients flow back; rows are read in pieces of this length, with the memory going
        on; null: whole rows
    carry: whether texts longer than a row go on in the next step, with their memory (``memlm.training.carried``)
    ema: decay of the moving average of the weights; null: none
    trainable: the parameters that are trained (``memlm.training.trainable``); null: all
    on_nan: stop, skip or rewind after a step that is not finite (``memlm.training.guard``)
    spike: a loss above so many times the median of the last ones counts as not finite; null: none does
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None
    gradient_checkpointing: bool | list
    lm_weight: float
    init_from: str | None
    trainable: str | list | dict | None
    log_every: int
    validate_every: int
    validation_batches: int
    save_every: int
    keep: int
    z_loss: float = 0.0
    ema: float | None = None
    lengths: list | None = None
    truncate: int | None = None
    carry: bool = False
    on_nan: str = "stop"
    spike: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type in (int, int | None) and value is not None:
                # The host keeps lists of rows, so their number is limited further.
                most = 10**6 if name == "batch_size" else _MOST
                require(1 <= value <= most, f"{name}={value} must be a whole number in [1, {most:,}]")
        chosen = self.gradient_checkpointing
        named = isinstance(chosen, bool) or (chosen and all(type(x) in (str, int) for x in chosen))
        require(
            bool(named), f"gradient_checkpointing={chosen} must be true, false, or names of mixers and layers' numbers"
        )
        for name in ("lm_weight", "z_loss"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name}={value} must not be negative, and be finite")
        require(
            self.ema is None or 0 < self.ema < 1, f"ema={self.ema} must lie between 0 and 1, such as 0.999, or be null"
        )
        known = self.on_nan in ("stop", "skip", "rewind")
        require(known, f"on_nan={self.on_nan!r} is unknown; use stop, skip or rewind")
        good = self.spike is None or 1 < self.spike < math.inf
        require(good, f"spike={self.spike} must be above 1, such as 3, or be null")
        lengths.check(self.lengths or [])
        trainable.check(self.trainable)

    def forwards(self, processes: int) -> int:
        """Forwards of one process in a step. Raises ValueError if the rows cannot be divided equally among
        processes.
        """
        require(
            self.batch_size % processes == 0,
            f"train.batch_size={self.batch_size} rows of a step cannot be shared equally by {processes} processes; "
            "make it a multiple of them",
        )
        rows = self.batch_size // processes
        most = self.micro_batch_size or rows
        return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most)


@dataclass(frozen=True)
class HardwareSettings:
    """See configs/hardware/auto.yaml; ``kernels`` is checked by the ops themselves.

    shard: the number of processes that share one copy of the parameters, ``all``, or ``node``; 1: each has all; null:
        the same, and one process may run alone
    """

    device: str
    mixed_precision: str
    compile: bool
    kernels: str
    sequence_parallel: int = 1
    shard: int | str | None = None

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), f"device={self.device!r} is unknown; use auto, cpu or cuda")
        precisions = ("auto", "no", "bf16", "fp16")
        known = self.mixed_precision in precisions
        require(known, f"mixed_precision={self.mixed_precision!r} is unknown; use auto, no, bf16 or fp16")
        size = self.sequence_parallel
        require(1 <= size <= _MOST, f"sequence_parallel={size} must be at least 1, the number of processes of a row")
        known = self.shard in (None, "all", "node") or (isinstance(self.shard, int) and self.shard >= 1)
        require(known, f"shard={self.shard!r} must be all, node, or a number of processes; null for none")
        half = self.shard not in (None, 1) and self.mixed_precision == "fp16"
        require(not half, "mixed_precision='fp16' cannot scale the loss of shared parameters; use bf16")

    def sharers(self, processes: int) -> int:
        """The number of processes that share one copy of the parameters.

        Raises ValueError, with a fix, if this many processes cannot do as asked.
        """
        if self.shard is None:
            return 1
        asked, start = f"hardware.shard={self.shard}", "start with torchrun --nproc_per_node N, or use hardware=auto"
        require(processes > 1, f"{asked}: there is one process; {start}")
        here = os.environ.get("LOCAL_WORLD_SIZE")
        told = self.shard != "node" or here is not None
        require(told, f"{asked}: the launcher does not tell the processes of a node (LOCAL_WORLD_SIZE); use a number")
        sharers = int(here or 0) if self.shard == "node" else processes if self.shard == "all" else int(self.shard)
        require(
            processes % sharers == 0,
            f"{asked}: {processes} processes cannot be divided into groups of {sharers}; choose a divisor",
        )
        alone = self.shard == "node" and sharers == processes
        require(not alone, f"{asked}: one node has all {processes} processes and no copies; use hardware=fsdp2")
        return sharers


@dataclass(frozen=True)
class TrackerSettings:
    """name: none, one tracker, or a list of them"""

    name: str | list
    project: str | None

    def __post_init__(self) -> None:
        for name in self.names:
            require(name in TRACKERS, f"name={name!r} is unknown; use none, {', '.join(TRACKERS)}, or a list")
            there = importlib.util.find_spec(name) is not None
            require(there, f"name={name}: {name} is not installed; pip install {TRACKERS[name]}, or leave it out")

    @property
    def names(self) -> list[str]:
        names = self.name if isinstance(self.name, list) else [self.name]
        return [name for name in dict.fromkeys(map(str, names)) if name != "none"]


@dataclass(frozen=True)
class RunSettings:
    """All groups of a run; ``config``: the same as plain values.

    dry_run: whether the run is planned instead; a number: for so many processes
    """

    config: dict[str, Any]
    name: str
    seed: int
    run_dir: Path
    train: TrainSettings
    optim: OptimSettings
    hardware: HardwareSettings
    tracker: TrackerSettings
    dry_run: bool | int

    @classmethod
    def of(cls, cfg: DictConfig) -> "RunSettings":
        """The settings of a composed configuration. Raises ValueError with the key, the value and a fix."""
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        types = (TrainSettings, OptimSettings, HardwareSettings, TrackerSettings)
        groups = ("train", "optim", "hardware", "tracker")
        known = ["name", "seed", "run_dir", "backbone", "model", "data", *groups]
        for key, value in config.items():
            require(key != "memory", f"memory={value!r} is read by nothing; {PACKAGE}")
            require(key in known, f"{key}={value!r} is not a setting; {suggest(str(key), known)}; {PACKAGE}")
        # The model group has it too.
        if (backbone := config.pop("backbone", None)) is not None:
            named = isinstance(config["model"], dict) and "backbone" in config["model"]
            require(named, f"backbone={backbone} is read by model=backbone; leave other choices of model=... out")
        missing = [key for key in ("name", "seed", "run_dir", "model", "data", *groups) if key not in config]
        require(not missing, f"{missing[:1]}: the configuration has none; restore configs/train.yaml")
        seed, run_dir, name = config["seed"], config["run_dir"], config["name"]
        check_type(name, str | int, "name")
        require(name != "", "name='' names no run; leave it out, or name one")
        check_type(seed, int, "seed")
        require(0 <= seed < 2**63, f"seed={seed} must lie in [0, 2**63)")
        named = isinstance(run_dir, str) and run_dir.strip()
        require(bool(named), f"run_dir={run_dir!r} names no folder; leave it out, or name one")
        config["train"] = in_steps(config["train"], config["data"])
        dry_run = config["train"].pop("dry_run", False)
        check_type(dry_run, bool | int, "train.dry_run")
        whole = isinstance(dry_run, bool) or 1 <= dry_run <= _MOST
        require(whole, f"train.dry_run={dry_run} must be true, false, or a number of processes")
        half, train = config["hardware"].get("mixed_precision") == "fp16", config["train"]
        judged = train.get("on_nan", "stop") != "stop" or train.get("spike") is not None
        fix = "set train.on_nan=stop and train.spike=null, or use bf16"
        require(not (half and judged), f"train.on_nan, train.spike: fp16 skips steps that overflow by itself; {fix}")
        built = (build_config(of, config[group], group) for of, group in zip(types, groups, strict=True))
        return cls(config, str(name), seed, Path(run_dir), *built, dry_run)
