"""Synthetic recall: multi-query associative recall (Zoology, arXiv:2312.04927), passkey retrieval, and copies.

The answer lies further back than a sliding window reaches, so only a memory can score above chance, 1 / num_values. A
memory of the values alone, without their keys or order, also scores above chance: the set guesser of
``memlm.data.guesser``. Only a score above both shows that values are found by their keys.

Symbols are bytes; their value is their token id in the byte tokenizer. The first 32 keys and values are printable
ASCII.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from . import guesser
from .row import IGNORE_INDEX, Row, split_id


def _symbols(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64)


# Six disjoint sets; pairs of a key and a value take the place of those keys and values that are no ASCII.
KEYS = np.concatenate([_symbols("abcdefghijklmnopqrstuvwxyz012345"), np.arange(192, 256)])
VALUES = np.concatenate([_symbols("ABCDEFGHIJKLMNOPQRSTUVWXYZ6789@&"), np.arange(128, 192)])
PAIRS = np.arange(128, 256)
NOISE = _symbols("!\"$%'()*+,-./:;<")
FILLER, MARK, ASK = _symbols(" #?")
# Zoology's power law of the places of queries.
_POWER = 0.01


def ramp(step: int, start: int, end: int) -> float:
    """The noise of the filler at `step`: 0 up to `start`, then linear, 1 from `end` on."""
    if step >= end:
        return 1.0
    return (step - start) / (end - start) if step > start else 0.0


class RecallTask:
    """The common part of all tasks. Each is a frozen dataclass of sizes in tokens.

    These include `length` and `gap`, and the numbers of symbols to choose from, `num_keys` and `num_values`.

    shown: whether answers stand in the text, where the next question can see them
    """

    shown: ClassVar[bool] = True

    @property
    def chance(self) -> float:
        """The accuracy of guessing without having read anything."""
        return 1 / self.num_values

    @property
    def symbols(self) -> np.ndarray:
        """All symbols that its rows may hold."""
        return np.concatenate([KEYS[: self.num_keys], VALUES[: self.num_values], NOISE, [FILLER, MARK, ASK]])

    @property
    def asked_from(self) -> int:
        """The first token of a row after which an answer may be due; tokens before it can be read ahead."""
        return 0

    @property
    def set_guesser(self) -> float:
        """The accuracy of the set guesser (``memlm.data.guesser``), which has the row's answers without their keys.

        Here by simulation; tasks with a formula compute it exactly.
        """

        def answers(rng: np.random.Generator) -> tuple[list, list]:
            labels = self.sample(int(rng.integers(2**31)), "test", 0, 1.0).labels
            bag = [(int(token),) for token in labels[labels != IGNORE_INDEX]]
            return bag, bag

        return guesser.mean(answers, self.shown)

    def scaled(self, factor: float) -> Self:
        """The same task at `factor` times the length and the gap."""
        return replace(self, length=round(self.length * factor), gap=round(self.gap * factor))

    def sample(self, seed: int, split: str, index: int, noise: float) -> Row:
        """Row `index` of `split`, of `length` tokens; only recalled values are scored.

        noise: the probability, in [0, 1], that a filler token is a random noise symbol; 1 in evaluation
        """
        rng = np.random.default_rng([seed, split_id(split), index])
        noisy = rng.random(self.length) < noise
        input_ids = np.where(noisy, NOISE[rng.integers(len(NOISE), size=self.length)], FILLER)
        filler, labels = input_ids.copy(), np.full_like(input_ids, IGNORE_INDEX)
        scored = self.write(rng, input_ids)
        labels[scored] = input_ids[scored]
        if not self.shown:
            input_ids[scored] = filler[scored]
        return Row(input_ids, labels, np.arange(self.length))

    def write(self, rng: np.random.Generator, input_ids: np.ndarray) -> np.ndarray:
        """Write the task over the filler, in place; returns the indices of the scored tokens."""
        raise NotImplementedError

    def _check_sizes(self, least_gap: int, least_length: int) -> None:
        for name, known in (("num_keys", KEYS), ("num_values", VALUES)):
            if not 1 <= getattr(self, name) <= len(known):
                raise ValueError(f"{name}={getattr(self, name)} must lie between 1 and {len(known)}")
        if self.gap < least_gap:
            raise ValueError(f"gap={self.gap} is too small for {self}; make it at least {least_gap}")
        if self.length < least_length:
            raise ValueError(
                f"length={self.length} is too short for {self}; make it at least {least_length}, or lower gap"
            )


@dataclass(frozen=True)
class MQAR(RecallTask):
    """`num_pairs` key-value pairs, `gap` filler tokens, then each key once more; its value must be predicted.

    The queries (key, value) are at random even offsets after the gap, in random order; the rest is filler. Keys are
    distinct. Values are independent, so other answers give no hint to a reader that has not read the pairs. One that
    has can rule answers out (``set_guesser``).
    Raises ValueError if the sizes do not fit.
    """

    length: int = 128
    num_pairs: int = 8
    gap: int = 40
    num_keys: int = 32
    num_values: int = 32

    def __post_init__(self):
        if not 1 <= self.num_pairs <= self.num_keys:
            raise ValueError(f"num_pairs={self.num_pairs} must lie between 1 and num_keys={self.num_keys}")
        self._check_sizes(least_gap=0, least_length=self.asked_from + 2 * self.num_pairs)

    @property
    def min_distance(self) -> int:
        """The least distance in tokens from the query key, which predicts a value, back to that value."""
        return self.gap + 1

    @property
    def set_guesser(self) -> float:
        return guesser.shown(self.num_pairs, self.num_values)

    @property
    def asked_from(self) -> int:
        return 2 * self.num_pairs + self.gap

    def write(self, rng: np.random.Generator, input_ids: np.ndarray) -> np.ndarray:
        keys = rng.permutation(KEYS[: self.num_keys])[: self.num_pairs]
        values = VALUES[self._values(rng)]
        queries = self.asked_from + 2 * self._order(rng, (self.length - self.asked_from) // 2)
        for places in (2 * np.arange(self.num_pairs), queries):
            input_ids[places] = keys
            input_ids[places + 1] = values
        return queries + 1

    def _values(self, rng: np.random.Generator) -> np.ndarray:
        """The number of each pair's value."""
        return rng.integers(self.num_values, size=self.num_pairs)

    def _order(self, rng: np.random.Generator, places: int) -> np.ndarray:
        """The place of each pair's query, one of so many."""
        return rng.permutation(places)[: self.num_pairs]


