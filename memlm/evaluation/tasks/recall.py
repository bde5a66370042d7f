"""Recall of pairs, copies and motifs in any tokenizer: rows of ``memlm.data`` as texts with questions.

The front of a row is read. The rest is one question with a place for each answer, so a row is read once.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from memlm.data import IGNORE_INDEX, RecallTask, is_byte_tokenizer
from memlm.data.recall import MQAR, NOISE, StackedMQAR, ZoologyMQAR
from memlm.data.recall_mad import FuzzyRecall, SelectiveCopy
from memlm.evaluation.events import Ask, Read, Stream
from memlm.evaluation.tasks import Setting, Task
from memlm.settings import named, require

# Longer than every task's shortest text.
_LONG = 2**24


def symbols(setting: Setting, task: RecallTask) -> np.ndarray:
    """[256]: the token of each symbol of a task. Other tokenizers than bytes give the first single tokens that stand
    for letters or digits, and that they encode alone.
    """
    if is_byte_tokenizer(setting.tokenizer):
        return np.arange(256)
    wanted = task.symbols
    tokens = list(islice(_alone(setting), len(wanted)))
    require(
        len(tokens) == len(wanted),
        f"the tokenizer has {len(tokens)} words of one token, and the task needs {len(wanted)} symbols; lower "
        "num_keys or num_values",
    )
    found = np.full(256, -1)
    found[wanted] = tokens
    return found


def _alone(setting: Setting) -> Iterator[int]:
    special = {*setting.tokenizer.all_special_ids}
    for token in range(len(setting.tokenizer)):
        text = setting.decode(np.array([token]))
        if token not in special and text.strip().isalnum() and setting.encode(text).tolist() == [token]:
            yield token


@dataclass(frozen=True, kw_only=True)
class RecallRows(Task):
    """Rows of one or several tasks of ``memlm.data``.

    gap: tokens between what is told and the first question, as a share of the text
    """

    gap: float = 0.3125

    def __post_init__(self) -> None:
        require(0 <= self.gap < 1, f"gap={self.gap} must lie in 0..1, a share of the text")
        # Sizes that fit no text are wrong settings, and not a model's.
        self.made(_LONG)

    @abstractmethod
    def made(self, length: int) -> Mapping[str, RecallTask]:
        """Tasks of texts of this length, by name."""

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            for length in self.lengths:
                for task in self.made(length).values():
                    symbols(setting, task)

    def streams(self, setting: Setting) -> Iterator[Stream]:
        for length in self.lengths:
            for form, task in self.made(length).items():
                token = symbols(setting, task)
                for index in range(self.rows):
                    row = task.sample(setting.seed, "test", index, 1.0)
                    places = np.flatnonzero(row.labels != IGNORE_INDEX)
                    ids, start = token[row.input_ids], task.asked_from
                    tag = {"length": length, "form": form}
                    answer = token[row.labels[places]]
                    yield [Read(ids[:start]), Ask(ids[start:-1], [answer], tag, at=places - 1 - start)]

    def floors(self) -> dict[str, float]:
        # The floors hold at any length; a text that is too short is another line.
        forms = self.made(_LONG)
        found = {}
        for name, floor in (("chance", lambda task: task.chance), ("set guesser", lambda task: task.set_guesser)):
            values = {form: floor(task) for form, task in forms.items()}
            same = len({*values.values()}) == 1
            found |= {name: next(iter(values.values()))} if same else {f"{name}, {f}": x for f, x in values.items()}
        return found


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(RecallRows):
    """MQAR in several forms.

    forms: "own", answers stand behind their questions and values may repeat; "zoology", no answer stands in the text,
        values are different, and questions follow the pairs by a power law; "stacked", a pair is one token
    """

    name = "mqar"
    title = "Multi-query associative recall"
    note = (
        "Pairs of a key and a value, then each key; the score is the share of values. The set guesser has all values "
        "of the text without their keys; a score below it shows no binding."
    )
    down = "form"
    forms: list = field(default_factory=lambda: ["own", "zoology"])
    num_pairs: int = 8
    num_keys: int = 32
    num_values: int = 32

    def made(self, length: int) -> Mapping[str, RecallTask]:
        sizes = {"length": length, "num_pairs": self.num_pairs}
        kinds = {"num_keys": self.num_keys, "num_values": self.num_values}
        make = {
            "own": lambda: MQAR(**sizes, gap=round(self.gap * length), **kinds),
            "zoology": lambda: ZoologyMQAR(**sizes, **kinds),
            "stacked": lambda: StackedMQAR(**sizes),
        }
        for form in self.forms:
            require(form in make, f"forms={form!r} is unknown; use own, zoology or stacked")
        return {form: make[form]() for form in self.forms}


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(RecallRows):
    """Selective copying, as in MAD."""

    name = "selective_copying"
    title = "Selective copying"
    note = (
        "Symbols at random places in noise, to be repeated in their order; the score is the share of symbols, each "
        "asked for after the right ones before it. The set guesser has the symbols without their order."
    )
    num_symbols: int = 16
    num_values: int = 32

    def made(self, length: int) -> Mapping[str, RecallTask]:
        sizes = {"num_symbols": self.num_symbols, "num_values": self.num_values}
        return {self.name: SelectiveCopy(length=length, gap=round(self.gap * length), **sizes)}


@dataclass(frozen=True, kw_only=True)
class FuzzyKeys(RecallRows):
    """Keys and values of several tokens, as in MAD."""

    name = "fuzzy_recall"
    title = "Recall of keys and values of several tokens"
    note = (
        "Pairs of a key of several tokens and a value of one or more, then each key; the score is the share of the "
        "values' tokens. The set guesser has all values of the text without their keys."
    )
    num_pairs: int = 6
    key_size: int = 3
    value_size: int = 3
    num_keys: int = 8
    num_values: int = 8

    def made(self, length: int) -> Mapping[str, RecallTask]:
        own = ("num_pairs", "key_size", "value_size", "num_keys", "num_values")
        sizes = {name: getattr(self, name) for name in own}
        return {self.name: FuzzyRecall(length=length, gap=round(self.gap * length), **sizes)}


@dataclass(frozen=True, kw_only=True)
class KeyValueDistance(Task):
    """Pairs, and every key asked for after 0, 1 .. tokens of noise; a text is read once.

    lengths: tokens between the pairs and the question
    """

    name = "key_value_distance"
    title = "Key and value over distance"
    note = (
        "Pairs of a key and a value, noise, then one key; the answer does not stay in the text. The score is the "
        "share of values. The set guesser has all values without their keys."
    )
    across = "distance"
    num_pairs: int = 8
    num_keys: int = 32
    num_values: int = 32

    def __post_init__(self) -> None:
        _ = self.pairs

    @property
    def pairs(self) -> ZoologyMQAR:
        sizes = {"num_keys": self.num_keys, "num_values": self.num_values}
        return ZoologyMQAR(length=4 * self.num_pairs, num_pairs=self.num_pairs, **sizes)

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            symbols(setting, self.pairs)

    def streams(self, setting: Setting) -> Iterator[Stream]:
        task = self.pairs
        token = symbols(setting, task)
        for index in range(self.rows):
            front = token[task.sample(setting.seed, "test", index, 1.0).input_ids[: task.asked_from]]
            stream: list[Read | Ask] = [Read(front)]
            rng, read = setting.rng(self.name, index), 0
            for distance in sorted(set(self.lengths)):
                stream.append(Read(token[NOISE[rng.integers(len(NOISE), size=distance - read)]]))
                read = distance
                stream += [
                    Ask(front[i : i + 1], [front[i + 1 : i + 2]], {"distance": distance})
                    for i in range(0, len(front), 2)
                ]
            yield stream

    def floors(self) -> dict[str, float]:
        return {"chance": 1 / self.num_values, "set guesser": 1 / self.num_pairs}
