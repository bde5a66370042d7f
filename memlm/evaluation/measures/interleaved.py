"""Questions that a model answers by reading on in a bank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memlm.bank import MemoryBank
from memlm.data import Chain, Linked, Source
from memlm.evaluation.data import Examined, has_documents, read_on
from memlm.evaluation.measures import Measure, Models, Table, plain
from memlm.evaluation.measures.bank import check_bank, share
from memlm.evaluation.report import Report
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
    """

    source: str
    documents: int
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
) -> Interleaved:
    """Ask the questions of one bank of test documents after another, up to ``questions`` in total.

    Raises ValueError if the model supports no bank.
    """
    of_chains: list[tuple[Chain, Answer, Answer]] = []
    for linked in libraries:
        chains = linked.chains[: questions - len(of_chains)]
        held = MemoryBank.build(model, way.documents(linked.texts, tokenizer), progress=False)
        first = _answers(way, held, linked, chains, tokenizer, rows)
        held.delete({name for chain in chains for name in chain.rounds[-1]})
        second = _answers(way, held, linked, chains, tokenizer, rows)
        of_chains += zip(chains, first, second, strict=True)
        if len(of_chains) >= questions:
            break
    hops = [
        share(
            [{*names} for names in answer.read[:n]] == [{*names} for names in chain.rounds[:n]]
            for chain, answer, _ in of_chains
        )
        for n in range(1, max(len(chain.rounds) for chain, *_ in of_chains) + 1)
    ]
    exact, deleted = (share(given[i].text == chain.answer for chain, *given in of_chains) for i in (0, 1))
    return Interleaved(source, len(linked.texts), len(of_chains), linked.chance, hops, exact, deleted)


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
    bank_documents: list
    bank_questions: int

    def measures(self, source: Source) -> bool:
        return bool(self.bank_documents) and has_documents(source)

    def check_model(self, model: PreTrainedModel) -> None:
        if self.bank_documents:
            check_bank(model)

    def run(self, one: Examined, examined: Sequence[Examined]) -> list[dict]:
        ways = [
            (name, way)
            for name, source in one.sources.items()
            for size in self.bank_documents
            if (way := read_on(source, size, self.bank_questions)) is not None
        ]
        model, questions = one.subject.model, self.bank_questions
        return plain(interleaved(model, one.tokenizer, name, *way, questions) for name, way in ways)

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

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("Questions answered by reading on")
        report.table(*self.table(models))
        questions = models[first.name]["interleaved"][0]["questions"]
        report.note(
            f"{questions} questions, to as many banks as these take. hop: read right so far, one document a round, "
            "each named by the model; answers: exact, as written; deleted: the same without the document that holds "
            "the answer."
        )
