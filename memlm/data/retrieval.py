"""Samples of documents and a question, to teach a memory which documents to read and how to use them.

A sample is ``[template | document 1 | ... | document N | question | template | answer]``. ``doc_ids`` hold the role of
each token, as in ``memlm.roles``: the question is a query, the answer a response. Answers are scored.

Legend: T tokens of a row or a sample.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np

from memlm.roles import QUERY, RESPONSE, TEMPLATE

from . import guesser
from .recall import ASK, FILLER, KEYS, MARK, NOISE, VALUES, RecallTask
from .row import IGNORE_INDEX, SPLITS, split_id
from .templates import Writer


class RetrievalRow(NamedTuple):
    """int64 [T] each; the first three as in ``Row``.

    doc_ids: the role of each token
    positives: 1 for tokens of documents that answer the question
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    doc_ids: np.ndarray
    positives: np.ndarray


class Part(NamedTuple):
    """Token ids with one role, as in ``doc_ids``; found as in ``positives``."""

    ids: Sequence[int]
    role: int
    found: bool = False
    scored: bool = False


def joined(parts: Sequence[Part]) -> RetrievalRow:
    """A sample from its parts, in order."""
    input_ids = np.concatenate([np.asarray(part.ids, np.int64) for part in parts])
    sizes = [len(part.ids) for part in parts]
    doc_ids, positives, scored = (np.repeat([int(p[i]) for p in parts], sizes).astype(np.int64) for i in (1, 2, 3))
    labels = np.where(scored, input_ids, IGNORE_INDEX)
    return RetrievalRow(input_ids, labels, np.arange(len(input_ids)), doc_ids, positives)


def make_sample(
    template: Sequence[int],
    documents: Iterable[tuple[Sequence[int], bool]],
    question: Sequence[int],
    answer: Sequence[int],
    tail: Sequence[int] = (),
    opening: Sequence[int] = (),
) -> RetrievalRow:
    """A sample from token ids; each document comes with a flag that marks a positive.

    tail: the template after the question; opening: the start of the response, which is not scored
    """
    parts = [Part(template, TEMPLATE)]
    parts += [Part(ids, number, found=found) for number, (ids, found) in enumerate(documents, 1)]
    parts += [
        Part(question, QUERY),
        Part(tail, TEMPLATE),
        Part(opening, RESPONSE),
        Part(answer, RESPONSE, scored=True),
    ]
    return joined(parts)


def transcript(
    write: Writer,
    question: str,
    read: Sequence[Mapping[str, str]] = (),
    asked: Sequence[str] = (),
    answer: str | None = None,
) -> list[Part]:
    """The parts of a sample after its documents, as in ``memlm.Interleave``; text that the model writes is scored.

    read: texts by name that were given so far, round by round
    asked: names that the model asks for next
    answer: the answer of a finished sample, directly after the last reading
    """
    parts = [
        Part(write("question", question=question), QUERY),
        Part(write("tail"), TEMPLATE),
        Part(write("response"), RESPONSE),
    ]
    for texts in read:
        parts += [Part(write.names(texts), RESPONSE, scored=True), Part(write.passages(texts), QUERY)]
    if asked:
        parts.append(Part(write.names(asked), RESPONSE, scored=True))
    if answer is not None and read:
        parts.append(Part(write("end_of_retrieval"), RESPONSE, scored=True))
        parts.append(Part(write.told_enough(question, said=True), RESPONSE))
    if answer is not None:
        parts.append(Part(write.answer(answer), RESPONSE, scored=True))
    return parts


class Chain(NamedTuple):
    """A question, its answer, and the names of the documents on the way, round by round."""

    question: str
    answer: str
    rounds: tuple[tuple[str, ...], ...]


class Linked(NamedTuple):
    """Texts of documents by name, and chains of questions; chance: of a right answer without reading."""

    texts: dict[str, str]
    chains: list[Chain]
    chance: float


