"""Training: ``run(cfg)`` is what train.py calls."""

from memlm.training.loop import run

__all__ = ["run"]
