"""Held-out text read in several ways; sums of nats for every document, whatever its length.

B rows, T tokens, V vocabulary, N tokens of one forward.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memlm.evaluation.statistics import bootstrap
from memlm.reader import Reader
from memlm.training.objective import token_losses

# Tokens of a forward, and its logits: enough to keep the processor busy, few enough for small memories.
_TOKENS, _LOGITS = 2048, 2**26


class Stretch(NamedTuple):
    """Tokens that are read with a memory of their own.

    document: its number; ids [T]; start: the position of the first of them in the document, -1 for the prefix
    scored: the first position whose token is scored
    """

    document: int
    ids: np.ndarray
    start: int
    scored: int


def _carried(number: int, ids: np.ndarray, segment: int, prefix: int | None) -> Iterator[Stretch]:
    yield Stretch(number, ids, 0, 1)


def _reset(number: int, ids: np.ndarray, segment: int, prefix: int | None) -> Iterator[Stretch]:
    for start in range(0, len(ids), segment):
        yield Stretch(number, ids[start : start + segment], start, start + 1)


def _rolling(number: int, ids: np.ndarray, segment: int, prefix: int | None) -> Iterator[Stretch]:
    if prefix is None:
        raise ValueError("rolling windows begin with the tokenizer's bos_token or eos_token, and it has neither")
    ids = np.concatenate([[prefix], ids])
    for scored in range(0, len(ids) - 1, segment):
        end = min(scored + segment, len(ids) - 1)
        # The last window is as long as the others, and scores its last tokens.
        start = max(end - segment, 0) - 1
        yield Stretch(number, ids[start + 1 : end + 1], start, scored)


# carried: one memory for a document, which predicts all tokens but the first.
# reset: a new memory for each segment, which predicts all of the segment's tokens but the first.
# rolling: lm-eval's loglikelihood_rolling with max_length = segment: a new memory for each window, which begins one
#     token earlier, the document's first window with the prefix. All tokens are predicted.
WAYS: dict[str, Callable[[int, np.ndarray, int, int | None], Iterator[Stretch]]] = {
    "carried": _carried,
    "reset": _reset,
    "rolling": _rolling,
}


@dataclass(frozen=True)
class Predicted:
    """Tokens of text that one way of reading predicts; tokens without text, such as ends of documents, do not count.

    tokens, bytes, nats: of each document
    low, high: the 95 % interval of bits_per_byte, if the documents were drawn anew
    """

    bits_per_byte: float
    low: float
    high: float
    tokens: list[int]
    bytes: list[int]
    nats: list[float]

    @classmethod
    def of(cls, sums: Tensor) -> "Predicted":
        """sums [documents, 3]: nats, bytes and tokens."""
        nats, sizes, tokens = (column.tolist() for column in sums.unbind(1))
        low, high = interval([bits(*x) for x in zip(nats, sizes, strict=True)], sizes)
        total = bits(sum(nats), sum(sizes))
        return cls(total, low, high, [round(n) for n in tokens], [round(n) for n in sizes], nats)


@dataclass(frozen=True)
class Reading:
    """One way of reading the documents.

    common: the tokens that all ways predict: all but the first of each segment, whose positions are multiples of
        ``segment``
    all: all tokens that this way predicts
    edges: bucket i holds positions [edges[i], edges[i + 1]) of a document
    by_position: bits per byte of the buckets, of the common tokens; nan without a token
    intervals: their 95 % intervals, if the documents were drawn anew
    of_tokens: means over the same buckets of the mixers' metrics per token, such as a memory's surprise; carried only
    """

    segment: int
    common: Predicted
    all: Predicted
    edges: list[int]
    by_position: list[float]
    intervals: list[tuple[float, float]]
    of_tokens: dict[str, list[float]]


@torch.no_grad()
def read(
    make_reader: Callable[[int], Reader],
    way: str,
    documents: Sequence[np.ndarray],
    sizes_V: Tensor,
    segment: int,
    longest: int,
    prefix: int | None = None,
    tokens_at_once: int = _TOKENS,
) -> Reading:
    """Read documents [T] in one of ``WAYS``; only sums are kept, so their length costs no memory.

    make_reader: of a reader with segments of a given length
    sizes_V: the bytes of text of each token
    longest: tokens of the longest document, and the last edge
    prefix: the token before a document in rolling windows

    Documents are read together. A shorter one ends with padding and leaves, so that no memory has read padding.
    Raises ValueError if the model's logits are not finite.
    """
    edges = [0, segment]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    buckets = len(edges) - 1
    stretches = [s for n, ids in enumerate(documents) for s in WAYS[way](n, ids, segment, prefix)]
    stretches = [s for s in stretches if len(s.ids) > 1]
    stretches.sort(key=lambda s: -len(s.ids))
    sums = torch.zeros(len(documents) * buckets * 2, 3, dtype=torch.float64, device=sizes_V.device)
    told: dict[str, Tensor] = {}
    rows = max(1, min(tokens_at_once, _LOGITS // len(sizes_V)) // segment)
    inner = torch.tensor(edges[1:-1], device=sizes_V.device)
    for begin in range(0, len(stretches), rows):
        for piece in _pieces(make_reader(segment), stretches[begin : begin + rows], segment, sizes_V):
            bucket_BT = torch.bucketize(piece.places_BT, inner, right=True).clamp(max=buckets - 1)
            index_BT = (piece.documents_B[:, None] * buckets + bucket_BT) * 2 + (piece.places_BT % segment == 0)
            sums.index_add_(0, index_BT.flatten(), piece.sums_BT3.flatten(0, 1))
            for name, x_BT in piece.told.items():
                # The prediction of a token is made at the one before it.
                at_BT = torch.bucketize(piece.places_BT - 1, inner, right=True).clamp(max=buckets - 1)
                both = torch.stack([x_BT.double(), torch.ones_like(x_BT, dtype=torch.float64)], -1)
                both = both * piece.real_BT[..., None]
                told.setdefault(name, sums.new_zeros(buckets, 2)).index_add_(0, at_BT.flatten(), both.flatten(0, 1))
    sums = sums.cpu().view(len(documents), buckets, 2, 3)
    bad = (~sums.isfinite()).flatten(1).any(1)
    if bad.any():
        raise ValueError(f"the model's logits are not finite in text, {way}: {int(bad.sum())} of {len(bad)} documents")
    common = sums[:, :, 0]
    of_buckets = [Predicted.of(column) for column in common.unbind(1)]
    return Reading(
        segment,
        Predicted.of(common.sum(1)),
        Predicted.of(sums.sum((1, 2))),
        edges,
        [x.bits_per_byte for x in of_buckets],
        [(x.low, x.high) for x in of_buckets],
        {name: _mean(both.cpu().unbind(1)) for name, both in told.items()},
    )


class _Piece(NamedTuple):
    """One forward.

    sums_BT3: nats, bytes and 1 of each scored token, otherwise 0; places_BT: its position in its document
    real_BT: whether the token before it was read; told: metrics of the tokens that were read
    """

    documents_B: Tensor
    sums_BT3: Tensor
    places_BT: Tensor
    real_BT: Tensor
    told: dict[str, Tensor]


def _pieces(reader: Reader, group: list[Stretch], segment: int, sizes_V: Tensor) -> Iterator[_Piece]:
    """Read stretches, the longest first, with memories of their own."""
    # The last token is a target alone.
    for begin in range(0, len(group[0].ids) - 1, segment):
        held = len(group)
        group = [s for s in group if len(s.ids) - 1 > begin]
        if len(group) < held:
            reader = reader.fork(torch.arange(len(group), device=sizes_V.device))
        width = min(segment, len(group[0].ids) - 1 - begin)
        ids = np.zeros((len(group), width + 1), np.int64)
        for row, s in enumerate(group):
            piece = s.ids[begin : begin + width + 1]
            ids[row, : len(piece)] = piece
        facts = [(s.document, s.start, s.start + len(s.ids), s.scored) for s in group]
        documents_B, starts_B, ends_B, scored_B = torch.tensor(facts, device=sizes_V.device).unbind(1)
        ids_BT = torch.from_numpy(ids).to(sizes_V.device)
        logits_BTV = reader(ids_BT[:, :-1], keep=width)
        nats_BT, _ = token_losses(logits_BTV, ids_BT[:, 1:])
        places_BT = starts_B[:, None] + begin + 1 + torch.arange(width, device=sizes_V.device)
        real_BT = places_BT < ends_B[:, None]
        bytes_BT = sizes_V[ids_BT[:, 1:]]
        counted_BT = real_BT & (places_BT >= scored_B[:, None]) & (bytes_BT > 0)
        parts = torch.stack([nats_BT.double(), bytes_BT.double(), torch.ones_like(nats_BT, dtype=torch.float64)], -1)
        sums_BT3 = parts.where(counted_BT[..., None], parts.new_zeros(()))
        told = {name: x for name, x in reader.metrics.items() if x.ndim == 2}
        yield _Piece(documents_B, sums_BT3, places_BT, real_BT, told)


def bits(nats: float, num_bytes: float) -> float:
    """Bits per byte; nan without a byte."""
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


def interval(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The interval of a weighted mean over documents, without those of weight 0."""
    kept = [(x, w) for x, w in zip(values, weights, strict=True) if w]
    return bootstrap([x for x, _ in kept], [w for _, w in kept])


def _mean(both: Iterable[Tensor]) -> list[float]:
    totals, counts = both
    return (totals / counts).tolist()
