"""A curriculum of lengths: rows of text are cut into shorter pieces until a number of tokens were seen."""

import math
from collections.abc import Sequence
from typing import Any

from memlm.data import Batch, Mixture, TextSource
from memlm.settings import require


class Lengths:
    """A step has the same tokens with and without a curriculum. It depends on the step alone.

    stages: [length, tokens], one after another; then rows are whole
    """

    def __init__(self, stages: Sequence[Any], mixture: Mixture, row: int) -> None:
        """row: tokens of a whole row. Raises ValueError if a length does not divide it, or rows are no texts."""
        self._row, self._tokens_per_step = row, row * mixture.batch_size
        self._ends: list[tuple[int, float]] = []
        others = [name for name, source in mixture.sources.items() if not isinstance(source, TextSource)]
        fix = f"data.sources.{others[0]} has whole tasks; leave lengths out, or that source" if others else ""
        require(not (stages and others), f"train.lengths cuts rows of text, and {fix}")
        end = 0.0
        for length, tokens in stages:
            fits = length < row and row % length == 0
            require(fits, f"train.lengths: {length} is not a part of data.seq_len={row}; choose a divisor of it")
            end += tokens
            self._ends.append((length, end))

    def cut(self, batch: Batch, step: int) -> Batch:
        seen = step * self._tokens_per_step
        length = next((length for length, end in self._ends if seen < end), self._row)
        return batch if length == self._row else batch.cut(length)

    def __str__(self) -> str:
        return ", ".join(
            [*(f"{length:,} until token {end:,.0f}" for length, end in self._ends), f"then {self._row:,}"]
        )


def check(stages: Any) -> None:
    """Raise ValueError unless each stage is [length, tokens], both above 0."""
    for stage in stages:
        pair = isinstance(stage, list) and len(stage) == 2 and all(type(x) in (int, float) for x in stage)
        good = pair and type(stage[0]) is int and stage[0] >= 2 and 0 < stage[1] < math.inf
        require(good, f"lengths: {stage!r} must be [length, tokens], such as [512, 1e9]: rows of 512 for 1e9 tokens")
