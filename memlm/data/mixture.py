"""Batches of several sources in fixed proportions; each batch is a pure function of the optimiser step.

Legend: B rows of a batch, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.roles import RESPONSE, RoleCounts, Roles

from .retrieval import RetrievalRow
from .row import IGNORE_INDEX, Row, Source

_MOST_ROWS = 2**20


@dataclass(frozen=True)
class Batch:
    """Labels are not shifted: the output at t - 1 is scored against labels[:, t]; -100 is not scored."""

    # int64 [B, T]; position 0 marks the start of a document or of the row
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    # The most documents in one row.
    max_documents: int
    # int64 [B], indices into Mixture.sources
    source_ids: Tensor
    # With their counts; None if no row has documents.
    roles: Roles | None = None
    # int64 [S], ascending: positions whose next token is scored in some row, if these are few; None: any
    places: Tensor | None = None
    # [B], divisors of the rows' summed losses, see `stretch`; None: their scored tokens
    counts: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[Row | RetrievalRow], source_ids: Sequence[int]) -> Self:
        input_ids, labels, position_ids = (np.stack(parts) for parts in zip(*(row[:3] for row in rows), strict=True))
        positions, roles = torch.from_numpy(position_ids), None
        if any(isinstance(row, RetrievalRow) for row in rows):
            # Rows of text are responses.
            plain = np.full_like(input_ids[0], RESPONSE), np.zeros_like(input_ids[0])
            parts = (row[3:] if isinstance(row, RetrievalRow) else plain for row in rows)
            doc_ids, positives = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
            roles = Roles(doc_ids, positives, RoleCounts.of(doc_ids, positions))
        (places,) = np.nonzero((labels[:, 1:] != IGNORE_INDEX).any(0))
        few = 2 * len(places) < labels.shape[1]
        return cls(
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            positions,
            int((position_ids == 0).sum(1).max()),
            torch.tensor(source_ids),
            roles,
            torch.from_numpy(places) if few else None,
        )

    def cut(self, length: int) -> Self:
        """The pieces of each row of text, of ``length`` tokens, a divisor of T. A piece begins as a document does."""
        assert self.roles is None and self.places is None
        input_ids, positions = self.input_ids.view(-1, length), self.position_ids.view(-1, length)
        place_T = torch.arange(length)
        positions = torch.where(positions == positions[:, :1] + place_T, place_T, positions)
        return type(self)(
            input_ids,
            self.labels.view(-1, length).masked_fill(positions == 0, IGNORE_INDEX),
            positions,
            int((positions == 0).sum(1).max()),
            self.source_ids.repeat_interleave(len(input_ids) // len(self.input_ids)),
        )

    def stretch(self, rank: int, size: int) -> Self:
        """Tokens of part `rank` of `size` equal parts of the rows. Its labels have one more token, the last target.

        The mean of the parts' losses is the whole rows' loss: each part sums the losses of its tokens, and divides by
        the row's scored tokens over `size`.
        """
        if self.roles is not None:
            raise ValueError(
                "data: rows of documents and questions cannot be cut; leave train.truncate and "
                "hardware.sequence_parallel out"
            )
        assert self.input_ids.shape[1] % size == 0
        length = self.input_ids.shape[1] // size
        first, end = rank * length, (rank + 1) * length
        places = torch.arange(first, end) if self.places is None else self.places
        return replace(
            self,
            input_ids=self.input_ids[:, first:end],
            position_ids=self.position_ids[:, first:end],
            labels=F.pad(self.labels, (0, 1), value=IGNORE_INDEX)[:, first : end + 1],
            places=places[(places >= first) & (places < end)] - first,
            counts=(self.labels[:, 1:] != IGNORE_INDEX).sum(1).clamp(min=1) / size,
        )

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Roles)
        }
        return type(self)(max_documents=self.max_documents, **moved)


class Mixture:
    """Every batch has `batch_size` rows: those of one optimiser step over all processes.

    Each source has the same number of rows in every batch, as close to its weight as whole rows allow. Weights are
    relative to their sum.

    Raises ValueError if weights do not fit the sources, or leave a source without a row.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float], batch_size: int):
        if sources.keys() != weights.keys():
            raise ValueError(f"data weights name {sorted(weights)}, but the sources are {sorted(sources)}")
        if not 1 <= batch_size <= _MOST_ROWS:
            raise ValueError(f"batch_size={batch_size} must lie between 1 and {_MOST_ROWS}")
        self.sources, self.batch_size = dict(sources), batch_size
        self.counts = _apportion({name: weights[name] for name in sources}, batch_size)

    @property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """The manifest of each source that is made of files, see `check_manifest`."""
        found = ((name, getattr(source, "manifest", None)) for name, source in self.sources.items())
        return {name: manifest for name, manifest in found if manifest is not None}

    def batch(self, step: int, split: str = "train", part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` equal parts of batch `step`, a pure function of its arguments.

        Row g of the batch is in part g % parts. A step of W processes with A forwards each has A * W parts; forward a
        on rank r is part a * W + r. So the content of a part does not depend on the process that takes it.
        Raises ValueError if the parts cannot be equal.
        """
        if not 0 <= part < parts or self.batch_size % parts:
            raise ValueError(
                f"batch_size={self.batch_size} rows cannot be cut into {parts} equal parts (forwards of a step over "
                "all processes); make it a multiple"
            )
        # Row j of a source, over all steps, is its row number step * count + j.
        slots = [(i, j) for i, count in enumerate(self.counts.values()) for j in range(count)]
        names, rows = [*self.sources], []
        for i, j in slots[part::parts]:
            index = step * self.counts[names[i]] + j
            rows.append(self.sources[names[i]].row(index, split, step))
        return Batch.from_rows(rows, [i for i, _ in slots[part::parts]])


def _apportion(weights: Mapping[str, float], num_rows: int) -> dict[str, int]:
    """Rows of each source by largest remainder; ties go to the source named first."""
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
