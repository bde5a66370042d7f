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
    natural = [max(map(cell_len, [*header[i].split(), *cells[i], ""])) for i in range(len(header))]
    most = min(max(map(cell_len, [*cells[0], ""])), width // 2)
    # Long names are folded where more columns then fit.
    names = min(range(most, min(most, 3 * width // 10) - 1, -1), key=lambda n: len(_parts(natural, width - n)))
    # The first header may be a sentence on the whole table.
    title, label = (header[0], "") if cell_len(header[0]) > names else ("", header[0])
    if title:
        yield Text(title, style="bold")
    left = max(1, width - names - _GAP)
    for part in _parts(natural, width - names):
        columns = [Column(label, width=names, overflow="fold")]
        columns += [Column(header[i], width=min(left, natural[i]), overflow="fold") for i in part]
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for row in zip(*(cells[i] for i in (0, *part)), strict=True):
            table.add_row(*map(Text, row))
        yield table
    yield ""


def _parts(widths: Sequence[int], most: int) -> list[list[int]]:
    """The numbers of the columns beside the first, in groups whose widths fit; a column that never fits is alone."""
    parts: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if parts[-1] and sum(widths[j] + _GAP for j in (*parts[-1], i)) > most:
            parts.append([])
        parts[-1].append(i)
    return parts
