"""RULER: needles in a haystack, and variable tracking."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, repeat

import numpy as np

from memlm.evaluation.tasks import Setting, words
from memlm.evaluation.tasks.haystack import Haystack, woven
from memlm.evaluation.tasks.ruler_prompt import Kind, Prompt

# The templates of niah.py, variable_tracking.py and constants.py in scripts/data/synthetic of RULER.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {values} for {key} is: {value}."
_MANY = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. I will quiz you about"
    " the {values} afterwards.\n",
    "What are all the special magic {values} for {query} mentioned in the provided text?"
    " The special magic {values} for {query} mentioned in the provided text are",
)
_ONE = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. I will quiz you about the"
    " {value} afterwards.\n",
    "What is the special magic {value} for {query} mentioned in the provided text?"
    " The special magic {value} for {query} mentioned in the provided text is",
)
_CHAIN = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "Question: Find all variables that are assigned the value {query} in the text above. Answer: According to the"
    " chain(s) of variable assignment in the text above, {count} variables are assigned the value {query}, they are: ",
)
# Depths in percent of the sentences of prose, of which each needle has another.
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
_DRAWS = {"words": words.pairs, "numbers": words.numbers, "uuids": words.uuids}


@dataclass(frozen=True)
class HiddenNeedles(Kind):
    """haystack: noise, a sentence repeated; needle, needles of other keys; essay, prose
    key, value: words, numbers or uuids
    keys, values, queries: keys of a text, values of a key, and keys of a question
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    generated = 128

    def prompt(self, setting: Setting, prose: Haystack, rng: np.random.Generator, length: int, row: int) -> Prompt:
        keys = words.distinct(_DRAWS[self.key], rng, self.keys)
        values = _DRAWS[self.value](rng, self.keys * self.values)
        owners = [key for key in keys for _ in range(self.values)]
        held = [self._needle(key, value) for key, value in zip(owners, values, strict=True)]
        end = "" if self.haystack == "essay" else "\n"
        needles = setting.pieces(f" {needle}" if not end else needle + end for needle in rng.permutation(held))
        asked = [keys[i] for i in rng.permutation(self.keys)[: self.queries]]
        answers = [value for key in asked for owner, value in zip(owners, values, strict=True) if owner == key]
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        intro, question = _ONE if len(answers) == 1 else _MANY
        names = {"values": self.value, "value": self.value[:-1], "query": query}
        (last,) = setting.pieces(["\n"])
        around = sum(map(len, needles)) + len(last)
        if self.haystack == "noise":
            hay = setting.once("noise", lambda: Haystack(setting, repeat(f"{NOISE}\n")))
        else:
            hay = Haystack(setting, self._others(rng, set(keys))) if self.haystack == "needle" else prose

        def context(tokens: int) -> np.ndarray:
            ids, starts = hay.ids(tokens - around), hay.starts(tokens - around)
            if self.haystack == "essay":
                depths = np.sort(rng.choice(DEPTHS, len(needles), replace=False))
                places = np.append(starts, len(ids))[len(starts) * depths // 100]
            else:
                places = np.sort(rng.choice(starts, len(needles), replace=False))
            return np.concatenate([woven(ids, places, needles), last])

        # There are at least as many sentences as needles.
        least = around + int(np.append(hay.starts(1 << 12), 1 << 12)[len(needles)])
        texts = intro.format(**names), question.format(**names)
        return Prompt(*texts, answers, f" {', '.join(answers)}.", " ".join(held), least, context)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(values=self.value, key=key, value=value)

    def _others(self, rng: np.random.Generator, keys: set[str]) -> Iterator[str]:
        """HiddenNeedles of other keys, so that a question has one answer."""
        while True:
            drawn = zip(_DRAWS[self.key](rng, 256), _DRAWS[self.value](rng, 256), strict=True)
            yield from (self._needle(key, value) + "\n" for key, value in drawn if key not in keys)


# Tokens of the example of variable tracking, and its least lines of noise.
_EXAMPLE, _LEAST = 500, 5


@dataclass(frozen=True)
class VariableChain(Kind):
    """A variable with a number, and ``hops`` variables, each with the value of the one before, in noise. An example of
    about 500 tokens, with shorter names, stands before.
    """

    hops: int = 4
    generated = 30

    def prompt(self, setting: Setting, prose: Haystack, rng: np.random.Generator, length: int, row: int) -> Prompt:
        names, question, links = self._chain(rng, 5)
        needles, (last,) = setting.pieces(links), setting.pieces(["\n"])
        hay = setting.once("noise", lambda: Haystack(setting, repeat(f"{NOISE}\n")))
        around = sum(map(len, needles)) + len(last)

        def context(tokens: int) -> np.ndarray:
            ids, starts = hay.ids(tokens - around), hay.starts(tokens - around)
            places = np.sort(rng.choice(starts, len(needles), replace=False))
            return np.concatenate([woven(ids, places, needles), last])

        least = around + len(needles) * int(hay.starts(1 << 12)[1])
        intro = self._example(setting, rng) + _CHAIN[0]
        return Prompt(intro, question, names, " ".join(names), "".join(links), least, context)

    def _chain(self, rng: np.random.Generator, letters: int) -> tuple[list[str], str, list[str]]:
        """Names, the question for them, and the lines."""
        names = words.distinct(words.letters(True, letters), rng, self.hops + 1)
        value = str(rng.integers(10000, 99999))
        links = [f"VAR {names[0]} = {value}\n"]
        links += [f"VAR {new} = VAR {old} \n" for old, new in pairwise(names)]
        return names, _CHAIN[1].format(query=value, count=len(names)), links

    def _example(self, setting: Setting, rng: np.random.Generator) -> str:
        names, question, lines = self._chain(rng, 3)
        unit, *parts = setting.pieces([f"{NOISE}\n", *lines, question])
        fixed = len(setting.encode(_CHAIN[0])) + sum(map(len, parts))
        noise = max(_LEAST, (_EXAMPLE - fixed) // len(unit))
        text = [f"{NOISE}\n"] * noise
        for place, line in zip(np.sort(rng.choice(noise, len(lines), replace=False)), lines, strict=True):
            text[place] = line + text[place]
        return f"{_CHAIN[0]}{''.join(text)}{question} {' '.join(names)}\n\n"
