"""Pictures of an evaluation; each function returns a matplotlib figure."""

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import itertools
import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter

_SCALE = LinearSegmentedColormap.from_list("needle", ["#F0496E", "#EBB839", "#0CD79F"])
_COLOURS = ("#2563eb", "#64748b", "#d97706", "#0f766e")
_FLOORS = {"chance": ":", "set_guesser": "--"}


def needle_map(grids: dict[str, list[dict]], training_length: int | None) -> Figure:
    """Heat maps side by side: length to the right, depth downwards, training length as a dashed line."""
    figure, axes = plt.subplots(
        1, len(grids), figsize=(1.2 + 4.4 * len(grids), 4.0), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, cells) in zip(axes[0], grids.items(), strict=True):
        lengths = sorted({c["length"] for c in cells})
        depths = sorted({c["depth"] for c in cells})
        values = {(c["depth"], c["length"]): c["accuracy"] for c in cells}
        image = _heat(axis, values, depths, lengths, vmin=0, vmax=1)
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
        axis.set_xlabel("length of the text, tokens")
        axis.set_title(_wrapped(name, 4.0, 11), fontsize=11)
        if training_length in lengths:
            edge = lengths.index(training_length) + 0.5
            axis.axvline(edge, color="black", linestyle="--", linewidth=1.5)
            axis.text(edge - 0.05, -0.56, "trained up to here", ha="right", va="bottom", fontsize=7)
    axes[0][0].set_ylabel("depth in percent of the text")
    cell = next(iter(grids.values()))[0]
    bar = figure.colorbar(image, ax=axes[0].tolist(), label="tokens recalled")
    for floor, style in _FLOORS.items():
        bar.ax.axhline(cell[floor], color="black", linestyle=style, linewidth=1.5)
    title = (
        f"Needle in a haystack: {cell['rows']} texts a cell\n"
        f"lines in the bar: chance {cell['chance']:.3f}, set guesser {cell['set_guesser']:.3f}"
    )
    figure.suptitle(title, fontsize=11)
    return figure


def _heat(axis: Axes, values: Mapping[tuple, float], rows: list, columns: list, **limits: float | None) -> AxesImage:
    """values: by row and column, some may be missing."""
    table = np.array([[values.get((row, column), np.nan) for column in columns] for row in rows])
    image = axis.imshow(table, cmap=_SCALE, aspect="auto", **limits)
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(columns)), [str(c) for c in columns])
    axis.set_yticks(range(len(rows)), [str(r) for r in rows])
    return image