def pack(samples: Sequence[RetrievalRow], length: int, pad_id: int) -> RetrievalRow:
    """One row of samples, then padding, which is a document of its own and not scored."""
    missing = length - sum(len(sample.input_ids) for sample in samples)
    if missing < 0:
        raise ValueError(f"samples have {length - missing} tokens, more than a row of {length}; raise data.seq_len")
    ignored = np.full(missing, IGNORE_INDEX)
    padding = RetrievalRow(
        np.full(missing, pad_id), ignored, np.arange(missing), np.full(missing, RESPONSE), np.zeros(missing, np.int64)
    )
    return RetrievalRow(*(np.concatenate(parts) for parts in zip(*samples, padding, strict=True)))


class Inquiry(NamedTuple):
    """Token ids of a question and its answer, and the indices of the documents that it is about."""

    question: np.ndarray
    answer: np.ndarray
    found: frozenset[int]


class Library(NamedTuple):
    """Token ids of documents, the template before questions, and the questions.

    chance: of a right answer without reading; tail, opening: as in ``make_sample``
    """

    template: np.ndarray
    documents: list[np.ndarray]
    inquiries: list[Inquiry]
    chance: float
    tail: Sequence[int] = ()
    opening: Sequence[int] = ()


class KeyedTask(RecallTask):
    """A task of documents that hold keys of `key_length` symbols, each one of `num_keys`.

    Keys of two or more symbols are different in each split. Samples have `num_documents` documents, or, if
    `min_documents` is set, a random number between the two.
    """

    num_documents: int
    min_documents: int | None
    key_length: int
    num_keys: int
    num_values: int

    @property
    def keys_of_a_split(self) -> int:
        return self.num_keys**self.key_length // self._sharing

    @property
    def _sharing(self) -> int:
        """The number of splits that the keys are divided among."""
        return len(SPLITS) if self.key_length > 1 else 1

    def _check_keys(self, symbols: int) -> None:
        """symbols: the number of symbols available for keys and values."""
        for name, known in (("num_keys", KEYS), ("num_values", VALUES)):
            most = min(symbols, len(known))
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 1 and {most}")
        if not 1 <= self.key_length <= 8:
            raise ValueError(f"key_length={self.key_length} must lie between 1 and 8")
        if not 1 <= self.num_documents <= self.keys_of_a_split:
            raise ValueError(
                f"num_documents={self.num_documents} must lie between 1 and the {self.keys_of_a_split} keys that "
                f"num_keys={self.num_keys} and key_length={self.key_length} give a split"
            )
        if not 1 <= self._fewest <= self.num_documents:
            raise ValueError(
                f"min_documents={self.min_documents} must lie between 1 and num_documents={self.num_documents}"
            )

    @property
    def _fewest(self) -> int:
        return self.num_documents if self.min_documents is None else self.min_documents

    def _count(self, rng: np.random.Generator) -> int:
        """The number of documents of a sample."""
        most = self.num_documents
        return most if self.min_documents is None else int(rng.integers(self.min_documents, most, endpoint=True))

    def _keys(self, rng: np.random.Generator, split: str, count: int) -> np.ndarray:
        """Distinct keys of a split as numbers, whose digits are the symbols, [count]."""
        numbers = rng.choice(self.keys_of_a_split, count, replace=False)
        return numbers * self._sharing + split_id(split) % self._sharing

    def _symbols(self, numbers: np.ndarray) -> np.ndarray:
        """[count] -> [count, symbols]"""
        return KEYS[numbers[:, None] // self.num_keys ** np.arange(self.key_length) % self.num_keys]


@dataclass(frozen=True)
class Facts(KeyedTask):
    """`num_documents` documents of noise, each with one fact `k1..km d1..dn` at a random place.

    The question is `ASK k1..km`, the answer the fact's n digits. Keys are distinct; those of two or more symbols are
    different in each split. Digits are any of the values; documents have random lengths.

    length: tokens of the sample
    key_length: symbols of a key
    alike: number of keys that differ from the asked one in a single symbol, if there are as many

    Raises ValueError if the sizes do not fit.
    """

    length: int = 128
    num_documents: int = 8
    min_documents: int | None = None
    digits: int = 1
    key_length: int = 1
    alike: int = 0
    num_keys: int = 32
    num_values: int = 32

    def __post_init__(self):
        self._check_keys(len(KEYS))
        if self.digits < 1:
            raise ValueError(f"digits={self.digits} must be at least 1")
        if not 0 <= self.alike < self._fewest:
            name = "num_documents" if self.min_documents is None else "min_documents"
            raise ValueError(f"alike={self.alike} must lie between 0 and {name} - 1 = {self._fewest - 1}")
        least = 2 + self.key_length + self.digits + self.num_documents * (self.key_length + self.digits)
        if self.length < least:
            raise ValueError(f"length={self.length} is too short for {self}; make it at least {least}")

    @property
    def set_guesser(self) -> float:
        """The set guesser has the digits of all documents; one fact's are asked for."""

        def facts(rng: np.random.Generator) -> tuple[list, list]:
            digits = rng.integers(self.num_values, size=(self._count(rng), self.digits))
            bag = [tuple(fact) for fact in digits.tolist()]
            return bag, bag[:1]

        return guesser.mean(facts)

    def scaled(self, factor: float) -> Self:
        """The same task at `factor` times the length and the documents, limited by the number of keys."""
        documents = min(round(self.num_documents * factor), self.keys_of_a_split)
        fewest = self.min_documents and min(round(self.min_documents * factor), documents)
        length = round(self.length * factor)
        return replace(self, length=length, num_documents=documents, min_documents=fewest)

    def sample(self, seed: int, split: str, index: int, noise: float) -> RetrievalRow:
        """Row `index` of `split`; noise: the probability that a token outside the facts is noise instead of blank."""
        rng = np.random.default_rng([seed, split_id(split), index])
        count = self._count(rng)
        numbers, asked = self._keys(rng, split, count), rng.integers(count)
        others = np.setdiff1d(self._neighbours(numbers[asked]), numbers)
        others = rng.permutation(others)[: self.alike]
        numbers[np.arange(1, len(others) + 1) + asked - count] = others
        keys, digits, documents = self._facts(rng, numbers, noise)
        told = ((ids, number == asked) for number, ids in enumerate(documents))
        return make_sample([MARK], told, [ASK, *keys[asked]], digits[asked])

    def library(self, seed: int, split: str, documents: int, questions: int) -> Library:
        """`documents` documents as long as those of a sample, and `questions` questions about one each, or fewer:
        none is asked twice, as the same answer again is no further trial.
        """
        rest = 2 + self.key_length + self.digits
        length = rest + -(-(self.length - rest) * documents // self.num_documents)
        many = replace(self, length=length, num_documents=documents, min_documents=None, alike=0)
        rng = np.random.default_rng([seed, split_id(split), documents, questions])
        keys, digits, texts = many._facts(rng, many._keys(rng, split, documents), 1.0)
        numbers = rng.permutation(documents)[:questions]
        found = [Inquiry(np.array([ASK, *keys[n]]), digits[n], frozenset({int(n)})) for n in numbers]
        return Library(np.array([MARK]), texts, found, self.chance**self.digits)

    def _neighbours(self, number: int) -> np.ndarray:
        """Keys of the same split that differ in one symbol."""
        places, symbols = self.num_keys ** np.arange(self.key_length), np.arange(self.num_keys)[:, None]
        others = number + (symbols - number // places % self.num_keys) * places
        return others[(others != number) & (others % self._sharing == number % self._sharing)]

    def _facts(
        self, rng: np.random.Generator, numbers: np.ndarray, noise: float
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Keys [documents, symbols], digits [documents, digits], and the documents that hold them."""
        fact = self.key_length + self.digits
        keys = self._symbols(numbers)
        digits = VALUES[rng.integers(self.num_values, size=(len(numbers), self.digits))]
        spare = self.length - 2 - fact - len(numbers) * fact
        cuts = np.sort(rng.integers(spare + 1, size=len(numbers) - 1))
        documents = []
        for number, extra in enumerate(np.diff(np.concatenate([[0], cuts, [spare]]))):
            size = extra + fact
            ids = np.where(rng.random(size) < noise, NOISE[rng.integers(len(NOISE), size=size)], FILLER)
            place = rng.integers(extra + 1)
            ids[place : place + fact] = [*keys[number], *digits[number]]
            documents.append(ids)
        return keys, digits, documents
