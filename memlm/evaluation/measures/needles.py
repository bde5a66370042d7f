"""A needle in a haystack: a passkey at each depth of texts of each length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from memlm.data import Passkey, RecallSource, Source
from memlm.evaluation import plots
from memlm.evaluation.data import Examined
from memlm.evaluation.figures import Figure, Records, Topic, scored
from memlm.evaluation.measures import Measure, Models, Table, by_source, check_counts, check_range, plain
from memlm.evaluation.measures.recall import score_task
from memlm.evaluation.report import Report
from memlm.evaluation.statistics import wilson
from memlm.evaluation.subject import Subject
from memlm.reader import bytes_after
from memlm.settings import require


@dataclass(frozen=True)
class Needle:
    """Accuracy by token in one cell of the grid; low, high: its 95 % interval over rows; depth 0 is the front,
    and at 1 the needle ends where the question begins. bytes: of the state of a text; None if unknown.
    """

    length: int
    depth: float
    rows: int
    chance: float
    set_guesser: float
    accuracy: float
    low: float
    high: float
    bytes: int | None = None


def needles(
    model: PreTrainedModel,
    task: Passkey,
    seed: int,
    lengths: Sequence[int],
    depths: Sequence[float],
    rows: int,
    records: list[dict[str, Any]] | None = None,
) -> list[Needle]:
    """A passkey at each depth of texts of each length; each cell has rows of its own.

    records: gets one for each cell, as in ``score_task``
    """
    cells: list[Needle] = []
    for length in lengths:
        for depth in depths:
            placed = replace(task, length=length, depth=depth)
            s, of_rows = score_task(model, placed, seed, rows, first=len(cells) * rows)
            floors, interval = (task.chance, task.set_guesser), wilson(s.accuracy, rows)
            cells.append(Needle(length, depth, rows, *floors, s.accuracy, *interval))
            if records is not None:
                records.append({"length": length, "depth": depth, **of_rows})
    return cells


@dataclass(frozen=True)
class Needles(Measure):
    """factors: lengths, as in ``recall``
    depths: depths of the needle in 0..1, as shares of the text before the question; [] for no needles
    needle_rows: rows of a cell
    """

    name = "needles"
    whole = False
    nothing = {}  # noqa: RUF012
    factors: list
    depths: list
    needle_rows: int

    def __post_init__(self) -> None:
        check_range(self, needle_rows=1)
        check_counts(self, "factors")
        numbers = all(type(d) in (int, float) and 0 <= d <= 1 for d in self.depths)
        require(numbers, f"depths={self.depths} must be numbers in 0..1")

    def measures(self, source: Source) -> bool:
        wanted = bool(self.factors) and bool(self.depths)
        return wanted and isinstance(source, RecallSource) and isinstance(source.task, Passkey)

    def tokens(self, sources: Mapping[str, Source]) -> int:
        lengths = [s.task.length for s in sources.values() if isinstance(s, RecallSource) and self.measures(s)]
        return max(self.factors, default=0) * max(lengths, default=0)

    def cost(self, sources: Mapping[str, Source]) -> int:
        lengths = [s.task.length for s in sources.values() if isinstance(s, RecallSource) and self.measures(s)]
        return sum(self.factors) * sum(lengths) * len(self.depths) * self.needle_rows

    def run(self, one: Examined, examined: Sequence[Examined]) -> dict[str, Any] | None:
        return one.parts.measure(self.name, self, partial(self._measured, one), self.cost(one.sources))

    def _measured(self, one: Examined, records: list[dict[str, Any]]) -> dict[str, Any]:
        model, found = one.subject.model, dict[str, Any]()
        for name, source in one.sources.items():
            if isinstance(source, RecallSource) and isinstance(task := source.task, Passkey):
                lengths, of_cells = [task.length * f for f in self.factors], list[dict[str, Any]]()
                cells = needles(model, task, source.seed, lengths, self.depths, self.needle_rows, of_cells)
                sizes = {length: bytes_after(model, length) for length in lengths}
                found[name] = plain(replace(cell, bytes=sizes[cell.length]) for cell in cells)
                records += [{"source": name, **record} for record in of_cells]
        return found

    def table(self, models: Models) -> Table | None:
        """None: the picture shows all results."""

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        of_rows = records(self.name)
        for source, cells in found.items():
            floors = {floor.replace("_", " "): cells[0][floor] for floor in ("chance", "set_guesser")}
            name = "Needle in a haystack" + (f" of {source}" if len(found) > 1 else "")
            about_task = {"needle_rows": self.needle_rows, **about["sources"].get(source, {})}
            words = ("tokens recalled", "length")
            topic = Topic(f"needles-{source}", name, *words, floors=floors, settings=about_task)
            for cell in cells:
                mean = (cell["accuracy"], cell["low"], cell["high"])
                place = {"source": source, "length": cell["length"], "depth": cell["depth"]}
                units = scored(of_rows, place, "right", "asked")
                down = f"depth {cell['depth']:.0%}"
                yield Figure(topic, down, cell["length"], *mean, cell["rows"], units, cell.get("bytes"))

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("Needle in a haystack")
        grids = by_source(models, "needles")
        report.picture("needles", plots.needle_map(grids, first.trained_length), "needle accuracy")
        cell = next(iter(grids.values()))[0]
        report.note(
            "A key and four symbols appear once in noise; the end asks for them. A cell is the share of the four "
            f"recalled, teacher forced, over {cell['rows']} texts never trained on; chance is {cell['chance']:.3f}. "
            f"The symbols without their order give {cell['set_guesser']:.3f}, as each is shown before the next. "
            "Depth is the needle's place in percent of the text before the question: at 100 % the two touch, within "
            "the reach of any window. Each cell has texts of its own. "
            "Right of the dashed line the texts are longer than any in training."
        )
