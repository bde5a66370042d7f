"""Pictures of many runs: figures of different units have axes of their own, and rows stay within their column."""

import itertools

import matplotlib.pyplot as plt
import pytest

from memlm.evaluation import plots


def topic(**about):
    return {"title": "Pairs", "label": "pairs", "across": "length", "share": True, "floors": {}, **about}


def cell(across, value, size=1000):
    return {"across": across, "value": value, "low": value, "high": value, "bytes": size, "down": None}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_totals_have_a_panel_each():
    rows = {f"row {i}": [cell("pairs", 3.0 + i), cell("KB", 400.0 * i)] for i in range(20)}
    figure = plots.compared(topic(across="", share=False), rows)
    assert [axis.get_title() for axis in figure.axes] == ["pairs", "KB"]
    assert all(axis.get_xlim()[1] < 600 * 20 for axis in figure.axes) and figure.axes[0].get_xlim()[1] < 30


def test_many_rows_stay_within_their_column_and_labels_apart():
    rows = {f"row {i}": [cell(x, 0.5, 1000 * 1.3**i) for x in ("1x", "2x")] for i in range(20)}
    figure = plots.compared(topic(), rows)
    left, right = figure.axes
    places = [float(x) for line in left.lines for x in line.get_xdata()]
    assert {round(x) for x in places} == {0, 1} and all(abs(x - round(x)) < 0.45 for x in places)
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in right.get_xticklabels(which="both") if t.get_text()]
    boxes = sorted(
        (box for box in boxes if right.bbox.x0 <= (box.x0 + box.x1) / 2 <= right.bbox.x1), key=lambda b: b.x0
    )
    assert len(boxes) > 2 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
