"""Figures of an evaluation in one form, so that runs can be compared: a measure yields them (``Measure.figures``)."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The records of a part, in their order; none if they were not kept.
Records = Callable[[str], Sequence[Mapping[str, Any]]]
# A text or document, with its mean and its weight.
Units = Mapping[Hashable, tuple[float, float]]


@dataclass(frozen=True)
class Topic:
    """Figures that share a table and a picture.

    label: of the values; share: whether they lie in 0..1, and more is better
    across: the columns' name
    floors: values of those who do not remember, the same in all columns or by column
    settings: of the texts and questions; runs are comparable if they are equal
    """

    name: str
    title: str
    label: str
    across: str
    share: bool = True
    floors: Mapping[str, Any] = field(default_factory=dict, hash=False)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Figure:
    """A value of one model, and its place in a table.

    low, high: its 95 % interval over ``n`` texts
    units: the texts by names that are equal in two evaluations only if the texts are; none if they were not kept
    bytes: of the state of a text at that place; None if unknown
    """

    topic: Topic
    down: str | None
    across: Any
    value: float
    low: float
    high: float
    n: int
    units: Units = field(default_factory=dict)
    bytes: int | None = None

    @property
    def place(self) -> tuple[str, str | None, Any]:
        return self.topic.name, self.down, self.across
