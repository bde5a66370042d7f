"""Questions to a bank of documents that training never saw."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from memlm.bank import MemoryBank
from memlm.data import IGNORE_INDEX, Inquiry, Library, Source, make_sample
from memlm.evaluation import plots
from memlm.evaluation.data import Examined, has_documents, library
from memlm.evaluation.figures import Figure, Records, Topic, identity, scored
from memlm.evaluation.measures import Measure, Models, Table, check_counts, check_range, plain
from memlm.evaluation.report import Report
from memlm.evaluation.statistics import wilson
from memlm.evaluation.subject import Subject
from memlm.modeling import MemLMForCausalLM
from memlm.roles import RESPONSE, Roles


@dataclass(frozen=True)
class Routed:
    """The choices of one layer at the end of the questions, averaged over questions.

    hit_1: whether its best document is positive; hit: whether one of its ``top_k`` is
    recall: the share of positives among these; precision: the positive share of these
    """

    layer: int
    top_k: int
    hit_1: float
    hit: float
    recall: float
    precision: float


@dataclass(frozen=True)
class Banked:
    """Results of questions to a bank.

    exact: share of answers with every token right, as in greedy decoding
    exact_deleted: the same after all documents asked about are deleted
    chance: probability of a right answer without reading
    bytes: of the bank
    """

    source: str
    documents: int
    tokens: int
    bytes: int
    questions: int
    chance: float
    exact: float
    exact_deleted: float
    layers: list[Routed]


@torch.no_grad()
def bank(
    model: MemLMForCausalLM,
    source: str,
    library: Library,
    rows: int = 32,
    records: list[dict[str, Any]] | None = None,
) -> Banked:
    """Read a library into a bank and ask all its questions. Raises ValueError if the model supports no bank.

    records: gets one: the identity of each question, with the documents, and whether its answers and the best document
        of each layer are right
    """
    held = MemoryBank.build(model, {str(i): ids for i, ids in enumerate(library.documents)}, progress=False)
    stats, asked = held.stats(), library.inquiries
    batches = [_asked(library, asked[at : at + rows], model.device) for at in range(0, len(asked), rows)]
    exact = torch.cat([_exact(held, *batch) for batch in batches]).double()
    around = map(np.asarray, (library.template, library.tail, library.opening, *library.documents))
    layers, documents = [], np.array(identity(*around))
    texts = [identity(documents, inquiry.question, inquiry.answer) for inquiry in asked]
    of_questions: dict[str, Any] = {"source": source, "documents": stats["documents"], "texts": texts}
    searches = [held.search(inputs.pop("input_ids"), **inputs) for inputs in ({**given} for given, _ in batches)]
    for layer, settings in zip(held.layers, held.settings, strict=True):
        best = [[int(name) for name in names] for search in searches for names in search[layer]]
        right = [[n in inquiry.found for n in numbers] for inquiry, numbers in zip(asked, best, strict=True)]
        recall = [sum(of) / len(inquiry.found) for inquiry, of in zip(asked, right, strict=True)]
        precision = [sum(of) / max(1, len(of)) for of in right]
        figures = [any(of[:1]) for of in right], [any(of) for of in right], recall, precision
        layers.append(Routed(layer, settings["top_k"], *map(share, figures)))
        of_questions[f"layer {layer}"] = [int(hit) for hit in figures[0]]
    held.delete({str(i) for inquiry in asked for i in inquiry.found})
    deleted = torch.cat([_exact(held, *batch) for batch in batches]).double()
    if records is not None:
        records.append({**of_questions, "exact": exact.int().tolist(), "exact_deleted": deleted.int().tolist()})
    counts = stats["documents"], stats["tokens"], held_bytes(stats), len(asked)
    return Banked(source, *counts, library.chance, exact.mean().item(), deleted.mean().item(), layers)


def _asked(library: Library, inquiries: Sequence[Inquiry], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Questions with their answers, without documents, as inputs of a model; and labels [B, T]."""
    samples = [
        make_sample(library.template, [], inquiry.question, inquiry.answer, library.tail, library.opening)
        for inquiry in inquiries
    ]
    ids_BT, labels_BT, place_BT, roles_BT = (
        pad_sequence([torch.from_numpy(getattr(sample, name)) for sample in samples], True, fill).to(device)
        for name, fill in (("input_ids", 0), ("labels", IGNORE_INDEX), ("position_ids", -1), ("doc_ids", RESPONSE))
    )
    return {"input_ids": ids_BT, "attention_mask": (place_BT >= 0).long(), "doc_ids": roles_BT}, labels_BT


def _exact(held: MemoryBank, inputs: dict[str, Tensor], labels_BT: Tensor) -> Tensor:
    """Whether every token of each answer has the highest logit, [B]."""
    ids_BT, mask_BT, roles = inputs["input_ids"], inputs["attention_mask"], Roles(inputs["doc_ids"], bank=held)
    logits = held.model(ids_BT, attention_mask=mask_BT, roles=roles, use_cache=False).logits
    return ((logits[:, :-1].argmax(-1) == labels_BT[:, 1:]) | (labels_BT[:, 1:] == IGNORE_INDEX)).all(1)


def check_bank(model: PreTrainedModel) -> None:
    """Raise ValueError if a model supports no bank; the message follows the model's name."""
    try:
        if not isinstance(model, MemLMForCausalLM):
            raise ValueError(f"{type(model).__name__} is a model of transformers; a bank needs memory=msa")
        MemoryBank(model)
    except ValueError as error:
        raise ValueError(f"has no bank: {error}") from None


