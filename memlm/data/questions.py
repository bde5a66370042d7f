"""Questions about documents, from JSONL files. Each line is ``{"query": ..., "documents": [...], "positives":
[indices], "answer": ...}``. Lines are indexed once and read on demand, so files may have any size.

Legend: N questions, T tokens of a row.
"""

import json
import os
import reprlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from memlm.roles import TEMPLATE
from memlm.settings import suggest

from .disk_cache import Content, DiskCache
from .documents import assign_splits
from .find import find
from .manifest import file_entry
from .retrieval import Chain, Inquiry, Library, Linked, Part, RetrievalRow, joined, pack, transcript
from .row import SPLITS, split_id
from .templates import Templates, Writer
from .tokenizer import shortener

# Part of the name of every cached index; increase it if the index files or the form of a line change.
_FORMAT = 1
_MOST = 10**9
_FILES = ("places.npy", "sizes.npy", "splits.npy")


class Question(NamedTuple):
    """The texts of a line; positives: indices, ascending, of the documents that answer the query."""

    query: str
    documents: tuple[str, ...]
    positives: tuple[int, ...]
    answer: str | None


class Questions(Sequence[Question]):
    """The questions of JSONL files, each read on demand. `cache_dir` holds an index of them.

    paths: files, folders or globs, see `find`
    splits: uint8 [N], indices into SPLITS
    sizes: int64 [N, 3], bytes of query and answer (0: none), number of positives

    Raises ValueError with file, line and key if a line is malformed, or if a file changes meanwhile.
    """

    def __init__(self, paths: str | Sequence[str], cache_dir: str | Path) -> None:
        names, left_out = find(paths, (".jsonl",))
        cache = DiskCache(cache_dir)
        contents = cache.contents(names)
        self._files = [*contents.items()]
        key = [_FORMAT, *((content.num_bytes, content.sha256) for content in contents.values())]
        folder = cache.folder(key, _FILES, lambda folder: _index(folder, self._files), below="questions")
        self._places, self.sizes, self.splits = (np.load(folder / name, mmap_mode="r") for name in _FILES)
        self.manifest = {
            "format": _FORMAT,
            "splits": {
                name: {"questions": count}
                for name, count in zip(SPLITS, np.bincount(self.splits, minlength=3).tolist(), strict=True)
            },
            "files": [file_entry(names[path], content) for path, content in self._files],
            "left_out": [{"path": name, "reason": reason} for name, reason in left_out.items()],
        }

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, index: int) -> Question:  # type: ignore[override]
        number, start = self._places[index].tolist()
        path, content = self._files[number]
        with path.open("rb") as lines:
            content.check(os.fstat(lines.fileno()), path)
            lines.seek(start)
            return _read(lines.readline(), f"{path}, byte {start}")


def _index(folder: Path, files: Sequence[tuple[Path, Content]]) -> None:
    places, sizes = array("q"), array("q")

    def queries() -> Iterator[str]:
        for i, (file, content) in enumerate(files):
            start = 0
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        question = _read(line, f"{file}:{number}")
                        places.extend((i, start))
                        texts = (question.query, question.answer or "")
                        sizes.extend((*(len(text.encode()) for text in texts), len(question.positives)))
                        yield question.query
                    start += len(line)
                content.check(os.fstat(lines.fileno()), file)

    splits = assign_splits(queries())
    arrays = np.array(places).reshape(-1, 2), np.array(sizes).reshape(-1, 3), splits
    for name, values in zip(_FILES, arrays, strict=True):
        np.save(folder / name, values)


