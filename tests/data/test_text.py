import json
import os
import shutil
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from memlm.data import build_data, documents, text
from memlm.data.disk_cache import DiskCache
from memlm.data.row import SPLITS
from memlm.data.text import TextCorpus, TextSource
from memlm.data.tokenizer import byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture
def books(tmp_path):
    """60 documents of 0 to 118 bytes, two of them in a subfolder, one empty."""
    folder = tmp_path / "books"
    (folder / "more").mkdir(parents=True)
    for i in range(60):
        name = f"more/{i}.md" if i < 2 else f"{i}.txt"
        (folder / name).write_text((f"{i:02}" * i)[: 2 * i])
    (folder / "picture.png").write_bytes(b"\0")
    return folder


def build(paths, tmp_path, tokenizer=TOKENIZER):
    paths = [str(path) for path in paths] if isinstance(paths, list) else paths
    return TextCorpus(documents.Documents(paths, tmp_path / "cache"), tokenizer)


def contents(corpus, split):
    return {name: TOKENIZER.decode(tokens[:-1]) for name, tokens in corpus.documents(split)}


def everything(corpus):
    parts = [contents(corpus, split) for split in SPLITS]
    merged = {name: content for part in parts for name, content in part.items()}
    assert len(merged) == sum(map(len, parts)), "splits share a document"
    return merged


def test_documents_and_splits(books, tmp_path):
    corpus = build([books], tmp_path)
    got = everything(corpus)
    assert got == {
        f"books/{file.relative_to(books).as_posix()}": file.read_text()
        for file in books.rglob("*.*")
        if file.suffix in (".txt", ".md") and file.stat().st_size
    }
    assert [len(contents(corpus, split)) for split in SPLITS] == [53, 3, 3]
    assert all(tokens[-1] == EOS for split in SPLITS for _, tokens in corpus.documents(split))
    by_hash = sorted(got, key=lambda name: documents.hashlib.sha256(name.encode()).digest())
    assert set(by_hash[-3:]) == {*contents(corpus, "test")}
    assert set(by_hash[-6:-3]) == {*contents(corpus, "validation")}


def test_manifest(books, tmp_path):
    corpus = build([books], tmp_path)
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert corpus.manifest == manifest | {"left_out": [{"path": "books/picture.png", "reason": "ending in .png"}]}
    assert manifest["python"] is None and manifest["dtype"] == "uint16"
    assert manifest["tokenizer"]["vocab_size"] == 259
    files = {file["path"]: file for file in manifest["files"]}
    assert len(files) == 60 and files["books/more/0.md"]["splits"] == []
    data = (books / "30.txt").read_bytes()
    assert files["books/30.txt"]["sha256"] == documents.hashlib.sha256(data).hexdigest()
    assert files["books/30.txt"]["bytes"] == len(data) == 60
    for split in SPLITS:
        names = {name for name, file in files.items() if file["splits"] == [split]}
        assert names == {*contents(corpus, split)}
        total = sum(files[name]["bytes"] + 1 for name in names)
        assert manifest["splits"][split] == {"documents": len(names), "tokens": total}


def test_paths(books, tmp_path):
    whole = everything(build([books], tmp_path))
    glob = everything(build([books / "*.txt"], tmp_path))
    assert glob == {name: content for name, content in whole.items() if name.endswith("txt")}
    assert everything(build([books / "**" / "*"], tmp_path)) == whole
    overlap = everything(build([books, books / "30.txt", books / "3*.txt"], tmp_path))
    assert overlap.keys() ^ whole.keys() == {"30.txt", "books/30.txt"}
    assert everything(build([books / ".." / "books"], tmp_path)) == whole


def test_order_of_paths_does_not_matter(books, tmp_path):
    files = [books / "more", books / "10.txt", books / "11.txt", books / "12.txt"]
    assert build(files, tmp_path).folder == build(files[::-1], tmp_path).folder


def test_fingerprint_follows_content_and_tokenizer(books, tmp_path):
    first = build([books], tmp_path)
    moved = tmp_path / "elsewhere" / "books"
    shutil.copytree(books, moved)
    assert build([moved], tmp_path).folder == first.folder
    bpe = load_tokenizer({"bpe": 262}, [documents.Documents([str(books)], tmp_path / "cache")])
    assert build([books], tmp_path, bpe).folder != first.folder
    (books / "30.txt").write_text("changed")
    changed = build([books], tmp_path)
    assert changed.folder != first.folder and everything(changed)["books/30.txt"] == "changed"


