"""A curriculum of lengths: rows of text are cut into shorter pieces until a number of tokens were seen."""

import math
from collections.abc import Sequence
from typing import Any

from memlm.data import Batch, Mixture, TextSource
from memlm.settings import require


class Stages:
    """The length of each step's rows. A step has the same tokens at every length.

    stages: [length, tokens], one after another; then rows are whole
    """

    def __init__(self, stages: Sequence[Any], row: int, tokens: int) -> None:
        """row, tokens: of a whole row, and of a step. Raises ValueError if a length does not divide the row."""
        self.row, self.tokens = row, tokens
        self._ends: list[tuple[int, float]] = []
        end = 0.0
        for length, of_stage in stages:
            fits = length < row and row % length == 0
            require(fits, f"train.lengths: {length} is not a part of data.seq_len={row}; choose a divisor of it")
            end += of_stage
            self._ends.append((length, end))

    def at(self, step: int) -> int:
        """The length of a step's rows."""
        return next((length for length, end in self._ends if step * self.tokens < end), self.row)

    def steps(self, steps: int) -> dict[int, int]:
        """How many of a run's steps have rows of each length."""
        found, before = dict[int, int](), 0
        for length, end in [*self._ends, (self.row, math.inf)]:
            until = steps if end >= steps * self.tokens else math.ceil(end / self.tokens)
            found[length] = found.get(length, 0) + until - before
            before = until
        return found

    def __str__(self) -> str:
        told = [f"{length:,} until token {end:,.0f}" for length, end in self._ends]
        return ", ".join([*told, f"then {self.row:,}"])


class Lengths:
    """A curriculum's rows. They depend on the step alone."""

    def __init__(self, stages: Sequence[Any], mixture: Mixture, row: int) -> None:
        """row: tokens of a whole row. Raises ValueError if a length does not divide it, or rows are no texts."""
        others = [name for name, source in mixture.sources.items() if not isinstance(source, TextSource)]
        fix = f"data.sources.{others[0]} has whole tasks; leave lengths out, or that source" if others else ""
        require(not (stages and others), f"train.lengths cuts rows of text, and {fix}")
        self.stages = Stages(stages, row, row * mixture.batch_size)

    def cut(self, batch: Batch, step: int) -> Batch:
        length = self.stages.at(step)
        return batch if length == self.stages.row else batch.cut(length)


def check(stages: Any) -> None:
    """Raise ValueError unless each stage is [length, tokens], both above 0."""
    for stage in stages:
        pair = isinstance(stage, list) and len(stage) == 2 and all(type(x) in (int, float) for x in stage)
        good = pair and type(stage[0]) is int and stage[0] >= 2 and 0 < stage[1] < math.inf
        require(good, f"lengths: {stage!r} must be [length, tokens], such as [512, 1e9]: rows of 512 for 1e9 tokens")