@dataclass(frozen=True)
class ZoologyMQAR(MQAR):
    """MQAR as Zoology defines it: no answer stands in the text, and a row's values are different.

    A filler token stands behind each query in the answer's place. Places near the pairs are likelier: the n-th has a
    probability in proportion to n**(a - 1), with Zoology's a = 0.01. Without answers in the text and with different
    values, the set guesser has exactly 1 / num_pairs. It differs in two points. The places are shared out at random:
    Zoology's first pair gets the place that is drawn first, so the values' order alone scores 0.154 for the default
    sizes. The filler has its own symbols; Zoology draws it from all symbols, of which few are keys of the row.
    """

    shown: ClassVar[bool] = False
    gap: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.num_pairs > self.num_values:
            raise ValueError(f"num_pairs={self.num_pairs} needs as many different values; raise num_values")

    @property
    def set_guesser(self) -> float:
        return 1 / self.num_pairs

    def _values(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.num_values)[: self.num_pairs]

    def _order(self, rng: np.random.Generator, places: int) -> np.ndarray:
        weights = np.arange(1, places + 1) ** (_POWER - 1)
        drawn = rng.choice(places, self.num_pairs, replace=False, p=weights / weights.sum())
        # In the order of the draws, an early query would tell an early pair.
        return rng.permutation(drawn)


