"""Lines that warn of a run that goes wrong, from its logged figures."""

from collections import deque
from collections.abc import Mapping
from statistics import median

_RECENT = 20
_FEW = 5


class Alerts:
    """An alert is given when a figure goes wrong, and again only after it was right.

    A gate dies if its size falls below 0.01, and below a tenth of its highest. A router collapses if its entropy falls
    below a twentieth of its highest, or memories get no token in three logs. A memory explodes if its norm is ten
    times the median of recent ones, or a thousand times the first. A loss spikes if it is twice that median.
    """

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._first: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._wrong: set[str] = set()

    def of(self, step: int, figures: Mapping[str, float]) -> list[str]:
        lines = []
        for name, value in figures.items():
            reason = self._reason(name, value)
            if reason and name not in self._wrong:
                lines.append(f"alert, step {step}: {name}={value:.3g}, {reason}")
            (self._wrong.add if reason else self._wrong.discard)(name)
        return lines

    def _reason(self, name: str, value: float) -> str | None:
        kind = name.rpartition("/")[2]
        recent = self._recent.setdefault(name, deque(maxlen=_RECENT))
        first, usual = self._first.setdefault(name, value), median(recent) if len(recent) >= _FEW else None
        # Gates of tanh may be negative.
        size = abs(value)
        highest = self._highest[name] = max(size, self._highest.get(name, size))
        recent.append(value)
        if kind.endswith("gate") and size < min(0.01, highest / 10):
            return f"it was up to {highest:.3g}: the gate closes"
        if kind == "router_entropy" and value < highest / 20:
            return f"it was up to {highest:.3g}: the router collapses"
        if kind.startswith("load_") and len(recent) >= 3 and max([*recent][-3:]) == 0:
            return "three times in a row: the router sends this memory no token"
        if kind.endswith("memory_norm"):
            if usual is not None and value > 10 * usual:
                return f"it was {usual:.3g}: the memory explodes"
            if value > 1000 * first > 0:
                return f"it was {first:.3g} at first: the memory explodes"
        if name == "loss" and usual is not None and value > 2 * usual:
            return f"it was {usual:.3g}: the loss spikes"
        return None
