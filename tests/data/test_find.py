"""The files that a folder or a glob selects, and the content that is read from them."""

import gzip
import json
import lzma
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from memlm.data import Questions
from memlm.data.documents import Documents
from memlm.data.find import find

ENDINGS = (".txt", ".jsonl", ".txt.gz")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """near: own.txt, B.TXT, a link to ../far with three files, hidden ones, and a picture."""
    for name in ("far/0.txt", "far/1.txt", "far/below/2.txt", "near/own.txt", "near/B.TXT", "near/.git/no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (".ipynb_checkpoints/own-checkpoint.txt", ".hidden.txt", "picture.png", "README"):
        (tmp_path / "near" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "near" / name).write_text(name)
    (tmp_path / "near" / "linked").symlink_to(tmp_path / "far")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "near"


def names(paths, endings=ENDINGS):
    return [*find(paths, endings).files.values()]


FAR = ["near/linked/0.txt", "near/linked/1.txt", "near/linked/below/2.txt"]


def test_a_folder_and_a_glob_have_one_rule(corpus):
    whole = ["near/B.TXT", *FAR, "near/own.txt"]
    assert names("near") == names(str(corpus)) == names("near/**") == names("near/*") == names("near/**/*") == whole
    assert names(["near"]) == names(("near", "near/own.txt")[:1]) == whole
    assert names("near/**/*.txt") == [*FAR, "near/own.txt"]
    assert names("near/*.TXT") == ["near/B.TXT"] and names("near/*/below") == [FAR[2]]
    assert names("*/**/2.txt") == [f"{corpus.parent.name}/far/below/2.txt"]
    # As in a shell, a name that begins with a dot is selected only if it is given.
    assert names("near/.*") == ["near/.git/no.txt", "near/.hidden.txt", "near/.ipynb_checkpoints/own-checkpoint.txt"]
    assert names("near/.git") == [".git/no.txt"] and names("near/.hidden.txt") == [".hidden.txt"]


def test_files_that_are_left_out_are_told(corpus):
    reasons = {
        "near/.git": "hidden",
        "near/.hidden.txt": "hidden",
        "near/.ipynb_checkpoints": "hidden",
        "near/README": "without an ending",
        "near/picture.png": "ending in .png",
    }
    assert find("near", ENDINGS).left_out == find("near/**", ENDINGS).left_out == reasons
    assert find("near/*.txt", ENDINGS).left_out == {"near/.hidden.txt": "hidden"}
    assert "near/.hidden.txt" not in find(["near", "near/.hidden.txt"], ENDINGS).left_out


@pytest.mark.parametrize("spec", ["near", "near/**", "near/**/*.txt", "near/**/**/*"])
def test_links_in_circles(corpus, spec):
    before = names(spec)
    for name, target in (
        ("up", ".."),
        ("self", "self"),
        ("here", "."),
        ("linked/back", "../near"),
        ("own", "own.txt"),
    ):
        (corpus / name).symlink_to(target)
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "again.txt").symlink_to("own.txt")
    assert names(spec) == before
    assert find("near", ENDINGS).left_out["near/gone.txt"] == "a link to nothing"


def test_a_name_without_a_link_comes_first(corpus):
    (corpus / "a").symlink_to("z")
    (corpus / "z").mkdir()
    (corpus / "z" / "1.txt").write_text("1")
    (corpus / "0.txt").symlink_to("own.txt")
    assert {"near/z/1.txt", "near/own.txt"} <= {*names("near")}
    assert not {"near/a/1.txt", "near/0.txt"} & {*names("near")}