def held_bytes(stats: Mapping[str, Any]) -> int:
    """Bytes of a bank, wherever they are, from its ``stats``."""
    return sum(stats[place] for place in ("device_bytes", "host_bytes", "disk_bytes"))


def of_banks(
    measure: str,
    title: str,
    found: Sequence[Mapping[str, Any]],
    of_source: Mapping[str, Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    steps: Callable[[Mapping[str, Any]], Mapping[str, float]],
    label: str,
) -> Iterator[Figure]:
    """Figures of banks by their size: answers, answers with the documents deleted, and the steps to them.

    of_source: what determines the banks; steps: the share right of each step, by the name that it has in ``records``
    """
    for source in dict.fromkeys(b["source"] for b in found):
        banks = {b["documents"]: b for b in found if b["source"] == source}
        chance = {"chance": {documents: b["chance"] for documents, b in banks.items()}}
        name, words, settings = f"{measure}-{source}", ("answers right", "documents"), of_source.get(source, {})
        answers = Topic(name, f"{title}: {source}", *words, floors=chance, settings=settings)
        deleted = replace(answers, name=f"{name}-deleted", title=f"{title}: {source}, documents deleted", share=False)
        stepwise = replace(answers, name=f"{name}-steps", title=f"{title}: {source}, {label}", label=label, floors={})
        for documents, b in banks.items():
            values = [(answers, None, "exact", b["exact"]), (deleted, None, "exact_deleted", b["exact_deleted"])]
            for topic, down, key, value in [*values, *((stepwise, step, step, x) for step, x in steps(b).items())]:
                units = scored(records, {"source": source, "documents": documents}, key)
                interval = wilson(value, b["questions"])
                yield Figure(topic, down, documents, value, *interval, b["questions"], units, b.get("bytes", 0))


def share(flags: Iterable[bool]) -> float:
    return float(np.mean([*flags]))


@dataclass(frozen=True)
class Bank(Measure):
    """bank_documents: sizes of banks; [] for none
    bank_questions: questions to each bank, at most; each is asked once
    """

    name = "bank"
    whole = False
    bank_documents: list
    bank_questions: int

    def __post_init__(self) -> None:
        check_range(self, bank_questions=1)
        check_counts(self, "bank_documents")

    def measures(self, source: Source) -> bool:
        return bool(self.bank_documents) and has_documents(source)

    def check(self, sources: Mapping[str, Source]) -> None:
        if self.bank_documents and not any(has_documents(source) for source in sources.values()):
            raise ValueError(
                "eval.bank_documents: the data has no documents; use data=facts, or a source of questions"
            )

    def check_model(self, model: PreTrainedModel) -> None:
        if self.bank_documents:
            check_bank(model)

    def notes(self, sources: Mapping[str, Source]) -> list[str]:
        unasked = [name for name, source in sources.items() if has_documents(source) and not self.bank_documents]
        return [f"{name}: eval=bank asks banks of its documents" for name in unasked]

    def run(self, one: Examined, examined: Sequence[Examined]) -> list[dict] | None:
        return one.parts.measure(self.name, self, partial(self._measured, one))

    def _measured(self, one: Examined, records: list[dict[str, Any]]) -> list[dict]:
        held = [
            (name, documents)
            for name, source in one.sources.items()
            for size in self.bank_documents
            if (documents := library(source, size, self.bank_questions)) is not None
        ]
        return plain(bank(one.subject.model, name, documents, records=records) for name, documents in held)

    def table(self, models: Models) -> Table:
        header = [
            "a bank's documents",
            "layer, k",
            "hit@1, hit@k",
            "recall@k, precision",
            "answers, chance",
            "deleted",
        ]
        rows = []
        for name, measured in models.items():
            for b in measured["bank"]:
                rows += [
                    [
                        f"{name}, {b['documents']:,} of {b['source']} (n = {b['questions']:,})",
                        f"{layer['layer']}, {layer['top_k']}",
                        f"{layer['hit_1']:.3f}, {layer['hit']:.3f}",
                        f"{layer['recall']:.3f}, {layer['precision']:.3f}",
                        f"{b['exact']:.3f}, {b['chance']:.3f}",
                        f"{b['exact_deleted']:.3f}",
                    ]
                    for layer in b["layers"]
                ]
        return header, rows

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        def routed(b: Mapping[str, Any]) -> dict[str, float]:
            return {f"layer {of['layer']}": of["hit_1"] for of in b["layers"]}

        of_source = {name: {"bank_questions": self.bank_questions, **of} for name, of in about["sources"].items()}
        yield from of_banks("bank", "Bank", found, of_source, records(self.name), routed, "best document right")

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("A bank of documents that training never saw")
        report.table(*self.table(models))
        banks = {name: m["bank"] for name, m in models.items() if m["bank"]}
        report.picture("bank", plots.by_documents(banks), "hits and answers by documents of a bank")
        report.note(
            "Each of the n questions is about one document or a few. hit@1: the best document is one of these; hit@k: "
            "one of those read is; recall@k: the share of these that is read; "
            "precision: the share of these among the documents read; answers: every token right; deleted: the same "
            "with every document asked about deleted from the bank."
        )
