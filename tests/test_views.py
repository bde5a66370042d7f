"""Tables and pictures of tasks: several views of one reading, floors by column, figures of all records."""

import pytest

from memlm.evaluation import plots
from memlm.evaluation.measures.asked import Asked, _table, cells, totals
from memlm.evaluation.statistics import wilson
from memlm.evaluation.tasks import Task, View


class Twice(Task):
    name, title, note = "twice", "Twice", "A task of two views."

    def views(self):
        floors = {"chance": 0.25, "set": {2: 0.5, 4: 0.25}}
        by_age = View("age", None, ("latest", "stale"), "share", name="age")
        return [
            View("pairs", "kind", floors=floors),
            by_age,
            View("pairs", None, ("seconds",), "s", False, name="time"),
        ]

    def totals(self, records):
        return {"capacity": (12.0, 9.0, 15.0)}


def record(stream, pairs, age, correct):
    about = {"exact": correct == 1.0, "nats": 0.5, "seconds": 30.0, "bytes": 8, "read": 4}
    return {
        **{"stream": stream, "pairs": pairs, "age": age, "kind": "a", "correct": correct},
        **{"latest": correct, "stale": 1 - correct, **about},
    }


RECORDS = [record(0, 2, 1, 1.0), record(0, 4, 1, 0.0), record(0, 4, 3, 1.0), record(1, 4, 3, 1.0)]


def test_cells_count_texts_and_average_the_views_values():
    first, age, _ = Twice(lengths=[], rows=1).views()
    found = cells(first, RECORDS)
    assert [(c["down"], c["across"], c["value"], c["texts"], c["questions"]) for c in found] == [
        ("a", 2, 1.0, 1, 1),
        ("a", 4, pytest.approx(2 / 3), 2, 3),
    ]
    # One text has two of the three questions, so these count as less than two texts.
    assert (found[1]["low"], found[1]["high"]) == wilson(2 / 3, 9 / 5)
    assert [(c["down"], c["across"], c["value"]) for c in cells(age, RECORDS)] == [
        ("latest", 1, 0.5),
        ("latest", 3, 1.0),
        ("stale", 1, 0.5),
        ("stale", 3, 0.0),
    ]


def test_texts_that_are_not_independent_count_as_one():
    (cell,) = cells(View("pairs"), [{**record(stream, 2, 1, 1.0), "unit": stream // 2} for stream in range(6)])
    assert cell["texts"] == 3 and cell["questions"] == 6 and (cell["low"], cell["high"]) == wilson(1.0, 3)


def test_rows_and_columns_have_the_order_of_the_texts():
    """Long texts come back first: each is a forward of its own."""
    late, early = record(1, 256, 1, 1.0), record(0, 64, 1, 1.0)
    found = cells(View("pairs", "kind"), [late | {"kind": "zoology"}, early | {"kind": "own"}, late | {"kind": "own"}])
    assert [cell["down"] for cell in found] == ["own", "own", "zoology"]
    assert plots.columns_of({"one": found[1:], "two": found}) == [64, 256]
    assert plots.columns_of({"one": [{"across": "late"}, {"across": "early"}]}) == ["late", "early"]


def test_every_view_has_a_table_and_a_picture(monkeypatch):
    task = Twice(lengths=[], rows=1)
    monkeypatch.setattr(Asked, "tasks", [task])
    found = [cell for view in task.views() for cell in cells(view, RECORDS)] + totals(task, RECORDS)
    models = {"one": {"asked": {"twice": found}}, "two": {"asked": {"twice": found}}}
    tables = Asked(ask={}).tables(models)
    assert list(tables) == ["asked-twice", "asked-twice-age", "asked-twice-time", "asked-twice-totals"]
    assert tables["asked-twice"] == (
        ["share right (95 % interval), by pairs", "2", "4"],
        [
            *(
                ["twice, " + name + ", a", "1.000 (0.207 to 1.000)", "0.667 (0.148 to 0.958)"]
                for name in ("one", "two")
            ),
            ["twice, chance", "0.250", "0.250"],
            ["twice, set", "0.500", "0.250"],
        ],
    )
    assert tables["asked-twice-time"][1][0] == ["twice, one", "30", "30 (30 to 30)"]
    assert tables["asked-twice-totals"] == (
        ["Twice", "capacity"],
        [["twice, " + n, "12 (9 to 15)"] for n in models],
    )
    for view in task.views():
        picture = plots.asked(task, view, {"one": [c for c in found if c["view"] == view.name]})
        assert picture.axes[0].get_ylabel() == view.label
        picture.canvas.draw()


def test_guessers_of_the_questions_are_in_tables_and_pictures():
    told = [{**r, "guesses": {"last value": float(r["stream"])}} for r in RECORDS]
    view = View("pairs", "kind", floors={"chance": 0.25})
    task = Twice(lengths=[], rows=1)
    models = {"one": {"asked": {"twice": cells(view, told)}}}
    _, rows = _table(task, view, {"one": models["one"]["asked"]["twice"]})
    assert rows[1:] == [["twice, chance", "0.250", "0.250"], ["twice, last value, a", "0.000", "0.333"]]
    labels = plots.asked(task, view, {"one": cells(view, told)}).legends[0].get_texts()
    assert [text.get_text() for text in labels] == ["chance 0.250", "last value, a", "one, a"]
    # Other values than scores have no guesser.
    assert not any("guesses" in cell for cell in cells(View("age", values=("latest",)), told))
