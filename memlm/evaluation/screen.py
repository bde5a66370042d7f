"""Tables on a terminal of any width: columns that do not fit stand below the others, and no figure is cut."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

# Between two columns.
_GAP = 2


def shown(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[RenderableType]:
    """A table with its first column, the names of the rows, in each part; width: of the terminal."""
    cells = [[row[i] if i < len(row) else "" for row in rows] for i in range(len(header))]
    names = min(max(map(cell_len, [*cells[0], ""])), width // 2)
    # The first header may be a sentence on the whole table.
    title, label = (header[0], "") if cell_len(header[0]) > names else ("", header[0])
    if title:
        yield Text(title, style="bold")
    most = max(1, width - names - _GAP)
    widths = [min(most, max(map(cell_len, [*header[i].split(), *cells[i], ""]))) for i in range(len(header))]
    for part in _parts(widths, most + _GAP):
        columns = [Column(label, width=names, overflow="fold")]
        columns += [Column(header[i], width=widths[i], overflow="fold") for i in part]
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for row in zip(*(cells[i] for i in (0, *part)), strict=True):
            table.add_row(*map(Text, row))
        yield table
    yield ""


def _parts(widths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The numbers of the columns beside the first, in groups whose widths fit."""
    part: list[int] = []
    for i in range(1, len(widths)):
        if part and sum(widths[j] + _GAP for j in (*part, i)) > most:
            yield part
            part = []
        part.append(i)
    yield part
