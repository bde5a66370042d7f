from dataclasses import replace
from itertools import combinations
from time import process_time

import numpy as np
import pytest

from memlm.data.recall import ASK, FILLER, KEYS, MARK, MQAR, NOISE, VALUES, Copy, Passkey, RecallSource, ramp

TASKS = [
    MQAR(),
    MQAR(length=75, num_pairs=3, gap=21),
    MQAR(length=129, num_pairs=32, gap=0),
    MQAR(length=200, num_pairs=40, gap=7, num_keys=64, num_values=96),
    MQAR().scaled(8),
    Passkey(),
    Passkey(length=63, digits=1, gap=13),
    Passkey(length=13, digits=2, gap=8),
    Passkey().scaled(8),
]


def rows(task, count=40, noise=1.0, split="test"):
    return [task.sample(3, split, index, noise) for index in range(count)]


def text(row):
    return bytes(row.input_ids.tolist()).decode("ascii")


def test_symbols_are_disjoint_and_printable():
    sets = [KEYS, VALUES, NOISE, np.array([FILLER]), np.array([MARK]), np.array([ASK])]
    assert [len(set(s.tolist())) for s in sets] == [96, 96, 16, 1, 1, 1]
    for one, other in combinations(sets, 2):
        assert not set(one.tolist()) & set(other.tolist())
    assert all(symbol < 256 for s in sets for symbol in s)
    assert all(chr(symbol).isprintable() and symbol < 128 for s in sets for symbol in s[:32])


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_shapes_and_labels(task):
    for row in rows(task):
        assert all(array.shape == (task.length,) and array.dtype == np.int64 for array in row)
        scored = row.labels != -100
        assert (row.labels[scored] == row.input_ids[scored]).all()
        assert scored.sum() == (task.num_pairs if isinstance(task, MQAR) else task.digits)
        assert np.isin(row.labels[scored], VALUES[: task.num_values]).all()
        assert (row.position_ids == np.arange(task.length)).all()


@pytest.mark.parametrize("task", [t for t in TASKS if isinstance(t, MQAR)], ids=str)
def test_mqar_layout(task):
    front, pairs = 2 * task.num_pairs, task.num_pairs
    for row in rows(task):
        ids = row.input_ids
        value_of = dict(zip(ids[0:front:2].tolist(), ids[1:front:2].tolist(), strict=True))
        assert len(value_of) == pairs
        assert np.isin(ids[front : front + task.gap], NOISE).all()
        (scored,) = np.nonzero(row.labels != -100)
        assert sorted(ids[scored - 1].tolist()) == sorted(value_of)
        assert [value_of[key] for key in ids[scored - 1].tolist()] == ids[scored].tolist()
        assert ((scored - 1 - front - task.gap) % 2 == 0).all() and scored.min() > front + task.gap
        rest = np.delete(ids[front:], np.concatenate([scored, scored - 1]) - front)
        assert np.isin(rest, NOISE).all()


def test_mqar_queries_are_uniform():
    task = MQAR()
    counts = np.zeros(task.length)
    order = np.zeros((8, 8))
    for row in rows(task, 2000):
        (scored,) = np.nonzero(row.labels != -100)
        counts[scored] += 1
        front = row.input_ids[0:16:2].tolist()
        for rank, key in enumerate(row.input_ids[scored - 1].tolist()):
            order[rank, front.index(key)] += 1
    slots = counts[57::2]
    assert counts.sum() == slots.sum() == 16000 and len(slots) == 36
    assert np.abs(slots / slots.mean() - 1).max() < 0.2
    assert np.abs(order / order.mean() - 1).max() < 0.3


