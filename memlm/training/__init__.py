"""Training; ``run(cfg)`` is the entry of train.py.

Files:

    loop                the loop: steps, validation, checkpoints
    objective           a batch becomes a loss here; scores of validation
    optim               Muon, AdamW, the schedule
    settings            the run's settings, checked
    checkpoint          checkpoints that are whole or absent
    resume              whether a checkpoint belongs to the run that is asked for
    interrupt           signals
    sweep               members of a sweep, each a process
    tracking            metrics, in ``metrics.jsonl`` and elsewhere
    display             the screen
"""

from memlm.training.loop import run

__all__ = ["run"]
