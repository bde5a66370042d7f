"""Sessions: a memory is asked while it is still being written. Invented sessions, and those of your own files."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from memlm.evaluation.events import Ask, Event, Read, Record, Stream
from memlm.evaluation.tasks import Setting, Task, View
from memlm.evaluation.tasks.guesses import guesses
from memlm.evaluation.tasks.invented import NAMES, VALUES_OF, noise
from memlm.settings import build_config, named, require

# The kinds of answers.
RIGHT, STALE, FABRICATED, OMITTED = "right", "stale", "fabricated", "omitted"


@dataclass(frozen=True, kw_only=True)
class SessionQuestion:
    """A question about sessions.

    q, a: its text and its right answer
    evidence: the number of the session, from 0, after which it may be asked; the last of several; -1: the last of all
    until: the number of the session that makes the answer wrong, if there is one
    old: answers that were right before; distractors: others
    """

    q: str
    a: str
    evidence: int | list = -1
    until: int | None = None
    old: list = field(default_factory=list)
    distractors: list = field(default_factory=list)

    def ready(self, read: int, sessions: int) -> bool:
        """Whether it may be asked after ``read`` of the sessions."""
        last = max(self.evidence) if isinstance(self.evidence, list) else self.evidence
        return (last % sessions) < read and (self.until is None or read <= self.until)


@dataclass(frozen=True, kw_only=True)
class _Sessions(Task):
    """every: sessions between the questions; lengths play no part
    unknown: the answer of one who was not told; no candidate if it is ""
    """

    every: int = 10
    unknown: str = "none"

    @abstractmethod
    def _check(self) -> None:
        """Raise ValueError if its settings do not fit."""

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            require(self.every >= 1, f"every={self.every} must be at least 1")
            self._check()

    def reduce(self, records: Iterable[Record]) -> Iterable[Record]:
        for record in records:
            won = dict.fromkeys((RIGHT, STALE, FABRICATED, OMITTED), 0.0)
            for kind, share in zip(record["kinds"], record["shares"], strict=True):
                won[kind] += share
            yield {**record, **won, RIGHT: record["correct"]}

    def _views(self, down: str | None, floors: Mapping[str, float]) -> Sequence[View]:
        return [
            View("sessions", down, floors=floors),
            View("told", down, (RIGHT, STALE, FABRICATED, OMITTED), "share of answers", name="answers"),
            View("sessions", down, ("seconds",), "seconds a question", False, name="seconds"),
            View("sessions", down, ("bytes",), "bytes of state", False, name="bytes"),
        ]

    def _asks(
        self,
        setting: Setting,
        questions: Iterable[SessionQuestion],
        ask: str,
        tag: Mapping[str, Any],
        values: Sequence[str] = (),
    ) -> Iterator[Ask]:
        """values: all that were told so far, in their order; none if they are unknown"""
        for question in questions:
            answers = [(question.a, RIGHT), *((x, STALE) for x in question.old)]
            answers += [(x, FABRICATED) for x in question.distractors]
            if self.unknown and len(answers) > 1:
                answers.append((self.unknown, OMITTED))
            told = {"told": "changed" if question.old else "once", "kinds": [kind for _, kind in answers]}
            if values:
                tag = {**tag, "guesses": guesses(values, [text for text, _ in answers])}
            ids, *of_answers = setting.pieces([ask.format(question.q), *(f" {text}" for text, _ in answers)])
            yield Ask(ids, of_answers, {**tag, **told})


def _read(setting: Setting, sessions: Iterable[str], first: bool) -> Read:
    lines = setting.pieces([f"{text}\n" for text in sessions])
    return Read(np.concatenate([setting.start, *lines] if first else lines))


@dataclass(frozen=True, kw_only=True)
class WhileConstructing(_Sessions):
    """sessions: with facts; facts: of a session
    noise: sessions without facts after each of them
    changes: share of the facts that change an earlier one
    questions: asked at a time
    """

    name = "while_constructing"
    title = "Asked while the memory is written"
    note = (
        "Sessions tell facts on 8 names with 6 attributes; some change an earlier one. After every few sessions, only "
        "facts told so far are asked. Candidates: the present value (right), the former one if there is one (stale), "
        "values told of other names (fabricated), and 'none' (omitted). 'Values told' and 'last value' are guessers "
        "that have the values without their names."
    )
    sessions: int = 20
    facts: int = 2
    noise: list = field(default_factory=lambda: [0, 1, 3])
    changes: float = 0.3
    questions: int = 8

    def _check(self) -> None:
        require(self.sessions >= self.every, f"sessions={self.sessions} must be at least every={self.every}")
        require(1 <= self.facts <= 48, f"facts={self.facts} must lie between 1 and 48")
        require(0 <= self.changes <= 1, f"changes={self.changes} must lie in 0..1")
        numbers = self.noise and all(type(n) is int and n >= 0 for n in self.noise)
        require(bool(numbers), f"noise={self.noise} must be whole numbers from 0 on")
        require(self.questions >= 1, f"questions={self.questions} must be at least 1")

    def tokens(self) -> int:
        # A sentence has less than 40 bytes.
        return 40 * self.sessions * self.facts * (1 + max(self.noise, default=0))

    def cost(self) -> int:
        asked = 4 * 30 * self.questions * (self.sessions // self.every)
        return self.rows * len(self.noise) * (self.tokens() + asked)

    def views(self) -> Sequence[View]:
        return self._views("noise", {"chance": 0.25})

    def streams(self, setting: Setting) -> Iterator[Stream]:
        for noisy in self.noise:
            for row in range(self.rows):
                # The same facts and questions whatever the noise.
                yield self._stream(setting, noisy, row)

    def _stream(self, setting: Setting, noisy: int, row: int) -> Stream:
        """noisy: sessions of noise after each with facts"""
        rng, other = setting.rng(self.name, row), setting.rng(self.name, "noise", row)
        now: dict[tuple[str, str], list[str]] = {}
        values: list[str] = []
        untold = [(name, attribute) for name in NAMES for attribute in VALUES_OF]
        rng.shuffle(untold)
        stream: list[Event] = []
        texts: list[str] = []
        for session in range(1, self.sessions + 1):
            facts = []
            for _ in range(self.facts):
                change = now and (not untold or rng.random() < self.changes)
                of = [*now][rng.integers(len(now))] if change else untold.pop()
                value = rng.choice([v for v in VALUES_OF[of[1]] if v not in now.get(of, [])[-1:]])
                now.setdefault(of, []).append(str(value))
                values.append(str(value))
                facts.append(f"The {of[1]} of {of[0]} is {value}.")
            texts += [" ".join(facts), *(" ".join(noise(other) for _ in facts) for _ in range(noisy))]
            if session % self.every == 0:
                stream.append(_read(setting, texts, not stream))
                asked = rng.choice(len(now), min(self.questions, len(now)), replace=False)
                questions = [self._question(now, [*now][i], rng) for i in asked]
                tag = {"sessions": session, "noise": f"{noisy} of noise", "unit": row}
                stream += self._asks(setting, questions, "{}", tag, values)
                texts = []
        return stream

    def _question(
        self, now: dict[tuple[str, str], list[str]], of: tuple[str, str], rng: np.random.Generator
    ) -> SessionQuestion:
        name, attribute = of
        *before, value = now[of]
        old = before[-1:]
        # Values told of others; those told of nobody only if there are too few.
        told = {v for (who, what), given in now.items() if what == attribute and who != name for v in given}
        values = [v for v in VALUES_OF[attribute] if v not in now[of]]
        values = sorted(rng.permutation(values).tolist(), key=lambda v: v not in told)
        return SessionQuestion(q=f"The {attribute} of {name} is", a=value, old=old, distractors=values[: 2 - len(old)])


@dataclass(frozen=True, kw_only=True)
class Sessions(_Sessions):
    """path: a JSONL file; each line is {"session": [text, ...], "questions": [{"q": ..., "a": ...}, ...]}
    ask: the text of a question, with {} for q

    A question has the fields of ``SessionQuestion``. Without old answers and distractors, it is right if greedy
    decoding gives its answer. Each line is a stream; ``rows`` bounds their number.
    """

    name = "sessions"
    title = "Sessions of a file"
    note = (
        "Sessions are read, and after every few those questions are asked whose evidence was read. With candidates, "
        "the likeliest counts; without, the share of the answer's tokens that greedy decoding gives."
    )
    path: str
    ask: str = "Question: {}\nAnswer:"

    def _check(self) -> None:
        require(self.ask.count("{}") == 1, f"ask={self.ask!r} must hold {{}} once")
        _ = self._lines

    def cost(self) -> int:
        return sum(len(text) for sessions, _ in self._lines for text in sessions)

    def views(self) -> Sequence[View]:
        sizes = [1 + len(q.old) + len(q.distractors) for _, questions in self._lines for q in questions]
        chance = sum(1 / (n + bool(self.unknown)) for n in sizes if n > 1) / len(sizes)
        return self._views(None, {"chance": chance})

    @cached_property
    def _lines(self) -> list[tuple[list[str], list[SessionQuestion]]]:
        place = Path(self.path).expanduser()
        try:
            lines = place.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise ValueError(f"path={self.path}: {reason}; name a JSONL file") from None
        found = [_parsed(line, f"{self.path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
        found = found[: self.rows]
        more = f"path={self.path} has no question in its first {self.rows} lines; add some, or raise rows"
        require(any(questions for _, questions in found), more)
        return found

    def streams(self, setting: Setting) -> Iterator[Stream]:
        for sessions, questions in self._lines:
            stream: list[Event] = []
            for start in range(0, len(sessions), self.every):
                read = min(start + self.every, len(sessions))
                ready = [question for question in questions if question.ready(read, len(sessions))]
                stream.append(_read(setting, sessions[start:read], not stream))
                stream += self._asks(setting, ready, self.ask, {"sessions": read})
            yield stream


def _parsed(line: str, place: str) -> tuple[list[str], list[SessionQuestion]]:
    """Raises ValueError with file, line number and a fix."""
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: {error}; a line must be a JSON object") from None
    form = '{"session": [text, ...], "questions": [{"q": ..., "a": ...}, ...]}'
    fit = isinstance(given, dict) and {*given} == {"session", "questions"}
    fit = fit and all(isinstance(given[key], list) for key in given) and given["session"]
    fit = fit and all(isinstance(text, str) for text in given["session"])
    fit = fit and all(isinstance(question, dict) for question in given["questions"])
    require(bool(fit), f"{place}: a line must have the form {form}")
    sessions, questions = given["session"], []
    for i, values in enumerate(given["questions"]):
        question = build_config(SessionQuestion, values, f"{place}: questions[{i}]")
        evidence = question.evidence if isinstance(question.evidence, list) else [question.evidence]
        for name, numbers in (("evidence", evidence), ("until", [] if question.until is None else [question.until])):
            known = all(type(n) is int and -1 <= n < len(sessions) for n in numbers) and (numbers or name == "until")
            most = len(sessions) - 1
            require(
                bool(known),
                f"{place}: questions[{i}].{name}={values.get(name)} must be numbers of sessions, 0..{most}",
            )
        for name in ("old", "distractors"):
            texts = all(isinstance(x, str) for x in values.get(name, []))
            require(texts, f"{place}: questions[{i}].{name}={values.get(name)} must be a list of texts")
        questions.append(question)
    return sessions, questions