def curves(runs: dict[str, list[dict]], prefix: str, label: str, logarithmic: bool = False) -> Figure | None:
    """One panel for each metric of metrics.jsonl whose name starts with ``prefix``, one line per run."""
    names = sorted({key for lines in runs.values() for line in lines for key in line if key.startswith(prefix)})
    if not names:
        return None
    width = min(4, len(names))
    height = -(-len(names) // width)
    figure, axes = plt.subplots(
        height, width, figsize=(3.4 * width, 2.6 * height), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for colour, (run, lines) in zip(_COLOURS, runs.items(), strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=run, linewidth=1.3)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if logarithmic:
            axis.set_yscale("log")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes[0][0].set_ylabel(label, fontsize=8)
    axes[0][0].legend(fontsize=7)
    return figure


def accuracy_by_length(results: dict[str, list[dict]]) -> Figure:
    """Recall accuracy against length with its intervals: one panel per task, one line per model, and the floors."""
    tasks = sorted({r["task"] for rs in results.values() for r in rs})
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.2 * len(tasks), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for colour, (run, rs) in zip(_COLOURS, results.items(), strict=False):
            mine = [r for r in rs if r["task"] == task]
            share = [r["accuracy"] for r in mine]
            around = [[r["accuracy"] - r["low"] for r in mine], [r["high"] - r["accuracy"] for r in mine]]
            axis.errorbar([r["length"] for r in mine], share, around, fmt="o-", color=colour, label=run, capsize=2)
        for floor, style in _FLOORS.items():
            label = floor.replace("_", " ")
            axis.plot([r["length"] for r in mine], [r[floor] for r in mine], style, color="black", label=label)
        axis.set_xscale("log", base=2)
        lengths = [r["length"] for r in next(iter(results.values())) if r["task"] == task]
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.set_ylim(-0.03, 1.03)
        told = ", ".join(f"{floor.replace('_', ' ')} {mine[0][floor]:.3f}" for floor in _FLOORS)
        axis.set_title(f"{task}\n{told}", fontsize=9)
        axis.set_xlabel("length, tokens (first: as trained)", fontsize=8)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("tokens recalled", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def by_documents(results: dict[str, list[dict]]) -> Figure:
    """A bank's hit rates and answers against its number of documents: one panel per model and source."""
    panels = {(name, b["source"]): [] for name, banks in results.items() for b in banks}
    for name, banks in results.items():
        for b in banks:
            panels[name, b["source"]].append(b)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, ((name, source), banks) in zip(axes[0], panels.items(), strict=True):
        documents = [b["documents"] for b in banks]
        for place, layer in enumerate(banks[0]["layers"]):
            hits = [b["layers"][place]["hit_1"] for b in banks]
            axis.plot(documents, hits, "x:", color=_COLOURS[2 + place % 2], label=f"hit@1, layer {layer['layer']}")
        for key, label, colour in (("exact", "answers", 0), ("exact_deleted", "asked about deleted", 1)):
            axis.plot(documents, [b[key] for b in banks], "o-", color=_COLOURS[colour], label=label)
        axis.axhline(banks[0]["chance"], color="black", linestyle=":", label=f"chance {banks[0]['chance']:.3f}")
        axis.set_xscale("log")
        axis.set_xticks(documents, [f"{n:,}" for n in documents])
        axis.minorticks_off()
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(f"{name}, {source}", fontsize=10)
        axis.set_xlabel("documents of the bank", fontsize=8)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("share of questions", fontsize=9)
    axes[0][0].legend(fontsize=8)
    return figure


def by_position(
    lines: dict[str, Sequence[float]],
    edges: Sequence[int],
    label: str,
    legend: str = "",
    intervals: Sequence[Sequence[tuple[float, float]]] = (),
) -> Figure:
    """A value by distance from the document's start: one line per name, one point per bucket; intervals: of each
    line's points.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    buckets = [f"{a}-{b}" for a, b in itertools.pairwise(edges)]
    for i, (name, values) in enumerate(lines.items()):
        style = ("o-", "s--", "^:")[i // len(_COLOURS) % 3]
        axis.plot(buckets, values, style, color=_COLOURS[i % len(_COLOURS)], label=name)
    for i, of_line in enumerate(intervals):
        low, high = zip(*of_line, strict=True)
        axis.fill_between(buckets, low, high, color=_COLOURS[i % len(_COLOURS)], alpha=0.08, linewidth=0)
    axis.set_xlabel("position in the document, tokens")
    axis.set_ylabel(label)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, title=legend, title_fontsize=8)
    return figure


def columns_of(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list:
    """The columns of a view's cells: numbers by size, words in the order of the texts."""
    found = list(dict.fromkeys(cell["across"] for cells in results.values() for cell in cells))
    return sorted(found) if all(isinstance(x, int | float) for x in found) else found


def guessed(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[Any, float]]:
    """Scores of the guessers by column, for each row of the cells. All models have the same texts."""
    found: dict[str, dict[Any, list[float]]] = {}
    for cell in next(iter(results.values()), ()):
        for name, score in cell.get("guesses", {}).items():
            row = ", ".join(filter(None, (name, cell["down"])))
            found.setdefault(row, {}).setdefault(cell["across"], []).append(score)
    return {row: {x: float(np.mean(scores)) for x, scores in of.items()} for row, of in found.items()}


def asked(task: Any, view: Any, results: dict[str, list[dict]]) -> Figure:
    """The values of a task's view with intervals, one line for each model and row of the table, and the floors.

    Rows of numbers, such as depths, and more rows than lines can show make a heat map for each model.
    """
    rows = list(dict.fromkeys(cell["down"] for cells in results.values() for cell in cells))
    if len(rows) > 1 and (len(rows) > len(_COLOURS) or all(map(_is_number, rows))):
        return _asked_map(task, view, results, sorted(rows, key=float) if all(map(_is_number, rows)) else rows)
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    columns = columns_of(results)
    lines = {
        ", ".join(str(x) for x in (name, down) if x is not None): [cell for cell in cells if cell["down"] == down]
        for name, cells in results.items()
        for down in dict.fromkeys(cell["down"] for cell in cells)
    }
    for i, (name, cells) in enumerate(lines.items()):
        # Side by side, so that intervals of equal values are seen.
        at = [columns.index(cell["across"]) + 0.06 * (i - (len(lines) - 1) / 2) for cell in cells]
        value = [cell["value"] for cell in cells]
        known = [cell["low"] is not None for cell in cells]
        below = [max(0.0, cell["value"] - cell["low"]) if k else 0.0 for cell, k in zip(cells, known, strict=True)]
        above = [max(0.0, cell["high"] - cell["value"]) if k else 0.0 for cell, k in zip(cells, known, strict=True)]
        colour, style = _COLOURS[i % len(_COLOURS)], ("o-", "s--", "^:")[i // len(_COLOURS) % 3]
        axis.errorbar(at, value, [below, above], fmt=style, color=colour, label=name, capsize=2, linewidth=1.3)
    # Those of several rows would hide the lines; the table has them.
    floors = {**view.floors, **(guessed(results) if len(rows) == 1 else {})}
    for (name, floor), style in zip(floors.items(), itertools.cycle((":", "--", "-.")), strict=False):
        by_column = floor if isinstance(floor, dict) else dict.fromkeys(columns, floor)
        held = [i for i, column in enumerate(columns) if column in by_column]
        label = name if isinstance(floor, dict) else f"{name} {floor:.3f}"
        # Half a column to each side, so that a lone column has a line too.
        heights = [by_column[columns[i]] for i in held]
        axis.hlines(
            heights, [i - 0.5 for i in held], [i + 0.5 for i in held], "black", style, linewidth=1, label=label
        )
    axis.set_xticks(range(len(columns)), [str(c) for c in columns])
    if view.share:
        axis.set_ylim(-0.03, 1.03)
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(view.across)
    axis.set_ylabel(view.label)
    axis.set_title(task.title, fontsize=10)
    axis.grid(alpha=0.25)
    if len(lines) > len(_COLOURS):
        figure.set_figwidth(9.0)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    else:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def compared(topic: dict[str, Any], rows: dict[str, list[dict]]) -> Figure:
    """All rows of a topic: means by column, over its lines; and the mean of all against the bytes of state. A topic
    without a word across has a figure of its own kind in each column.
    """
    rows = {name: cells for name, cells in rows.items() if cells}
    if not topic["across"]:
        return _totals(topic, rows)
    sized = {name: cells for name, cells in rows.items() if all(cell["bytes"] for cell in cells)}
    panels = 1 + bool(topic["share"] and sized)
    height = 3.6 + 0.16 * max(0, len(rows) - 6)
    figure, axes = plt.subplots(1, panels, figsize=(2.0 + 4.4 * panels, height), layout="constrained", squeeze=False)
    columns = list(dict.fromkeys(cell["across"] for cells in rows.values() for cell in cells))
    for i, (name, cells) in enumerate(rows.items()):
        look = {"color": plt.get_cmap("tab20")(2 * i % 20 + i // 10 % 2), "marker": "osD^v"[i % 5]}
        at = [x for x in columns if any(cell["across"] == x for cell in cells)]
        groups = [[cell for cell in cells if cell["across"] == x] for x in at]
        means = [float(np.mean([cell["value"] for cell in group])) for group in groups]
        # Side by side, so that intervals of equal values are seen.
        apart = min(0.06, 0.7 / len(rows))
        places = [columns.index(x) + apart * (i - (len(rows) - 1) / 2) for x in at]
        alone = all(len(group) == 1 for group in groups)
        around = [[max(0.0, m - g[0]["low"]), max(0.0, g[0]["high"] - m)] for m, g in zip(means, groups, strict=True)]
        error = np.nan_to_num(np.array(around).T) if alone else None
        axes[0][0].errorbar(places, means, error, label=name, capsize=2, linewidth=1.2, markersize=4, **look)
        if panels == 2 and name in sized:
            size = float(np.mean([cell["bytes"] for cell in cells])) / 1000
            axes[0][1].plot([size], [float(np.mean(means))], linestyle="none", **look)
    if topic["share"]:
        for floor, style in zip(topic["floors"], ("-", "--", "-."), strict=False):
            value = topic["floors"][floor]
            heights = [value.get(x, np.nan) if isinstance(value, dict) else value for x in columns]
            axes[0][0].plot(range(len(columns)), heights, style, color="black", linewidth=1, label=floor)
        axes[0][0].set_ylim(-0.03, 1.03)
    axes[0][0].set_xticks(range(len(columns)), [str(x) for x in columns])
    axes[0][0].set_xlabel(topic["across"])
    axes[0][0].set_ylabel(topic["label"])
    if panels == 2:
        axes[0][1].set_xscale("log")
        axes[0][1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0][1].xaxis.set_major_formatter("{x:,g}")
        axes[0][1].xaxis.set_minor_formatter(NullFormatter())
        axes[0][1].set_ylim(-0.03, 1.03)
        axes[0][1].set_xlabel("state of a text, KB")
        axes[0][1].set_ylabel(f"{topic['label']}, mean")
    for axis in axes[0]:
        axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.suptitle(topic["title"], fontsize=11)
    return figure


def _totals(topic: dict[str, Any], rows: dict[str, list[dict]]) -> Figure:
    """A panel for each column, with its own scale and a line for each row."""
    columns = list(dict.fromkeys(cell["across"] for cells in rows.values() for cell in cells))
    size = (2.0 + 3.2 * len(columns), 1.4 + 0.24 * len(rows))
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for i, cells in enumerate(rows.values()):
            for cell in (cell for cell in cells if cell["across"] == column and cell["value"] is not None):
                around = [cell["value"] - cell["low"]], [cell["high"] - cell["value"]]
                error = np.clip(np.nan_to_num(np.array(around, float)), 0, None)
                axis.errorbar(cell["value"], i, xerr=error, color="C0", marker="o", markersize=4, capsize=2)
        axis.set_title(column, fontsize=9)
        axis.grid(alpha=0.25)
    axes[0][0].set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(topic["title"], fontsize=11)
    return figure


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and float(text) >= 0
    except ValueError:
        return False


def _asked_map(task: Any, view: Any, results: dict[str, list[dict]], rows: list[str]) -> Figure:
    """One panel for each model; the floors are lines in the bar of colours."""
    columns = columns_of(results)
    size = max(5.0, 2.2 + (1.2 + 0.62 * len(columns)) * len(results)), max(3.4, 1.8 + 0.32 * len(rows))
    figure, axes = plt.subplots(1, len(results), figsize=size, sharey=True, layout="constrained", squeeze=False)
    shown = [cell["value"] for cells in results.values() for cell in cells]
    low, high = (0.0, 1.0) if view.share else (min(shown), max(shown))
    for axis, (name, cells) in zip(axes[0], results.items(), strict=True):
        values = {(cell["down"], cell["across"]): cell["value"] for cell in cells}
        image = _heat(axis, values, rows, columns, vmin=low, vmax=high)
        axis.tick_params(axis="x", labelrotation=45, labelsize=8)
        axis.set_xlabel(view.across)
        axis.set_title(_wrapped(name, (size[0] - 2.2) / len(results), 9), fontsize=9)
    axes[0][0].set_ylabel(view.down)
    bar = figure.colorbar(image, ax=axes[0].tolist(), label=view.label)
    floors = {name: floor for name, floor in view.floors.items() if not isinstance(floor, Mapping)}
    for (_, floor), style in zip(floors.items(), itertools.cycle((":", "--", "-."))):
        bar.ax.axhline(floor, color="black", linestyle=style, linewidth=1.5)
    told = "; ".join(f"{name} {floor:.3f}" for name, floor in floors.items())
    title = task.title + (f" ({told}: line in the bar)" if told else "")
    figure.suptitle(_wrapped(title, size[0], 10), fontsize=10)
    return figure


def _wrapped(title: str, inches: float, points: int) -> str:
    """A title in lines of at most so many inches; a letter is 0.6 of the font's size wide."""
    return textwrap.fill(title, max(10, int(72 * inches / (0.6 * points))))
