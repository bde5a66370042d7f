"""Tables on narrow terminals, and words that stay inside their pictures."""

import io
import itertools

import matplotlib.pyplot as plt
import pytest
from rich.console import Console

from memlm.evaluation import plots
from memlm.evaluation.screen import shown
from memlm.evaluation.tasks import View, tasks

INTERVAL = "0.996 (0.886 to 1.000)"
TABLES = {
    "intervals": (
        ["share right (95 % interval), by length", "128", "512", "2048", "8192"],
        [["mqar, titans_mag (memory off)", *[INTERVAL] * 4], ["mqar, chance", "0.031", "0.032", "0.033"]],
    ),
    "long names": (
        ["A key is written again: share right, by rewrites", "0", "1", "2"],
        [["knows the key's values, not their order", *[INTERVAL] * 3]],
    ),
    "sizes": (
        ["model", "seeds", "tokens are", "parameters", "FLOPs a token", "tokens trained", "bytes of state"],
        [["titans_mag", "0, 1, 2", "byte", "195,654", "495,168", "3,686,400", "122,880"]],
    ),
    "no columns": (["alone"], [["a"], ["b"]]),
    "no rows": (["alone", "more"], []),
}


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_fits_the_terminal_with_every_cell_whole(table, width):
    header, rows = TABLES[table]
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    for part in shown(header, rows, width):
        console.print(part)
    text = console.file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(width, len(header[0])) and "…" not in text
    for row in rows:
        for cell in row[1:]:
            # A cell is on one line unless it is wider than all that the names leave.
            assert any(cell in line for line in lines) or len(cell) > width - width // 2 - 2
    words = text.split()
    assert all(word in words for name in header for word in name.split())
    if width == 200:
        assert all(sum(line.startswith(row[0]) for line in lines[-1 - len(rows) :]) == 1 for row in rows)
        assert len(lines) <= len(rows) + 5
    if width == 80 and table == "long names":
        # Two columns beside each other.
        assert max(line.count(INTERVAL) for line in lines) == 2


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("models", [1, 3])
def test_titles_of_a_heat_map_stay_inside_it_and_apart(models, columns):
    """A long title with its floors, and models with policies in their names."""
    (task,) = tasks({"saturation": {}}, [256], 1)
    floors = {"chance": 0.031, "the most frequent of all values": 0.125, "a reader of the last pairs alone": 0.5}
    view = View(across="age of the pair", down="pairs stored", floors=floors)
    cell = {"value": 0.3, "low": 0.2, "high": 0.4}
    grid = [{**cell, "down": down, "across": across} for down in ("1", "2", "16") for across in range(columns)]
    figure = plots.asked(task, view, {f"titans_mag_deep, keydiff, {i},536 bytes": grid for i in range(models)})
    figure.canvas.draw()
    (width, height), renderer = figure.canvas.get_width_height(), figure.canvas.get_renderer()
    titles = [figure._suptitle, *(axis.title for axis in figure.axes if axis.get_title())]
    assert len(titles) == 1 + models
    boxes = [title.get_window_extent(renderer) for title in titles]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    plt.close(figure)
