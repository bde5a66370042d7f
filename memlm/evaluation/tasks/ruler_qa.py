"""RULER: questions about documents of SQuAD or HotpotQA, among other documents of the same file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memlm.evaluation.tasks import Setting
from memlm.evaluation.tasks.haystack import Haystack
from memlm.evaluation.tasks.ruler_prompt import Kind, Prompt, string_match_part
from memlm.settings import require

# The templates of qa.py and constants.py of RULER.
_ASKED = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
_INTRO = f"{_ASKED}The following are given documents.\n\n"
_QUESTION = _ASKED + "Question: {query} Answer:"
FORMS = {"squad": "SQuAD's JSON, such as dev-v2.0.json", "hotpotqa": "HotpotQA's JSON of the distractor setting"}


class FileQuestion(NamedTuple):
    """needed: the numbers of its documents; near: those of the same article"""

    query: str
    answers: Sequence[str]
    needed: Sequence[int]
    near: Sequence[int]


class QuestionFile(NamedTuple):
    questions: Sequence[FileQuestion]
    documents: Sequence[str]


def read(form: str, path: str) -> QuestionFile:
    """Raises ValueError, one line, for a file of another form."""
    try:
        data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        library = _squad(data["data"]) if form == "squad" else _hotpotqa(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"eval.ask.ruler.{form}={path}: is not {FORMS[form]} ({told:.80})") from None
    require(bool(library.questions), f"eval.ask.ruler.{form}={path}: has no question; name {FORMS[form]}")
    return library


def _squad(articles: Sequence[Mapping[str, Any]]) -> QuestionFile:
    texts = sorted({p["context"] for article in articles for p in article["paragraphs"]})
    numbers = {text: i for i, text in enumerate(texts)}
    questions = []
    for article in articles:
        of_article = [numbers[p["context"]] for p in article["paragraphs"]]
        for p in article["paragraphs"]:
            own = numbers[p["context"]]
            near = [i for i in of_article if i != own]
            questions += [
                FileQuestion(qa["question"], [answer["text"] for answer in qa["answers"]], [own], near)
                for qa in p["qas"]
                if not qa.get("is_impossible", False)
            ]
    return QuestionFile(questions, texts)


def _hotpotqa(items: Sequence[Mapping[str, Any]]) -> QuestionFile:
    of_item = [[f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]] for item in items]
    texts = sorted({text for found in of_item for text in found})
    numbers = {text: i for i, text in enumerate(texts)}
    questions = [
        FileQuestion(item["question"], [item["answer"]], [numbers[text] for text in found], [])
        for item, found in zip(items, of_item, strict=True)
    ]
    return QuestionFile(questions, texts)


@dataclass(frozen=True)
class AskedDocuments(Kind):
    """Text ``row`` asks question ``row`` of the file. The documents needed and others of their article, then of the
    file, stand in random order; a last one, which is not needed, may be cut.
    """

    form: str
    path: str
    generated = 32

    def score(self, text: str, answers: Sequence[str]) -> float:
        return string_match_part(text, answers)

    def prompt(self, setting: Setting, prose: Haystack, rng: np.random.Generator, length: int, row: int) -> Prompt:
        library: QuestionFile = setting.once((self.form, self.path), lambda: read(self.form, self.path))
        count = len(library.questions)
        require(row < count, f"eval.ask.ruler.{self.form}={self.path}: has {count} questions; lower eval.rows")
        asked = library.questions[row]
        (last,) = setting.pieces(["\n\n"])
        needed = [self._ids(setting, library, i) for i in dict.fromkeys(asked.needed)]
        heads = setting.pieces(f"Document {i + 1}:\n" for i in range(len(needed)))

        def context(tokens: int) -> np.ndarray:
            held, room = list(needed), tokens - len(last) - sum(map(len, [*needed, *heads]))
            for number in self._others(asked, len(library.documents), rng):
                ids = self._ids(setting, library, number)
                (head,) = setting.pieces([f"Document {len(held) + 1}:\n"])
                room -= len(head) + len(ids)
                if room < 0:
                    break
                held.append(ids)
            titles = setting.pieces(f"Document {i + 1}:\n" for i in range(len(held)))
            order = rng.permutation(len(held)).tolist()
            parts = [part for title, i in zip(titles, order, strict=True) for part in (title, held[i])]
            body = np.concatenate([*parts, head, ids]).astype(np.int64)
            return np.concatenate([body[: tokens - len(last)], last])

        least = len(last) + sum(map(len, [*needed, *heads]))
        question = _QUESTION.format(query=asked.query)
        return Prompt(_INTRO, question, asked.answers, f" {asked.answers[0]}", "Document 1:\n", least, context)

    def _ids(self, setting: Setting, library: QuestionFile, number: int) -> np.ndarray:
        text = f"{library.documents[number]}\n\n"
        return setting.once((self.form, self.path, number), lambda: setting.pieces([text])[0])

    def _others(self, asked: FileQuestion, count: int, rng: np.random.Generator) -> Iterator[int]:
        """Without end: all others again, if the file has too few."""
        yield from rng.permutation(asked.near).astype(int).tolist()
        known = {*asked.needed, *asked.near}
        others = [i for i in rng.permutation(count).tolist() if i not in known]
        yield from cycle(others or [*asked.near] or [*asked.needed])
