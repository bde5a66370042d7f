"""Evaluation; ``run(cfg)`` is the entry of evaluate.py.

Files:

    run                 the command
    subject             a model, and its checkpoint's information
    data                test data in the tokens of each model
    measures            one file per measure: recall, needles, banks, text, tasks
    ablation            the model without parts, or with their outputs of another run
    parts               parts of an evaluation: kept as they complete, each may fail alone
    storage             folders and files of results
    progress            the progress bar
    events              one runner of tasks: texts that are read, and questions about them
    tasks               one file per task
    perplexity          text read in several ways
    statistics          intervals
    compare             many runs side by side
    runs                their results, found, read and grouped
    figures             a figure of any measure, in the form that is compared
    page                tables, and the content of the HTML page
    screen              tables on a terminal
    plots               pictures
    report              the HTML page
    insight, tokens     a look at memories while they read; a text in colours
"""

from memlm.evaluation.run import run

__all__ = ["run"]
