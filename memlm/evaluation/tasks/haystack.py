"""Haystacks: texts without end in which tasks hide their needles, as tokens.

T tokens, S sentences.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from memlm.evaluation.tasks import Setting, words
from memlm.settings import require

# Sentences that are encoded at a time.
_AT_ONCE = 1024


class Haystack:
    """Sentences as tokens; each is encoded once, when a text needs it.

    >>> haystack = Haystack(setting, itertools.repeat("The grass is green.\\n"))
    >>> ids_T = haystack.ids(1_000_000)
    >>> starts_S = haystack.starts(1_000_000)
    """

    def __init__(self, setting: Setting, sentences: Iterator[str]) -> None:
        self._pieces, self._sentences = setting.pieces, sentences
        self._ids_T, self._ends_S = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def ids(self, tokens: int) -> np.ndarray:
        """The first tokens; the last sentence may be cut."""
        self._extend(tokens)
        return self._ids_T[:tokens]

    def starts(self, tokens: int) -> np.ndarray:
        """The places of the first tokens of all sentences that begin within the first tokens."""
        self._extend(tokens)
        starts_S = np.concatenate([[0], self._ends_S])
        return starts_S[: np.searchsorted(starts_S, tokens)]

    def _extend(self, tokens: int) -> None:
        new, held = [], len(self._ids_T)
        while held < tokens:
            new += self._pieces(islice(self._sentences, _AT_ONCE))
            held = len(self._ids_T) + sum(map(len, new))
        if new:
            ends_S = np.cumsum([len(ids) for ids in new]) + len(self._ids_T)
            self._ends_S = np.concatenate([self._ends_S, ends_S])
            self._ids_T = np.concatenate([self._ids_T, *new]).astype(np.int64)


def woven(ids_T: np.ndarray, places: Sequence[int], needles: Sequence[np.ndarray]) -> np.ndarray:
    """ids with a needle before each of the given places, in their order."""
    parts, last = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [ids_T[last:place], needle]
        last = place
    return np.concatenate([*parts, ids_T[last:]]).astype(np.int64)


def essay(setting: Setting, path: str | None) -> Haystack:
    """Plain prose: the texts of a file or of the ``*.txt`` of a folder, repeated as often as needed; by default
    sentences made by rule. The latter are not Paul Graham's essays, the prose of RULER's published results.
    """
    return setting.once(("essay", path), lambda: Haystack(setting, map(" {}".format, _prose(setting, path))))


def _prose(setting: Setting, path: str | None) -> Iterator[str]:
    if path is None:
        return words.sentences(setting.rng("essay"))
    return chain.from_iterable(_sentences(file) for _ in iter(int, 1) for file in files(path))


def files(path: str) -> list[Path]:
    """Raises ValueError if there is no text."""
    place = Path(path).expanduser()
    found = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    try:
        empty = not any(next(_sentences(file), "") for file in found)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"haystack={path}: cannot be read ({error}); name a text file in UTF-8, or a folder"
        ) from None
    require(not empty, f"haystack={path} has no text; name a text file, or a folder of *.txt")
    return found


def _sentences(file: Path) -> Iterator[str]:
    """A paragraph is read at a time, so a file of any size serves."""
    with file.open(encoding="utf-8") as lines:
        paragraph: list[str] = []
        for line in chain(lines, [""]):
            if line.strip():
                paragraph.append(line.strip())
            elif paragraph:
                yield from re.split(r"(?<=[.!?])\s+", " ".join(" ".join(paragraph).split()))
                paragraph = []
