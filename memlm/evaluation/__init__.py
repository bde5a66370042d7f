"""Evaluation; ``run(cfg)`` is the entry of evaluate.py.

Files:

    run                 the command
    subject             a model, and the facts of its checkpoint
    data                test data in the tokens of each model
    measures            one file per measure: recall, needles, banks, text
    ablation            the model with its memory silenced
    page                tables, and the content of the HTML page
    plots               pictures
    report              the HTML page
"""

from memlm.evaluation.run import run

__all__ = ["run"]
