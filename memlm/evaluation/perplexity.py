"""Held-out text read in several ways; sums of nats for every document, whatever its length.

B rows, T tokens, V vocabulary, N = B * T.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.evaluation.statistics import bootstrap
from memlm.reader import Reader

# Tokens of a forward, and its logits: enough to keep the processor busy, few enough for small memories.
_TOKENS, _LOGITS = 2048, 2**26


class Stretch(NamedTuple):
    """Tokens that are read with a memory of their own.

    document: its number; ids [T]; start: the position of the first of them in the document, one less for a prefix
    scored: the first position whose token is scored
    """

    document: int
    ids: np.ndarray
    start: int
    scored: int


def _carried(number: int, ids: np.ndarray, segment: int, prefix: int | None) -> Iterator[Stretch]:
    yield from _reset(number, ids, max(1, len(ids)), prefix)


def _reset(number: int, ids: np.ndarray, segment: int, prefix: int | None) -> Iterator[Stretch]:
    front = np.array([] if prefix is None else [prefix], ids.dtype)
    for start in range(0, len(ids), segment):
        piece = np.concatenate([front, ids[start : start + segment]])
        yield Stretch(number, piece, start - len(front), start + 1)


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
# reset: a new memory for each segment, which predicts all of the segment's tokens but the first. These two begin with
#     the prefix if there is one.
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

    make_reader: of a reader whose forwards are of a given length
    sizes_V: the bytes of text of each token
    longest: tokens of the longest document, and the last edge
    prefix: the token before a text, which rolling windows need; it is not scored

    Documents are read together, about ``tokens_at_once`` tokens in a forward, however long a segment is: a memory
    carried on is the same at any cut. A shorter document ends with padding and leaves, so that no memory has read
    padding.
    Raises ValueError if the model's logits are not finite.
    """
    edges = [0, segment]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    buckets = len(edges) - 1
    stretches = [s for n, ids in enumerate(documents) for s in WAYS[way](n, ids, segment, prefix)]
    stretches = sorted((s for s in stretches if len(s.ids) > 1), key=lambda s: -len(s.ids))
    tokens_at_once = max(1, min(tokens_at_once, _LOGITS // len(sizes_V)))
    rows = max(1, tokens_at_once // segment)
    shape = len(documents), buckets, 2
    # One place more for tokens that are not scored.
    nats = torch.zeros(math.prod(shape) + 1, dtype=torch.float64, device=sizes_V.device)
    num_bytes, tokens = np.zeros((2, len(nats)), np.int64)
    sizes, inner = sizes_V.cpu().numpy(), np.array(edges[1:-1])
    told, inputs = dict[str, Tensor](), np.zeros(buckets + 1, np.int64)
    for begin in range(0, len(stretches), rows):
        group = stretches[begin : begin + rows]
        for piece in _pieces(make_reader(tokens_at_once), group, segment, tokens_at_once, sizes_V.device):
            places, targets = piece.places.ravel(), piece.targets.ravel()
            numbers = np.repeat(piece.documents, piece.places.shape[1])
            at = (numbers * buckets + np.searchsorted(inner, places, "right")) * 2
            at = np.where(piece.scored.ravel() & (sizes[targets] > 0), at + (places % segment == 0), len(nats) - 1)
            nats.index_add_(0, torch.from_numpy(at).to(nats.device), piece.nats_N.double())
            np.add.at(num_bytes, at, sizes[targets])
            np.add.at(tokens, at, 1)
            if piece.told:
                # The metrics are those of the token before the predicted one.
                at = np.where(piece.read.ravel(), np.searchsorted(inner, places - 1, "right"), buckets)
                np.add.at(inputs, at, 1)
                at_N = torch.from_numpy(at).to(nats.device)
                for name, x_BT in piece.told.items():
                    told.setdefault(name, nats.new_zeros(buckets + 1)).index_add_(0, at_N, x_BT.flatten().double())
    columns = [nats.cpu(), torch.from_numpy(num_bytes), torch.from_numpy(tokens)]
    sums = torch.stack([column.double()[:-1] for column in columns], 1).view(*shape, 3)
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
        {name: (total.cpu()[:-1] / torch.from_numpy(inputs[:-1])).tolist() for name, total in told.items()},
    )


class _Piece(NamedTuple):
    """One forward of B stretches.

    nats_N: of the B x T predicted tokens; targets [B, T]: these tokens; places [B, T]: their positions
    scored, read [B, T]: whether the token is scored, and whether the one before it was read
    told: metrics [B, T] of the tokens that were read
    """

    documents: np.ndarray
    nats_N: Tensor
    targets: np.ndarray
    places: np.ndarray
    scored: np.ndarray
    read: np.ndarray
    told: dict[str, Tensor]


def _pieces(
    reader: Reader, group: list[Stretch], segment: int, tokens_at_once: int, device: torch.device
) -> Iterator[_Piece]:
    """Read stretches, the longest first, with memories of their own."""
    begin, width = 0, 0
    # The last token is a target alone.
    while (begin := begin + width) < len(group[0].ids) - 1:
        held = len(group)
        group = [s for s in group if len(s.ids) - 1 > begin]
        if len(group) < held:
            reader = reader.fork(torch.arange(len(group), device=device))
        # The shortest stretch leaves at the end of its segment.
        shortest = -(-(len(group[-1].ids) - 1 - begin) // segment) * segment
        width = min(max(1, tokens_at_once // len(group)), shortest, len(group[0].ids) - 1 - begin)
        ids = np.zeros((len(group), width + 1), np.int64)
        for row, s in zip(ids, group, strict=True):
            piece = s.ids[begin : begin + width + 1]
            row[: len(piece)] = piece
        ids_BT = torch.from_numpy(ids).to(device)
        logits_NV = reader(ids_BT[:, :-1], keep=width).flatten(0, 1)
        nats_N = F.cross_entropy(logits_NV.float(), ids_BT[:, 1:].flatten(), reduction="none")
        starts, ends, scored = np.array([(s.start, s.start + len(s.ids), s.scored) for s in group]).T[..., None]
        places = starts + np.arange(begin + 1, begin + 1 + width)
        told = {name: x for name, x in reader.metrics.items() if x.ndim == 2}
        read = places < ends
        numbers = np.array([s.document for s in group])
        yield _Piece(numbers, nats_N, ids[:, 1:], places, read & (places >= scored), read, told)


def bits(nats: float, num_bytes: float) -> float:
    """Bits per byte; nan without a byte."""
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


def interval(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The interval of a weighted mean over documents, without those of weight 0."""
    kept = [(x, w) for x, w in zip(values, weights, strict=True) if w]
    return bootstrap([x for x, _ in kept], [w for _, w in kept])