@pytest.mark.parametrize("task", [t for t in TASKS if isinstance(t, Passkey)], ids=str)
def test_passkey_layout(task):
    needles = set()
    for row in rows(task, 300):
        line = text(row)
        size = task.digits + 2
        assert line.count("#") == line.count("?") == 1 and line.index("?") == task.length - size
        needle = line.index("#")
        assert line[needle + 1 : needle + size] == line[-size + 1 :]
        assert ord(line[needle + 1]) in KEYS
        outside = np.delete(row.input_ids[:-size], np.arange(needle, needle + size))
        assert np.isin(outside, NOISE).all()
        assert (np.nonzero(row.labels != -100)[0] == np.arange(task.length - task.digits, task.length)).all()
        needles.add(needle)
    latest = task.length - size - 1 - task.gap
    assert min(needles) >= 0 and max(needles) <= latest
    assert len(needles) > 0.6 * min(latest + 1, 100)


def test_copy_layout():
    task, distances = Copy(length=64, num_symbols=12, gap=3), set()
    for row in rows(task, 200):
        ids = row.input_ids
        (scored,) = np.nonzero(row.labels != -100)
        second = scored[0] - 1
        assert (scored == np.arange(second + 1, second + 12)).all() and (row.labels[scored] == ids[scored]).all()
        symbols = ids[second : second + 12]
        (first,) = np.nonzero(ids[:second] == symbols[0])
        assert len(first) == 1 and (ids[first[0] : first[0] + 12] == symbols).all()
        assert len({*symbols.tolist()}) == 12 and np.isin(symbols, [*KEYS[:32], *VALUES[:32]]).all()
        distances.add(second - first[0])
    assert min(distances) == 15 and max(distances) == 52 and len(distances) > 30
    assert task.chance == 1 / 64 and task.scaled(2).gap == 6
    wrongs = (
        ({"length": 24}, "length=24 is too short"),
        ({"length": 200, "num_symbols": 65}, "num_symbols=65 must lie"),
    )
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            Copy(**({"num_symbols": 12, "gap": 3} | wrong))


def test_passkey_depth():
    task = Passkey()
    for length in (128, 1024):
        for depth in (0, 0.25, 0.5, 1):
            for row in rows(replace(task, depth=depth, length=length), 5):
                before, needle = text(row).index("?"), text(row).index("#")
                assert needle == round(depth * (before - 6)), "at 1 the needle of 6 tokens ends at the question"
    assert {text(row).index("#") for row in rows(task, 2000)} == set(range(77))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_min_distance(task):
    """Brute force: the distance from the token that predicts a scored one back to the first answer to its key."""
    task = replace(task, depth=1.0) if isinstance(task, Passkey) else task
    least = task.length
    for row in rows(task, 300):
        ids = row.input_ids.tolist()
        scored = np.nonzero(row.labels != -100)[0].tolist()
        for number, t in enumerate(scored):
            offset = 1 if isinstance(task, MQAR) else number + 1
            source = ids.index(ids[t - offset]) + offset
            assert ids[source] == ids[t]
            least = min(least, t - 1 - source)
            assert least >= task.min_distance
    assert least - task.min_distance <= (0 if isinstance(task, Passkey) else 2)


def test_recipe_reaches_beyond_the_window():
    layers, window, conv = 2, 16, 4
    for task in (MQAR(), Passkey()):
        assert task.min_distance > layers * (window - 1 + conv - 1)
    assert (MQAR().min_distance, Passkey().min_distance, MQAR().scaled(8).min_distance) == (41, 45, 321)


def test_scaled():
    assert MQAR().scaled(8) == MQAR(length=1024, num_pairs=8, gap=320)
    assert Passkey(depth=0.5).scaled(2) == Passkey(length=256, digits=4, gap=90, depth=0.5)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_noise(task):
    filler = [np.isin(row.input_ids, [FILLER, *NOISE]) for row in rows(task)]
    for noise in (0.0, 0.3, 1.0):
        noisy = [np.isin(row.input_ids, NOISE) for row in rows(task, noise=noise)]
        share = sum(n.sum() for n in noisy) / max(1, sum(f.sum() for f in filler))
        assert abs(share - noise) < 0.1
    # Noise changes only the filler.
    for clean, full in zip(rows(task, noise=0.0), rows(task, noise=1.0), strict=True):
        assert (clean.labels == full.labels).all()
        assert np.isin(full.input_ids[clean.input_ids != full.input_ids], NOISE).all()


