"""The output of every data source: one row of T tokens, for a split and a row number."""

from typing import NamedTuple, Protocol

import numpy as np

SPLITS = ("train", "validation", "test")
IGNORE_INDEX = -100


class Row(NamedTuple):
    """int64 [T] each. Labels are not shifted: labels[t] is input_ids[t], or IGNORE_INDEX if it is not scored."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


class Source(Protocol):
    """Endless rows 0, 1, 2, ...: each is a pure function of the source and the arguments; step: the optimiser step."""

    def row(self, index: int, split: str, step: int) -> Row: ...


def split_id(split: str) -> int:
    """The index of `split` in SPLITS; it enters every seed, so splits never share a random stream."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; use one of {', '.join(SPLITS)}")
    return SPLITS.index(split)
