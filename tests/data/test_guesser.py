"""The floor of one who has the answers of a text without their keys."""

from collections import Counter

import numpy as np
import pytest

from memlm.data import guesser
from memlm.data.recall import MQAR, VALUES, Copy, Passkey, RecallTask
from memlm.data.retrieval import Facts


def hits(task, rows=2000):
    """Right answers of each row, for a guesser that reads the row up to its first question and draws its guesses."""
    rng, found = np.random.default_rng(1), []
    for index in range(rows):
        row = task.sample(5, "test", index, 1.0)
        places = np.flatnonzero(row.labels != -100)
        left = Counter(row.labels[places].tolist())
        right = []
        for place in places:
            most = max(left.values())
            guess = rng.choice([token for token, count in left.items() if count == most])
            right.append(guess == row.labels[place])
            if task.shown:
                left[int(row.input_ids[place])] -= 1
        found.append(np.mean(right))
    return np.array(found)


TASKS = [
    MQAR(),
    MQAR(length=256, num_pairs=16, num_values=64),
    MQAR(num_pairs=6, num_values=2),
    Passkey(),
    Passkey(digits=1),
    Copy(),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_floor_is_that_of_a_guesser_which_reads_rows(task):
    found = hits(task)
    # Three standard errors: one of these cases in 400 would fail by chance, and the draws are fixed.
    assert task.set_guesser == pytest.approx(found.mean(), abs=3 * found.std() / len(found) ** 0.5 + 1e-12)
    # The simulation that tasks without a formula use.
    assert RecallTask.set_guesser.fget(task) == pytest.approx(task.set_guesser, abs=0.02)
    assert task.set_guesser >= task.chance


def test_the_floors_of_the_default_rows():
    """Earlier simulations of 2,000 rows gave 0.386 and 0.248, with a standard error of 0.0025."""
    assert MQAR().set_guesser == pytest.approx(0.3870, abs=5e-5)
    assert MQAR().set_guesser == pytest.approx(0.386, abs=0.005)
    assert MQAR(length=256, num_pairs=16, num_values=64).set_guesser == pytest.approx(0.2534, abs=5e-5)
    assert MQAR(length=256, num_pairs=16, num_values=64).set_guesser == pytest.approx(0.248, abs=0.0055)
    assert Passkey().set_guesser == pytest.approx(0.5438, abs=5e-5)
    assert Copy().set_guesser == pytest.approx(sum(1 / k for k in range(1, 20)) / 19)


def test_the_most_frequent_of_few_draws_by_hand():
    # Two draws of V kinds are equal with probability 1 / V; three of two kinds hold a pair or a triple.
    assert guesser.most_frequent(2, 5).tolist() == pytest.approx([0, 1, 1.2])
    assert guesser.most_frequent(3, 2).tolist() == pytest.approx([0, 1, 1.5, 2.25])
    assert guesser.most_frequent(3, 1).tolist() == pytest.approx([0, 1, 2, 3])


def test_answers_of_several_tokens_are_guessed_from_their_beginning():
    bag = [(1, 2), (1, 3), (4,)]
    assert guesser.scores(bag, [(1, 3)]) == [1.0, 0.5]
    assert guesser.scores(bag, [(4,), (1, 2)]) == [0.0, 1.0, 0.5]
    assert guesser.scores([(1,), (2,)], [(1,), (2,)], shown=False) == [0.5, 0.5]


def test_documents_have_a_floor_of_all_their_facts():
    task = Facts(num_documents=8, length=128)
    assert task.set_guesser == pytest.approx(guesser.most_frequent(8, 32)[8] / 8, abs=0.02)
    row = task.sample(0, "test", 3, 1.0)
    assert np.isin(row.input_ids[row.doc_ids > 0], VALUES).sum() == 8
