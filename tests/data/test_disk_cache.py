"""The cache of a corpus: it is complete or built again, whatever happens to it, and damage is detected."""

import json
import os
import shutil
import traceback

import numpy as np
import pytest

from memlm import files
from memlm.data import Documents, Questions, TextCorpus, TextSource, byte_tokenizer, disk_cache, load_tokenizer
from memlm.data.disk_cache import DiskCache, NotBuilt, only_built
from memlm.data.row import SPLITS
from memlm.data.tokenizer import fingerprint
from tests.faults import every_fault

QUESTION = {"documents": ["a document", "another"], "positives": [1], "answer": "an answer"}


def write_files(folder):
    """Texts, and questions, below a folder."""
    (folder / "books").mkdir()
    for i in range(24):
        (folder / "books" / f"{i}.txt").write_text(f"the cat {i} and the hat " * (i + 1))
    lines = (json.dumps({"query": f"question {i}?"} | QUESTION) for i in range(24))
    (folder / "asked.jsonl").write_text("\n".join(lines))
    # The files are old, so that their digests are kept.
    for path in [*(folder / "books").iterdir(), folder / "asked.jsonl"]:
        os.utime(path, (1e9, 1e9))


def corpus(folder):
    documents = Documents(str(folder / "books"), folder / "cache")
    read = TextCorpus(documents, byte_tokenizer())
    return read.folder, [(split, name, bytes(x)) for split in SPLITS for name, x in read.documents(split)]


def tokenizer(folder):
    found = load_tokenizer({"bpe": 262}, [Documents(str(folder / "books"), folder / "cache")])
    return next((folder / "cache" / "tokenizers").glob("?" * 32)), fingerprint(found)


def questions(folder):
    read = Questions(str(folder / "asked.jsonl"), folder / "cache")
    path = next((folder / "cache" / "questions").glob("?" * 32))
    return path, [[*read], read.sizes.tolist(), read.splits.tolist()]


KINDS = (corpus, tokenizer, questions)