@dataclass(frozen=True)
class StackedMQAR(ZoologyMQAR):
    """Zoology's MQAR with each pair in one token, so that no convolution is needed to join a key to its value.

    A pair is one of num_keys * num_values symbols of its own. Zoology joins the embeddings of a key and a value; our
    models read token ids, and learn an embedding for each pair.
    """

    num_keys: int = 8
    num_values: int = 16

    def __post_init__(self):
        if self.num_keys * self.num_values > len(PAIRS) or max(self.num_keys, self.num_values) > 32:
            raise ValueError(
                f"num_keys={self.num_keys} times num_values={self.num_values} must be at most {len(PAIRS)}, with at "
                "most 32 of each"
            )
        super().__post_init__()

    @property
    def symbols(self) -> np.ndarray:
        return np.concatenate([super().symbols, PAIRS[: self.num_keys * self.num_values]])

    @property
    def asked_from(self) -> int:
        return self.num_pairs + self.gap

    def write(self, rng: np.random.Generator, input_ids: np.ndarray) -> np.ndarray:
        keys, values = rng.permutation(self.num_keys)[: self.num_pairs], self._values(rng)
        queries = self.asked_from + 2 * self._order(rng, (self.length - self.asked_from) // 2)
        input_ids[: self.num_pairs] = PAIRS[keys * self.num_values + values]
        input_ids[queries], input_ids[queries + 1] = KEYS[keys], VALUES[values]
        return queries + 1


@dataclass(frozen=True)
class Passkey(RecallTask):
    """`MARK key d1..dn` somewhere in filler and `ASK key d1..dn` at the end; the n digits must be predicted.

    Digits are any of the values. The needle's place is random, and a digit is at least `gap` tokens before the token
    that predicts it. `depth` fixes the place, whatever the gap, as a share of the text before the question: at 0 the
    needle is the front, at 1 it ends where the question begins.
    Raises ValueError if the sizes do not fit.
    """

    length: int = 128
    digits: int = 4
    gap: int = 45
    depth: float | None = None
    num_keys: int = 32
    num_values: int = 32

    def __post_init__(self):
        if self.digits < 1:
            raise ValueError(f"digits={self.digits} must be at least 1")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must lie between 0 (front) and 1 (before the question)")
        self._check_sizes(least_gap=self.digits + 1, least_length=self.digits + 3 + self.gap)

    @property
    def min_distance(self) -> int:
        """The least distance in tokens from the token that predicts a digit back to that digit."""
        return self.gap if self.depth is None else self._question - self._place(self.depth) - 1

    @property
    def _question(self) -> int:
        return self.length - self.digits - 2

    def _place(self, depth: float) -> int:
        """The needle's first token; the needle is as long as the question."""
        return round(depth * (self._question - self.digits - 2))

    @property
    def set_guesser(self) -> float:
        return guesser.shown(self.digits, self.num_values)

    def write(self, rng: np.random.Generator, input_ids: np.ndarray) -> np.ndarray:
        message = np.concatenate(
            [rng.choice(KEYS[: self.num_keys], 1), VALUES[rng.integers(self.num_values, size=self.digits)]]
        )
        # A digit is predicted by the token before it, which is one nearer to the needle.
        latest = self._question - 1 - self.gap
        needle = rng.integers(latest + 1) if self.depth is None else self._place(self.depth)
        for start, symbol in ((needle, MARK), (self._question, ASK)):
            input_ids[start] = symbol
            input_ids[start + 1 : start + 1 + len(message)] = message
        return np.arange(self._question + 2, self.length)


@dataclass(frozen=True)
class Copy(RecallTask):
    """`num_symbols` different keys and values in random order, and after at least `gap` filler tokens the same again.

    All symbols of the copy but its first must be predicted. So many answers teach plain attention to find what
    followed a symbol before (induction heads, arXiv:2209.11895), which it needs for MQAR and learns slowly from MQAR
    alone. Both places are random, so that no fixed distance helps.
    Raises ValueError if the sizes do not fit.
    """

    length: int = 128
    num_symbols: int = 20
    gap: int = 0
    num_keys: int = 32
    num_values: int = 32

    def __post_init__(self):
        self._check_sizes(least_gap=0, least_length=2 * self.num_symbols + self.gap)
        most = self.num_keys + self.num_values
        if not 2 <= self.num_symbols <= most:
            raise ValueError(f"num_symbols={self.num_symbols} must lie between 2 and num_keys + num_values={most}")

    @property
    def chance(self) -> float:
        return 1 / (self.num_keys + self.num_values)

    @property
    def set_guesser(self) -> float:
        return guesser.shown_once(self.num_symbols - 1)

    def write(self, rng: np.random.Generator, input_ids: np.ndarray) -> np.ndarray:
        alphabet = np.concatenate([KEYS[: self.num_keys], VALUES[: self.num_values]])
        symbols, size = rng.permutation(alphabet)[: self.num_symbols], self.num_symbols
        first, second = np.sort(rng.integers(self.length - 2 * size - self.gap + 1, size=2))
        second += size + self.gap
        for start in (first, second):
            input_ids[start : start + size] = symbols
        return np.arange(second + 1, second + size)


@dataclass(frozen=True)
class RecallSource:
    """Rows of a task. In training, noise rises over the steps `noise_ramp` (start, end); otherwise it is 1."""

    task: RecallTask
    seed: int
    noise_ramp: tuple[int, int]

    def row(self, index: int, split: str, step: int) -> Row:
        noise = ramp(step, *self.noise_ramp) if split == "train" else 1.0
        return self.task.sample(self.seed, split, index, noise)