@pytest.mark.parametrize("task", [MQAR(), Passkey(), MQAR(num_keys=96, num_values=8)], ids=str)
def test_answers_are_independent(task):
    """Chance is as documented, whatever else the row has: all values are equally likely, also next to each other."""
    answers = np.array([row.labels[row.labels != -100] for row in rows(task, 3000)])
    counts = np.bincount(answers.ravel(), minlength=256)[VALUES]
    assert (counts[task.num_values :] == 0).all()
    counts = counts[: task.num_values]
    assert np.abs(counts / counts.mean() - 1).max() < 0.25
    assert abs((answers[:, 0] == answers[:, 1]).mean() - task.chance) < 0.014


@pytest.mark.parametrize("task", [MQAR(), Passkey()], ids=str)
def test_purity_and_streams(task):
    def key(row):
        return row.input_ids.tobytes()

    forward = [key(task.sample(0, "train", i, 1.0)) for i in range(50)]
    backward = [key(task.sample(0, "train", i, 1.0)) for i in reversed(range(50))]
    assert forward == backward[::-1] and len(set(forward)) == 50
    others = [
        key(task.sample(seed, split, i, 1.0))
        for seed, split in ((0, "validation"), (0, "test"), (1, "train"))
        for i in range(50)
    ]
    assert len({*forward, *others}) == 200
    with pytest.raises(ValueError, match="split 'dev' does not exist; use one of train, validation, test"):
        task.sample(0, "dev", 0, 1.0)


def test_ramp():
    steps = (0, 150, 225, 300, 10_000)
    assert [ramp(step, 150, 300) for step in steps] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert ramp(0, 0, 0) == ramp(5, 5, 5) == 1.0 and ramp(4, 5, 5) == 0.0


def test_source_takes_its_noise_from_the_step():
    source = RecallSource(MQAR(), seed=1, noise_ramp=(10, 20))
    for step, split, noise in ((0, "train", 0.0), (15, "train", 0.5), (20, "train", 1.0), (0, "test", 1.0)):
        got, want = source.row(4, split, step), MQAR().sample(1, split, 4, noise)
        assert (got.input_ids == want.input_ids).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MQAR(length=71), "length=71 is too short for MQAR.* at least 72, or lower gap"),
        (lambda: MQAR(num_pairs=33, length=1000), "num_pairs=33 must lie between 1 and num_keys=32"),
        (lambda: MQAR(num_values=97), "num_values=97 must lie between 1 and 96"),
        (lambda: Passkey(num_keys=0), "num_keys=0 must lie between 1 and 96"),
        (lambda: MQAR(num_pairs=0), "num_pairs=0 must"),
        (lambda: MQAR(gap=-1), "gap=-1 is too small .* at least 0"),
        (lambda: Passkey(length=51), "length=51 is too short for Passkey.* at least 52"),
        (lambda: Passkey(gap=4), "gap=4 is too small .* at least 5"),
        (lambda: Passkey(digits=0), "digits=0 must be at least 1"),
        (lambda: Passkey(depth=1.5), "depth=1.5 must lie between 0"),
        (lambda: MQAR().scaled(0.25), "gap|length=32 is too short"),
    ],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("task", [MQAR(length=72), Passkey(length=52), Passkey(length=12, gap=5)], ids=str)
def test_smallest_sizes_fit(task):
    assert all((row.labels != -100).any() for row in rows(task))


def test_a_batch_takes_less_time_than_one_draw_for_each_token():
    """Every training step makes rows, 32 in 2 to 4 ms; a loop over their tokens would take several times as long."""
    task, rng = MQAR(), np.random.default_rng(0)

    def cost(work):
        times = []
        for _ in range(20):
            start = process_time()
            work()
            times.append(process_time() - start)
        return min(times)

    assert cost(lambda: rows(task, 32)) < cost(lambda: [rng.integers(16) for _ in range(32 * task.length)])
