"""The ``optim`` and ``train`` groups as dataclasses: types and ranges are checked before anything is built."""

from dataclasses import dataclass

from memlm.memory.base import require


@dataclass(frozen=True)
class OptimSettings:
    """lr, muon_lr: peaks for AdamW and Muon; final_lr: share of the peak at the last step; clip: gradient norm."""

    name: str
    lr: float
    muon_lr: float | None
    betas: list
    weight_decay: float
    warmup_steps: int
    final_lr: float
    clip: float

    def __post_init__(self) -> None:
        require(self.name in ("adamw", "muon"), f"name={self.name!r} is unknown; use adamw or muon")
        require(self.name != "muon" or self.muon_lr is not None, "muon_lr=null; give Muon a learning rate")
        for name in ("lr", "muon_lr", "clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be above 0")
        numbers = all(isinstance(b, float) and 0 <= b < 1 for b in self.betas)
        require(len(self.betas) == 2 and numbers, f"betas={list(self.betas)} must be two numbers in [0, 1)")
        for name in ("weight_decay", "warmup_steps", "final_lr"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class TrainSettings:
    """steps: optimiser steps; batch_size: rows of one forward of one process; lm_weight: of the language model's loss,
    beside the mixers' own; *_every: in steps; validation_batches: batches of each validation; keep: checkpoints that
    stay; init_from: the run, or the checkpoint's folder, whose weights a new run starts with.
    """

    steps: int
    batch_size: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    lm_weight: float
    init_from: str | None
    log_every: int
    validate_every: int
    validation_batches: int
    save_every: int
    keep: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("gradient_checkpointing", "init_from", "lm_weight"):
                require(value >= 1, f"{name}={value} must be a whole number, at least 1")
        require(self.lm_weight >= 0, f"lm_weight={self.lm_weight} must not be negative")