def test_what_is_no_file_is_never_opened(corpus):
    os.mkfifo(corpus / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("near/socket.txt")
        (corpus / "zero.txt").symlink_to("/dev/zero")
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for a pipe"))
        signal.alarm(20)
        try:
            documents = Documents("near", corpus.parent / "cache")
            assert len([*documents]) == 5
            odd = [name for name, reason in documents.left_out.items() if reason == "not a file"]
            assert odd == ["near/pipe.txt", "near/socket.txt", "near/zero.txt"]
            with pytest.raises(ValueError, match=r"pipe\.txt holds no text \(1 not a file\)"):
                Documents("near/pipe.txt", corpus.parent / "cache")
        finally:
            signal.alarm(0)


@pytest.mark.parametrize("paths", ["", " ", 5, [None], ["near", ""], {"a": "near"}, [["near"]], b"near"])
def test_paths_that_name_nothing(corpus, paths):
    with pytest.raises(ValueError, match="must name a file, a folder or a glob") as caught:
        Documents(paths, "cache")
    assert "\n" not in str(caught.value)


def test_a_folder_that_may_not_be_read(corpus, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=r"below cannot be read \(Permission denied\); change its permissions"
    ) as error:
        find("near", ENDINGS)
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read(corpus, monkeypatch):
    opened = Path.open

    def refuse(self, mode="r", *args, **options):
        if self.suffix != ".TXT":
            return opened(self, mode, *args, **options)
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"B\.TXT cannot be read \(Permission denied\)"):
        Documents("near", "cache")


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}
TEXTS = ["one ünï", "two", "three\nlines\n"]


def pack(folder, end):
    jsonl = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    (folder / f"a.JSONL{end}").write_bytes(PACK[end](jsonl))
    # Two packed parts one behind the other, as parallel packers write them.
    (folder / f"b.txt{end.upper()}").write_bytes(PACK[end](b"\xef\xbb\xbffour ") + PACK[end](b"times" * 50_000))


@pytest.mark.parametrize("end", PACK)
def test_packed_files(tmp_path, end):
    (tmp_path / "in").mkdir()
    pack(tmp_path / "in", end)
    documents = Documents(str(tmp_path / "in"), tmp_path / "cache")
    assert [d.text for d in documents] == [*TEXTS, "four " + "times" * 50_000]
    assert [documents.name(d.file, d.row) for d in documents][::3] == [f"in/a.JSONL{end}:1", f"in/b.txt{end.upper()}"]


@pytest.mark.parametrize("end", [end for end in PACK if end])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * 99, lambda data: data[3:]]
)
def test_packed_files_that_are_damaged(tmp_path, end, damage):
    (tmp_path / f"a.txt{end}").write_bytes(damage(PACK[end](np.random.default_rng(0).bytes(1000).hex().encode())))
    with pytest.raises(ValueError, match=rf"a\.txt{end} cannot be read \(.*\); repair it, or leave it out") as caught:
        [*Documents(str(tmp_path / f"a.txt{end}"), tmp_path / "cache")]
    assert "\n" not in str(caught.value)


def test_zst_without_pyarrow(tmp_path, monkeypatch):
    pack(tmp_path, ".zst")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="reading zst needs pyarrow; pip install pyarrow"):
        [*Documents(str(tmp_path), tmp_path / "cache")]


def test_a_mark_of_utf_8_is_no_text(tmp_path):
    mark, lines = b"\xef\xbb\xbf", [json.dumps({"text": text}).encode() for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(mark + b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(mark + b"hello")
    (tmp_path / "c.txt").write_bytes(b"in the middle" + mark)
    texts = [document.text for document in Documents(str(tmp_path), tmp_path / "cache")]
    assert texts == [*TEXTS, "hello", "in the middle\ufeff"]


def test_a_file_that_changes_while_it_is_read(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("before")
    documents = Documents(str(tmp_path), tmp_path / "cache")
    (tmp_path / "1.txt").write_text("behind it")
    with pytest.raises(ValueError, match=r"1\.txt has changed since this run opened it; put it back, or start again"):
        list(documents)


def test_questions_are_found_by_the_same_rule(tmp_path):
    (tmp_path / "q" / "more").mkdir(parents=True)
    for i, name in enumerate(("b.jsonl", "more/a.JSONL", ".hidden.jsonl", "notes.txt")):
        question = {"query": str(i), "documents": ["d"], "positives": [0], "answer": "a"}
        (tmp_path / "q" / name).write_text(json.dumps(question))
    for paths in (tmp_path / "q", tmp_path / "q" / "**"):
        questions = Questions(str(paths), tmp_path / "cache")
        assert [q.query for q in questions] == ["0", "1"]
        assert [file["path"] for file in questions.manifest["left_out"]] == ["q/.hidden.jsonl", "q/notes.txt"]
