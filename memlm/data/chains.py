"""Chains of facts: questions that need several documents, to teach a model to ask for documents and read on.

Each document has a name and holds one fact somewhere in its text: ``key>key`` of another document, or ``key>value`` at
the end of a chain. A question names the first key of a chain, ``?ab``. The sample then alternates between the model's
output (left) and the given text (right); these characters appear nowhere else::

    [x]| the document to read next        [x]..ab>cd..| its name and text
    [y]|                                  [y].cd>V...|
    =V<eos> nothing more to read, and the answer
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from memlm.roles import TEMPLATE

from .recall import FILLER, NOISE, VALUES
from .retrieval import Chain, KeyedTask, Linked, Part, RetrievalRow, joined, pack, transcript
from .row import split_id
from .templates import Templates, Writer
from .tokenizer import byte_tokenizer

# The texts around names, documents and answers, for ``memlm.Interleave``.
TEMPLATES = {
    "document": "[{name}]{text}",
    "head": "#",
    "question": "?{question}",
    "tail": "",
    "response": "",
    "name": "[{name}]",
    "end_of_names": "|",
    "passage": "[{name}]{text}",
    "end_of_passages": "|",
    "end_of_retrieval": "=",
    "restated": "",
    "answer": "{answer}",
}
_ARROW = ">"
# Letters; further symbols are bytes that no text contains.
_LETTERS = 32
_END = byte_tokenizer().eos_token_id
_WRITE = Writer(Templates(**TEMPLATES), byte_tokenizer())


@dataclass(frozen=True)
class Chains(KeyedTask):
    """Chains of `hops` documents, as many as fit into `num_documents`. A sample asks about one chain.

    A random number of its documents has been read: with none, the next name is scored; with all, the answer is. The
    router must find the document to read next.

    length: tokens of a row; samples are padded to it
    document_length: the most tokens of a text
    name_length: symbols of a name, each any of the values

    Raises ValueError if the sizes do not fit.
    """

    length: int = 128
    num_documents: int = 8
    min_documents: int | None = None
    hops: int = 2
    document_length: int = 8
    key_length: int = 2
    name_length: int = 1
    num_keys: int = 32
    num_values: int = 32

    def __post_init__(self):
        self._check_keys(_LETTERS)
        if not 1 <= self.hops <= self._fewest:
            raise ValueError(f"hops={self.hops} must lie between 1 and the fewest documents, {self._fewest}")
        if self.document_length < self._least:
            raise ValueError(f"document_length={self.document_length} must be at least {self._least}, a fact")
        if not 1 <= self.name_length <= 4 or self.num_values**self.name_length < self.num_documents:
            raise ValueError(
                f"name_length={self.name_length} must lie between 1 and 4, and be enough for the names of "
                f"num_documents={self.num_documents} of num_values={self.num_values} symbols"
            )
        named = 2 + self.name_length
        read = self.hops * (2 * named + 2 + self.document_length)
        most = 2 + self.key_length + self.num_documents * (named + self.document_length) + read + 3
        if self.length < most:
            raise ValueError(f"length={self.length} is too short for {self}; make it at least {most}")

    @property
    def _least(self) -> int:
        return 2 * self.key_length + len(_ARROW)

    def scaled(self, factor: float) -> Self:
        """The same task at `factor` times the length and the documents, limited by the number of keys and names."""
        most = min(self.keys_of_a_split, self.num_values**self.name_length)
        documents = min(round(self.num_documents * factor), most)
        fewest = self.min_documents and min(round(self.min_documents * factor), documents)
        length = round(self.length * factor)
        return replace(self, length=length, num_documents=documents, min_documents=fewest)

    def sample(self, seed: int, split: str, index: int, noise: float) -> RetrievalRow:
        """Row `index` of `split`; noise: the probability that a token outside the facts is noise instead of blank."""
        rng = np.random.default_rng([seed, split_id(split), index])
        linked = self._linked(rng, split, self._count(rng), noise)
        question, answer, rounds = linked.chains[rng.integers(len(linked.chains))]
        read = rng.integers(self.hops + 1)
        # Documents that were read are no positives any more.
        asked = rounds[read] if read < self.hops else ()
        parts = [Part(_WRITE("head"), TEMPLATE)]
        for i, (name, text) in enumerate(linked.texts.items(), 1):
            parts.append(Part(_WRITE("document", name=name, text=text), i, found=name in asked))
        texts = [{name: linked.texts[name] for name in names} for names in rounds[:read]]
        parts += transcript(_WRITE, question, texts, asked, None if asked else answer)
        return pack([joined(parts)], self.length, _END)

    def linked(self, seed: int, split: str, index: int, documents: int) -> Linked:
        """Library `index` of `split`, with `documents` documents, rounded down to whole chains."""
        rng = np.random.default_rng([seed, split_id(split), index, documents])
        length = self.length + (documents - self.num_documents) * (2 + self.name_length + self.document_length)
        many = replace(self, length=length, num_documents=documents, min_documents=None)
        return many._linked(rng, split, documents, 1.0)

    def _linked(self, rng: np.random.Generator, split: str, documents: int, noise: float) -> Linked:
        """Documents and chains in random order."""
        count = documents // self.hops
        keys = [_text(key) for key in self._symbols(self._keys(rng, split, count * self.hops))]
        values = [_text(VALUES[[digit]]) for digit in rng.integers(self.num_values, size=count)]
        numbers = rng.choice(self.num_values**self.name_length, count * self.hops, replace=False)
        names = [_text(VALUES[n // self.num_values ** np.arange(self.name_length) % self.num_values]) for n in numbers]
        texts, chains = {}, []
        for i, value in enumerate(values):
            of_chain = slice(i * self.hops, (i + 1) * self.hops)
            facts = zip(keys[of_chain], [*keys[of_chain][1:], value], strict=True)
            for name, fact in zip(names[of_chain], facts, strict=True):
                texts[name] = self._written(rng, _ARROW.join(fact), noise)
            chains.append(Chain(keys[of_chain][0], value, tuple((name,) for name in names[of_chain])))
        order = rng.permutation(len(names))
        return Linked({names[i]: texts[names[i]] for i in order}, chains, self.chance)

    def _written(self, rng: np.random.Generator, fact: str, noise: float) -> str:
        """A text with a fact at a random place."""
        extra = rng.integers(self._least, self.document_length, endpoint=True) - len(fact)
        ids = np.where(rng.random(extra) < noise, NOISE[rng.integers(len(NOISE), size=extra)], FILLER)
        place = rng.integers(extra + 1)
        return _text(ids[:place]) + fact + _text(ids[place:])


def _text(ids: np.ndarray) -> str:
    return bytes(ids.tolist()).decode("ascii")
