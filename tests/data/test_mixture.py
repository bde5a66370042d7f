from hashlib import sha256
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from memlm.data import MQAR, Mixture, Passkey, RecallSource, Row, TextSource, build_data
from tests import processes

ROOT = Path(__file__).parents[2]
NAMES = ("recall", "text", "mixture")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache, monkeypatch):
    monkeypatch.setenv("MEMLM_CACHE", str(cache))
    return lambda name: OmegaConf.load(ROOT / "configs" / "data" / f"{name}.yaml")


class Numbers:
    """Rows that hold their own number."""

    def row(self, index, split, step):
        values = np.array([index, step, len(split)])
        return Row(values, values, np.arange(3))


def recall_mixture(batch_size=8):
    sources = {"mqar": RecallSource(MQAR(), 1, (2, 9)), "passkey": RecallSource(Passkey(), 2, (2, 9))}
    return Mixture(sources, {"mqar": 0.7, "passkey": 0.3}, batch_size)


def numbers(weights, batch_size):
    return Mixture({name: Numbers() for name in weights}, weights, batch_size)


def same(one, other):
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a is b is None or torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_configs(config, name):
    cfg = config(name)
    tokenizer, mixture = build_data(cfg, seed=0, batch_size=32)
    batch = mixture.batch(0)
    assert len(tokenizer) == 259
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.shape == (32, 128) and tensor.dtype == torch.int64
    assert batch.source_ids.shape == (32,) and batch.source_ids.dtype == torch.int64
    want = [round(32 * source.weight) for source in cfg.sources.values()]
    assert torch.bincount(batch.source_ids).tolist() == want == [*mixture.counts.values()]
    assert batch.max_documents == (batch.position_ids == 0).sum(1).max()
    assert [*mixture.sources] == [*cfg.sources]
    assert mixture.batch(3, "validation").labels.ne(-100).any(1).all()


def test_config_is_the_recipe(config):
    _, mixture = build_data(config("recall"), seed=0, batch_size=32)
    mqar, passkey = mixture.sources.values()
    assert (mqar.task, passkey.task) == (MQAR(128, 8, 40), Passkey(128, 4, 45))
    assert mqar.noise_ramp == passkey.noise_ramp == (150, 300)
    assert mqar.seed != passkey.seed
    _, other = build_data(config("recall"), seed=1, batch_size=32)
    assert not torch.equal(mixture.batch(0).input_ids, other.batch(0).input_ids)


