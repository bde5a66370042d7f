"""Needles over length and depth: places as the axis tells, draws of each cell, and tokens that a grid costs."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memlm.data import Passkey
from memlm.evaluation import plots
from memlm.evaluation.events import Read, run
from memlm.evaluation.measures.asked import cells
from memlm.evaluation.measures.needles import needles
from memlm.evaluation.tasks import Setting, tasks
from memlm.training.objective import Score
from tests.oracles import Guesser, Oracle, scores
from tests.test_ruler import TOKENIZERS


def grid(tokenizer, lengths, rows, seed=0, **settings):
    (task,) = tasks({"grid": settings}, lengths, rows)
    setting = Setting(tokenizer, seed)
    task.check(setting)
    return task, setting, list(task.streams(setting))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_needles_stand_where_the_axis_says(tokenizer):
    depths, found = [0, 10, 50, 90, 100], set()
    _, setting, streams = grid(TOKENIZERS[tokenizer], [3000, 4001], 2, depths=depths)
    for read, *asks in streams:
        length = asks[0].tag["length"]
        assert {len(read.ids) + len(ask.ids) + len(ask.answers[0]) for ask in asks} == {length}
        for depth, ask in zip(depths, asks, strict=True):
            assert ask.tag["depth"] == depth and len(ask.answers) == 5
            needle = np.concatenate([ask.ids, ask.answers[0]])
            windows = np.lib.stride_tricks.sliding_window_view(read.ids, len(needle))
            (place,) = np.nonzero((windows == needle).all(1))[0]
            found.add((setting.decode(ask.ids), setting.decode(ask.answers[0])))
            # Depth 0 is the first token of the text; at 100, a full stop alone stands between needle and question.
            behind = len(read.ids) - place - len(needle)
            assert depth or place == len(setting.start)
            assert depth < 100 or setting.decode(read.ids[-behind:]) == "."
            # Half of the longest sentence of the haystack.
            assert abs(place / (len(read.ids) - len(needle)) - depth / 100) <= 60 / len(read.ids), (depth, place)
    # Each cell has draws of its own.
    assert len(found) == 4 * 5


def test_an_oracle_is_right_and_a_guesser_has_chance():
    task, _, streams = grid(TOKENIZERS["byte"], [1000], 40, depths=[0, 50, 100])
    assert all(r["exact"] for r in scores(Oracle, streams[:3], 259))
    guessed = [r["correct"] for r in scores(Guesser, [stream[1:] for stream in streams], 259)]
    assert np.mean(guessed) == pytest.approx(task.floors()["chance"], abs=0.12)


def test_a_grid_costs_little_more_than_its_texts_read_once():
    class Blank(Oracle):
        def __call__(self, ids_BT, keep=1):
            self.tokens += ids_BT.shape[1]
            return torch.zeros(len(ids_BT), keep, self.vocabulary)

    lengths = [1280 * 2**i for i in range(10)]
    task, _, streams = grid(TOKENIZERS["byte"], lengths, 1, depths=list(range(0, 100, 10)))
    read = []
    records = list(run(lambda: Blank({}, 259), streams, read.append))
    assert len(records) == 100 and sum(read) <= 3 * lengths[-1]
    figure = plots.asked(task, task.views()[0], {"blank": cells(task.views()[0], records)})
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [str(d) for d in range(0, 100, 10)]
    assert len(axis.texts) == 100 and {text.get_text() for text in axis.texts} == {"0.10"}


@pytest.mark.parametrize(
    ("settings", "lengths", "line"),
    [
        ({"depths": [0, 1, 2]}, [4096], r"lengths=4096 is too short for depths=\[0, 1, 2\].* need [\d,]+ tokens"),
        ({"depths": [50]}, [4096], r"depths=\[50\] must be two or more different numbers in 0\.\.100"),
        ({"depths": [0, 101]}, [4096], "depths="),
    ],
)
def test_mistakes_are_a_line(settings, lengths, line):
    with pytest.raises(ValueError, match=line):
        grid(TOKENIZERS["byte"], lengths, 1, **settings)


def test_depths_are_numbers_of_a_heat_map_and_words_are_lines():
    (task,) = tasks({"grid": {}}, [2048], 1)
    cell = {"across": 2048, "value": 0.5, "low": 0.4, "high": 0.6}
    for downs, maps in (("0", "100"), True), (("first", "last"), False), ((None,), False), (tuple("abcde"), True):
        figure = plots.asked(task, task.views()[0], {"one": [{**cell, "down": down} for down in downs]})
        assert bool(figure.axes[0].images) == maps


def test_read_events_hold_no_question():
    _, setting, streams = grid(TOKENIZERS["byte"], [2048], 1)
    text = setting.decode(streams[0][0].ids)
    assert len(re.findall(r"The magic number of [a-z]+-[a-z]+ is \d{7}\.", text)) == 5
    assert sum(isinstance(event, Read) for event in streams[0]) == 1


def test_each_cell_of_the_needle_map_has_rows_of_its_own(monkeypatch):
    seen = []

    def scored(model, batches, names, *_):
        seen.extend(row.tobytes() for batch in batches for row in batch.labels.numpy())
        return {name: Score(correct=1, tokens=2) for name in names}

    monkeypatch.setattr("memlm.evaluation.measures.recall.score", scored)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=259), device="cpu")
    found = needles(model, Passkey(), 0, [128, 256], [0.0, 0.5, 1.0], 8)
    assert [(cell.length, cell.depth) for cell in found] == [(n, d) for n in (128, 256) for d in (0.0, 0.5, 1.0)]
    # A cell repeats no other's key and digits, which are the labels.
    assert len(seen) == 6 * 8 == len({*seen})
