"""MQAR by Zoology's definition, pairs in one token, and MAD's tasks: rows are built as their docstrings describe."""

import numpy as np
import pytest

from memlm.data import build_data
from memlm.data.recall import ASK, KEYS, MQAR, NOISE, PAIRS, VALUES, StackedMQAR, ZoologyMQAR
from memlm.data.recall_mad import FuzzyRecall, SelectiveCopy

TASKS = [
    ZoologyMQAR(length=64),
    ZoologyMQAR(length=33, num_pairs=4, gap=5),
    ZoologyMQAR(length=32, num_pairs=8, num_keys=8, num_values=8),
    StackedMQAR(length=64),
    StackedMQAR(length=24, num_pairs=8),
    SelectiveCopy(),
    SelectiveCopy(length=35, num_symbols=17, gap=0),
    FuzzyRecall(),
    FuzzyRecall(length=75, num_pairs=5, gap=3, key_size=2, value_size=5),
]


def rows(task, count=60, noise=1.0):
    return [task.sample(3, "test", index, noise) for index in range(count)]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_rows_have_the_task_s_symbols_and_ask_after_their_front(task):
    for row in rows(task):
        places = np.flatnonzero(row.labels != -100)
        assert row.input_ids.shape == row.labels.shape == (task.length,)
        assert np.isin(row.input_ids, task.symbols).all() and np.isin(row.labels[places], VALUES).all()
        assert places.min() - 1 >= task.asked_from
        assert (row.input_ids[places] == row.labels[places]).all() == task.shown
    smallest = min(np.flatnonzero(row.labels != -100)[0] for row in rows(task, 400)) - 1
    # Questions of several tokens end later; the first answers come soon after the front.
    assert smallest - task.asked_from <= 8


@pytest.mark.parametrize("task", TASKS[:5], ids=str)
def test_zoology_asks_every_pair_once_and_shows_no_answer(task):
    stacked = isinstance(task, StackedMQAR)
    for row in rows(task):
        ids, places = row.input_ids, np.flatnonzero(row.labels != -100)
        if stacked:
            pairs = [divmod(token - PAIRS[0], task.num_values) for token in ids[: task.num_pairs].tolist()]
            value_of = {int(KEYS[key]): int(VALUES[value]) for key, value in pairs}
        else:
            front = ids[: 2 * task.num_pairs].tolist()
            value_of = dict(zip(front[::2], front[1::2], strict=True))
        assert len(value_of) == len({*value_of.values()}) == len(places) == task.num_pairs
        assert [value_of[key] for key in ids[places - 1].tolist()] == row.labels[places].tolist()
        assert ((places - 1 - task.asked_from) % 2 == 0).all()
        rest = np.delete(ids, [*range(task.asked_from - task.gap), *(places - 1)])
        assert np.isin(rest, NOISE).all()


@pytest.mark.parametrize("kind", [MQAR, ZoologyMQAR, StackedMQAR])
def test_the_order_of_the_questions_tells_nothing_of_the_order_of_the_pairs(kind):
    """One who has the values in their order, without keys, scores 1 / num_pairs."""
    task, found = kind(length=40, num_pairs=3, gap=0), np.zeros((3, 3))
    for row in rows(task, 1500):
        places = np.flatnonzero(row.labels != -100)
        front = row.input_ids[: task.asked_from]
        told = VALUES[(front - PAIRS[0]) % task.num_values] if kind is StackedMQAR else front[1::2]
        for rank, value in enumerate(row.labels[places]):
            # Values of MQAR may repeat.
            found[rank] += (told == value) / (told == value).sum()
    assert np.abs(found / 1500 - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 1500)


