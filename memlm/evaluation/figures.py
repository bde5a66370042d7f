"""Figures of an evaluation in one form, so that runs can be compared: a measure yields them (``Measure.figures``)."""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
    bytes: of the state of a text at that place; None: those of a text of the trained length; 0: unknown
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


def identity(*parts: np.ndarray) -> str:
    """A hash of the tokens of a text, and of all else that a model is given with them."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
    return found.hexdigest()[:16]


def scored(
    records: Sequence[Mapping[str, Any]], place: Mapping[str, Any], right: str, asked: str | None = None
) -> Units:
    """The texts of a cell, from the record that has its place; none if there is no such record.

    right, asked: the keys of lists: a number for each text, as its share right or as two counts. ``texts`` holds
    the identities of all that determines a text's score, beside the model
    """
    record = next((found for found in records if place.items() <= found.items()), None)
    if record is None:
        return {}
    counts = record[asked] if asked else [1] * len(record["texts"])
    # The number of a text tells equal ones apart.
    names = enumerate(record["texts"])
    return {name: (x / n, float(n)) for name, x, n in zip(names, record[right], counts, strict=True)}
