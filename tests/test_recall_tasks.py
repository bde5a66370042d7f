"""Recall as events: who has every answer scores 1, who has nothing scores chance, the set guesser scores its floor."""

import numpy as np
import pytest

from memlm.data import byte_tokenizer
from memlm.evaluation.tasks import Setting, tasks
from tests.oracles import Guesser, Oracle, guessed, scores

BYTES = Setting(byte_tokenizer(), 0)
ASKED = {
    "mqar": {"forms": ["own", "zoology", "stacked"], "num_pairs": 4},
    "selective_copying": {"num_symbols": 8},
    "fuzzy_recall": {"num_pairs": 3},
    "key_value_distance": {"num_pairs": 4},
}


def task(name, lengths=(64,), rows=100, **settings):
    (found,) = tasks({name: {**ASKED[name], **settings}}, [*lengths], rows)
    return found


def shares(records, key):
    values = {record[key] for record in records}
    return {value: [r["correct"] for r in records if r[key] == value] for value in values}


@pytest.mark.parametrize("name", ASKED)
def test_whoever_has_the_answers_is_right_and_whoever_has_nothing_is_at_chance(name):
    asked = task(name, rows=40)
    streams = list(asked.streams(BYTES))
    assert all(r["exact"] for r in scores(Oracle, streams, 256))
    # The guesser draws from all 256 bytes.
    assert np.mean([r["correct"] for r in scores(Guesser, streams, 256)]) == pytest.approx(1 / 256, abs=0.01)
    assert all(0 < floor < 1 for floor in asked.floors().values())


@pytest.mark.parametrize("name", ASKED)
def test_whoever_has_the_answers_without_their_keys_has_the_floor(name):
    asked = task(name)
    streams = list(asked.streams(BYTES))
    records = scores(Oracle, streams, 256, guessed(streams, motifs=name == "fuzzy_recall"))
    floors = asked.floors()
    for form, found in shares(records, "form" if name == "mqar" else asked.across).items():
        of_texts = np.array(found).reshape(asked.rows, -1).mean(1)
        floor = floors.get(f"set guesser, {form}", floors.get("set guesser"))
        # Four standard errors.
        assert np.mean(found) == pytest.approx(floor, abs=4 * of_texts.std() / asked.rows**0.5)
