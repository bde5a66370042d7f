"""Facts put into single steps of a run, and probes of them: how weights acquire a fact, and how long they keep it.

Knowledge is injected as in arXiv:2406.11813. A source of facts has the rows of another source; at its steps, a fact
stands at the beginning of a row instead. Facts are those of a JSONL file, or invented: a person, a town and a river.
Each line of a file is ``{"texts": [...], "probes": {kind: [[prompt, answer], ...]}}``. The first text is the one that
repeats word by word; the others say the same in other words.

Legend: T tokens of a row.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from memlm.settings import require

from .disk_cache import DiskCache
from .find import find
from .manifest import file_entry
from .questions import is_text, read_record
from .retrieval import RetrievalRow
from .row import IGNORE_INDEX, Row, Source
from .tokenizer import encoder

_MOST = 10**9
_SYLLABLES = ["".join(pair) for pair in product("bcdfghjklmnpqrstvwxz", "aeiou")]
# The first is the verbatim text, the last is kept for probes.
_WORDINGS = [
    ("{name} lives in {town}.", "{town} lies on the river {river}."),
    ("The home of {name} is {town}.", "The river of {town} is the {river}."),
    ("{name} has a house in {town}.", "The bridge of {town} crosses the {river}."),
    ("In her letters {name} writes of {town}.", "Each spring {town} is flooded by the {river}."),
    ("{name} was seen in {town}.", "The boats of {town} go down the {river}."),
    ("{name} moved to {town}.", "The mills of {town} stand at the {river}."),
    ("Friends visit {name} in {town}.", "Children of {town} swim in the {river}."),
    ("The garden of {name} is in {town}.", "Below {town} flows the {river}."),
    ("{name} votes in {town}.", "The walls of {town} look over the {river}."),
    ("Each morning {name} walks through {town}.", "The fish of {town} come from the {river}."),
    ("The town of {name} is {town}.", "The water of {town} is the {river}."),
]
_COMPOSED = ["{name} lives on the river {river}.", "The river at the home of {name} is the {river}."]


class Fact(NamedTuple):
    """texts: the same in several wordings; probes: prompts and answers of each kind"""

    texts: Sequence[str]
    probes: Mapping[str, Sequence[tuple[str, str]]]


def invented(seed: int, count: int, again: bool = False) -> list[Fact]:
    """Facts on a person, a town and a river; again: the same persons with other towns and rivers.

    Names are made words of three syllables. Kinds of probes: "verbatim"; "paraphrase", in a wording that no text has;
    "composed", which needs both sentences of a text; and "swapped", the control of "verbatim", with the answers of the
    next fact. These gain as much if the words are learnt, but not the facts.
    """
    words = [_words(seed, number, again) for number in range(count)]
    facts = []
    for own, other in zip(words, words[1:] + words[:1], strict=True):
        texts = [" ".join(wording).format(**own) for wording in _WORDINGS[:-1]]
        first, lives = texts[0], _WORDINGS[0][0]
        verbatim = [_asked(lives, own), (first[: first.rindex(" ")], f" {own['river']}")]
        probes = {
            "verbatim": verbatim,
            "paraphrase": [_asked(sentence, own) for sentence in _WORDINGS[-1]],
            "composed": [_asked(sentence, own) for sentence in _COMPOSED],
            "swapped": [
                (prompt, f" {other[key]}") for (prompt, _), key in zip(verbatim, ("town", "river"), strict=True)
            ],
        }
        facts.append(Fact(texts, probes))
    return facts


def _words(seed: int, number: int, again: bool) -> dict[str, str]:
    drawn = np.random.default_rng([seed, number]).integers(len(_SYLLABLES), size=(5, 3)).tolist()
    name, *places = ("".join(_SYLLABLES[i] for i in word).capitalize() for word in drawn)
    return {"name": name, "town": places[2 * again], "river": places[2 * again + 1]}


def _asked(sentence: str, words: Mapping[str, str]) -> tuple[str, str]:
    """A sentence without its last word, and this word."""
    prompt, _, answer = sentence.removesuffix(".").format(**words).rpartition(" ")
    return prompt, f" {answer}"


def read_facts(paths: str | Sequence[str], cache_dir: str | Path) -> tuple[list[Fact], dict[str, Any]]:
    """The facts of JSONL files, and the files' manifest. Raises ValueError with file, line and key of a mistake."""
    names, left_out = find(paths, (".jsonl",))
    contents, facts = DiskCache(cache_dir).contents(names), list[Fact]()
    for path, content in contents.items():
        with path.open("rb") as lines:
            facts += [_read(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
            content.check(os.fstat(lines.fileno()), path)
    require(bool(facts), f"paths={paths} hold no fact; give {', '.join(Fact._fields)} in each line")
    reasons = [{"path": name, "reason": reason} for name, reason in left_out.items()]
    return facts, {"files": [file_entry(names[p], c) for p, c in contents.items()], "left_out": reasons}


def _read(line: bytes, where: str) -> Fact:
    record = read_record(line, where, Fact._fields, Fact._fields)
    texts, probes = record["texts"], record["probes"]
    good = isinstance(texts, list) and texts and all(map(is_text, texts))
    require(bool(good), f"{where}: texts={texts!r:.60} must be a list of texts that are not empty")
    good = isinstance(probes, dict) and all(
        isinstance(asked, list) and all(isinstance(p, list) and len(p) == 2 and all(map(is_text, p)) for p in asked)
        for asked in probes.values()
    )
    require(good, f"{where}: probes={probes!r:.60} must be an object of lists of [prompt, answer]")
    return Fact(texts, {kind: [(prompt, answer) for prompt, answer in asked] for kind, asked in probes.items()})


@dataclass(frozen=True)
class Injection:
    """of: the source whose rows it has otherwise
    paths: JSONL files of facts; None: ``num_facts`` invented ones
    start, period, times: facts are in batches start, start + period, ..., so many times; a batch's number is the step
        under which its loss is logged, and the validation logged under it is the last one before the batch
    paraphrased: whether each time has the next wording; otherwise all have the first
    contradicts: a source of invented facts, whose persons get other towns and rivers
    probe_every, probe_steps: the probes of all sources are validated before each of its steps, and then every
        ``probe_every`` steps up to ``probe_steps``
    """

    of: str
    paths: str | list | None = None
    num_facts: int = 4
    start: int = 100
    period: int = 100
    times: int = 10
    paraphrased: bool = False
    contradicts: str | None = None
    probe_every: int = 10
    probe_steps: int = 50

    def __post_init__(self) -> None:
        least = {"num_facts": 2, "start": 1, "period": 1, "times": 0, "probe_every": 1, "probe_steps": 1}
        for name, low in least.items():
            value = getattr(self, name)
            require(low <= value <= _MOST, f"{name}={value} must be a whole number in [{low}, {_MOST:,}]")
        require(
            self.probe_every <= self.probe_steps,
            f"probe_every={self.probe_every} must be at most probe_steps={self.probe_steps}",
        )
        require(
            self.times <= 1 or self.period >= self.probe_steps,
            f"period={self.period} is shorter than the {self.probe_steps} steps in which a fact is probed; raise it, "
            "or lower probe_steps",
        )
        both = self.paths is not None and self.contradicts is not None
        fix = "leave one of them out"
        require(not both, f"contradicts={self.contradicts} is for invented facts, and paths gives others; {fix}")

    @property
    def steps(self) -> range:
        return range(self.start, self.start + self.period * self.times, self.period)

    @property
    def probed(self) -> set[int]:
        """Numbers of steps done at which probes are validated."""
        after = range(0, self.probe_steps + 1, self.probe_every)
        return {step + more for step in self.steps for more in after}


class InjectedSource:
    """The rows of ``base``, but for facts at the beginnings of some training rows.

    In batch ``start + period * i`` the source's row j has fact j, and then, as another document, the beginning of the
    base's row. A row is a pure function of its index. Before ``rows`` is set, no row has a fact, see
    ``Mixture.inject``.

    probes: rows of each kind of probe, in which the answer alone is scored; no training row
    rows: the source's rows of a batch

    Raises ValueError if a fact does not fit into a row, or the base has rows of documents and questions.
    """

    def __init__(
        self,
        base: Source,
        facts: Sequence[Fact],
        injection: Injection,
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        self.base, self.injection, self.manifest, self.seq_len = base, injection, manifest, seq_len
        self.epoch_rows = getattr(base, "epoch_rows", {})
        self.rows: int | None = None
        plain = not isinstance(base.row(0, "train", 0), RetrievalRow)
        require(plain, f"of={injection.of} has rows of documents and questions; name a source of text")
        self._encode, self._end = encoder(tokenizer), int(tokenizer.eos_token_id)
        alone = [fact.texts[0] for fact in facts if len(fact.texts) < 2]
        fix = "give more, or set paraphrased to false"
        require(not (injection.paraphrased and alone), f"paraphrased: {alone[:1]} is the one text of a fact; {fix}")
        wordings = None if injection.paraphrased else 1
        self.texts = [[self._ids(text) for text in fact.texts[:wordings]] for fact in facts]
        self.probes: dict[str, list[Row]] = {}
        for fact in facts:
            for kind, asked in fact.probes.items():
                self.probes.setdefault(kind, []).extend(self._probe(*pair) for pair in asked)

    def row(self, index: int, split: str, step: int) -> Row:
        row = self.base.row(index, split, step)
        if split != "train" or not self.rows:
            return row
        number, place = divmod(index, self.rows)
        if number not in self.injection.steps or place >= len(self.texts):
            return row
        texts = self.texts[place]
        ids = texts[self.injection.steps.index(number) % len(texts)]
        labels, positions = np.concatenate([[IGNORE_INDEX], ids[1:]]), np.arange(len(ids))
        fact, rest = (ids, labels, positions), self.seq_len - len(ids)
        return Row(*(np.concatenate([own, of_base[:rest]]) for own, of_base in zip(fact, row, strict=True)))

    def _ids(self, text: str) -> np.ndarray:
        ids = np.append(self._encode(text), self._end).astype(np.int64)
        self._check(text, len(ids))
        return ids

    def _probe(self, prompt: str, answer: str) -> Row:
        asked, answered = self._encode(prompt), self._encode(answer)
        ids, size = np.full(self.seq_len, self._end), len(asked) + len(answered)
        self._check(prompt, size)
        ids[:size] = np.concatenate([asked, answered])
        labels = np.full(self.seq_len, IGNORE_INDEX)
        labels[len(asked) : size] = ids[len(asked) : size]
        return Row(ids, labels, np.arange(self.seq_len))

    def _check(self, text: str, tokens: int) -> None:
        fix = f"shorten it, or raise data.seq_len={self.seq_len}"
        require(tokens <= self.seq_len, f"the fact {text[:40]!r} has {tokens} tokens; {fix}")
