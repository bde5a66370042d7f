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
from memlm.settings import require

from .injected import InjectedSource
from .retrieval import RetrievalRow
from .row import IGNORE_INDEX, SPLITS, Row, Source, split_id
from .text import TextSource

_MOST_ROWS = 2**20
# Rows of each source in a period, and batches of the longest period.
_LEAST_ROWS, _LONGEST_PERIOD = 16, 2**12


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
            # The first one may have begun in an earlier row.
            int(((position_ids == 0).sum(1) + (position_ids[:, 0] != 0)).max()),
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
    relative to their sum: shares of the tokens, because all rows are equally long. Where a source would get no row,
    batches differ: rows are shared out among those of a period, in which each source has at least 16, and spread
    evenly over it. `counts` are rows of a batch, or their mean. Each batch of validation then has rows of all sources.

    Probes of facts (`InjectedSource`) are batches of the split "probes": `num_probe_batches` hold each probe once.
    Their ids of sources go on behind those of `sources`, with the names `probe_names`. `probed` are the numbers of
    steps done at which they are validated, see `inject`.

    Raises ValueError if weights do not fit the sources, or leave a source without a row.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float], batch_size: int):
        if sources.keys() != weights.keys():
            raise ValueError(f"data weights name {sorted(weights)}, but the sources are {sorted(sources)}")
        if not 1 <= batch_size <= _MOST_ROWS:
            raise ValueError(f"batch_size={batch_size} must lie between 1 and {_MOST_ROWS}")
        self.sources, self.batch_size = dict(sources), batch_size
        weights = {name: weights[name] for name in sources}
        rows = _apportion(weights, batch_size)
        self._batches = {split: [_slots(rows)] for split in SPLITS}
        self._rows = dict.fromkeys(SPLITS, rows)
        self.counts: dict[str, float] = dict(rows)
        present = [name for name, weight in weights.items() if weight > 0]
        if not all(rows[name] for name in present):
            period = _period(weights, batch_size)
            rows = _apportion(weights, period * batch_size)
            held = _apportion(weights, batch_size - len(present)) if batch_size > len(present) else {}
            held = {name: held.get(name, 0) + (name in present) for name in weights}
            self._rows = dict.fromkeys(SPLITS, held) | {"train": rows}
            self._batches = {split: [_slots(held)] for split in SPLITS} | {"train": _spread(rows, period)}
            self.counts = {name: count / period for name, count in rows.items()}
        self.probed: frozenset[int] = frozenset()
        probes = {
            f"{name}/{kind}": rows for name, source in self._injected.items() for kind, rows in source.probes.items()
        }
        self.probe_names = [*probes]
        self._probes = [(len(sources) + i, row) for i, rows in enumerate(probes.values()) for row in rows]
        if missing := -len(self._probes) % batch_size:
            # All batches have the same number of rows, which processes share equally; these have nothing scored.
            i, row = self._probes[-1]
            self._probes += [(i, row._replace(labels=np.full_like(row.labels, IGNORE_INDEX)))] * missing
        self.num_probe_batches = len(self._probes) // batch_size

    @property
    def _injected(self) -> dict[str, InjectedSource]:
        return {name: source for name, source in self.sources.items() if isinstance(source, InjectedSource)}

    @property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """The manifest of each source that is made of files, see `check_manifest`."""
        found = ((name, getattr(source, "manifest", None)) for name, source in self.sources.items())
        return {name: manifest for name, manifest in found if manifest is not None}

    def repeated(self, steps: int) -> dict[str, str]:
        """A line for each source of text that so many steps read more than once."""
        sizes = {name: getattr(source, "epoch_rows", {}).get("train") for name, source in self.sources.items()}
        read = {name: steps * count for name, count in self.counts.items()}
        return {
            name: f"{steps:,} steps read {read[name]:,.0f} rows of its {rows:,}: each {read[name] / rows:.1f} times"
            for name, rows in sizes.items()
            if rows and read[name] > rows
        }

    def carry(self) -> None:
        """Let each training row of a text be the continuation of the same row of the batch before.

        Raises ValueError if no source is a text, or one is too small or in some batches only.
        """
        facts = [*self._injected]
        fix = "their rows do not go on; leave one of them out"
        require(not facts, f"train.carry: data.sources.{facts[:1]} puts facts into rows of text, and {fix}")
        texts = {name: source for name, source in self.sources.items() if isinstance(source, TextSource)}
        require(bool(texts), "train.carry: no source of data is a text; leave it out")
        apart = len(self._batches["train"]) > 1
        require(not apart, "train.carry: a source has no row in some batches; raise its weight or train.batch_size")
        for name, source in texts.items():
            streams, rows = self._rows["train"][name], source.epoch_rows["train"]
            fix = "lower data.seq_len or train.batch_size, or add text"
            require(streams <= rows, f"train.carry: {name} has {rows} rows for the {streams} of a batch; {fix}")
            source.streams = streams

    def inject(self, steps: int) -> None:
        """Let sources of facts put them into the batches of a run of so many steps.

        Raises ValueError if the facts of a source are more than its rows of a batch, or due after the run.
        """
        for name, source in self._injected.items():
            where, rows, facts = f"data.sources.{name}", self._rows["train"][name], len(source.texts)
            fix = "raise its weight or train.batch_size"
            require(len(self._batches["train"]) == 1, f"{where}: a source has no row in some batches; {fix}")
            require(facts <= rows, f"{where}: {facts} facts are more than its {rows} rows of a batch; {fix}")
            last = max(source.injection.steps, default=0)
            fix = "lower start, period or times, or raise train.steps"
            require(last < steps, f"{where}: facts are due in step {last}, behind train.steps={steps}; {fix}")
            source.rows = rows
        self.probed = frozenset[int]().union(*(source.injection.probed for source in self._injected.values()))

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
        if split == "probes":
            given = self._probes[step * self.batch_size : (step + 1) * self.batch_size][part::parts]
            return Batch.from_rows([row for _, row in given], [i for i, _ in given])
        split_id(split)
        period, number = divmod(step, len(self._batches[split]))
        slots, names, rows = self._batches[split][number], [*self.sources], []
        for i, j in slots[part::parts]:
            index = period * self._rows[split][names[i]] + j
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
    return counts


def _slots(rows: Mapping[str, int]) -> list[tuple[int, int]]:
    """Source and number of each row."""
    return [(i, j) for i, count in enumerate(rows.values()) for j in range(count)]


def _period(weights: Mapping[str, float], batch_size: int) -> int:
    """The fewest batches, a power of two, in which each source has its least number of rows."""
    least = min((weight, name) for name, weight in weights.items() if weight > 0)
    share = least[0] / sum(weights.values())
    period = 1
    while period * batch_size * share < _LEAST_ROWS:
        period *= 2
    present = sum(weight > 0 for weight in weights.values())
    if period > _LONGEST_PERIOD or present > batch_size:
        raise ValueError(
            f"data weight {least[0]} of source {least[1]} gives it no row in a batch of {batch_size}, or too few in "
            "others; raise its weight or the batch size"
        )
    return period


def _spread(rows: Mapping[str, int], period: int) -> list[list[tuple[int, int]]]:
    """The rows of each batch of a period, those of a source at equal distances."""
    places = sorted(((j + 0.5) / count, i, j) for i, count in enumerate(rows.values()) for j in range(count))
    size = len(places) // period
    return [sorted((i, j) for _, i, j in places[k * size : (k + 1) * size]) for k in range(period)]
