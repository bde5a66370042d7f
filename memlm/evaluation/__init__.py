"""Evaluation: ``run(cfg)`` is what evaluate.py calls."""

from memlm.evaluation.run import run

__all__ = ["run"]
