"""Data sets of the hub, here folders of JSONL files, which `datasets` streams in the same way."""

import json
import sys

import pytest

from memlm.data import Preparation, build_data, layout
from memlm.data.encoding import Encoding
from memlm.data.row import SPLITS
from memlm.training import run
from tests.conftest import composed


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(layout, "_HELD_OUT", 500)


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for i in range(3):
        lines = [json.dumps({"content": f"file {i}, row {j}: " + "x" * (j % 50), "id": j}) for j in range(100)]
        (folder / f"part-{i}.jsonl").write_text("\n".join(lines))
    return folder


def config(folder, tmp_path, **options):
    source = {"kind": "hub", "weight": 1, "dataset": str(folder), "column": "content"} | options
    return {"tokenizer": "byte", "seq_len": 16, "cache_dir": str(tmp_path / "cache"), "sources": {"web": source}}


class Alone(Preparation):
    workers = 1


def texts(cfg):
    tokenizer, mixture = build_data(cfg, seed=0, batch_size=2, preparation=Alone())
    corpus = mixture.sources["web"].corpus
    found = [(split, name, tokenizer.decode(ids[:-1])) for split in SPLITS for name, ids in corpus.documents(split)]
    return found, corpus, mixture.batch(3).input_ids.tolist()


def test_the_rows_of_a_data_set_are_its_documents(rows, tmp_path, monkeypatch):
    found, corpus, batch = texts(config(rows, tmp_path))
    expected = [
        json.loads(line)["content"] for path in sorted(rows.iterdir()) for line in path.read_text().split("\n")
    ]
    assert sorted(text for _, _, text in found) == sorted(expected)
    assert {split for split, *_ in found} == {*SPLITS} and len({name for _, name, _ in found}) == 300
    assert corpus.manifest["format"] == 3 and [e["path"].rpartition(":")[2] for e in corpus.manifest["files"]] == [
        *"012"
    ]
    # Another start reads nothing, and the same data set elsewhere is encoded to the same.
    monkeypatch.setattr(Encoding, "run", None)
    assert texts(config(rows, tmp_path))[2] == batch
    (rows / "part-0.jsonl").write_text("{}")
    with pytest.raises(TypeError):
        texts(config(rows, tmp_path))


def test_a_limit_is_shared_out_among_the_parts(rows, tmp_path):
    found, corpus, _ = texts(config(rows, tmp_path, tokens=3000))
    total = sum(of["tokens"] for of in corpus.manifest["splits"].values())
    assert 3000 <= total < 3000 + 3 * 70
    for i in range(3):
        of_file = [text for _, _, text in found if text.startswith(f"file {i},")]
        assert 1000 <= sum(len(text) + 1 for text in of_file) < 1070


def test_a_limited_part_shows_how_far_it_is(rows, tmp_path):
    """In tokens, because a part may take hours."""
    shares = []

    class Told(Alone):
        def advance(self, name, done, total):
            shares.append(done / total)

    build_data(config(rows, tmp_path, tokens=3000), seed=0, batch_size=2, preparation=Told())
    assert shares == sorted(shares) and shares[-1] == 1
    assert max(b - a for a, b in zip([0.0, *shares], shares, strict=False)) < 0.05


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"dataset": "no/network"},
            r"data\.sources\.web: dataset='no/network' cannot be read \(.*offline.*check name",
        ),
        ({"column": "text"}, r"data\.sources\.web: dataset='.*rows' cannot be read \(.*text"),
        ({"column": "id"}, "column 'id' of row 1 holds no text"),
        ({"split": "tests"}, r"data\.sources\.web: dataset='.*rows' cannot be read \(.*tests"),
        ({"dataset": ""}, r"data\.sources\.web\.dataset='' names no data set"),
        ({"tokens": -1}, r"data\.sources\.web\.tokens=-1 must lie"),
        ({"tokens": "all"}, r"data\.sources\.web\.tokens='all' must be float or null"),
        ({"columns": "text"}, r"data\.sources\.web\.columns is unknown; did you mean 'column'"),
    ],
)
def test_mistakes_are_one_line(rows, tmp_path, options, told):
    with pytest.raises(ValueError, match=told) as caught:
        texts(config(rows, tmp_path, **options))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_tokenizer_is_trained_on_it(rows, tmp_path):
    found, corpus, _ = texts(config(rows, tmp_path) | {"tokenizer": {"bpe": 275}})
    assert len(found) == 300 and corpus.manifest["tokenizer"]["vocab_size"] == 275
    assert max(len(ids) for _, ids in corpus.documents("train")) < 40


def test_a_run_on_it_goes_on(rows, tmp_path, capsys):
    for path in rows.iterdir():
        path.write_text(path.read_text().replace("content", "text"))
    (rows / "part-0.jsonl").write_text("\n".join(path.read_text() for path in sorted(rows.iterdir())))
    [(rows / f"part-{i}.jsonl").unlink() for i in (1, 2)]
    folders = (f"run_dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache", "data.sources.hub.config=null")
    sizes = ("data.seq_len=16", "model.hidden_size=32", "train.batch_size=2")
    options = ("data=hub", f"data.sources.hub.dataset={rows}", *folders, *sizes)
    for steps in (1, 2):
        run(composed(*options, f"train.steps={steps}", "optim.schedule_steps=2"))
        told = " ".join(capsys.readouterr().out.split())
        assert "bits/byte" in told and ("continuing from step 1" in told) == (steps == 2)


def test_without_the_package(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data\.sources\.web: .*streaming needs datasets; pip install datasets"):
        texts(config(rows, tmp_path))
