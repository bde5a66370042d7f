"""Tasks: what a memory is asked. A new one is a module here, and its name under ``eval.ask``.

A task is a frozen dataclass that derives from ``Task``; its fields are its settings. It yields streams of events
(``memlm.evaluation.events``), and the runner does the rest.

Files:

    babilong            bAbI's facts in prose
    exposure            recognition, recall and retention of sentences, by state and by weights
    grid                needles over length and depth
    guesses             guessers that have a part of a text
    haystack            texts that hide needles
    invented            invented facts and sentences
    order               which of two passages came first
    overwrite           keys that are written several times
    recall              pairs, copies and motifs in any tokenizer
    ruler               RULER's tasks; the other files of this name are its parts
    ruler_lists         lists of words
    ruler_needles       needles in a haystack, variable tracking
    ruler_prompt        prompts and scorers
    ruler_qa            questions about documents
    saturation          how many pairs a state holds
    sessions            a memory is asked while it is written; sessions of your files
    stores              the same facts in a memory, in weights, and in a bank
    symbols             keys, values and noise as single tokens
    words               words, names and numbers
"""

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from transformers import PreTrainedTokenizerFast

from memlm.data import Source, TextSource
from memlm.data.tokenizer import continuer, encoder, first_token
from memlm.evaluation.events import Record, Stream
from memlm.settings import build_config, require, suggest


class Setting:
    """The surroundings of a task: the model's tokenizer, a seed for all draws, and sources of data.

    encode: text -> token ids [T]; no special token is added
    start: the token that the tokenizer puts before a text, if it does
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, sources: Mapping[str, Source] | None = None
    ) -> None:
        self.tokenizer, self.seed, self.sources = tokenizer, seed, sources or {}
        encode = encoder(tokenizer)
        self.encode: Callable[[str], np.ndarray] = lambda text: encode(text).astype(np.int64)
        first = first_token(tokenizer)
        self.start = np.array([] if first is None else [first], np.int64)
        self._continue = continuer(tokenizer)
        self._made: dict[Hashable, Any] = {}

    def pieces(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Token ids [T] of texts that follow another, at a space or a line end; equal texts are encoded once."""
        texts = list(texts)
        ids = dict.fromkeys(texts)
        ids |= zip(ids, self._continue(list(ids)), strict=True)
        return [ids[text] for text in texts]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value that ``make`` gave at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def documents(self) -> Iterator[np.ndarray]:
        """Tokens [T] of the test documents of the sources of text."""
        for source in self.sources.values():
            if isinstance(source, TextSource):
                yield from (ids.astype(np.int64) for _, ids in source.corpus.documents("test"))

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def check_text(self, text: str, where: str) -> None:
        """Raise ValueError, which begins with ``where``, if the tokenizer loses signs of a text.

        Spaces and small letters for capital ones are no loss.
        """
        whole, kept = ("".join(x.lower().split()) for x in (text, self.decode(self.encode(text))))
        lost = "".join(sorted({*whole} - {*kept}))
        require(
            whole == kept,
            f"{where}: the tokenizer does not keep the text"
            + (f", it loses {lost!r}" if lost else "")
            + "; leave it out, or choose a model whose tokenizer encodes any text",
        )

    def rng(self, *words: int | str) -> np.random.Generator:
        """Draws that depend on the seed and on the given words alone."""
        return np.random.default_rng([self.seed, *(w if isinstance(w, int) else _number(w) for w in words)])


def _number(word: str) -> int:
    return int.from_bytes(word.encode(), "little")


