"""Invented facts and sentences.

Names, values and places have four letters, so no answer is likelier because it is shorter.
"""

from collections.abc import Iterator

import numpy as np

NAMES = ["Anna", "Omar", "Lena", "Ivan", "Mina", "Hugo", "Nora", "Paul"]
# The values of each attribute of a name.
VALUES_OF = {
    "town": ["Rome", "Oslo", "Lima", "Kyiv", "Bern", "Cork", "Bath", "Baku", "Nice", "Riga"],
    "food": ["rice", "soup", "cake", "corn", "eggs", "figs", "beef", "tofu", "kiwi", "plum"],
    "bird": ["crow", "dove", "duck", "hawk", "swan", "wren", "lark", "gull", "kite", "rook"],
    "game": ["golf", "polo", "judo", "sumo", "luge", "pool", "ludo", "dice", "surf", "yoga"],
    "gift": ["ring", "book", "lamp", "doll", "vase", "coin", "drum", "harp", "bell", "comb"],
    "coat": ["blue", "pink", "gold", "grey", "cyan", "teal", "navy", "rose", "lime", "rust"],
}
PLACES = ["lake", "hill", "park", "dock", "farm", "road", "barn", "mill"]


def _one(rng: np.random.Generator, words: list[str]) -> str:
    return words[rng.integers(len(words))]


def noise(rng: np.random.Generator) -> str:
    """A sentence on nobody."""
    weather, times = ["Rain", "Snow", "Hail", "Dust"], ["noon", "dawn", "dusk", "nine", "four", "five"]
    return f"{_one(rng, weather)} fell on the {_one(rng, PLACES)} at {_one(rng, times)}."


def clauses(rng: np.random.Generator) -> tuple[str, str]:
    """The two halves of a sentence, each one of 640."""
    first = f" {_one(rng, NAMES)} hid the {_one(rng, VALUES_OF['gift'])} at the {_one(rng, PLACES)},"
    return first, f" and {_one(rng, NAMES)} saw the {_one(rng, VALUES_OF['bird'])} at the {_one(rng, PLACES)}."


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """Sentences without end."""
    while True:
        yield "".join(clauses(rng))
