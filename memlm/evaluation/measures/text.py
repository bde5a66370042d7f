"""Held-out text by position, with the memory carried across segments, and with a new memory for each segment.

B rows, T tokens of a segment, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.data import Source, TextSource, token_bytes
from memlm.evaluation import plots
from memlm.evaluation.data import Examined, texts
from memlm.evaluation.measures import Measure, Models, Table, by_source, check_range
from memlm.evaluation.report import Report
from memlm.evaluation.subject import Subject
from memlm.hub.causal import new_memory
from memlm.training.objective import token_losses
from memlm.versions import CACHE


@dataclass(frozen=True)
class TextByPosition:
    """Bits per byte of held-out text by distance from the document's start, and over all of it.

    edges: bucket i holds positions [edges[i], edges[i + 1]); nan if it has no token
    of_tokens: means over the same buckets of the mixers' metrics per token, such as a memory's surprise
    """

    carried: bool
    segment: int
    documents: int
    tokens: int
    bits_per_byte: float
    edges: list[int]
    by_position: list[float]
    of_tokens: dict[str, list[float]]


@torch.no_grad()
def text_by_position(
    model: PreTrainedModel,
    documents: Iterable[np.ndarray],
    token_bytes: Tensor,
    segment: int,
    carried: bool,
    max_length: int,
    rows: int = 16,
) -> TextByPosition:
    """Read documents in segments, with one memory per document (carried) or a new one for each segment.

    Both ways score the same tokens: all but the first of each segment, which a new memory cannot predict.
    """
    documents = sorted((d[:max_length] for d in documents), key=len)
    nats = torch.zeros(max_length, dtype=torch.float64)
    counted = torch.zeros(max_length, dtype=torch.float64)
    read = torch.zeros(max_length, dtype=torch.float64)
    told: dict[str, Tensor] = {}
    scored_tokens = 0
    for start in range(0, len(documents), rows):
        group = documents[start : start + rows]
        longest = len(group[-1])
        ids = np.zeros((len(group), longest), np.int64)
        real = np.zeros((len(group), longest), np.int64)
        for row, document in enumerate(group):
            ids[row, : len(document)], real[row, : len(document)] = document, 1
        ids_BT, real_BT = (torch.from_numpy(x).to(model.device) for x in (ids, real))
        memory = new_memory(model)
        for begin in range(0, longest, segment):
            if not carried:
                memory = new_memory(model)
            here = slice(begin, min(begin + segment, longest))
            piece, mask = ids_BT[:, here], real_BT[:, here]
            seen = real_BT[:, here.start - memory.get_seq_length() : here.stop]
            out = model(piece, attention_mask=seen, use_cache=True, **{CACHE: memory})
            read[here] += mask.double().sum(0).cpu()
            for name, x in getattr(out, "metrics", {}).items():
                if x.ndim == 2:
                    sums = told.setdefault(name, torch.zeros_like(read))
                    sums[here] += x.double().masked_fill(mask == 0, 0.0).sum(0).cpu()
            piece_nats, scored = token_losses(out.logits[:, :-1], piece.masked_fill(mask == 0, -100)[:, 1:])
            sizes = token_bytes.to(model.device)[piece[:, 1:]] * scored
            # Tokens without text, such as the end of a document, are not scored as text.
            piece_nats = piece_nats * (sizes > 0)
            where = slice(here.start + 1, here.stop)
            nats[where] += piece_nats.double().sum(0).cpu()
            counted[where] += sizes.double().sum(0).cpu()
            scored_tokens += int(scored.sum())
    edges = [0, segment]
    while edges[-1] < max_length:
        edges.append(min(2 * edges[-1], max_length))
    buckets = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return TextByPosition(
        carried,
        segment,
        len(documents),
        scored_tokens,
        _bits(nats.sum().item(), counted.sum().item()),
        edges,
        [_bits(nats[at].sum().item(), counted[at].sum().item()) for at in buckets],
        {name: [_mean(sums[at].sum().item(), read[at].sum().item()) for at in buckets] for name, sums in told.items()},
    )


def _bits(nats: float, num_bytes: float) -> float:
    return _mean(nats / math.log(2), num_bytes)


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


@dataclass(frozen=True)
class Text(Measure):
    """text_documents: held-out documents; 0 for no text
    text_length: tokens of each
    """

    name = "text"
    nothing = {}  # noqa: RUF012
    text_documents: int
    text_length: int

    def __post_init__(self) -> None:
        check_range(self, text_documents=0, text_length=2)

    def measures(self, source: Source) -> bool:
        return self.text_documents > 0 and isinstance(source, TextSource)

    def check_model(self, model: PreTrainedModel) -> None:
        new_memory(model)

    def tokens(self, sources: Mapping[str, Source]) -> int:
        return self.text_length if any(map(self.measures, sources.values())) else 0

    def run(self, one: Examined, examined: Sequence[Examined]) -> dict[str, Any]:
        read = zip(examined, texts(examined, self.text_documents, self.text_length), strict=True)
        documents = next(documents for other, documents in read if other is one)
        model, sizes = one.subject.model, torch.from_numpy(token_bytes(one.tokenizer))
        return {
            name: {
                how: asdict(
                    text_by_position(model, documents[name], sizes, source.seq_len, how == "carried", self.text_length)
                )
                for how in ("carried", "reset")
            }
            for name, source in one.sources.items()
            if isinstance(source, TextSource)
        }

    def table(self, models: Models) -> Table:
        rows = [
            [name, *(f"{read[how]['bits_per_byte']:.4f}" for how in ("carried", "reset"))]
            for name, read in by_source(models, "text").items()
        ]
        return ["bits per byte of text", "memory carried", "reset each segment"], rows

    def section(self, report: Report, models: Models, first: Subject) -> None:
        texts = {f"{n}, {how}": t for n, read in by_source(models, "text").items() for how, t in read.items()}
        read = next(iter(texts.values()))
        report.heading("Held-out text by position")
        report.table(*self.table(models))
        bits = {f"{name}: {t['bits_per_byte']:.3f}": t["by_position"] for name, t in texts.items()}
        picture = plots.by_position(bits, read["edges"], "bits per byte", "over all positions")
        report.picture("text", picture, "bits per byte by position")
        report.note(
            f"{read['documents']} documents, {read['tokens']:,} tokens, read in segments of {read['segment']}; "
            "carried: one memory for a document; reset: a new one each segment. Same tokens scored either way."
        )
        if len({m["tokenizer"] for m in models.values()}) > 1:
            report.note("Tokens are not the same for all models: each was given the same bytes of every document.")
        surprises = {
            f"{n}, {name.removesuffix('/surprise')}": values
            for n, of_model in by_source(models, "text").items()
            for name, values in of_model["carried"]["of_tokens"].items()
            if name.endswith("/surprise")
        }
        if surprises:
            picture = plots.by_position(surprises, read["edges"], "surprise")
            report.picture("surprise", picture, "surprise by position")
            report.note(
                "Surprise: the norm of the gradient of the inner loss, a mean over tokens and heads; memory carried."
            )
