"""A look inside: surprise and the memory's part in it, token by token, and the states and choices of the memories."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.data import Batch, RecallSource, Row, Source, TextSource
from memlm.evaluation.ablation import long_term, memory_off
from memlm.evaluation.data import Examined, texts
from memlm.evaluation.insight import Insight
from memlm.evaluation.measures import Measure, Models, Table, check_range
from memlm.evaluation.report import Report
from memlm.evaluation.subject import Subject
from memlm.evaluation.tokens import view
from memlm.hub.causal import of_model
from memlm.reader import Reader, continues
from memlm.settings import require

# A stream is read in so many calls; states are seen after each.
_CALLS = 32


@dataclass(frozen=True)
class Inside(Measure):
    """inside: texts of each source that are shown token by token; 0 for none
    inside_length: tokens of each, at most
    """

    name = "inside"
    apart = "it shows single texts, which the pages of the runs have"
    inside: int = 0
    inside_length: int = 384

    def __post_init__(self) -> None:
        check_range(self, inside=0, inside_length=2)

    def measures(self, source: Source) -> bool:
        return self.inside > 0 and isinstance(source, TextSource | RecallSource)

    def check_model(self, model: PreTrainedModel) -> None:
        continues(model)

    def cost(self, sources: Mapping[str, Source]) -> int:
        return 2 * self.inside * self.inside_length * sum(map(self.measures, sources.values()))

    def run(self, one: Examined, examined: Sequence[Examined]) -> list[dict[str, Any]]:
        return [self._looked(one, *found) for found in self._streams(one, examined)]

    def _streams(self, one: Examined, examined: Sequence[Examined]) -> Iterator[tuple[str, Batch]]:
        place = next(i for i, other in enumerate(examined) if other is one)
        of_texts = texts(examined, self.inside, self.inside_length)[place]
        for name, source in one.sources.items():
            if isinstance(source, TextSource):
                for ids in of_texts[name]:
                    yield f"{name}: a document", Batch.from_rows([_row(ids)], [0])
            elif isinstance(source, RecallSource):
                for i in range(self.inside):
                    yield f"{name}: a row", Batch.from_rows([source.task.sample(source.seed, "test", i, 1.0)], [0])

    def _looked(self, one: Examined, title: str, batch: Batch) -> dict[str, Any]:
        """All figures of one text, one for each token unless their name tells otherwise."""
        model, ids = one.subject.model, batch.input_ids[0].tolist()
        seen, told = Insight(), dict[str, list[float]]()
        with seen.of(model):
            nats = _read(model, batch, told)
        saved = None
        if long_term(model) and not one.subject.memory_off:
            with memory_off(model):
                saved = (_read(model, batch, {}) - nats).tolist()
        scored = (batch.labels[0] >= 0).nonzero().flatten().tolist()
        # In text, every token is scored, and none answers a question.
        answers = [] if len(scored) >= len(ids) - 1 else [t for t in scored if t]
        doc_ids = positives = None
        if batch.roles is not None:
            doc_ids = batch.roles.doc_ids[0].tolist()
            positives = None if batch.roles.positives is None else batch.roles.positives[0].tolist()
        found: dict[str, Any] = {
            "tokens": [one.tokenizer.decode([i]) for i in ids],
            "nats": nats.tolist(),
            "saved": saved,
            "answers": answers,
            "needle": needle(ids, answers, positives),
            "series": told,
            "outputs": seen.outputs,
            "states": seen.states,
            "memories": seen.memories,
            "read": {name: spans(seen, name, doc_ids, answers, len(ids)) for name in seen.chunks},
        }
        return {"title": title, **_rounded(found)}

    def table(self, models: Models) -> Table | None:
        """None: all is on the page."""

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("Inside")
        report.note(
            "Choose a colour; point at a token, or tap it, for its figures. Surprise: nats of the token. Saved by the "
            "memory: its nats with the long-term memory silenced, minus those with it; red if that is below 0. "
            "Underlined: answers, and the place that holds the first."
        )
        for name, measured in models.items():
            for i, found in enumerate(measured[self.name]):
                report.fragment(view(f"{name}, {found['title']}", found, f"{name}-{i}"))


@torch.no_grad()
def _read(model: PreTrainedModel, batch: Batch, told: dict[str, list[float]]) -> Tensor:
    """Nats [T] of the tokens of one row, 0 for the first, whose metrics are added to ``told``."""
    ids_BT = batch.input_ids.to(model.device)
    length, logits = ids_BT.shape[1], []
    if batch.roles is None:
        reader = Reader(model, with_metrics=True)
        for piece_BT in ids_BT.split(max(1, length // _CALLS), 1):
            logits.append(reader(piece_BT, keep=piece_BT.shape[1]))
            _tell(told, reader.metrics, piece_BT.shape[1])
    else:
        packed = batch.position_ids.to(model.device) if batch.max_documents > 1 else None
        words = {"position_ids": packed, "max_documents": batch.max_documents, "output_metrics": True}
        out = model(ids_BT, **of_model(model, roles=batch.roles.to(model.device), **words))
        logits.append(out.logits)
        _tell(told, getattr(out, "metrics", None) or {}, length)
    logits_TV = torch.cat(logits, 1)[0].float()
    require(bool(torch.isfinite(logits_TV).all()), "the model's logits are not finite")
    nats_T = -logits_TV[:-1].log_softmax(-1).gather(1, ids_BT[0, 1:, None])[:, 0]
    return torch.cat([nats_T.new_zeros(1), nats_T]).cpu()


def _tell(told: dict[str, list[float]], metrics: Mapping[str, Tensor], length: int) -> None:
    """Add the metrics of a call; those without tokens are the same for all of its tokens."""
    for name, x in metrics.items():
        if x.ndim == 2:
            told.setdefault(name, []).extend(x[0].float().tolist())
        elif x.numel() == 1:
            told.setdefault(name, []).extend([float(x)] * length)


def needle(ids: Sequence[int], answers: Sequence[int], positives: Sequence[int] | None = None) -> list[int] | None:
    """The place [first, end) of the first answer's tokens before it is asked; None if there is none.

    positives: nonzero for tokens of the documents that hold it; None: unknown
    """
    if not answers:
        return None
    first = end = answers[0]
    while end in answers:
        end += 1
    wanted = [*ids[first:end]]
    found = [i for i in range(first - len(wanted) + 1) if [*ids[i : i + len(wanted)]] == wanted]
    if positives is not None:
        found = [i for i in found if positives[i]]
    return [found[0], found[0] + len(wanted)] if found else None


def spans(
    seen: Insight, name: str, doc_ids: Sequence[int] | None, answers: Sequence[int], length: int
) -> list[tuple[int, int, float]]:
    """The parts [first, end) of the text that a layer chose for the answers, and the share of answers that did.

    doc_ids: the documents of the tokens; None if the chunks are those of one stream
    """
    size, chosen = seen.sizes[name], seen.chunks[name]
    asking = [t for t in range(length) if doc_ids is None or doc_ids[t] <= 0]
    if len(chosen) != len(asking):
        return []
    places = _chunks(length, size, doc_ids)
    # The token before an answer predicts it.
    rows = [chosen[asking.index(t - 1)] for t in answers if t - 1 in asking]
    counts = [sum(n in row for row in rows) for n in range(len(places))]
    return [(*place, count / len(rows)) for place, count in zip(places, counts, strict=True) if count]


def _chunks(length: int, size: int, doc_ids: Sequence[int] | None) -> list[tuple[int, int]]:
    if doc_ids is None:
        return [(start, min(start + size, length)) for start in range(0, length, size)]
    found, start = [], 0
    while start < length:
        end = start
        while end < length and doc_ids[end] == doc_ids[start]:
            end += 1
        if doc_ids[start] > 0:
            found += [(i, min(i + size, end)) for i in range(start, end, size)]
        start = end
    return found


def _row(ids: np.ndarray) -> Row:
    ids = ids.astype(np.int64)
    return Row(ids, ids, np.arange(len(ids)))


def _rounded(x: Any) -> Any:
    """Numbers to four digits: the page and the file stay small."""
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x
