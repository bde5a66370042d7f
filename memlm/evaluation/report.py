"""The page of an evaluation: self-contained HTML with its pictures embedded, and the same in Markdown."""

import base64
import html
import io
import re
from pathlib import Path

from matplotlib.figure import Figure

from memlm import files
from memlm.evaluation import tokens

_STYLE = (
    """
:root { color-scheme: light dark; --ink: #1e293b; --soft: #475569; --rule: #e2e8f0; --edge: #94a3b8; --paper: #fff }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.box { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; text-align: right; overflow-wrap: normal }
th { border-bottom: 2px solid var(--edge); font-weight: 600; vertical-align: bottom }
td { border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 16rem;
  position: sticky; left: 0; background: var(--paper) }
img { display: block; width: 100%; height: auto }
pre { font-size: .85rem; white-space: pre-wrap } .note { color: var(--soft) }
@media (max-width: 600px) {
  body { margin: 1rem auto } th, td { padding: .25rem .5rem }
  th:first-child, td:first-child { min-width: 7rem; max-width: 45vw; overflow-wrap: anywhere }
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --soft: #a3b1c6; --rule: #334155; --edge: #64748b; --paper: #111827 }
  /* Pictures have a white ground: their lightness is turned, their hue kept. */
  img { filter: invert(.93) hue-rotate(180deg) }
}
"""
    + tokens.STYLE
)


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

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")
        self._markdown.append(f"```\n{text}\n```")

    def fragment(self, markup: str) -> None:
        """Add HTML as it is: its maker escapes all text. Markdown leaves it out."""
        self._parts.append(markup)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="box"><table><tr>{head}</tr>{body}</table></div>')
        cells = [[_escaped(cell) for cell in line] for line in (header, *rows)]
        lines = ["| " + " | ".join(line) + " |" for line in (cells[0], ["---"] * len(header), *cells[1:])]
        self._markdown.append("\n".join(lines))

    def picture(self, name: str, figure: Figure | None, alt: str) -> None:
        """Add a figure and close it; None adds nothing."""
        if figure is None:
            return
        import matplotlib.pyplot as plt

        buffer, width = io.BytesIO(), figure.get_figwidth()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        self._pictures[name] = buffer.getvalue()
        data = base64.b64encode(buffer.getvalue()).decode()
        # On a phone, a wide picture scrolls; at less than these sizes its words cannot be read.
        size = f"min-width: {55 * width:.0f}px; max-width: {110 * width:.0f}px"
        image = f'<img alt="{html.escape(alt)}" style="{size}" src="data:image/png;base64,{data}">'
        self._parts.append(f'<div class="box">{image}</div>')
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
            f'<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style>"
            f"<h1>{title}</h1>{''.join(self._parts)}</html>",
        )
        return path


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\|<*])", r"\\\1", text)