def test_zoology_draws_the_places_of_queries_by_its_power_law():
    """With one pair, the place is one draw; its law is that of Zoology's generator."""
    task = ZoologyMQAR(length=66, num_pairs=1)
    places = [(np.flatnonzero(row.labels != -100)[0] - 3) // 2 for row in rows(task, 4000)]
    found = np.bincount(places, minlength=32) / 4000
    wanted = 0.01 * np.arange(1, 33) ** (0.01 - 1)
    wanted /= wanted.sum()
    assert np.abs(found - wanted).max() < 4 * np.sqrt(wanted.max() / 4000) and found[0] > 0.2 > 0.02 > found[16:].max()


@pytest.mark.parametrize("task", TASKS[5:7], ids=str)
def test_a_selective_copy_repeats_the_values_in_their_order(task):
    for row in rows(task):
        ids, n = row.input_ids, task.num_symbols
        assert ids[-n - 1] == ASK and (row.labels[-n:] == ids[-n:]).all() and (row.labels[:-n] == -100).all()
        (told,) = np.nonzero(np.isin(ids[: -n - 1], VALUES))
        assert (ids[told] == ids[-n:]).all()
        assert (np.arange(task.length - n - 1, task.length - 1) - told).min() >= task.min_distance


@pytest.mark.parametrize("task", TASKS[7:], ids=str)
def test_fuzzy_recall_repeats_each_pair_of_motifs_once(task):
    sizes = set()
    for row in rows(task, 200):
        line = "".join("k" if i in KEYS else "v" if i in VALUES else "." for i in row.input_ids)
        runs = [m for part in line.split(".") if part for m in part.replace("vk", "v k").split()]
        assert len(runs) == 2 * task.num_pairs and all(m.count("k") == task.key_size for m in runs)
        starts = [i for i, c in enumerate(line) if c == "k" and (i == 0 or line[i - 1] != "k")]
        pairs = [tuple(row.input_ids[s : s + len(m)]) for s, m in zip(starts, runs, strict=True)]
        assert sorted(pairs[: task.num_pairs]) == sorted(pairs[task.num_pairs :])
        assert len({pair[: task.key_size] for pair in pairs}) == task.num_pairs
        assert all(len({*pair}) == len(pair) for pair in pairs)
        second = starts[task.num_pairs]
        assert set(np.flatnonzero(row.labels != -100)) == {i for i in range(second, task.length) if line[i] == "v"}
        sizes |= {len(pair) - task.key_size for pair in pairs}
    assert sizes == set(range(1, task.value_size + 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ZoologyMQAR(num_values=4), "num_pairs=8 needs as many different values; raise num_values"),
        (lambda: ZoologyMQAR(length=31), "length=31 is too short .* at least 32"),
        (lambda: StackedMQAR(num_keys=16), "num_keys=16 times num_values=16 must be at most 128"),
        (lambda: StackedMQAR(length=23), "length=23 is too short .* at least 24"),
        (lambda: SelectiveCopy(num_symbols=0), "num_symbols=0 must be at least 1"),
        (lambda: SelectiveCopy(length=72), "length=72 is too short .* at least 73"),
        (lambda: FuzzyRecall(key_size=9), "key_size=9 must lie between 1 and num_keys=8"),
        (lambda: FuzzyRecall(num_pairs=9, key_size=1), "num_pairs=9 must lie between 1 and the 8 keys"),
        (lambda: FuzzyRecall(length=111), "length=111 is too short .* at least 112"),
    ],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ["mqar_zoology", "mqar_stacked", "selective_copy", "fuzzy_recall"])
def test_each_kind_is_a_source_of_training(kind, tmp_path):
    cfg = {
        **{"tokenizer": "byte", "seq_len": 128, "cache_dir": str(tmp_path), "noise_ramp": [0, 0]},
        "sources": {"a": {"kind": kind, "weight": 1.0}},
    }
    _, mixture = build_data(cfg, seed=0, batch_size=4)
    batch = mixture.batch(0)
    scored = batch.labels != -100
    assert scored.any(1).all() and ((batch.input_ids == batch.labels)[scored].all()) == ("mqar" not in kind)
