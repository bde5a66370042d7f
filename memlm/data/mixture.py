"""Batches of several sources in fixed proportions, each a pure function of the step.

Legend: B rows of a batch, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .retrieval import ANSWER, RetrievalRow
from .row import IGNORE_INDEX, Row, Source


@dataclass(frozen=True)
class Batch:
    """Labels are not shifted: the output at t - 1 is scored against labels[:, t], unless that is -100."""

    # int64 [B, T]; position 0 marks the start of a document or of the row
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    # the most documents that begin in one row
    max_documents: int
    # int64 [B], places in Mixture.sources
    source_ids: Tensor
    # int64 [B, T], see RetrievalRow; None where no row has documents
    doc_ids: Tensor | None = None
    positives: Tensor | None = None
    # int64 [S], ascending: where a token is scored next in some row, if these are few; None: anywhere
    places: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[Row | RetrievalRow], source_ids: Sequence[int]) -> Self:
        input_ids, labels, position_ids = (np.stack(parts) for parts in zip(*(row[:3] for row in rows), strict=True))
        roles: list[Tensor | None] = [None, None]
        if any(isinstance(row, RetrievalRow) for row in rows):
            # Rows of text are what a response is.
            plain = np.full_like(input_ids[0], ANSWER), np.zeros_like(input_ids[0])
            parts = (row[3:] if isinstance(row, RetrievalRow) else plain for row in rows)
            roles = [torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True)]
        (places,) = np.nonzero((labels[:, 1:] != IGNORE_INDEX).any(0))
        few = 2 * len(places) < labels.shape[1]
        return cls(
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            torch.from_numpy(position_ids),
            int((position_ids == 0).sum(1).max()),
            torch.tensor(source_ids),
            *roles,
            torch.from_numpy(places) if few else None,
        )

    def to(self, device: torch.device | str) -> Self:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return type(self)(max_documents=self.max_documents, **moved)


class Mixture:
    """Every global batch (`batch_size` rows on each of `world_size` ranks) has the same number of rows of a
    source, as near to its weight as whole rows allow. Weights are relative to their sum.

    The global batch does not depend on how many ranks share it: its row g goes to rank g % world_size.
    Raises ValueError for weights that do not fit the sources, or that leave a source without a row.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        if sources.keys() != weights.keys():
            raise ValueError(f"data weights name {sorted(weights)}, but the sources are {sorted(sources)}")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size={batch_size}, rank={rank}, world_size={world_size} make no batch")
        self.sources, self.rank, self.world_size = dict(sources), rank, world_size
        self.counts = _apportion({name: weights[name] for name in sources}, batch_size * world_size)

    def batch(self, step: int, split: str = "train") -> Batch:
        """This rank's part of global batch `step`, a pure function of its arguments."""
        rows, source_ids = [], []
        # Row j of a source, over all steps, is its row number step * count + j.
        slots = [(i, j) for i, count in enumerate(self.counts.values()) for j in range(count)]
        names = [*self.sources]
        for i, j in slots[self.rank :: self.world_size]:
            index = step * self.counts[names[i]] + j
            rows.append(self.sources[names[i]].row(index, split, step))
            source_ids.append(i)
        return Batch.from_rows(rows, source_ids)


def _apportion(weights: Mapping[str, float], num_rows: int) -> dict[str, int]:
    """Rows of each source by largest remainder, the first named winning a tie."""
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"data weights {dict(weights)} must not be negative, and not all zero")
    shares = {name: num_rows * weight / total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    for name in by_remainder[: num_rows - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if weights[name] > 0 and count == 0:
            raise ValueError(
                f"data weight {weights[name]} of source {name} gives it no row in a batch of {num_rows};"
                " raise its weight or the batch size"
            )
    return counts
