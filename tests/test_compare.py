"""Runs side by side: intervals, seeds, differences from the reference."""

import math
from dataclasses import replace

import numpy as np
import pytest

from memlm.evaluation.compare import _asked_otherwise, compared
from memlm.evaluation.figures import Figure, Topic
from memlm.evaluation.runs import Runs
from memlm.evaluation.statistics import bootstrap, of_seeds, paired, unpaired, wilson

SHARES = Topic("task", "A task", "share right", "length", floors={"chance": {64: 0.25}})


def row(name: str, *seeds: list[float], texts: str = "texts", size: int = 2000) -> Runs:
    """A row whose seeds have read the same texts, with these scores."""
    found = {}
    for seed, scores in enumerate(seeds):
        share = float(np.mean(scores))
        units = {(texts, i): (score, 1.0) for i, score in enumerate(scores)}
        figure = Figure(SHARES, None, 64, share, *wilson(share, len(scores)), len(scores), units, size)
        found[seed] = {figure.place: figure}
    facts = {seed: {"tokenizer": "byte", "parameters": 10, "state_bytes": 1} for seed in found}
    return Runs(name, {"kind": name}, facts, found, {}, name)


def cells(*rows: Runs) -> list[dict]:
    return [one["cells"][0] for one in compared(rows)["rows"]]


def test_a_run_does_not_differ_from_itself():
    scores = np.random.default_rng(0).random(40)
    pairs = list(zip(scores, np.arange(1.0, 41.0), strict=True))
    assert paired(pairs, pairs) == (0.0, 0.0, 0.0)
    _, same = cells(row("a", [*scores]), row("b", [*scores]))
    difference = same["difference"]
    assert (difference["value"], difference["low"], difference["high"]) == (0.0, 0.0, 0.0)
    assert difference["paired"] and not difference["marked"]


def test_pairs_see_a_difference_that_is_small_beside_that_of_texts():
    scores = np.random.default_rng(0).random(200) * 0.8
    a, b = row("a", [*scores]), row("b", [*(scores + 0.01 + 0.01 * (np.arange(200) % 2))])
    difference = cells(a, b)[1]["difference"]
    assert difference["value"] == pytest.approx(0.015) and 0.01 < difference["low"] < difference["high"] < 0.02
    assert difference["marked"] and difference["texts"] == 200
    other = cells(a, row("b", [*(scores + 0.015)], texts="others"))[1]["difference"]
    assert not other["paired"] and other["low"] < 0 < other["high"] and not other["marked"]


def test_weighted_pairs_are_the_bootstrap_of_their_difference():
    rng = np.random.default_rng(1)
    x, y, w = rng.random(30), rng.random(30), rng.integers(1, 9, 30).astype(float)
    value, *interval = paired([*zip(x, w, strict=True)], [*zip(y, w, strict=True)])
    assert value == pytest.approx(np.average(x - y, weights=w))
    assert interval == pytest.approx(bootstrap(x - y, w, draws=2000))


def test_intervals_are_the_published_ones():
    # Newcombe (1998), table II, method 10, example (a): 56/70 - 48/80.
    found = unpaired(56 / 70, wilson(56 / 70, 70), 48 / 80, wilson(48 / 80, 80))
    assert found == pytest.approx((0.0524, 0.3339), abs=1e-4)
    # Student's t: 4.3027 at 2 degrees of freedom, 2.0452 at 29.
    assert of_seeds([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    many = [*np.random.default_rng(0).standard_normal(30)]
    half = (of_seeds(many)[1] - of_seeds(many)[0]) / 2
    assert half == pytest.approx(2.0452 * np.std(many, ddof=1) / 30**0.5, rel=0.01)
    assert all(map(math.isnan, of_seeds([1.0, 2.0])))


def test_a_cell_is_a_mean_over_seeds_and_a_difference_within_their_noise_has_no_mark():
    good, bad = [1.0] * 30 + [0.0] * 10, [0.0] * 30 + [1.0] * 10
    a, b, c = cells(row("a", good, bad, good), row("b", good, good, good), row("c", good, size=4000))
    assert (
        a["value"] == pytest.approx(7 / 12)
        and a["over"] == "seeds"
        and a["seeds"] == {"0": 0.75, "1": 0.25, "2": 0.75}
    )
    low, high = of_seeds([0.75, 0.25, 0.75])
    assert low < 0 and high > 1 and (a["low"], a["high"]) == (0.0, 1.0)
    # Over texts alone it would be seen.
    assert b["difference"]["low"] > 0 and b["difference"]["over_seeds"][0] < 0 and not b["difference"]["marked"]
    assert c["over"] == "texts" and c["texts"] == 40 and (c["low"], c["high"]) == pytest.approx(wilson(0.75, 40))
    assert c["above_chance_per_kb"] == pytest.approx(0.5 / 4) and b["above_chance_per_kb"] == pytest.approx(0.5 / 2)
    # Two seeds of each that overlap.
    _, two = cells(row("a", good, bad), row("b", good, good))
    assert two["difference"]["low"] > 0 and not two["difference"]["marked"]


def test_a_note_names_settings_in_which_evaluations_differ():
    rows = [row("a", [1.0]), row("b", [1.0])]
    assert _asked_otherwise(rows) == []
    (figure,) = rows[1].seeds[0].values()
    rows[1].seeds[0][figure.place] = replace(figure, topic=replace(SHARES, settings={"gap": 0.5}))
    assert _asked_otherwise(rows) == ["task was not measured alike in all runs: gap: None, 0.5"]
