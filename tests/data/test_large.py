"""Corpora that stay in shards: what is held out, rows of groups of shards, and damage. Small limits make them here."""

import fcntl
import json
import os
import runpy
import sys

import numpy as np
import pytest

from memlm.data import documents, layout, reading, text
from memlm.data.documents import Documents
from memlm.data.encoding import Encoding, remove_remains
from memlm.data.row import SPLITS
from memlm.data.text import TextCorpus, TextSource
from memlm.data.tokenizer import byte_tokenizer
from tests.conftest import ROOT, composed

BYTES = byte_tokenizer()
EOS = BYTES.eos_token_id


@pytest.fixture
def books(tmp_path, monkeypatch):
    for module, name, value in [
        (documents, "PART", 9000),
        (documents, "LARGE", 1),
        (reading, "STRETCH", 2000),
        (reading, "_LONGEST", 8000),
        (layout, "_HELD_OUT", 3000),
        (text, "_TOGETHER", 3),
    ]:
        monkeypatch.setattr(module, name, value)
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"text {i}, line\n" * (4000 if i == 7 else 9 + i))
    rows = [json.dumps({"text": f"row {i} " * (700 if i == 5 else i)}) for i in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "zero.txt").touch()
    return folder


def corpus(folder, cache):
    return TextCorpus(Documents(str(folder), cache), BYTES, 1)


def test_a_text_is_in_one_split_and_there_once(books, tmp_path):
    found = corpus(books, tmp_path / "cache")
    assert found.manifest["format"] == 3 and len(found.token_files("train")) > 8
    held, seen = {}, {}
    for split in SPLITS:
        of_split = [*found.documents(split)]
        tokens = sum(len(ids) for _, ids in of_split)
        assert found.manifest["splits"][split] == {"documents": len(of_split), "tokens": tokens}
        assert np.diff(found.spans(split)).sum() == tokens == sum(size for _, size in found.token_files(split))
        held[split] = tokens
        for name, ids in of_split:
            seen.setdefault(name, []).append(bytes(ids[ids < 256].tolist()).decode())
            assert EOS not in ids[:-1]
    # At least as much as is asked for, and one document more at most.
    assert 3000 <= held["validation"] < 6000 and 3000 <= held["test"] < 6000 < held["train"]
    texts, source = {}, Documents(str(books), tmp_path / "cache")
    for document in source:
        name = source.name(document.file, document.row)
        texts[name] = texts.get(name, "") + document.text
    assert texts.keys() == seen.keys()
    assert all(parts == [texts[name]] for name, parts in seen.items() if len(parts) == 1)
    # Stretches of a long file may be in several splits.
    assert len(seen["books/07.txt"]) > 20 and sum(map(len, seen["books/07.txt"])) == len(texts["books/07.txt"])
    assert [entry["path"] for entry in found.manifest["files"] if entry.get("splits") == []] == ["books/zero.txt"]


@pytest.mark.parametrize("seq_len", [63, 500])
def test_rows_of_an_epoch_are_the_shards_in_random_order(books, tmp_path, seq_len):
    """Rows depend on their number alone; an epoch has every token of the split, and at most a row of a group twice."""
    found = corpus(books, tmp_path / "cache")
    source, fresh = TextSource(found, seq_len, seed=1), TextSource(corpus(books, tmp_path / "cache"), seq_len, seed=1)
    total = source.epoch_rows["train"]
    assert total == found.manifest["splits"]["train"]["tokens"] // seq_len
    orders = []
    for epoch in range(2):
        rows = [source.row(epoch * total + i, "train", 0) for i in range(total)]
        for i in reversed(range(0, total, 17)):
            assert (fresh.row(epoch * total + i, "train", 0).input_ids == rows[i].input_ids).all()
        groups, bounds = source._groups("train", epoch)
        assert len(groups) > 2 and bounds[-1] == total
        assert sorted(number for group in groups for number in group) == [n for n, _ in found.token_files("train")]
        orders.append(groups)
        for group, (numbers, first) in enumerate(zip(groups, bounds, strict=False)):
            order = np.argsort(source._group("train", epoch, group)[2])
            line = np.concatenate([rows[first + i].input_ids for i in order])
            spans = source._group("train", epoch, group)[0]
            whole = np.concatenate([found.tokens(*span) for span in spans])
            assert np.diff(found.spans("train", numbers)).sum() == len(whole)
            assert len(line) - seq_len < len(whole) < len(line) + seq_len
            assert (line == np.resize(whole, len(line))).all()
    assert orders[0] != orders[1]
    assert [source.row(3, split, 0).input_ids.shape for split in SPLITS[1:]] == [(seq_len,)] * 2


