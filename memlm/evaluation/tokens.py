"""HTML of one text token by token, in colours, with curves below it: self-contained, for light and dark pages."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

# Inks that are clear on white and on black, as red, green and blue.
_INKS = ("234 88 12", "59 130 246", "5 150 105", "236 72 153", "139 92 246", "202 138 4", "8 145 178", "120 134 156")
_SURPRISE, _SAVED, _LOST = _INKS[0], _INKS[2], _INKS[3]
_WIDTH, _HEIGHT = 720, 110

STYLE = """
.view { border: 1px solid var(--rule); border-radius: .4rem; padding: .2rem .8rem; margin: .8rem 0 }
.view h3 { font-size: 1rem; margin: .5rem 0 } .view label { margin-right: 1rem; white-space: nowrap }
.tokens { font: 13px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem;
  overflow-y: auto; margin: .6rem 0 }
.tokens span { background: var(--c0); border-radius: 2px; cursor: default }
.tokens .key { text-decoration: underline; text-underline-offset: 3px; text-decoration-thickness: 2px }
.tokens span:hover::after, .tokens span:focus::after { content: attr(data-v); position: fixed; left: 0; right: 0;
  bottom: 0; padding: .4rem 1rem; color: var(--paper); background: var(--ink); white-space: normal; z-index: 1 }