def test_large_vocabularies_take_four_bytes(books, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<<{i}>>" for i in range(66_000)])
    corpus = build([books], tmp_path, tokenizer)
    assert corpus.manifest["dtype"] == "uint32"
    assert everything(corpus) == everything(build([books], tmp_path))


@pytest.mark.parametrize("content", ["0123456789" * 30, "grüße 世界 🧠 " * 40])
def test_single_document_is_cut_by_position(tmp_path, content):
    (tmp_path / "one.txt").write_text(content)
    corpus = build([tmp_path / "one.txt"], tmp_path)
    parts = [contents(corpus, split)["one.txt"] for split in SPLITS]
    assert "".join(parts) == content
    assert [len(part) / len(content) for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
    assert corpus.manifest["files"][0]["splits"] == ["test", "train", "validation"]


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_fill_every_split(tmp_path, form, count):
    """One or two documents are cut: no text is lost or in two splits, and every split has rows for a model."""
    texts = [f"{i}{'abcdefgh' * 200 * i}" for i in range(1, count + 1)]
    (tmp_path / "in").mkdir()
    if form == "jsonl":
        (tmp_path / "in" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        for i, written in enumerate(texts):
            (tmp_path / "in" / f"{i}.txt").write_text(written)
    cfg = {
        "tokenizer": {"bpe": 265},
        "seq_len": 8,
        "cache_dir": str(tmp_path / "cache"),
        "sources": {"text": {"kind": "text", "weight": 1, "paths": str(tmp_path / "in")}},
    }
    tokenizer, mixture = build_data(cfg, seed=0, batch_size=2)
    assert all(mixture.batch(3, split).labels.ne(-100).any() for split in SPLITS)
    parts = dict.fromkeys(range(count), "")
    for split in SPLITS:
        pieces = [tokenizer.decode(tokens[:-1]) for _, tokens in mixture.sources["text"].corpus.documents(split)]
        if count < 3:
            shares = [len(piece) / len(written) for piece, written in zip(pieces, texts, strict=True)]
            assert shares == pytest.approx([{"train": 0.9}.get(split, 0.05)] * count, abs=0.01)
            parts = {i: parts[i] + piece for i, piece in enumerate(pieces)}
        else:
            (parts[texts.index(pieces[0])],) = pieces
    assert [*parts.values()] == texts


def test_jsonl_and_parquet(tmp_path):
    rows = [f"row {i} ü \u2028 <eos> \x00" for i in range(30)]
    lines = "\n\n".join(json.dumps({"id": 1, "text": row}, ensure_ascii=i % 2) for i, row in enumerate(rows))
    (tmp_path / "a.jsonl").write_text(lines.replace("\x00", "\\u0000"))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1] * 30, "text": rows}), tmp_path / "b.parquet")
    corpus = build([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path)
    assert everything(corpus) == {f"a.jsonl:{2 * i + 1}": row for i, row in enumerate(rows)} | {
        f"b.parquet:{i + 1}": row for i, row in enumerate(rows)
    }
    assert corpus.manifest["files"][0]["splits"] == ["test", "train", "validation"]


def test_two_files_of_one_name(tmp_path):
    for parent in ("p", "q", "r"):
        (tmp_path / parent / "a").mkdir(parents=True)
        (tmp_path / parent / "a" / "x.txt").write_text(parent)
    with pytest.raises(ValueError, match=r"two files are named a/x\.txt"):
        build([tmp_path / "p" / "a", tmp_path / "q" / "a"], tmp_path)
    assert len(everything(build([tmp_path / "p", tmp_path / "q", tmp_path / "r"], tmp_path))) == 3


def test_tokenizer_without_end_of_text(books, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        build([books], tmp_path, tokenizer)


def test_cache_is_reused_without_reading(books, tmp_path, monkeypatch):
    first = build([books], tmp_path)
    content = everything(first)
    # With an old time: a file that has just changed is read again.
    for path in [*books.rglob("*.*"), *first.folder.iterdir()]:
        os.utime(path, (1e9, 1e9))
    build([books], tmp_path)
    monkeypatch.setattr(documents.hashlib, "file_digest", None)
    monkeypatch.setattr(text, "build_small", None)
    again = build([books], tmp_path)
    assert again.folder == first.folder and everything(again) == content


def test_killed_build_is_done_again(books, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # As after a kill: the folder is filled, but neither renamed nor removed.
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            build([books], tmp_path)
    (left,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "shards")
    (left / "tokens.bin").write_bytes(b"half")
    corpus = build([books], tmp_path)
    assert corpus.folder != left and len(everything(corpus)) == 59


def test_failed_build_leaves_nothing_and_the_slower_of_two_yields(books, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError

    def build_twice(folder, *args):
        monkeypatch.undo()
        build([books], tmp_path)
        return original(folder, *args)

    # As on file systems without locks.
    monkeypatch.setattr(DiskCache, "turn", lambda *_: nullcontext())
    original = text.build_small
    monkeypatch.setattr(text, "build_small", fail)
    with pytest.raises(RuntimeError):
        build([books], tmp_path)
    assert not [*(tmp_path / "cache").iterdir()]
    monkeypatch.setattr(text, "build_small", build_twice)
    corpus = build([books], tmp_path)
    assert len(everything(corpus)) == 59
    kept = {path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")}
    assert kept == {corpus.folder, corpus._store} and not [*corpus._store.iterdir()]


@pytest.mark.parametrize("seq_len", [2, 16, 63, 75])
def test_rows_are_the_documents_in_a_line(books, tmp_path, seq_len):
    """An epoch's rows hold every token of the split once, except the remainder; positions restart per document."""
    corpus = build([books], tmp_path)
    source = TextSource(corpus, seq_len, seed=5)
    size = corpus.manifest["splits"]["train"]["tokens"]
    num_rows = size // seq_len
    known = {tuple(tokens.tolist()) for _, tokens in corpus.documents("train")}
    orders = []
    for epoch in range(3):
        rows = [source.row(epoch * num_rows + i, "train", step=0) for i in range(num_rows)]
        _, _, order = source._draw_group("train", epoch, 0)
        assert (np.diff(order) < 0).any()
        line = np.concatenate([rows[i].input_ids for i in np.argsort(order)])
        positions = np.concatenate([rows[i].position_ids for i in np.argsort(order)])
        found = np.split(line, np.flatnonzero(line == EOS) + 1)
        assert {tuple(document.tolist()) for document in found[:-1]} <= known
        assert len(found) > len(known) - seq_len and len(line) > size - seq_len
        starts = np.append(0, np.flatnonzero(line == EOS) + 1)
        starts = np.union1d(starts[starts < len(line)], np.arange(0, len(line), seq_len))
        assert (np.flatnonzero(positions == 0) == starts).all()
        assert ((np.diff(positions) == 1) | (positions[1:] == 0)).all()
        orders.append(line.tobytes())
        for row in rows:
            assert all(array.shape == (seq_len,) and array.dtype == np.int64 for array in row)
            assert (row.labels == np.where(row.position_ids == 0, -100, row.input_ids)).all()
    assert len(set(orders)) == 3


def test_rows_are_pure(books, tmp_path):
    corpus = build([books], tmp_path)

    def key(source, index, split="train"):
        return source.row(index, split, step=0).input_ids.tobytes()

    def fresh(seed=1):
        return TextSource(corpus, 16, seed)

    forward = [key(fresh(), i) for i in range(0, 2000, 97)]
    one = fresh()
    assert [key(one, i) for i in reversed(range(0, 2000, 97))] == forward[::-1]
    assert forward != [key(fresh(2), i) for i in range(0, 2000, 97)]
    for split in ("validation", "test"):
        allowed = np.concatenate([tokens for _, tokens in corpus.documents(split)])
        row = fresh().row(0, split, step=0)
        assert np.isin(row.input_ids, allowed).all()
    with pytest.raises(ValueError, match="split 'dev' does not exist"):
        one.row(0, "dev", step=0)


def test_row_longer_than_a_split(books, tmp_path):
    corpus = build([books], tmp_path)
    tokens = corpus.manifest["splits"]["validation"]["tokens"]
    with pytest.raises(ValueError, match=f"validation split has {tokens} tokens, less than one row of seq_len=999"):
        TextSource(corpus, 999, seed=0)


def test_stdlib(tmp_path):
    start = perf_counter()
    corpus = build(None, tmp_path)
    assert perf_counter() - start < 15
    names = {file["path"] for file in corpus.manifest["files"]}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "idle_test", "site-packages"} & {*name.split("/")} for name in names)
    assert corpus.manifest["splits"]["train"]["tokens"] > 5e6
    assert corpus.manifest["python"].startswith(sysconfig.get_python_version())
    for name, tokens in corpus.documents("test"):
        assert bytes(tokens[:-1].tolist()) == (Path(sysconfig.get_path("stdlib")) / name).read_bytes()
    assert build("stdlib", tmp_path).folder == corpus.folder
