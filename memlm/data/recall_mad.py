"""Recall tasks of MAD (arXiv:2403.17844) in our symbols: selective copying, and recall of keys of several tokens."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from . import guesser
from .recall import ASK, KEYS, VALUES, RecallTask


@dataclass(frozen=True)
class SelectiveCopy(RecallTask):
    """`num_symbols` values at random places of the filler, `gap` tokens or more, `ASK`, and the values in their order.

    The copy must be predicted. MAD feeds blanks instead of the copy; here the model reads its answers, as it does when
    it generates.
    Raises ValueError if the sizes do not fit.
    """

    # None is written.
    num_keys: ClassVar[int] = 1
    length: int = 128
    num_symbols: int = 16
    gap: int = 40
    num_values: int = 32

    def __post_init__(self):
        if self.num_symbols < 1:
            raise ValueError(f"num_symbols={self.num_symbols} must be at least 1")
        self._check_sizes(least_gap=0, least_length=2 * self.num_symbols + 1 + self.gap)

    @property
    def min_distance(self) -> int:
        """The least distance in tokens from the token that predicts a value back to that value."""
        return self.gap + self.num_symbols

    @property
    def set_guesser(self) -> float:
        return guesser.shown(self.num_symbols, self.num_values)

    @property
    def asked_from(self) -> int:
        return self.length - self.num_symbols - 1

    def write(self, rng: np.random.Generator, input_ids: np.ndarray) -> np.ndarray:
        values = VALUES[rng.integers(self.num_values, size=self.num_symbols)]
        places = rng.choice(self.asked_from - self.gap, self.num_symbols, replace=False)
        input_ids[np.sort(places)] = values
        input_ids[self.asked_from] = ASK
        input_ids[self.asked_from + 1 :] = values
        return np.arange(self.asked_from + 1, self.length)


@dataclass(frozen=True)
class FuzzyRecall(RecallTask):
    """MQAR with keys of `key_size` symbols and values of 1 to `value_size`; few symbols make many of them.

    `num_pairs` pairs, `gap` filler tokens, then each key once more, followed by its value, in random order and with
    filler between. The values must be predicted. Keys are different; a symbol appears once in a key or a value, but in
    several of them. In training MAD also has shorter keys.
    Raises ValueError if the sizes do not fit.
    """

    length: int = 128
    num_pairs: int = 6
    gap: int = 40
    key_size: int = 3
    value_size: int = 3
    num_keys: int = 8
    num_values: int = 8

    def __post_init__(self):
        for size, kinds in (("key_size", "num_keys"), ("value_size", "num_values")):
            if not 1 <= getattr(self, size) <= getattr(self, kinds):
                raise ValueError(f"{size}={getattr(self, size)} must lie between 1 and {kinds}={getattr(self, kinds)}")
        most = math.perm(self.num_keys, self.key_size)
        if not 1 <= self.num_pairs <= most:
            raise ValueError(f"num_pairs={self.num_pairs} must lie between 1 and the {most} keys of {self}")
        self._check_sizes(least_gap=0, least_length=2 * self._longest + self.gap)

    @property
    def _longest(self) -> int:
        """Tokens of all pairs, at most."""
        return self.num_pairs * (self.key_size + self.value_size)

    @property
    def min_distance(self) -> int:
        """The least distance in tokens from the token that predicts a value's token back to that token."""
        return self.gap + self.key_size

    @property
    def set_guesser(self) -> float:
        def values(rng: np.random.Generator) -> tuple[list, list]:
            bag = [tuple(value.tolist()) for value in self._values(rng)]
            return bag, bag

        return guesser.mean(values)

    @property
    def asked_from(self) -> int:
        return self.num_pairs * (self.key_size + 1) + self.gap

    def write(self, rng: np.random.Generator, input_ids: np.ndarray) -> np.ndarray:
        keys: dict[tuple, np.ndarray] = {}
        while len(keys) < self.num_pairs:
            key = rng.permutation(self.num_keys)[: self.key_size]
            keys[tuple(key)] = KEYS[key]
        pairs = [np.concatenate(pair) for pair in zip(keys.values(), self._values(rng), strict=True)]
        told = np.concatenate(pairs)
        input_ids[: len(told)] = told
        spare = np.sort(rng.integers(self.length - 2 * len(told) - self.gap + 1, size=self.num_pairs))
        place, scored = len(told) + self.gap, []
        for number, before in zip(rng.permutation(self.num_pairs), np.diff(spare, prepend=0), strict=True):
            start, pair = place + before, pairs[number]
            place = start + len(pair)
            input_ids[start:place] = pair
            scored.append(np.arange(start + self.key_size, place))
        return np.concatenate(scored)

    def _values(self, rng: np.random.Generator) -> list[np.ndarray]:
        sizes = rng.integers(1, self.value_size, size=self.num_pairs, endpoint=True)
        return [VALUES[rng.permutation(self.num_values)[:size]] for size in sizes]