.tokens span:focus { outline: 1px solid var(--ink) }
.view .curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 1.2rem }
.view svg * { vector-effect: non-scaling-stroke }
.view svg { width: 100%; height: 5.5rem; display: block } .view figure { margin: .5rem 0 }
.view figcaption { font-size: .85rem; color: var(--soft) } .view b { font-weight: 600 }
"""
STYLE += "".join(
    f".view:has(.v{i}:checked) .tokens span {{ background: var(--c{i}, transparent) }}\n" for i in range(1, 12)
)


def view(title: str, found: Mapping[str, Any], key: str) -> str:
    """A text of ``measures.inside`` as HTML; key: distinguishes its buttons from those of others."""
    words = {"surprise": _surprise(found["nats"])}
    if found["saved"]:
        words["saved by the memory"] = _saved(found["saved"])
    for layer, memories in found["memories"].items():
        words[f"memory of {layer}"] = [_ink(_INKS[row[0] % len(_INKS)], 0.45) for row in memories]
    buttons = "".join(
        f'<label><input type="radio" name="{html.escape(key)}" class="v{i}"{" checked" if i == 0 else ""}> '
        f"{html.escape(name)}</label>"
        for i, name in enumerate(words)
    )
    marked = {*found["answers"], *range(*(found["needle"] or (0, 0)))}
    spans = "".join(
        _token(t, text, found, [colours[t] for colours in words.values()], t in marked)
        for t, text in enumerate(found["tokens"])
    )
    return (
        f'<div class="view"><h3>{html.escape(title)}</h3>{buttons}<div class="tokens">{spans}</div>'
        f'<div class="curves">{_read(found)}{"".join(_curves(found))}</div></div>'
    )


def _token(t: int, text: str, found: Mapping[str, Any], colours: Sequence[str], marked: bool) -> str:
    # A part of a letter, or a sign that no screen has.
    readable = text and "\ufffd" not in text and (text.isprintable() or text.isspace())
    shown = text.replace("\n", "⏎\n") if readable else "·"
    told = [f"token {t} {text!r}: {found['nats'][t]:.2f} nats"]
    if found["saved"]:
        told.append(f"saved {found['saved'][t]:.2f}")
    told += [f"{layer}: memories {', '.join(map(str, rows[t]))}" for layer, rows in found["memories"].items()]
    told += [
        f"{name} {values[t]:.3g}" for name, values in found["series"].items() if len(values) == len(found["tokens"])
    ]
    style = ";".join(f"--c{i}:{colour}" for i, colour in enumerate(colours) if colour)
    mark = ' class="key"' if marked else ""
    words = html.escape("; ".join(told))
    return f'<span tabindex="-1"{mark} style="{style}" data-v="{words}">{html.escape(shown)}</span>'


def _ink(ink: str, share: float) -> str:
    share = min(1.0, share)
    return f"rgb({ink}/{share:.2f})" if share >= 0.02 else ""


def _surprise(nats: Sequence[float]) -> list[str]:
    most = _high(nats)
    return [_ink(_SURPRISE, 0.7 * x / most) for x in nats]


def _saved(saved: Sequence[float]) -> list[str]:
    most = _high([abs(x) for x in saved])
    return [_ink(_SAVED if x > 0 else _LOST, 0.7 * abs(x) / most) for x in saved]


def _high(values: Sequence[float]) -> float:
    """The value that gets the full colour; a few tokens are far above all others."""
    return max(sorted(values)[int(0.95 * (len(values) - 1))], 1e-6)


def _read(found: Mapping[str, Any]) -> str:
    """The chunks that were read for the answers, a line for each layer, and the place of the answer."""
    layers = [(name, spans) for name, spans in found["read"].items() if spans]
    if not layers:
        return ""
    length, drawn = len(found["tokens"]), []
    scale = _WIDTH / length
    for row, (_, spans) in enumerate(layers):
        y = 20 * row
        for first, end, share in spans:
            drawn.append(
                f'<rect x="{first * scale:.1f}" y="{y}" width="{max(1.0, (end - first) * scale):.1f}" height="16" '
                f'fill="rgb({_INKS[1]}/{0.2 + 0.7 * share:.2f})"><title>tokens {first} to {end}: '
                f"{share:.0%} of answers</title></rect>"
            )
    height = 20 * len(layers)
    return _figure(
        f"<b>chunks read for the answers</b>, over the text, from {html.escape(layers[0][0])} on top to "
        f"{html.escape(layers[-1][0])}; the stroke marks the place that holds the answer",
        "".join(drawn) + _marks(found, height, scale),
        height,
    )


def _curves(found: Mapping[str, Any]) -> list[str]:
    """One picture for each quantity, a line for each layer."""
    groups: dict[str, dict[str, Sequence[float]]] = {}
    for name, values in found["series"].items():
        layer, _, quantity = name.partition("/")
        groups.setdefault(quantity.replace("_", " "), {})[layer.replace("layer", "layer ")] = values
    for quantity, of_layers in (("norm of the output", found["outputs"]), ("norm of the state", found["states"])):
        if of_layers:
            groups[quantity] = of_layers
    return [
        _lines(quantity, lines, found)
        for quantity, lines in groups.items()
        if any(len(values) > 1 and max(values) > min(values) for values in lines.values())
    ]


def _lines(quantity: str, lines: Mapping[str, Sequence[float]], found: Mapping[str, Any]) -> str:
    every = [x for values in lines.values() for x in values]
    low, high = min(every), max(every)
    span, drawn, legend = max(high - low, 1e-9), [], []
    for i, (layer, values) in enumerate(lines.items()):
        ink = f"rgb({_INKS[(i + 1) % len(_INKS)]})"
        step = _WIDTH / max(1, len(values) - 1)
        points = " ".join(
            f"{j * step:.1f},{_HEIGHT - 4 - (x - low) / span * (_HEIGHT - 8):.1f}" for j, x in enumerate(values)
        )
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="1.5"/>')
        legend.append(f'<span style="color:{ink}">■</span>&nbsp;{html.escape(layer).replace(" ", "&nbsp;")}')
    scale = _WIDTH / max(1, len(found["tokens"]) - 1)
    caption = f"<b>{html.escape(quantity)}</b>, {low:.3g} to {high:.3g} &nbsp; {' '.join(legend)}"
    return _figure(caption, "".join(drawn) + _marks(found, _HEIGHT, scale), _HEIGHT)


def _marks(found: Mapping[str, Any], height: int, scale: float) -> str:
    places = ([found["needle"][0]] if found["needle"] else []) + [*found["answers"]]
    return "".join(
        f'<line x1="{t * scale:.1f}" x2="{t * scale:.1f}" y1="0" y2="{height}" stroke="currentColor" '
        f'stroke-width="{2 if i == 0 and found["needle"] else 0.7}" stroke-dasharray="{"" if i == 0 else "2 3"}"/>'
        for i, t in enumerate(places)
    )


def _figure(caption: str, drawn: str, height: int) -> str:
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<svg viewBox="0 -2 {_WIDTH} {height + 4}" preserveAspectRatio="none" role="img">'
        f'<rect x="0" y="-2" width="{_WIDTH}" height="{height + 4}" fill="none" stroke="currentColor" '
        f'stroke-opacity=".25"/>{drawn}</svg></figure>'
    )
