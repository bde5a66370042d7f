"""The page of an evaluation: self-contained HTML with its pictures embedded, and the same in Markdown."""

import base64
import html
import io
import re
from pathlib import Path

from matplotlib.figure import Figure

from memlm import files

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: #1e293b }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .25rem .8rem; text-align: right }
th { border-bottom: 2px solid #94a3b8; font-weight: 600 } td { border-bottom: 1px solid #e2e8f0 }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto } .note { color: #475569 }
"""


class Report:
    """Sections in the order of their addition; ``write`` also saves each picture as a PNG."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._markdown = [f"# {_escaped(title)}"]
        self._pictures: dict[str, bytes] = {}

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")
        self._markdown.append(f"## {_escaped(text)}")

    def note(self, text: str) -> None:
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')
        self._markdown.append(_escaped(text))

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")
        cells = [[_escaped(cell) for cell in line] for line in (header, *rows)]
        lines = ["| " + " | ".join(line) + " |" for line in (cells[0], ["---"] * len(header), *cells[1:])]
        self._markdown.append("\n".join(lines))

    def picture(self, name: str, figure: Figure | None, alt: str) -> None:
        """Add a figure and close it; None adds nothing."""
        if figure is None:
            return
        import matplotlib.pyplot as plt

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        self._pictures[name] = buffer.getvalue()
        data = base64.b64encode(buffer.getvalue()).decode()
        self._parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
        self._markdown.append(f"![{alt}](plots/{name}.png)")

    def write(self, folder: Path) -> Path:
        """Write ``plots/*.png``, then ``report.md`` and ``report.html``; returns the latter."""
        for name, data in self._pictures.items():
            files.write(folder / "plots" / f"{name}.png", data)
        files.write(folder / "report.md", "\n\n".join(self._markdown) + "\n")
        title = html.escape(self.title)
        path = folder / "report.html"
        files.write(
            path,
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
            f"<h1>{title}</h1>{''.join(self._parts)}</html>",
        )
        return path


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\|<*])", r"\\\1", text)
