"""Needles over length and depth: a text is read once, and all of its needles are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from memlm.evaluation.events import Ask, Read, Stream
from memlm.evaluation.tasks import Setting, Task, words
from memlm.evaluation.tasks.haystack import essay, files, woven
from memlm.settings import require

NEEDLE = " The magic number of {key} is {value}."
QUESTION = " The magic number of {key} is"
# A sentence with a needle, which stands at its beginning.
_SAMPLE = "calm-otter 0123456789"


@dataclass(frozen=True, kw_only=True)
class NeedleGrid(Task):
    """depths: places of the needles in percent of the text; 0 is its beginning, and 100 ends at the question
    haystack: a text file, or a folder of ``*.txt``; null for sentences made by rule

    A text has a needle at each depth, each with a key and a value of its own, drawn anew for each text. It is read
    once, and each needle is asked for on a copy of the memory. A needle stands between sentences, at the place that is
    nearest to its depth. Length counts the text, a question and its answer.
    """

    name = "grid"
    title = "Needles by length and depth"
    note = (
        "A number stands at each depth of a text; the model chooses the number of a key among all numbers of the text."
        " Depth is in percent of the text. A model that remembers the numbers without their keys has chance; one that"
        " always gives the last number is right at the last depth alone."
    )
    down = "depth"
    depths: list = field(default_factory=lambda: [0, 25, 50, 75, 100])
    haystack: str | None = None

    def __post_init__(self) -> None:
        numbers = all(type(d) in (int, float) and 0 <= d <= 100 for d in self.depths)
        different = len({*self.depths}) == len(self.depths) >= 2
        require(numbers and different, f"depths={self.depths} must be two or more different numbers in 0..100")
        if self.haystack is not None:
            files(self.haystack)

    def floors(self) -> dict[str, float]:
        return {"chance": 1 / len(self.depths)}

    def check(self, setting: Setting) -> None:
        setting.check_text(NEEDLE.format(key=_SAMPLE, value="") + QUESTION, "eval.ask.grid")
        nearest = min(b - a for a, b in zip(sorted(self.depths), sorted(self.depths)[1:], strict=False))
        for row in range(self.rows):
            needles, questions, values = self._pieces(setting, min(self.lengths), row)
            longest = max(map(len, needles))
            around = len(setting.start) + len(questions[0]) + len(values[0])
            # Two neighbours have a sentence between them.
            least = around + round((2 * longest + 2) * 100 / nearest) + longest
            require(
                min(self.lengths) >= least,
                f"eval.ask.grid: lengths={min(self.lengths)} is too short for depths={self.depths}: with this "
                f"tokenizer they need {least:,} tokens; raise eval.lengths, or name fewer depths",
            )

    def streams(self, setting: Setting) -> Iterator[Stream]:
        for length in self.lengths:
            for row in range(self.rows):
                yield self._stream(setting, length, row)

    def _stream(self, setting: Setting, length: int, row: int) -> Stream:
        needles, questions, values = self._pieces(setting, length, row)
        sizes_D = np.array([len(ids) for ids in needles])
        tokens = length - len(setting.start) - len(questions[0]) - len(values[0])
        depths_D = np.array(sorted(self.depths))
        # Where each needle begins in the text, and in the text without needles.
        begins_D = np.round(depths_D / 100 * (tokens - sizes_D))
        places_D = begins_D - (np.cumsum(sizes_D) - sizes_D)
        hay = essay(setting, self.haystack)
        ids, starts = hay.ids(tokens - int(sizes_D.sum())), hay.starts(tokens - int(sizes_D.sum()))
        starts = np.append(starts, len(ids))
        nearest_D = starts[np.abs(starts - places_D[:, None]).argmin(1)]
        events: list[Read | Ask] = [Read(np.concatenate([setting.start, woven(ids, nearest_D, needles)]))]
        for i, depth in enumerate(sorted(self.depths)):
            answers = [values[i], *values[:i], *values[i + 1 :]]
            events.append(Ask(questions[i], answers, {"length": length, "depth": depth}))
        return events

    def _pieces(self, setting: Setting, length: int, row: int) -> tuple[list[np.ndarray], ...]:
        """Needles, questions and values: the latter two have equally many tokens, so that questions share forwards."""
        rng = setting.rng("grid", length, row)
        keys = alike(setting, words.pairs, rng, len(self.depths))
        values = alike(setting, words.numbers, rng, len(self.depths))
        needles = (NEEDLE.format(key=key, value=value) for key, value in zip(keys, values, strict=True))
        questions = (QUESTION.format(key=key) for key in keys)
        return setting.pieces(needles), setting.pieces(questions), setting.pieces(f" {value}" for value in values)


def alike(setting: Setting, draw: words.Draw, rng: np.random.Generator, count: int) -> list[str]:
    """``count`` different draws of the most common number of tokens."""
    pool: list[str] = []
    while True:
        pool = list(dict.fromkeys([*pool, *words.distinct(draw, rng, 8 * count)]))
        groups: dict[int, list[str]] = {}
        for word, ids in zip(pool, setting.pieces(f" {word}" for word in pool), strict=True):
            groups.setdefault(len(ids), []).append(word)
        most = max(groups.values(), key=len)
        if len(most) >= count:
            return most[:count]