def test_cache_dir_without_home(config, monkeypatch):
    monkeypatch.delenv("MEMLM_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    assert all(config(name).cache_dir == "~/.cache/memlm" for name in NAMES)


def test_plain_dict_and_bpe(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("the cat and the hat and the mat " * 8)
    cfg = {
        "tokenizer": {"bpe": 270},
        "seq_len": 16,
        "cache_dir": str(tmp_path / "cache"),
        "sources": {"text": {"kind": "text", "weight": 1, "paths": str(tmp_path)}},
    }
    for given in (cfg, OmegaConf.create(cfg)):
        tokenizer, mixture = build_data(given, seed=0, batch_size=2)
        assert len(tokenizer) == 270 and isinstance(mixture.sources["text"], TextSource)
        assert tokenizer.decode(mixture.batch(0).input_ids[0]).count("the") > 1
    cfg["sources"]["mqar"] = {"kind": "mqar", "weight": 1}
    with pytest.raises(ValueError, match=r"data.sources.mqar is made of bytes; set data.tokenizer to byte"):
        build_data(cfg, seed=0, batch_size=2)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_pure(config, name):
    """Batch 7 is the same alone, after batches 0 to 6, and in any order."""

    def make():
        return build_data(config(name), seed=4, batch_size=4)[1]

    in_order = make()
    batches = [in_order.batch(step) for step in range(8)]
    assert same(make().batch(7), batches[7])
    again = make()
    assert all(same(again.batch(step), batches[step]) for step in reversed(range(8)))
    assert not same(batches[6], batches[7])
    assert not same(in_order.batch(7, "test"), batches[7])


def test_batches_are_the_same_in_another_process(config, cache):
    script = (
        "print(hash('a'))\nimport sys\nfrom hashlib import sha256\nfrom omegaconf import OmegaConf\n"
        "from memlm.data import build_data\n"
        "_, mixture = build_data(OmegaConf.load(sys.argv[1]), seed=4, batch_size=8)\n"
        "print(sha256(mixture.batch(7).input_ids.numpy().tobytes()).hexdigest())"
    )
    _, mixture = build_data(config("mixture"), seed=4, batch_size=8)
    done = processes.run("-c", script, ROOT / "configs" / "data" / "mixture.yaml", cwd=cache)
    assert done.returncode == 0, done.stderr
    hashed, output = done.stdout.splitlines()
    # Strings are in other places of its sets.
    assert int(hashed) != hash("a")
    assert output == sha256(mixture.batch(7).input_ids.numpy().tobytes()).hexdigest()


TENSORS = ("input_ids", "labels", "position_ids", "source_ids")


@pytest.mark.parametrize(
    ("name", "step", "split", "digest"),
    [
        ("recall", 0, "train", "8097b1b2650a0f58"),
        ("recall", 200, "train", "2151639120a22b12"),
        ("recall", 3, "validation", "37e9f5d7951eb8ad"),
        ("facts", 200, "train", "92ec93506e691d81"),
    ],
)
def test_batches_are_those_recorded(config, name, step, split, digest):
    """In one part, so that runs remain comparable with those of earlier versions."""
    batch = build_data(config(name), seed=0, batch_size=8)[1].batch(step, split)
    assert sha256(b"".join(getattr(batch, n).numpy().tobytes() for n in TENSORS)).hexdigest()[:16] == digest


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("world_size", "forwards"), [(1, 2), (2, 1), (3, 2), (1, 12)])
def test_parts_make_the_same_batch(world_size, forwards, split):
    """The rows of a step, their order and their noise do not depend on the number of processes and forwards."""
    mixture, parts = recall_mixture(batch_size=12), world_size * forwards
    whole = mixture.batch(5, split)
    for part in range(parts):
        batch = mixture.batch(5, split, part, parts)
        for name in TENSORS:
            assert torch.equal(getattr(batch, name), getattr(whole, name)[part::parts])


@pytest.mark.parametrize(("part", "parts"), [(0, 5), (0, 24), (2, 2), (-1, 2), (0, 0)])
def test_parts_that_are_not_equal(part, parts):
    with pytest.raises(ValueError, match=f"batch_size=12 rows cannot be cut into {parts} equal parts") as caught:
        recall_mixture(batch_size=12).batch(0, "train", part, parts)
    assert "\n" not in str(caught.value)


def test_each_row_is_used_once():
    mixture = numbers({"a": 0.6, "b": 0.4}, batch_size=5)
    batches = [mixture.batch(step) for step in range(4)]
    for source, count in ((0, 3), (1, 2)):
        seen = torch.cat([batch.input_ids[batch.source_ids == source, 0] for batch in batches])
        assert seen.tolist() == [*range(4 * count)]
    assert [batch.input_ids[0, 1].item() for batch in batches] == [0, 1, 2, 3]
    assert mixture.batch(2, "validation").input_ids[:, 2].tolist() == [10] * 5


@pytest.mark.parametrize(
    ("weights", "batch_size", "counts"),
    [
        ({"a": 0.5, "b": 0.25, "c": 0.25}, 32, [16, 8, 8]),
        ({"a": 1, "b": 1, "c": 1}, 7, [3, 2, 2]),
        ({"a": 0.29, "b": 0.71}, 100, [29, 71]),
        ({"a": 41, "b": 29, "c": 17, "d": 13}, 10, [4, 3, 2, 1]),
        ({"a": 1.0, "b": 0.0}, 3, [3, 0]),
        ({"a": 8, "b": 1}, 5, [4, 1]),
    ],
)
def test_largest_remainder(weights, batch_size, counts):
    mixture = numbers(weights, batch_size)
    assert [*mixture.counts.values()] == counts
    assert torch.bincount(mixture.batch(1).source_ids, minlength=len(counts)).tolist() == counts


@pytest.mark.parametrize(
    ("weights", "batch_size", "message"),
    [
        ({"a": 1, "b": 1e-4}, 8, "data weight 0.0001 of source b gives it no row in a batch of 8, or too few in"),
        (
            {"a": 1, "b": 2},
            1,
            "data weight 1 of source a gives it no row in a batch of 1, or too few in others",
        ),
        ({"a": 1, "b": -1}, 8, "must not be negative"),
        ({"a": 0, "b": 0.0}, 8, "not all zero"),
        ({"a": float("nan"), "b": 1}, 8, "data weights"),
        ({"a": 1}, 0, "batch_size=0"),
        ({"a": 1}, 10**12, "batch_size=1000000000000 must lie between 1 and"),
    ],
)
def test_weights_that_do_not_fit(weights, batch_size, message):
    with pytest.raises(ValueError, match=message):
        numbers(weights, batch_size)


@pytest.mark.parametrize(
    ("weights", "batch_size"),
    [({"a": 15e9, "b": 4e8, "c": 0}, 8), ({"a": 1, "b": 0.01}, 3), ({"a": 0.97, "b": 0.01, "c": 0.02}, 16)],
)
def test_a_source_of_few_tokens_has_rows_in_some_batches(weights, batch_size):
    """Shares are those of the weights over steps and, within a row, at any step; rows come one after the other."""
    mixture = numbers(weights, batch_size)
    names, seen, total = [*weights], {name: [] for name in weights}, sum(weights.values())
    for step in range(2 * len(mixture._batches["train"])):
        batch = mixture.batch(step)
        assert len(batch.input_ids) == batch_size
        for source, row in zip(batch.source_ids.tolist(), batch.input_ids.tolist(), strict=True):
            seen[names[source]].append(row[0])
        for name, numbers_of_rows in seen.items():
            share = weights[name] / total * batch_size * (step + 1)
            assert abs(len(numbers_of_rows) - share) < 1.5 + 0.05 * share
    assert all(found == [*range(len(found))] for found in seen.values()) and seen["b"] and not seen.get("d")
    assert {name: len(found) / (step + 1) for name, found in seen.items()} == mixture.counts
    validated = torch.bincount(mixture.batch(5, "validation").source_ids, minlength=len(names)).tolist()
    assert all((count > 0) == (weights[name] > 0) for name, count in zip(names, validated, strict=True))
    parts = [mixture.batch(7, part=part, parts=batch_size).input_ids.tolist() for part in range(batch_size)]
    assert [part[0] for part in parts] == mixture.batch(7).input_ids.tolist()


def test_weights_of_other_sources():
    with pytest.raises(ValueError, match=r"data weights name \['b'\], but the sources are \['a'\]"):
        Mixture({"a": Numbers()}, {"b": 1.0}, 4)


def test_to_device():
    batch = recall_mixture().batch(0)
    moved = batch.to("meta")
    assert moved.max_documents == batch.max_documents == 1
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.source_ids.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seq_length", 3, "data.seq_length is unknown; did you mean 'seq_len'?"),
        ("zzz", 3, "data.zzz is unknown; one of: tokenizer"),
        ("seq_len", None, "data.seq_len is missing"),
        ("seq_len", "128", "data.seq_len='128' is not a whole number"),
        ("seq_len", 1, "data.seq_len=1 is too short"),
        ("seq_len", 64, "data.sources.mqar: length=64 is too short for MQAR"),
        ("seq_len", 5 * 10**6, "data.sources.text: the validation split has"),
        ("sources", {}, "data.sources={} must name at least one source"),
        ("sources.mqar.numpairs", 8, "data.sources.mqar.numpairs is unknown; did you mean 'num_pairs'?"),
        ("sources.mqar.num_pairs", 8.5, "data.sources.mqar.num_pairs=8.5 is not a whole number"),
        ("sources.mqar.weight", "half", "data.sources.mqar.weight='half' is not a number"),
        ("sources.mqar.weight", None, "data.sources.mqar.weight is missing"),
        (
            "sources.mqar.kind",
            "mqra",
            "data.sources.mqar.kind='mqra' is unknown; did you mean 'mqar'?",
        ),
        ("sources.mqar.digits", 4, "data.sources.mqar.digits is unknown"),
        ("sources.mqar", 5, "data.sources.mqar.kind=5 is unknown"),
        ("sources.text.paths", ["gone"], "gone does not exist"),
        ("noise_ramp", [300, 150], r"data.noise_ramp=\[300, 150\] must be two steps"),
        ("noise_ramp", None, r"data.noise_ramp=\[\] must be two steps"),
        ("tokenizer", "no/such/tokenizer", "data.tokenizer: 'no/such/tokenizer' is not 'byte'"),
    ],
)
def test_config_errors(config, key, value, message):
    cfg = OmegaConf.to_container(config("mixture"), resolve=True)
    *parents, last = key.split(".")
    section = cfg
    for parent in parents:
        section = section[parent]
    if value is None:
        del section[last]
    else:
        section[last] = value
    with pytest.raises(ValueError, match=message) as caught:
        build_data(cfg, seed=0, batch_size=32)
    assert "\n" not in str(caught.value)


def test_a_batch_takes_little_time(config):
    _, mixture = build_data(config("mixture"), seed=0, batch_size=32)
    times = []
    for step in range(20):
        start = perf_counter()
        mixture.batch(step)
        times.append(perf_counter() - start)
    assert min(times) < 5e-3


def test_a_schedule_longer_than_the_text_is_told(cache):
    (cache / "short.txt").write_text("a short text. " * 200)
    source = {"kind": "text", "weight": 1, "paths": str(cache / "short.txt")}
    data = {"tokenizer": "byte", "seq_len": 32, "cache_dir": str(cache), "sources": {"text": source}}
    _, mixture = build_data(data, seed=0, batch_size=4)
    rows = mixture.sources["text"].epoch_rows["train"]
    assert rows == 78 and not mixture.repeated(19)
    assert mixture.repeated(39) == {"text": "39 steps read 156 rows of its 78: each 2.0 times"}