def test_a_damaged_shard_is_encoded_again_and_no_other(books, tmp_path, monkeypatch):
    before = corpus(books, tmp_path / "cache")
    rows = [TextSource(before, 64, 0).row(i, "train", 0).input_ids.tolist() for i in range(99)]
    shards = sorted((tmp_path / "cache" / "shards").glob("*.bin"))
    made, write = [], Encoding._write
    monkeypatch.setattr(Encoding, "_write", lambda self, name, *rest: (made.append(name), write(self, name, *rest))[1])
    shards[3].write_bytes(b"cut")
    shards[5].unlink()
    after = corpus(books, tmp_path / "cache")
    assert sorted(made) == [shards[3].stem, shards[5].stem]
    assert [TextSource(after, 64, 0).row(i, "train", 0).input_ids.tolist() for i in range(99)] == rows
    # One more file costs the part that it is in.
    (books / "zzz.txt").write_text("one more\n" * 2000)
    made.clear()
    corpus(books, tmp_path / "cache")
    assert 1 <= len(made) <= 4
    # A shard that changes under a run.
    source = TextSource(after, 64, 0)
    source.row(0, "train", 0)
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:2])
    with pytest.raises(ValueError, match=r"\.bin has changed since this run opened it"):
        source.row(0, "train", 0)
    with pytest.raises(ValueError, match=r"\.bin (cannot be read|has changed)"):
        [source.row(i, "train", 0) for i in range(source.epoch_rows["train"])]


def test_a_small_corpus_of_the_same_files_takes_no_shard_away(books, tmp_path, monkeypatch):
    found = corpus(books, tmp_path / "cache")
    monkeypatch.setattr(documents, "LARGE", 10**9)
    assert corpus(books, tmp_path / "cache").manifest["format"] == 2
    source = TextSource(found, 64, 0)
    assert all(of.shard.is_whole(found._store) for of in layout.large_shards(found.folder))
    assert len([source.row(i, "train", 0) for i in range(source.epoch_rows["train"])])


def test_remains_of_killed_processes_are_removed(books, tmp_path, monkeypatch):
    """Files that a process still writes stay, whatever their age."""
    store = tmp_path / "cache" / "shards"
    store.mkdir(parents=True)
    dead, new, held = (store / f"{name}.bin.partial-0" for name in ("dead", "new", "held"))
    for path in (dead, new, held):
        path.write_bytes(b"half")
    for path in (dead, held):
        os.utime(path, (1e9, 1e9))
    seen, write = [], Encoding._write

    def writes(self, name, part, documents, advance, most):
        assert not dead.exists()

        def advanced(*args):
            (mine,) = self.folder.glob(f"{name}.bin.partial-*")
            os.utime(mine, (1e9, 1e9))
            remove_remains(self.folder)
            seen.append(mine.exists())
            advance(*args)

        return write(self, name, part, documents, advanced, most)

    monkeypatch.setattr(Encoding, "_write", writes)
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        corpus(books, tmp_path / "cache")
    assert [path.exists() for path in (dead, new, held)] == [False, True, True] and seen and all(seen)


def test_the_script_prepares_mends_and_reports(books, tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"))
    options = ("data=text", f"data.sources.text.paths={books}", f"data.cache_dir={tmp_path}/cache", "data.seq_len=32")
    script["prepare"](composed(*options), 1)
    found = corpus(books, tmp_path / "cache")
    tokens = found.manifest["splits"]["train"]["tokens"]
    told = " ".join(capsys.readouterr().out.split())
    assert f"data.sources.text: train {tokens:,} tokens in " in told and str(found.folder) in told
    shard = sorted((tmp_path / "cache" / "shards").glob("*.bin"))[2]
    right = shard.read_bytes()
    # Only its digest differs.
    shard.write_bytes(right[::-1])
    script["prepare"](composed(*options), 1)
    assert f"encoding 1 damaged shards again, the first {shard.name}" in " ".join(capsys.readouterr().out.split())
    assert shard.read_bytes() == right


def test_the_script_tells_of_data_without_text(tmp_path, capsys, monkeypatch):
    """It takes the settings of a run, a batch in tokens too."""
    script = runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"))
    settings = ["data=mqar", f"data.cache_dir={tmp_path}/cache", "train.batch_tokens=1024"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--workers", "1", *settings])
    script["main"]()
    assert capsys.readouterr().out == "data.sources: no text among mqar; nothing to encode\n"
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "data=mqar", "train.batch_tokns=1024"])
    with pytest.raises(SystemExit):
        script["main"]()
    assert "did you mean 'train.batch_tokens'" in capsys.readouterr().err


def test_a_large_corpus_without_text(books, tmp_path):
    for path in books.iterdir():
        path.write_text("")
    (books / "00.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"books/00\.jsonl and all other files are empty"):
        corpus(books, tmp_path / "cache")


def test_a_tokenizer_is_trained_on_a_part_of_a_large_corpus(books, tmp_path, monkeypatch):
    source = Documents(str(books), tmp_path / "cache")
    held = [ids[ids < 256] for split in SPLITS[1:] for _, ids in corpus(books, tmp_path / "cache").documents(split)]
    monkeypatch.setattr(documents, "LARGE", 10**6)
    texts = [*source.training_texts()]
    # Stretches of one file are alike here.
    among = [text for ids in held if (text := bytes(ids.tolist()).decode()) in texts and "text 7," not in text]
    assert not among and len(texts) > 200
    monkeypatch.setattr(documents, "LARGE", 40_000)
    assert 20_000 < sum(map(len, source.training_texts())) < 45_000
