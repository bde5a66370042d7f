"""What is measured of a trained model: recall over length, needles over length and depth, a bank over the number of
its documents, and reading on in it, text over position.

B rows, T tokens of a segment, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from memlm.bank import MemoryBank
from memlm.cache import MemoryCache
from memlm.data import (
    IGNORE_INDEX,
    Batch,
    Chain,
    Inquiry,
    Library,
    Linked,
    Passkey,
    RecallTask,
    make_sample,
)
from memlm.interleave import Answer, Interleave
from memlm.modeling import MemLMForCausalLM
from memlm.roles import RESPONSE
from memlm.training.objective import Score, score, token_losses

# Tokens of a forward over many rows: enough to keep the processor busy, few enough for small memories.
_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class Recall:
    """Accuracy of one task at one length: by token, and by row with every answer right."""

    task: str
    factor: int
    length: int
    rows: int
    chance: float
    accuracy: float
    row_accuracy: float


def recall(
    model: MemLMForCausalLM, name: str, task: RecallTask, seed: int, factors: Sequence[int], rows: int
) -> list[Recall]:
    """The task at ``factor`` times its length and gap, on test rows with all filler noise."""
    results = []
    for factor in factors:
        scaled = task.scaled(factor)
        s = _score_task(model, scaled, seed, rows)
        results.append(Recall(name, factor, scaled.length, rows, task.chance, s.accuracy, s.row_accuracy))
    return results


@dataclass(frozen=True)
class Needle:
    """Accuracy, by token, of one cell of the grid; depth 0 is the front of the text."""

    length: int
    depth: float
    rows: int
    chance: float
    accuracy: float


def needles(
    model: MemLMForCausalLM,
    task: Passkey,
    seed: int,
    lengths: Sequence[int],
    depths: Sequence[float],
    rows: int,
) -> list[Needle]:
    """A passkey at each depth of texts of each length; the nearest is ``task.gap`` tokens away."""
    cells = []
    for length in lengths:
        for depth in depths:
            s = _score_task(model, replace(task, length=length, depth=depth), seed, rows)
            cells.append(Needle(length, depth, rows, task.chance, s.accuracy))
    return cells


def _score_task(model: MemLMForCausalLM, task: RecallTask, seed: int, rows: int) -> Score:
    size = max(1, min(rows, _TOKENS_AT_ONCE // task.length))
    batches = (
        Batch.from_rows(
            [task.sample(seed, "test", i, 1.0) for i in range(start, min(start + size, rows))],
            [0] * min(size, rows - start),
        )
        for start in range(0, rows, size)
    )
    return score(model, batches, ["task"], torch.ones(model.config.vocab_size, dtype=torch.long), model.device)["task"]


@dataclass(frozen=True)
class Routed:
    """How one layer chose at the end of the questions, over all of them: whether its best document is one that the
    question is about (hit_1), whether one of its ``top_k`` is (hit), the share of those to be found among them
    (recall), and the share of them that are to be found (precision).
    """

    layer: int
    top_k: int
    hit_1: float
    hit: float
    recall: float
    precision: float


@dataclass(frozen=True)
class Banked:
    """Questions to a bank: the share answered exactly, every token (what greedy decoding says), and that share once
    all documents asked about are deleted; chance: of a right answer, of who has read nothing.
    """

    source: str
    documents: int
    tokens: int
    questions: int
    chance: float
    exact: float
    exact_deleted: float
    layers: list[Routed]


@torch.no_grad()
def bank(model: MemLMForCausalLM, source: str, library: Library, rows: int = 32) -> Banked:
    """Read a library into a bank, and ask it. Raises ValueError for a model that has no bank."""
    held = MemoryBank.build(model, {str(i): ids for i, ids in enumerate(library.documents)}, progress=False)
    stats, asked = held.stats(), library.inquiries
    batches = [_asked(library, asked[at : at + rows], model.device) for at in range(0, len(asked), rows)]
    exact = torch.cat([_exact(held, *batch) for batch in batches]).double().mean().item()
    layers = []
    searches = [held.search(**inputs) for inputs, _ in batches]
    for layer, settings in zip(held.layers, held.settings, strict=True):
        best = [[int(name) for name in names] for search in searches for names in search[layer]]
        right = [[n in inquiry.found for n in numbers] for inquiry, numbers in zip(asked, best, strict=True)]
        recall = [sum(of) / len(inquiry.found) for inquiry, of in zip(asked, right, strict=True)]
        precision = [sum(of) / max(1, len(of)) for of in right]
        figures = [any(of[:1]) for of in right], [any(of) for of in right], recall, precision
        layers.append(Routed(layer, settings["top_k"], *map(_share, figures)))
    held.delete({str(i) for inquiry in asked for i in inquiry.found})
    deleted = torch.cat([_exact(held, *batch) for batch in batches]).double().mean().item()
    return Banked(source, stats["documents"], stats["tokens"], len(asked), library.chance, exact, deleted, layers)


def _asked(library: Library, inquiries: Sequence[Inquiry], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Questions and their answers, without any document, as inputs of a model, and labels, [B, T]."""
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
    """Whether every token of each answer is the likeliest, [B]."""
    logits = held.model(**inputs, memory_bank=held, use_cache=False).logits
    return ((logits[:, :-1].argmax(-1) == labels_BT[:, 1:]) | (labels_BT[:, 1:] == IGNORE_INDEX)).all(1)


