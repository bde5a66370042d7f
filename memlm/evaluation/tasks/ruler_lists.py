"""RULER: lists of words, in which the most frequent ones are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memlm.evaluation.tasks import Setting, words
from memlm.evaluation.tasks.haystack import Haystack
from memlm.evaluation.tasks.ruler_prompt import Kind, Prompt

# The templates of common_words_extraction.py, freq_words_extraction.py and constants.py of RULER.
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
    " appear most often.\n",
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:",
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared"
    " coded words.",
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently"
    " appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(items))


# Times of a common and of another word; words and these times in the example.
_LONG, _SHORT = (30, 3, (40, 10, 3)), (6, 1, (20, 3, 1))


@dataclass(frozen=True)
class CommonWords(Kind):
    """Ten words appear often, the others rarely; an example stands before. Texts below 4,096 tokens have a shorter
    example and fewer repetitions; so have longer ones, in small tokens, that the long example would fill.
    """

    common: int = 10
    generated = 120

    def prompt(self, setting: Setting, prose: Haystack, rng: np.random.Generator, length: int, row: int) -> Prompt:
        long = self._prompt(setting, rng, length, *_LONG) if length >= 4096 else None
        fits = long and len(setting.encode(long.intro + long.question)) + long.least + self.generated < length
        return long if long and fits else self._prompt(setting, rng, length, *_SHORT)

    def _prompt(
        self, setting: Setting, rng: np.random.Generator, length: int, many: int, few: int, example: tuple
    ) -> Prompt:
        drawn = rng.permutation(words.ENGLISH).tolist()
        (last,) = setting.pieces(["\n"])
        while (fits := _Fitted(setting, drawn, self.common, many, few)).count(length) == len(drawn):
            # There are too few English words, and a mixture would tell the common ones by their looks.
            drawn = words.made(rng, 100 + int(1.1 * len(drawn) * length / fits.tokens_W[-1]))
        answers = drawn[: self.common]
        intro = f"{self._example(rng, *example)}\n{_COMMON[0]}"

        def context(tokens: int) -> np.ndarray:
            return np.concatenate([fits.ids(tokens - len(last), rng), last])

        least = fits.least(2 * self.common) + len(last)
        reply = " " + _numbered(answers)
        return Prompt(intro, _COMMON[1], answers, reply, _numbered(drawn[:20]), least, context)

    def _example(self, rng: np.random.Generator, size: int, many: int, few: int) -> str:
        drawn = rng.permutation(words.ENGLISH)[:size].tolist()
        items = rng.permutation(drawn[: self.common] * many + drawn[self.common :] * few)
        return f"{_COMMON[0]}{_numbered(items)}\n{_COMMON[1]} {_numbered(drawn[: self.common])}"


class _Fitted:
    """A numbered list with the first words ``many`` times and the others ``few`` times, for a number of tokens."""

    def __init__(self, setting: Setting, drawn: Sequence[str], common: int, many: int, few: int) -> None:
        self.common, self.many, self.few = common, many, few
        self.words = setting.pieces(f" {word}" for word in drawn)
        entries = common * many + (len(drawn) - common) * few
        self.numbers = _numbers(setting, entries)
        sizes_N = np.array([len(ids) for ids in self.numbers[:entries]])
        sizes_W = np.array([len(ids) for ids in self.words])
        # Tokens of the list by its number of words, from ``common`` on.
        before_N = np.concatenate([[0], np.cumsum(sizes_N)])[common * many :: few]
        before_W = many * sizes_W[:common].sum() + few * np.concatenate([[0], np.cumsum(sizes_W[common:])])
        self.tokens_W = before_N[: len(before_W)] + before_W

    def least(self, count: int) -> int:
        return int(self.tokens_W[count - self.common])

    def count(self, tokens: int) -> int:
        """The most words that fit."""
        return self.common + int(np.searchsorted(self.tokens_W, tokens, "right")) - 1

    def ids(self, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """A list of exactly so many tokens. Entries of the next word fill it up, of which the last may be cut."""
        count = self.count(tokens)
        times = np.repeat([self.many, self.few], [self.common, count - self.common])
        order = [*rng.permutation(np.repeat(np.arange(count), times)).tolist(), *[count] * self.few]
        parts = [part for i, word in enumerate(order) for part in (self.numbers[i], self.words[word])]
        return np.concatenate(parts).astype(np.int64)[:tokens]


def _numbers(setting: Setting, entries: int) -> list[np.ndarray]:
    """Ids of at least so many numbers; the first one follows a line end."""
    held: list[np.ndarray] = setting.once("numbers", list)
    held += setting.pieces(f"{' ' * (i > 0)}{i + 1}." for i in range(len(held), entries))
    return held


def frequencies(size: int) -> np.ndarray:
    """The share of each of ``size`` words, the most frequent first; zeta(2) = pi^2 / 6."""
    return np.arange(1, size + 1) ** -2.0 / (np.pi**2 / 6)


@dataclass(frozen=True)
class FrequentWords(Kind):
    """Words of six letters whose frequency falls as rank ** -2; the dots "..." are the most frequent."""

    generated = 50

    def prompt(self, setting: Setting, prose: Haystack, rng: np.random.Generator, length: int, row: int) -> Prompt:
        size = max(5, (length - self.generated) // 50)
        vocabulary = ["...", *words.distinct(words.letters(False, 6), rng, size - 1)]
        ids, (last,) = setting.pieces(f" {word}" for word in vocabulary), setting.pieces(["\n"])
        sizes_V = np.array([len(x) for x in ids])
        shares_V = frequencies(size)

        def fitted(tokens: int) -> np.ndarray:
            """The times of each word in the most words that fit."""
            low, high = 0, 2 * tokens + 2
            while high - low > 1:
                middle = (low + high) // 2
                fits = (np.floor(middle * shares_V) * sizes_V).sum() <= tokens
                low, high = (middle, high) if fits else (low, middle)
            return np.floor(low * shares_V).astype(int)

        def context(tokens: int) -> np.ndarray:
            times_V = fitted(tokens - len(last))
            rest = tokens - len(last) - int((times_V * sizes_V).sum())
            # Dots fill the text up.
            times_V[0] += rest // len(ids[0])
            order = rng.permutation(np.repeat(np.arange(size), times_V))
            end = ids[0][: rest % len(ids[0])]
            return np.concatenate([*(ids[word] for word in order.tolist()), end, last]).astype(np.int64)

        # The third of the answers, rank 4, appears more often than rank 5 from here on.
        least_V = np.floor(np.ceil(1 / (shares_V[3] - shares_V[4])) * shares_V)
        least = int((least_V * sizes_V).sum()) + len(last)
        answers = vocabulary[1:4]
        return Prompt(*_FREQUENT, answers, f" {', '.join(answers)}.", " ".join(vocabulary[:5]), least, context)
