"""Corpora encoded in parts: by any number of processes, after a stop, in memory that does not grow with files."""

import gzip
import io
import json
import os
import random
import sys
import time
import tracemalloc

import pytest
from rich.console import Console

from memlm.data import Preparation, build_data, documents, reading
from memlm.data.documents import Documents
from memlm.data.encoding import Encoding
from memlm.data.row import SPLITS
from memlm.data.text import TextCorpus
from memlm.data.tokenizer import byte_tokenizer, load_tokenizer
from memlm.training.display import Display
from memlm.training.preparing import Preparing
from tests.processes import Python, command

BYTES = byte_tokenizer()


def text(size, seed=0):
    rng = random.Random(seed)
    return "".join(rng.choice(["the ", "cat, ", "sat\n", "ü 世界。\n", "on\n\n", "mat \n "]) for _ in range(size // 4))


@pytest.fixture
def books(tmp_path):
    """Files of every form, of up to 60 KB."""
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(text(60_000 if i == 2 else 300, i))
    rows = [json.dumps({"text": text(random.Random(i).choice([0, 40, 900, 9000]), i)}) for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n\n".join(rows[::-1]).encode()))
    return folder


def corpus(folder, cache, tokenizer=BYTES, workers=1, **options):
    return TextCorpus(Documents(str(folder), cache), tokenizer, workers, **options)


def content(corpus):
    return {name: (corpus.folder / name).read_bytes() for name in ("tokens.bin", "documents.npy", "manifest.json")}


def test_cuts_change_no_token(books, tmp_path, monkeypatch):
    """A text's stretches and a file's parts have the tokens of the whole."""
    tokenizer = load_tokenizer({"bpe": 280}, [Documents(str(books), tmp_path / "cache")])
    whole = [content(corpus(books, tmp_path / "whole", of)) for of in (BYTES, tokenizer)]
    monkeypatch.setattr(reading, "STRETCH", 2000)
    monkeypatch.setattr(reading, "_LONGEST", 8000)
    monkeypatch.setattr(documents, "PART", 9000)
    assert len(Documents(str(books), tmp_path / "cut").parts) > 10
    assert [content(corpus(books, tmp_path / "cut", of)) for of in (BYTES, tokenizer)] == whole
    assert not [*(tmp_path / "cut" / "shards").iterdir()]


def test_a_text_without_lines_is_cut_too(monkeypatch):
    monkeypatch.setattr(reading, "STRETCH", 10)
    monkeypatch.setattr(reading, "_LONGEST", 40)
    long = "ü" * 95 + "a\nb" + "x" * 9
    for size in (1, 7, 1000):
        chunks = [long[i : i + size] for i in range(0, len(long), size)]
        assert [*reading.stretches(chunks)] == [("ü" * 40, False)] * 2 + [
            ("ü" * 15 + "a\n", False),
            ("b" + "x" * 9, True),
        ]


@pytest.mark.parametrize("form", ["txt", "txt.gz", "jsonl"])
@pytest.mark.parametrize("large", [False, True])
def test_the_only_document_is_cut_at_the_same_characters(tmp_path, monkeypatch, form, large):
    whole = text(50_000) if large else "aü世"
    data = (json.dumps({"text": whole}) if form == "jsonl" else whole).encode()
    (tmp_path / f"one.{form}").write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    monkeypatch.setattr(reading, "STRETCH", 900)
    monkeypatch.setattr(documents, "PART", 7000)
    found = corpus(tmp_path / f"one.{form}", tmp_path / "cache")
    pieces = [bytes(ids[:-1].tolist()).decode() for split in SPLITS for _, ids in found.documents(split)]
    cuts = [len(whole) * 90 // 100, len(whole) * 95 // 100]
    assert pieces == [whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] :]]


def test_memory_does_not_grow_with_a_file(tmp_path):
    """It is a constant of some MB, here less than the file, whose text alone was held twice before."""
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(30):
            file.write("a line of text\n" * (2**20 // 15))
    (tmp_path / "b.jsonl").write_text('{"text": "another"}\n' * 9)
    tracemalloc.start()
    try:
        corpus(tmp_path, tmp_path / "cache")
        assert tracemalloc.get_traced_memory()[1] < 15 * 2**20
    finally:
        # It would slow down every later test of the process.
        tracemalloc.stop()


def killed(folder, cache, after):
    """Encode in a process of its own, and kill it once `after` shards are there."""
    code = (
        "import sys\n"
        "from memlm.data import Preparation, build_data, documents, encoding, text, byte_tokenizer\n"
        "documents.PART = 9000\n"
        "text.TextCorpus(documents.Documents(sys.argv[1], sys.argv[2]), byte_tokenizer(), 2)\n"
    )
    process = Python("-c", code, folder, cache)
    process.until(lambda: len([*(cache / "shards").rglob("*.json")]) >= after)
    process.kill()
    process.wait()


def test_workers_and_stops_change_nothing(books, tmp_path, monkeypatch):
    """Two processes, one killed after some shards, and one that goes on, make the files that one process makes; the
    workers end with their parent; what was finished is not encoded again.
    """
    monkeypatch.setattr(documents, "PART", 9000)
    alone = content(corpus(books, tmp_path / "alone"))
    cache = tmp_path / "cache"
    killed(books, cache, 5)
    before = {path: path.stat().st_mtime_ns for path in (cache / "shards").rglob("*.json")}
    assert len(before) >= 5
    damaged = min(before)
    damaged.with_suffix(".bin").write_bytes(b"?")
    made, shares = [], []
    write = Encoding._write
    monkeypatch.setattr(Encoding, "_write", lambda self, name, *rest: (made.append(name), write(self, name, *rest))[1])
    assert content(corpus(books, cache, report=lambda done, total: shares.append(done / total))) == alone
    assert not {path.stem for path in before} - {damaged.stem} & {*made} and damaged.stem in made
    assert shares == sorted(shares) and shares[-1] == 1
    (books / "broken.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with (
        command(tmp_path) as python,
        pytest.raises(ValueError, match=r'broken\.jsonl, line 2: no string "text" in JSON and UTF-8'),
    ):
        monkeypatch.setattr(sys, "executable", str(python))
        corpus(books, cache, workers=2)


def test_one_of_several_processes_encodes_and_the_others_wait(books, tmp_path, monkeypatch):
    """They wait for a file's lock, which has no time limit, and not in a collective, which has one. Their other
    settings may differ.
    """
    run = Encoding.run

    def slow(self, *rest):
        (tmp_path / f"encodes-{os.getpid()}").touch()
        time.sleep(0.5)
        return run(self, *rest)

    class Told(Preparation):
        def say(self, line):
            assert line == f"{tmp_path}/cache: another process prepares the same data; waiting for it"
            (tmp_path / f"waits-{os.getpid()}").touch()

    monkeypatch.setattr(Encoding, "run", slow)
    source = {"kind": "text", "paths": str(books)}
    data = {"tokenizer": "byte", "seq_len": 32, "cache_dir": str(tmp_path / "cache"), "sources": {"text": source}}
    children = []
    for weight in (1, 1, 2):
        source["weight"] = weight
        if (child := os.fork()) == 0:
            try:
                build_data(data, seed=0, batch_size=2, preparation=Told())
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert len([*tmp_path.glob("encodes-*")]) == 1 and len([*tmp_path.glob("waits-*")]) == 2


@pytest.mark.parametrize("live", [False, True])
def test_a_long_preparation_shows_how_much_is_left(monkeypatch, live):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("memlm.training.preparing.time.perf_counter", lambda: next(clock))
    display = Display(1, shown=True)
    screen = io.StringIO()
    display.console, display.live = Console(file=screen, force_terminal=live, width=100), live
    preparing = Preparing(display)
    for done in (0, 25, 50, 75, 100):
        preparing.advance("web", done, 100)
    told = screen.getvalue()
    if live:
        assert "encoding data.sources.web" in told and "75 %" in told
    else:
        assert told.splitlines() == [
            "encoding data.sources.web: 25%  left 60s",
            "encoding data.sources.web: 75%  left 20s",
        ]