@dataclass(frozen=True)
class Interleaved:
    """Questions that a model answers by reading on in a bank: the share answered exactly, and that share once the
    documents last read on the way are deleted; hops: the share that had read right so far, round by round; chance: of
    a right answer, of who has read nothing.
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
    """Banks of test documents, one after another, and all questions of each until there are enough or no more.

    Raises ValueError for a model that has no bank.
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
        _share(
            [{*names} for names in answer.read[:n]] == [{*names} for names in chain.rounds[:n]]
            for chain, answer, _ in of_chains
        )
        for n in range(1, max(len(chain.rounds) for chain, *_ in of_chains) + 1)
    ]
    exact, deleted = (_share(given[i].text == chain.answer for chain, *given in of_chains) for i in (0, 1))
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


def _share(flags: Iterable[bool]) -> float:
    return float(np.mean([*flags]))


@dataclass(frozen=True)
class TextByPosition:
    """Bits per byte of held-out text by distance from the document's start, and over all of it.

    edges: bucket i holds positions [edges[i], edges[i + 1]); nan where no token fell.
    of_tokens: means over the same buckets of what mixers tell of each token, such as a memory's surprise.
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
    model: MemLMForCausalLM,
    documents: Iterable[np.ndarray],
    token_bytes: Tensor,
    segment: int,
    carried: bool,
    max_length: int,
    rows: int = 16,
) -> TextByPosition:
    """Read documents in segments, with one memory for a document (carried) or a new one each segment.

    The same tokens are scored either way: all but the first of each segment, which a new memory cannot know.
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
        memory = MemoryCache()
        for begin in range(0, longest, segment):
            if not carried:
                memory = MemoryCache()
            piece, mask = ids_BT[:, begin : begin + segment], real_BT[:, begin : begin + segment]
            out = model(piece, attention_mask=mask, past_key_values=memory, use_cache=True)
            here = slice(begin, begin + piece.shape[1])
            read[here] += mask.double().sum(0).cpu()
            for name, x in out.metrics.items():
                if x.ndim == 2:
                    sums = told.setdefault(name, torch.zeros_like(read))
                    sums[here] += x.double().masked_fill(mask == 0, 0.0).sum(0).cpu()
            piece_nats, scored = token_losses(out.logits[:, :-1], piece.masked_fill(mask == 0, -100)[:, 1:])
            sizes = token_bytes.to(model.device)[piece[:, 1:]] * scored
            # Tokens that stand for no text, such as the end of a document, are not text.
            piece_nats = piece_nats * (sizes > 0)
            where = slice(begin + 1, begin + piece.shape[1])
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


def plain(results: Iterable) -> list[dict]:
    """Dataclasses as JSON-ready dicts."""
    return [asdict(r) for r in results]
