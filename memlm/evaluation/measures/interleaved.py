"""Questions that a model answers by reading on in a bank."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memlm.bank import MemoryBank
from memlm.data import Chain, Linked, Source
from memlm.evaluation.data import Examined, has_documents, read_on
from memlm.evaluation.figures import Figure, Records
from memlm.evaluation.measures import Measure, Models, Table, plain
from memlm.evaluation.measures.bank import check_bank, held_bytes, of_banks, share
from memlm.evaluation.report import Report
from memlm.evaluation.storage import digest
from memlm.evaluation.subject import Subject
from memlm.interleave import Answer, Interleave
from memlm.modeling import MemLMForCausalLM


@dataclass(frozen=True)
class Interleaved:
    """Results of questions that a model answers by reading on in a bank.

    hops: share of questions with all documents so far read right, round by round
    exact: share of answers that are exactly right
    exact_deleted: the same after the documents of the last round are deleted
    chance: probability of a right answer without reading
    bytes: of the largest bank
    """

    source: str
    documents: int
    bytes: int
    questions: int
    chance: float
    hops: list[float]
    exact: float
    exact_deleted: float


def interleaved(
    model: MemLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    way: Interleave,
    libraries: Iterable[Linked],
    questions: int,
    rows: int = 32,
    records: list[dict[str, Any]] | None = None,
) -> Interleaved:
    """Ask the questions of one bank of test documents after another, up to ``questions`` in total.

    records: gets one: the identity of each question, with the documents, and whether its answers and hops are right

    Raises ValueError if the model supports no bank.
    """
    of_chains: list[tuple[Chain, Answer, Answer]] = []
    texts, size = list[str](), 0
    for linked in libraries:
        chains = linked.chains[: questions - len(of_chains)]
        held = MemoryBank.build(model, way.documents(linked.texts, tokenizer), progress=False)
        first = _answers(way, held, linked, chains, tokenizer, rows)
        size, documents = max(size, held_bytes(held.stats())), digest(linked.texts)
        texts += [digest([documents, chain.question, chain.answer]) for chain in chains]
        held.delete({name for chain in chains for name in chain.rounds[-1]})
        second = _answers(way, held, linked, chains, tokenizer, rows)
        of_chains += zip(chains, first, second, strict=True)
        if len(of_chains) >= questions:
            break
    hops = [
        [
            int([{*names} for names in answer.read[:n]] == [{*names} for names in chain.rounds[:n]])
            for chain, answer, _ in of_chains
        ]
        for n in range(1, max(len(chain.rounds) for chain, *_ in of_chains) + 1)
    ]
    exact, deleted = ([int(given[i].text == chain.answer) for chain, *given in of_chains] for i in (0, 1))
    if records is not None:
        of_hops = {f"hop {n}": right for n, right in enumerate(hops, 1)}
        record = {"source": source, "documents": len(linked.texts), "texts": texts, **of_hops}
        records.append({**record, "exact": exact, "exact_deleted": deleted})
    shares = linked.chance, [*map(share, hops)], share(exact), share(deleted)
    return Interleaved(source, len(linked.texts), size, len(of_chains), *shares)


def _answers(
    way: Interleave,
    held: MemoryBank,
    linked: Linked,
    chains: Sequence[Chain],
    tokenizer: PreTrainedTokenizerFast,
    rows: int,
) -> list[Answer]:
    asked = [chain.question for chain in chains]
    batches = (asked[at : at + rows] for at in range(0, len(asked), rows))
    return [answer for batch in batches for answer in way.answers(batch, held, linked.texts, tokenizer)]


@dataclass(frozen=True)
class ReadingOn(Measure):
    """Uses the settings of the measure ``bank``, which checks them."""

    name = "interleaved"
    whole = False
    bank_documents: list
    bank_questions: int

    def measures(self, source: Source) -> bool:
        return bool(self.bank_documents) and has_documents(source)

    def check_model(self, model: PreTrainedModel) -> None:
        if self.bank_documents:
            check_bank(model)

    def run(self, one: Examined, examined: Sequence[Examined]) -> list[dict] | None:
        return one.parts.measure(self.name, self, partial(self._measured, one))

    def _measured(self, one: Examined, records: list[dict[str, Any]]) -> list[dict]:
        ways = [
            (name, way)
            for name, source in one.sources.items()
            for size in self.bank_documents
            if (way := read_on(source, size, self.bank_questions)) is not None
        ]
        model, words = one.subject.model, {"questions": self.bank_questions, "records": records}
        return plain(interleaved(model, one.tokenizer, name, *way, **words) for name, way in ways)

    def table(self, models: Models) -> Table:
        first = next(iter(models.values()))["interleaved"]
        hops = range(max(len(i["hops"]) for i in first))
        header = ["read on in a bank's documents", *(f"hop {hop + 1}" for hop in hops), "answers", "chance", "deleted"]
        rows = []
        for name, measured in models.items():
            for i in measured["interleaved"]:
                cells = [f"{share:.3f}" for share in i["hops"]] + [""] * (len(hops) - len(i["hops"]))
                cells += [f"{i[key]:.3f}" for key in ("exact", "chance", "exact_deleted")]
                rows.append([f"{name}, {i['documents']:,} of {i['source']}", *cells])
        return header, rows

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        def hops(i: Mapping[str, Any]) -> dict[str, float]:
            return {f"hop {n}": right for n, right in enumerate(i["hops"], 1)}

        of_source = {name: {"bank_questions": self.bank_questions, **of} for name, of in about["sources"].items()}
        label = "documents read right so far"
        yield from of_banks("interleaved", "Reading on", found, of_source, records(self.name), hops, label)

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("Questions answered by reading on")
        report.table(*self.table(models))
        questions = models[first.name]["interleaved"][0]["questions"]
        report.note(
            f"{questions} questions, to as many banks as these take. hop: read right so far, one document a round, "
            "each named by the model; answers: exact, as written; deleted: the same without the document that holds "
            "the answer."
        )