@dataclass(frozen=True)
class View:
    """A table and a picture of a task's records.

    across, down: the words of a record that make the columns and the rows
    values: the words of a record whose means are shown; several make a row each
    label: of the values; share: whether they lie in 0..1
    floors: values of those who do not remember, the same in all columns or by column; those of guessers that depend on
        the text are in the tags of its questions, ``{"guesses": {name: score}}``
    name: distinguishes the views of one task
    """

    across: str = "length"
    down: str | None = None
    values: Sequence[str] = ("correct",)
    label: str = "share right"
    share: bool = True
    floors: Mapping[str, float | Mapping[Any, float]] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task. Derive a frozen dataclass; ``eval.lengths`` and ``eval.rows`` are the values of the fields of these
    names unless the task's own settings give others.

    name: the key in ``eval.ask``; title: a heading
    across, down: the words of a record's tag that make the columns and the rows of its table, if it has one view
    note: one or two sentences for readers: what is asked, and what the score is
    lengths: tokens of the texts
    rows: texts of each length
    """

    name: ClassVar[str]
    title: ClassVar[str]
    note: ClassVar[str]
    across: ClassVar[str] = "length"
    down: ClassVar[str | None] = None
    lengths: list
    rows: int

    def check(self, setting: Setting) -> None:
        """Raise ValueError, with the key, if the tokenizer or the lengths do not serve. If a length does, so do longer
        ones.
        """

    def kinds_apart(self) -> Mapping[str, Self]:
        """Kinds of its texts, by name, each of which is left out alone if it cannot be asked."""
        return {"": self}

    def fitting(self, setting: Setting) -> tuple[Iterator[Stream], dict[str, str]]:
        """The texts and questions that can be asked, and the reasons why others cannot, by kind and length.

        Raises ValueError if none can.
        """
        fit, reasons = list[tuple[int, Self]](), dict[str, str]()
        for kind, task in self.kinds_apart().items():
            lengths = sorted(self.lengths)
            for length in sorted(self.lengths):
                try:
                    replace(task, lengths=[length]).check(setting)
                except ValueError as error:
                    reasons[", ".join(filter(None, (kind, f"{length:,} tokens")))] = str(error)
                    lengths.remove(length)
                else:
                    break
            fit += [(length, replace(task, lengths=[length])) for length in lengths]
        if not reasons:
            return self.streams(setting), {}
        require(bool(fit), next(iter(reasons.values())))
        fit.sort(key=lambda of: self.lengths.index(of[0]))
        return (stream for _, task in fit for stream in task.streams(setting)), reasons

    def tokens(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths, default=0)

    def cost(self) -> int:
        """Tokens that it reads, roughly."""
        return sum(self.lengths) * self.rows

    def streams(self, setting: Setting) -> Iterator[Stream]:
        """The texts and questions."""
        raise NotImplementedError

    def floors(self) -> dict[str, float | Mapping[Any, float]]:
        """Scores of those who do not remember: ``chance``, and guessers that know a part."""
        return {}

    def views(self) -> Sequence[View]:
        """Tables and pictures of one reading; the first has the headline."""
        return [View(self.across, self.down, floors=self.floors())]

    def reduce(self, records: Iterable[Record]) -> Iterable[Record]:
        """The records that the views show, such as one of several questions that belong together."""
        return records

    def totals(self, records: Sequence[Record]) -> dict[str, tuple[float, float, float]]:
        """Figures of all records together: name -> value and its 95 % interval."""
        return {}


def tasks(chosen: Mapping[str, Mapping[str, Any]], lengths: list, rows: int) -> list[Task]:
    """Tasks by name, with their settings. Raises ValueError with the key below ``eval``, the value and a fix."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    kinds = {
        kind.name: kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Task) and "name" in vars(kind)
    }
    found = []
    for name, settings in chosen.items():
        require(name in kinds, f"ask: {name!r} is unknown; {suggest(str(name), sorted(kinds))}")
        require(settings is None or isinstance(settings, Mapping), f"ask.{name}={settings!r} must be its settings")
        given = {"lengths": lengths, "rows": rows, **(settings or {})}
        require(given["lengths"] != [], f"ask.{name}.lengths=[] is empty; name some lengths")
        found.append(build_config(kinds[name], given, f"ask.{name}"))
    return found
