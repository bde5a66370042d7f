"""RULER: a prompt, the scorers, and what a kind of task gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memlm.evaluation.tasks import Setting
from memlm.evaluation.tasks.haystack import Haystack


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """RULER's score of most tasks: the share of the answers in a text, in any case of letters."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def string_match_part(text: str, answers: Sequence[str]) -> float:
    """RULER's score of questions: whether one of the answers is in a text."""
    return float(any(answer.lower() in text.lower() for answer in answers))


@dataclass(frozen=True)
class Prompt:
    """A text but for its context.

    intro, question: before and behind the context, whose last sign is a line end; the question ends with the beginning
        of its answer
    answers: the expected strings; reply: a text with all of them
    sample: of what the context holds, for a check of the tokenizer
    least: tokens of the shortest context
    context: tokens -> ids of exactly as many
    """

    intro: str
    question: str
    answers: Sequence[str]
    reply: str
    sample: str
    least: int
    context: Callable[[int], np.ndarray]


class Kind:
    """A task of RULER. generated: tokens that a model generates."""

    generated: ClassVar[int]

    def prompt(self, setting: Setting, prose: Haystack, rng: np.random.Generator, length: int, row: int) -> Prompt:
        """Text ``row`` of ``length`` tokens with all draws from ``rng``; prose: the haystack "essay"."""
        raise NotImplementedError

    def score(self, text: str, answers: Sequence[str]) -> float:
        return string_match_all(text, answers)
