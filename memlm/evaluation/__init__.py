"""Evaluation; ``run(cfg)`` is the entry of evaluate.py.

Files:

    run                 the command
    subject             a model, and its checkpoint's information
    data                test data in the tokens of each model
    measures            one file per measure: recall, needles, banks, text
    ablation            the model without its long-term memory
    page                tables, and the content of the HTML page
    plots               pictures
    report              the HTML page
"""

from memlm.evaluation.run import run

__all__ = ["run"]
