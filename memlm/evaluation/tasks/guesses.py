"""Scores of guessers that have a part of a text; a question's tag keeps them under ``guesses``."""

from collections import Counter
from collections.abc import Hashable, Sequence


def guesses(told: Sequence[Hashable], answers: Sequence[Hashable]) -> dict[str, float]:
    """The scores of two who have all values of a text, without the keys, names or relations that they belong to.

    told: values in the text's order, with repeats; answers: the candidates, the right one first

    "values told" guesses the candidate that was told most often, and equal ones share; "last value" the one told last.
    """
    counts = Counter(told)
    most = max(counts[answer] for answer in answers)
    last = next((value for value in reversed(told) if value in answers), None)
    best = [answer for answer in answers if counts[answer] == most]
    return {"values told": (answers[0] in best) / len(best), "last value": float(last == answers[0])}
