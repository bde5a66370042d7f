"""BABILong: stories whose answers a second simulation confirms, in texts of the asked length."""

import re

import numpy as np
import pytest

from memlm.evaluation.tasks import Setting, tasks
from memlm.evaluation.tasks.babilong import CHOICES, STORIES
from tests.oracles import Guesser, Oracle, scores
from tests.test_ruler import TOKENIZERS

WENT, TOOK, LEFT = (
    rf"(\w+) (?:{verbs}) the (\w+)\."
    for verbs in (
        "moved to|went to|travelled to|journeyed to|went back to",
        "picked up|grabbed|got|took",
        "dropped|put down|left|discarded",
    )
)
AWAY = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


def answers(told, question):
    """Every answer that the facts allow, from their words alone."""
    place, holder, been, gifts, beside = {}, {}, {}, [], set()
    for fact in told:
        if found := re.fullmatch(WENT, fact):
            place[found[1]] = found[2]
            for thing in (t for t, person in holder.items() if person == found[1]):
                been[thing].append(found[2])
        elif found := re.fullmatch(TOOK, fact):
            assert found[2] not in holder
            here = place.get(found[1])
            # An object is taken where it lies.
            assert found[2] not in been or been[found[2]][-1] == here
            been.setdefault(found[2], [here])
            holder[found[2]] = found[1]
        elif found := re.fullmatch(LEFT, fact):
            assert holder.pop(found[2]) == found[1]
        elif found := re.fullmatch(r"(\w+) gave the (\w+) to (\w+)\.", fact):
            assert holder[found[2]] == found[1] != found[3]
            holder[found[2]] = found[3]
            gifts.append(found.groups())
        else:
            a, way, b = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups()
            (opposite,) = (w for w, (x, y) in AWAY.items() if (-x, -y) == AWAY[way])
            beside |= {(a, way, b), (b, opposite, a)}
    forms = {
        r"Where is (\w+)\?": lambda x: [place[x]],
        r"Where is the (\w+)\?": lambda x: [been[x][-1]],
        r"Where was the (\w+) before the (\w+)\?": lambda x, y: [been[x][-2]] if been[x][-1] == y else [],
        r"What is (\w+) of the (\w+)\?": lambda w, b: [a for a, way, other in beside if (way, other) == (w, b)],
        r"What is the (\w+) (\w+) of\?": lambda a, w: [b for other, way, b in beside if (other, way) == (a, w)],
        r"Who gave the (\w+) to (\w+)\?": lambda t, o: [p for p, thing, to in gifts if (thing, to) == (t, o)],
        r"Who did (\w+) give the (\w+) to\?": lambda p, t: [o for who, thing, o in gifts if (who, thing) == (p, t)],
        r"What did (\w+) give to (\w+)\?": lambda p, o: [t for who, t, to in gifts if (who, to) == (p, o)],
    }
    ((form, words),) = ((f, m.groups()) for f in forms if (m := re.fullmatch(f, question)))
    return {*forms[form](*words)}


@pytest.mark.parametrize("task", STORIES)
def test_answers_follow_from_the_facts(task):
    asked, given = 0, []
    for seed in range(150):
        told, puzzles = STORIES[task](np.random.default_rng(seed), 16)
        assert len(told) == (2 if task == 4 else 16)
        for question, answer, choices in puzzles:
            assert answers(told, question) == {answer}, (told, question)
            assert answer in choices and len({*choices}) == CHOICES[task]
            given.append(sorted(choices).index(answer))
            asked += 1
    assert asked >= 150
    # No answer is likelier than the others, so a fixed preference has chance.
    shares = np.bincount(given, minlength=CHOICES[task]) / asked
    assert np.abs(shares - 1 / CHOICES[task]).max() < 4 * (1 / CHOICES[task] / 150) ** 0.5


def test_words_without_relations_and_the_last_of_them_have_their_scores():
    setting, found = streams(TOKENIZERS["byte"], [1500], 24, facts=8)
    (task,) = tasks({"babilong": {"facts": 8}}, [1500], 24)
    scored = {number: [] for number in STORIES}
    for i, (_, *asks) in enumerate(found):
        number = 1 + i // 24
        told, puzzles, _ = task._story(setting, number, 1500, i % 24)
        for ask, puzzle in zip(asks, puzzles, strict=True):
            known = [word for word in " ".join(told).replace(".", "").split() if word in puzzle.choices]
            most = max(map(known.count, known))
            best = {word for word in known if known.count(word) == most}
            assert ask.tag["guesses"] == {
                "values told": (puzzle.answer in best) / len(best),
                "last value": float(known[-1] == puzzle.answer),
            }
            scored[number].append(ask.tag["guesses"]["values told"])
    # Both neighbours of the second place are told once; a question names this place and a direction.
    assert {*scored[4]} == {0.5} and np.mean(scored[1]) > 1 / 6


def streams(tokenizer, lengths, rows, **settings):
    (task,) = tasks({"babilong": settings}, lengths, rows)
    setting = Setting(tokenizer, 0)
    task.check(setting)
    return setting, list(task.streams(setting))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_facts_stand_in_order_in_texts_of_the_asked_length(tokenizer):
    setting, found = streams(TOKENIZERS[tokenizer], [2000, 3001], 2)
    (task,) = tasks({"babilong": {}}, [2000, 3001], 2)
    for i, (read, *asks) in enumerate(found):
        length, number = asks[0].tag["length"], 1 + i // 2 % 5
        assert asks[0].tag["task"] == f"{number} (chance {1 / CHOICES[number]:.3f})"
        assert max(len(read.ids) + len(a.ids) + max(map(len, a.answers)) for a in asks) == length
        told, puzzles, _ = task._story(setting, number, length, i % 2)
        text, place = setting.decode(read.ids), 0
        for fact in told:
            place = text.index(fact, place) + len(fact)
        for ask, puzzle in zip(asks, puzzles, strict=True):
            assert puzzle.question in setting.decode(ask.ids)
            assert setting.decode(ask.answers[0]).strip() == puzzle.answer


def test_an_oracle_is_right_and_a_guesser_has_chance():
    _, found = streams(TOKENIZERS["byte"], [1100], 1)
    assert all(r["exact"] for r in scores(Oracle, found, 259))
    _, found = streams(TOKENIZERS["byte"], [1500], 16, tasks=[1])
    guessed = [r["correct"] for r in scores(Guesser, [stream[1:] for stream in found], 259)]
    assert np.mean(guessed) == pytest.approx(1 / 6, abs=4 * (1 / 6 * 5 / 6 / 16) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "lengths", "line"),
    [
        ({}, [500], r"lengths=500 is too short for the facts of task 1: with this tokenizer it needs \d+ tokens"),
        ({"tasks": [6]}, [2000], r"tasks=\[6\] must be numbers of 1 to 5"),
        ({"facts": 2}, [2000], r"facts=2 must lie in 8\.\.1000"),
    ],
)
def test_mistakes_are_a_line(settings, lengths, line):
    with pytest.raises(ValueError, match=line):
        streams(TOKENIZERS["byte"], lengths, 1, **settings)