def cut(quarters):
    return lambda path, _: os.truncate(path, path.stat().st_size * quarters // 4)


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


DAMAGE = {
    **{f"cut at {n}/4": cut(n) for n in range(4)},
    **{f"bit {n}": flip for n in range(3)},
    "foreign": lambda path, rng: path.write_bytes(rng.bytes(path.stat().st_size)),
    "json": lambda path, _: path.write_text("[" * 9000),
    "gone": lambda path, _: path.unlink(),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "a link": lambda path, _: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("read", KINDS)
def test_what_is_damaged_is_made_again(tmp_path, read):
    write_files(tmp_path)
    folder, right = read(tmp_path)
    rng = np.random.default_rng(0)
    for name in sorted(path.name for path in folder.iterdir()):
        for kind, damage in DAMAGE.items():
            damage(folder / name, rng)
            assert read(tmp_path) == (folder, right), (name, kind)
            files.check_seal(folder)
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    assert read(tmp_path) == (folder, right)


@pytest.mark.parametrize(
    "junk", ["", "{", "[]", "null", "[" * 9000, '{"%s": 3}', '{"%s": [1, 2, 3, 4]}', '{"%s": [null]}']
)
def test_digests_that_are_torn_are_taken_anew(tmp_path, junk):
    write_files(tmp_path)
    known = tmp_path / "cache" / "sha256.json"
    right = corpus(tmp_path)
    remembered = json.loads(known.read_text())
    assert len(remembered) >= 24
    known.write_text(junk.replace("%s", str(tmp_path / "books" / "1.txt")))
    assert corpus(tmp_path) == right
    assert json.loads(known.read_text()).items() >= remembered.items()


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path):
    """If it comes later than the clock's tick, or changes the time of the folder's entry."""
    path, cache = tmp_path / "a.txt", DiskCache(tmp_path / "cache")
    for age in (0, 10**9):
        digests = set()
        for text in ("one", "two"):
            path.write_text(text)
            now = path.stat().st_mtime_ns
            os.utime(path, ns=(now, now // 10**9 * 10**9 - age * 10**9))
            digests.add(cache.contents([path])[path].sha256)
        assert len(digests) == 2


def test_a_cache_that_cannot_be_written_to_can_be_read(tmp_path, monkeypatch):
    write_files(tmp_path)
    right = corpus(tmp_path)
    (tmp_path / "cache" / "sha256.json").unlink()

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "write", refuse)
    assert corpus(tmp_path) == right
    (tmp_path / "books" / "1.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"data\.cache_dir: .* cannot be made \(.*Read-only.*\); make room, or name"):
        corpus(tmp_path)


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_build_at_once(tmp_path, damaged):
    """Six processes at the same moment, which all find no folder or a damaged one."""
    write_files(tmp_path)
    if damaged:
        folder, right = corpus(tmp_path)
        (folder / "tokens.bin").write_bytes(b"half")
    reader, writer = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            try:
                assert len(corpus(tmp_path)[1]) == 24
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    os.close(writer)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    folder, content = corpus(tmp_path)
    files.check_seal(folder)
    assert not damaged or content == right
    assert not [*(tmp_path / "cache").glob("*.partial-*")]


def test_a_token_file_that_changes_while_it_is_read(tmp_path):
    write_files(tmp_path)
    documents = Documents(str(tmp_path / "books"), tmp_path / "cache")
    for change in (lambda path: os.truncate(path, 100), lambda path: path.write_bytes(bytes(path.stat().st_size))):
        source = TextSource(TextCorpus(documents, byte_tokenizer()), 16, seed=0)
        before = source.row(0, "train", 0).input_ids.tolist()
        path = source.corpus.folder / "tokens.bin"
        change(path)
        with pytest.raises(ValueError, match=r"tokens\.bin has changed since this run opened it"):
            source.row(0, "train", 0)
        # Another process builds it again; a process that has the old one open continues with that.
        source = TextSource(TextCorpus(documents, byte_tokenizer()), 16, seed=0)
        shutil.rmtree(source.corpus.folder)
        assert source.row(0, "train", 0).input_ids.tolist() == before


@pytest.mark.parametrize("change", [lambda path: os.utime(path), lambda path: os.truncate(path, 9), os.unlink])
def test_questions_that_change_while_they_are_read(tmp_path, change):
    write_files(tmp_path)
    read = Questions(str(tmp_path / "asked.jsonl"), tmp_path / "cache")
    assert read[20].query == "question 20?"
    change(tmp_path / "asked.jsonl")
    with pytest.raises((ValueError, OSError), match=r"asked\.jsonl") as caught:
        read[3]
    assert "\n" not in str(caught.value)


class Building:
    """A cache where one folder is damaged and two are missing."""

    def __init__(self, folder):
        write_files(folder)
        found = [read(folder) for read in KINDS]
        self.right = [content for _, content in found]
        (damaged, _), *others = found
        (damaged / "tokens.bin").write_bytes(b"half")
        for other, _ in others:
            shutil.rmtree(other)

    def save(self, folder):
        for read in KINDS:
            read(folder)

    def check(self, folder, done):
        made = [path for path in (folder / "cache").rglob("?" * 32) if (path / "digests.json").exists()]
        if done:
            assert len(made) == 3
            for path in made:
                files.check_seal(path)
        for read, right in zip(KINDS, self.right, strict=True):
            place, content = read(folder)
            files.check_seal(place)
            assert content == right


def test_within_only_built_nothing_is_built_and_little_is_read(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path / "cache")
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path in paths:
        path.write_text("1234")
    with only_built(), pytest.raises(NotBuilt):
        cache.folder([1], ["a"], lambda folder: (folder / "a").touch())
    assert not (tmp_path / "cache").exists()
    made = cache.folder([1], ["a"], lambda folder: (folder / "a").touch())
    with only_built():
        assert cache.folder([1], ["a"], None) == made
        with pytest.raises(NotBuilt):
            cache.folder([1], ["a"], None, has_more=lambda folder: False)
    assert made.exists()
    monkeypatch.setattr(disk_cache, "_READ", 10)
    assert len(cache.contents(paths)) == 3
    with only_built():
        assert len(cache.contents(paths[:2])) == 2
        with pytest.raises(NotBuilt, match=r"2\.txt and others were not read before"):
            cache.contents(paths)


def test_a_build_survives_faults(tmp_path):
    every_fault("tests.data.test_disk_cache:Building", tmp_path, at_most=8)


@pytest.mark.slow
def test_a_build_survives_every_fault(tmp_path):
    report = every_fault("tests.data.test_disk_cache:Building", tmp_path)
    print(report)
    assert report["tried"] == 5 * report["operations"] + 1