def read_record(line: bytes, where: str, known: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
    """A line of a JSONL file. Raises ValueError, with its place, if it is no object, or lacks a needed key."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error}); correct or remove the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not an object; give {', '.join(known)}")
    for key in needed:
        if key not in record:
            raise ValueError(f"{where}: {key} is missing; give {', '.join(known)}")
    return record


def _read(line: bytes, where: str) -> Question:
    record = read_record(line, where, Question._fields, ("query", "documents", "positives"))
    query, answer = record["query"], record.get("answer")
    for key, text in (("query", query), *((("answer", answer),) if answer is not None else ())):
        if not is_text(text):
            raise ValueError(f"{where}: {key}={reprlib.repr(text)} must be a text that is not empty")
    documents, positives = record["documents"], record["positives"]
    if not isinstance(documents, list) or not documents:
        raise ValueError(f"{where}: documents={reprlib.repr(documents)} must be a list of texts")
    for i, text in enumerate(documents):
        if not is_text(text):
            raise ValueError(f"{where}: documents[{i}]={reprlib.repr(text)} must be a text that is not empty")
    of_documents = isinstance(positives, list) and all(type(i) is int and 0 <= i < len(documents) for i in positives)
    if not of_documents or not positives:
        raise ValueError(
            f"{where}: positives={reprlib.repr(positives)} must be a list that names at least one of {len(documents)} "
            "documents, counted from 0"
        )
    return Question(query, tuple(documents), tuple(sorted({*positives})), answer)


def is_text(value: object) -> bool:
    # JSON can encode half a surrogate pair, which UTF-8 cannot.
    return isinstance(value, str) and bool(value) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def shuffled(rng: np.random.Generator, count: int) -> Iterator[int]:
    """0 to count - 1 in random order: Fisher and Yates' shuffle, one step at constant cost for each number drawn."""
    moved: dict[int, int] = {}
    for i in range(count):
        j = int(rng.integers(i, count))
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
        moved.pop(i, None)


class QuestionSource:
    """Endless rows of `seq_len` tokens: questions, each with its documents.

    Documents of other questions of the same split fill up to `num_documents`, in random order. A document is cut to
    `document_length` tokens. A row takes further questions while they fit whole. A question alone in a row first loses
    negatives, then its documents are cut. The cost of a row does not depend on the number of questions.

    templates: "plain", "chat" (the tokenizer's chat template), "interleave" (``Templates``), or a dict of changes to
        the latter's texts

    If templates name documents, a sample follows the rounds of ``memlm.Interleave``, in one of two forms, equally
    often. Either nothing has been read, and the model writes the names of the positives; or it has read them, nothing
    is left to find, and the answer follows. A question without an answer always takes the first form. Names are
    numbers below `num_names`, drawn anew for each sample and written in ascending order.

    Raises ValueError if a split has no question, a question is longer than a row or lacks a needed answer, or there is
    no chat template.
    """

    def __init__(
        self,
        questions: Questions,
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        seed: int,
        num_documents: int = 16,
        document_length: int = 512,
        templates: str | Mapping[str, str] = "plain",
        num_names: int = 100_000,
    ):
        self.seq_len, self.seed, self.manifest = seq_len, seed, questions.manifest
        self.num_documents, self.document_length, self.num_names = num_documents, document_length, num_names
        for key, value, most in (
            # A document has at least one token.
            ("num_documents", num_documents, seq_len),
            ("document_length", document_length, _MOST),
            ("num_names", num_names, _MOST),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{key}={value} must lie between 1 and {most}")
        self._end: int = tokenizer.eos_token_id
        self.templates = _templates(templates, tokenizer)
        self._write, self._shorten = Writer(self.templates, tokenizer), shortener(tokenizer)
        self._questions = questions
        self._of_split = [np.flatnonzero(questions.splits == split) for split in range(len(SPLITS))]
        for split, members in zip(SPLITS, self._of_split, strict=True):
            if not len(members):
                raise ValueError(
                    f"paths: no question of {len(questions)} is left for the {split} split; give 3 or more"
                )
        if not self.templates.named and not questions.sizes[:, 1].all():
            query = questions[int(questions.sizes[:, 1].argmin())].query
            raise ValueError(
                f"paths: the question {query[:40]!r} has no answer, which only templates=interleave can do without; "
                "give it one"
            )
        largest = int(questions.sizes[:, 2].max())
        if self.templates.named and num_names < max(num_documents, largest):
            raise ValueError(
                f"num_names={num_names} must be at least num_documents={num_documents} and {largest}, the most "
                "positives of a question"
            )
        # A token has at least one byte, so only few questions must be read to check that all fit.
        for index in np.flatnonzero(self._most_tokens() > seq_len):
            question, largest = questions[int(index)], num_names - 1
            names = [str(largest - i) for i in range(len(question.positives))]
            # The first form of a sample is shorter than the second, with passages and an answer.
            self._about(question, names, question.answer is not None, seq_len)

    def row(self, index: int, split: str, step: int) -> RetrievalRow:
        rng = np.random.default_rng([self.seed, split_id(split), index])
        members, samples, room = self._of_split[split_id(split)], [], self.seq_len
        for place in shuffled(rng, len(members)):
            sample = self._sample(self._questions[members[place]], members, rng, room)
            if sample is None:
                break
            samples.append(sample)
            room -= len(sample.input_ids)
        return pack(samples, self.seq_len, self._end)

    def linked(self, split: str, documents: int, questions: int) -> Linked:
        """At most `questions` questions of a split, with their positives and others' documents up to `documents`,
        named by numbers.
        """
        rng = np.random.default_rng([self.seed, split_id(split), documents, questions])
        members, numbers = self._of_split[split_id(split)], dict[str, int]()
        drawn = (self._questions[members[place]] for place in shuffled(rng, len(members)))
        asked = [*islice(drawn, questions)]
        for question in asked:
            for i in question.positives:
                numbers.setdefault(question.documents[i], len(numbers))
        for text in (text for question in chain(asked, drawn) for text in question.documents):
            if len(numbers) >= documents:
                break
            numbers.setdefault(text, len(numbers))
        chains = []
        for question in asked:
            found = sorted({numbers[question.documents[i]] for i in question.positives})
            chains.append(Chain(question.query, (question.answer or "").strip(), (tuple(map(str, found)),)))
        texts = {str(number): self._shorten(text, self.document_length) for text, number in numbers.items()}
        return Linked(texts, chains, 0.0)

    def library(self, split: str, documents: int, questions: int) -> Library:
        """The same as tokens. If templates name documents, these names are the answers."""
        linked, write = self.linked(split, documents, questions), self._write
        inquiries = []
        for query, answer, (names,) in linked.chains:
            said = write.names(names) if self.templates.named else write.answer(answer)
            asked = np.array(write("question", question=query))
            inquiries.append(Inquiry(asked, np.array(said), frozenset(map(int, names))))
        texts = [np.array(write("document", name=name, text=text)) for name, text in linked.texts.items()]
        return Library(np.array(write("head"), np.int64), texts, inquiries, 0.0, write("tail"), write("response"))

    def _sample(
        self, question: Question, members: np.ndarray, rng: np.random.Generator, room: int
    ) -> RetrievalRow | None:
        """A sample of at most `room` tokens, or None if it does not fit after others; alone in a row it is
        shortened.
        """
        named, alone = self.templates.named, room == self.seq_len
        read = question.answer is not None and not (named and rng.integers(2))
        count = max(self.num_documents, len(question.positives))
        names = [*map(str, rng.choice(self.num_names, count, replace=False))] if named else [""] * count
        fitted = self._about(question, names, read, room)
        if fitted is None:
            return None
        about, (head, *rest) = fitted
        documents = [(ids, not (named and read)) for ids in about]
        room -= sum(map(len, about)) + len(head.ids) + sum(len(part.ids) for part in rest)
        for text in islice(self._others(question, members, rng), max(0, self.num_documents - len(about))):
            text = self._shorten(text, self.document_length)
            ids = self._write("document", name=names[len(documents)], text=text)
            if len(ids) > room and not alone:
                return None
            if len(ids) > room:
                break
            documents.append((ids, False))
            room -= len(ids)
        order = enumerate(rng.permutation(len(documents)), 1)
        return joined([head, *(Part(documents[i][0], n, found=documents[i][1]) for n, i in order), *rest])

    def _about(
        self, question: Question, names: Sequence[str], read: bool, room: int
    ) -> tuple[list[list[int]], list[Part]] | None:
        """The positives of a question, and the parts of its sample that are no documents.

        Alone in a row, documents are cut until everything fits; else the result may be None.
        """
        wanted = [*dict.fromkeys(question.documents[i] for i in question.positives)]
        names, limit, write = names[: len(wanted)], self.document_length, self._write
        names = sorted(names, key=int) if self.templates.named else names
        while True:
            texts = [self._shorten(text, limit) for text in wanted]
            about = [write("document", name=name, text=text) for name, text in zip(names, texts, strict=True)]
            rest = [Part(write("head"), TEMPLATE)]
            if not self.templates.named:
                rest += transcript(write, question.query, answer=question.answer)
            elif read:
                given = dict(zip(names, texts, strict=True))
                rest += transcript(write, question.query, [given], answer=question.answer)
            else:
                rest += transcript(write, question.query, asked=names)
            excess = sum(map(len, about)) + sum(len(part.ids) for part in rest) - room
            if excess <= 0:
                return about, rest
            if room < self.seq_len:
                return None
            if limit == 1:
                raise ValueError(
                    f"seq_len={room} is too short for the question {question.query[:40]!r}; raise data.seq_len to "
                    f"{room + excess} or more"
                )
            limit = max(1, min(limit, max(map(len, about))) - max(1, excess // (2 * len(about))))

    def _most_tokens(self) -> np.ndarray:
        """[N]: an upper bound on the tokens of each sample that cannot be dropped."""
        t = self.templates
        fixed = 1 + sum(len(getattr(t, f.name).encode()) for f in fields(t))
        named = (t.document + t.name + t.passage).replace("{name}", str(self.num_names - 1))
        # Besides these, one character of each document, twice.
        query_N, answer_N, positives_N = np.asarray(self._questions.sizes).T
        return fixed + 2 * query_N + answer_N + (len(named.encode()) + 2 * 4) * positives_N

    def _others(self, question: Question, members: np.ndarray, rng: np.random.Generator) -> Iterator[str]:
        """Negatives: the question's own first, because they are harder."""
        given = {question.documents[i] for i in question.positives}
        own = [text for text in dict.fromkeys(question.documents) if text not in given]
        yield from (own[i] for i in rng.permutation(len(own)))
        given |= {*own}
        for place in shuffled(rng, len(members)):
            for text in self._questions[members[place]].documents:
                if text not in given:
                    given.add(text)
                    yield text


def _templates(spec: str | Mapping[str, str], tokenizer: PreTrainedTokenizerFast) -> Templates:
    if isinstance(spec, Mapping):
        known = [f.name for f in fields(Templates)]
        for key in spec:
            if key not in known:
                raise ValueError(f"templates.{key} is unknown; {suggest(str(key), known)}")
        return Templates(**spec)
    if spec == "chat":
        return Templates.chat(tokenizer)
    if spec not in ("plain", "interleave"):
        raise ValueError(f"templates={spec!r} must be plain, chat, interleave, or texts of interleave's that differ")
    return Templates.plain() if spec == "plain" else Templates()
