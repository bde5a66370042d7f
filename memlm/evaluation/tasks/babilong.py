"""BABILong (arXiv:2406.10149): facts of bAbI (arXiv:1502.05698) scattered in order over a long text.

The facts are made by rule, and a simulation gives the answers, so no file is needed. The text around them is prose, by
default sentences made by rule; BABILong takes books.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np

from memlm.evaluation.events import Ask, Read, Stream
from memlm.evaluation.tasks import Setting, Task
from memlm.evaluation.tasks.guesses import guesses
from memlm.evaluation.tasks.haystack import essay, files, woven
from memlm.settings import require

PERSONS, GIVERS = ("Mary", "John", "Sandra", "Daniel"), ("Fred", "Jeff", "Bill", "Mary")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("football", "apple", "milk")
_WENT = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
_TOOK, _LEFT = ("picked up", "grabbed", "got", "took"), ("dropped", "put down", "left", "discarded")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Puzzle(NamedTuple):
    """A question, its answer, and all answers that its form allows, as many for each question of a task."""

    question: str
    answer: str
    choices: Sequence[str]


Story = tuple[list[str], list[Puzzle]]


class _Draw:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, of: Sequence[str]) -> str:
        return of[int(self.rng.integers(len(of)))]


def moves(rng: np.random.Generator, facts: int) -> Story:
    """Task 1, one supporting fact: where a person is."""
    draw, told, place = _Draw(rng), [], {}
    for _ in range(facts):
        person = draw(PERSONS)
        place[person] = draw([p for p in PLACES if p != place.get(person)])
        told.append(f"{person} {draw(_WENT)} the {place[person]}.")
    return told, [Puzzle(f"Where is {person}?", at, PLACES) for person, at in place.items()]


def _carried(rng: np.random.Generator, facts: int) -> tuple[list[str], dict[str, list[str]]]:
    """Facts of persons who carry objects, and the places of each object that was taken, in their order."""
    draw, told = _Draw(rng), []
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    lies: dict[str, str] = {}
    been: dict[str, list[str]] = {}
    for _ in range(facts):
        person = draw(PERSONS)
        here = place.get(person)
        free = [x for x in OBJECTS if x not in holder and (x not in lies or lies[x] == here)] if here else []
        held = [x for x in OBJECTS if holder.get(x) == person]
        act = draw(["go", *["take"] * (2 * bool(free)), *["leave"] * bool(held)])
        if act == "take" and here:
            thing = draw(free)
            holder[thing] = person
            been.setdefault(thing, [here])
            told.append(f"{person} {draw(_TOOK)} the {thing}.")
        elif act == "leave" and here:
            thing = draw(held)
            lies[thing] = here
            del holder[thing]
            told.append(f"{person} {draw(_LEFT)} the {thing}.")
        else:
            place[person] = draw([p for p in PLACES if p != here])
            for thing in held:
                been[thing].append(place[person])
            told.append(f"{person} {draw(_WENT)} the {place[person]}.")
    return told, been


def carried(rng: np.random.Generator, facts: int) -> Story:
    """Task 2, two supporting facts: where an object is."""
    told, been = _carried(rng, facts)
    return told, [Puzzle(f"Where is the {thing}?", places[-1], PLACES) for thing, places in been.items()]


def before(rng: np.random.Generator, facts: int) -> Story:
    """Task 3, three supporting facts: where an object was before its last place."""
    told, been = _carried(rng, facts)
    return told, [
        Puzzle(f"Where was the {thing} before the {last}?", earlier, [p for p in PLACES if p != last])
        for thing, (*_, earlier, last) in ((thing, places) for thing, places in been.items() if len(places) > 1)
    ]


def relations(rng: np.random.Generator, facts: int) -> Story:
    """Task 4, relations of two: three places in a row from north to south or from west to east; what is beside the
    second?
    """
    draw = _Draw(rng)
    first, middle, last = rng.permutation(PLACES)[:3].tolist()
    way = draw(list(_OPPOSITE))
    told, puzzles = [], []
    for end, w in ((first, way), (last, _OPPOSITE[way])):
        told.append(draw([f"The {end} is {w} of the {middle}.", f"The {middle} is {_OPPOSITE[w]} of the {end}."]))
        choices = [p for p in PLACES if p != middle]
        puzzles.append(Puzzle(f"What is {w} of the {middle}?", end, choices))
        puzzles.append(Puzzle(f"What is the {middle} {_OPPOSITE[w]} of?", end, choices))
    return rng.permutation(told).tolist(), puzzles


def gifts(rng: np.random.Generator, facts: int) -> Story:
    """Task 5, relations of three: who gave what to whom. Only questions with one answer are asked."""
    draw, told = _Draw(rng), []
    holder: dict[str, str] = {}
    given: list[tuple[str, str, str]] = []
    for _ in range(facts):
        thing = draw(OBJECTS)
        if thing not in holder:
            holder[thing] = draw(GIVERS)
            told.append(f"{holder[thing]} {draw(_TOOK)} the {thing}.")
            continue
        person, other = holder[thing], draw([p for p in GIVERS if p != holder[thing]])
        holder[thing] = other
        given.append((person, thing, other))
        told.append(f"{person} gave the {thing} to {other}.")
    puzzles = []
    for person, thing, other in dict.fromkeys(given):
        if len({p for p, t, o in given if (t, o) == (thing, other)}) == 1:
            choices = [p for p in GIVERS if p != other]
            puzzles.append(Puzzle(f"Who gave the {thing} to {other}?", person, choices))
        if len({o for p, t, o in given if (p, t) == (person, thing)}) == 1:
            choices = [p for p in GIVERS if p != person]
            puzzles.append(Puzzle(f"Who did {person} give the {thing} to?", other, choices))
        if len({t for p, t, o in given if (p, o) == (person, other)}) == 1:
            puzzles.append(Puzzle(f"What did {person} give to {other}?", thing, OBJECTS))
    return told, puzzles


STORIES: dict[int, Callable[[np.random.Generator, int], Story]] = {
    1: moves,
    2: carried,
    3: before,
    4: relations,
    5: gifts,
}
# Choices of a question.
CHOICES = {1: 6, 2: 6, 3: 5, 4: 5, 5: 3}
# The most questions of a text.
_QUESTIONS = 3


@dataclass(frozen=True, kw_only=True)
class Babilong(Task):
    """tasks: numbers of bAbI's tasks, 1 to 5
    facts: of a text; task 4 has two
    haystack: a text file, or a folder of ``*.txt``; null for sentences made by rule

    A text is read once, and up to three questions are asked about it. Length counts the longest question and answer.
    """

    name = "babilong"
    title = "BABILong: facts of bAbI in a long text"
    note = (
        "Facts stand in order between sentences of prose; the model chooses the answer among all that a question"
        " allows. Rows name bAbI's task and the score of a guesser. 'Values told' has the words of the facts without"
        " their relations, and 'last value' the last of them; a score below theirs shows no memory of the facts."
    )
    down = "task"
    tasks: list = field(default_factory=lambda: [1, 2, 3, 4, 5])
    facts: int = 16
    haystack: str | None = None

    def __post_init__(self) -> None:
        known = bool(self.tasks) and all(type(task) is int and task in STORIES for task in self.tasks)
        require(known, f"tasks={self.tasks} must be numbers of 1 to 5")
        require(8 <= self.facts <= 1000, f"facts={self.facts} must lie in 8..1000")
        if self.haystack is not None:
            files(self.haystack)

    def cost(self) -> int:
        return super().cost() * len(self.tasks)

    def floors(self) -> dict[str, float]:
        chances = {1 / CHOICES[task] for task in self.tasks}
        return {"chance": chances.pop()} if len(chances) == 1 else {}

    def kinds_apart(self) -> Mapping[str, Self]:
        return {f"task {name}": replace(self, tasks=[name]) for name in self.tasks}

    def check(self, setting: Setting) -> None:
        setting.check_text(" ".join((*PERSONS, *GIVERS, *PLACES, *OBJECTS, *_WENT, "?.")), "eval.ask.babilong")
        for task in self.tasks:
            for row in range(self.rows):
                told, asked, answers = self._pieces(setting, *self._story(setting, task, min(self.lengths), row)[:2])
                room = min(self.lengths) - self._around(setting, told, asked, answers)
                require(
                    room >= len(told),
                    f"eval.ask.babilong: lengths={min(self.lengths)} is too short for the facts of task {task}: with "
                    f"this tokenizer it needs {min(self.lengths) - room + len(told):,} tokens; raise eval.lengths, or "
                    "lower facts",
                )

    def streams(self, setting: Setting) -> Iterator[Stream]:
        for length in self.lengths:
            for task in self.tasks:
                for row in range(self.rows):
                    yield self._stream(setting, task, length, row)

    def _story(
        self, setting: Setting, task: int, length: int, row: int
    ) -> tuple[list[str], list[Puzzle], np.random.Generator]:
        rng = setting.rng("babilong", task, length, row)
        while True:
            told, puzzles = STORIES[task](rng, self.facts)
            if puzzles:
                return told, [puzzles[i] for i in rng.permutation(len(puzzles))[:_QUESTIONS]], rng

    def _pieces(self, setting: Setting, told: list[str], puzzles: list[Puzzle]) -> tuple[list, list, list]:
        """Ids of the facts, of the questions, and of the answers of each question, the right one first."""
        asked = setting.pieces(f"Question: {puzzle.question} Answer:" for puzzle in puzzles)
        answers = [
            setting.pieces(f" {word}" for word in (p.answer, *(w for w in p.choices if w != p.answer)))
            for p in puzzles
        ]
        return setting.pieces(f" {fact}" for fact in told), asked, answers

    def _around(self, setting: Setting, told: list, asked: list, answers: list) -> int:
        """Tokens of all but the prose."""
        longest = max(len(q) + max(map(len, a)) for q, a in zip(asked, answers, strict=True))
        return len(setting.start) + sum(map(len, told)) + longest + len(setting.pieces(["\n"])[0])

    def _stream(self, setting: Setting, task: int, length: int, row: int) -> Stream:
        told, puzzles, rng = self._story(setting, task, length, row)
        facts, asked, answers = self._pieces(setting, told, puzzles)
        hay, tokens = essay(setting, self.haystack), length - self._around(setting, facts, asked, answers)
        ids, starts = hay.ids(tokens), np.append(hay.starts(tokens), tokens)
        # Several facts may stand between two sentences of a short text.
        places = np.sort(rng.choice(starts, len(facts)))
        tag = {"length": length, "task": f"{task} (chance {1 / CHOICES[task]:.3f})"}
        words = re.findall(r"\w+", " ".join(told))
        tags = [
            {**tag, "guesses": guesses(words, [p.answer, *(c for c in p.choices if c != p.answer)])} for p in puzzles
        ]
        read = Read(np.concatenate([setting.start, woven(ids, places, facts), setting.pieces(["\n"])[0]]))
        return [read, *map(Ask, asked, answers, tags)]
