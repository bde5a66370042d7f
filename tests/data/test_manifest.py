"""The files that a run was trained on, and whether they are still the same."""

import json

import pytest

from memlm.data import Questions, check_manifest, left_out
from memlm.data.documents import Documents
from memlm.data.text import TextCorpus
from memlm.data.tokenizer import byte_tokenizer, load_tokenizer
from memlm.training import run
from tests.conftest import composed


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books").mkdir()
    for i in range(40):
        (tmp_path / "books" / f"{i:02}.txt").write_text(f"document {i} " * 30)
    return tmp_path / "books"


def manifest(folder, tokenizer=None):
    documents = Documents(str(folder), folder.parent / "cache")
    # In the form that is read from a run's folder.
    return json.loads(json.dumps(TextCorpus(documents, tokenizer or byte_tokenizer()).manifest))


def remove(*numbers):
    return lambda folder: [(folder / f"{i:02}.txt").unlink() for i in numbers]


def put(*names):
    return lambda folder: [(folder / name).write_text("another text") for name in names]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("07.txt"), r"books/07\.txt changed; restore"),
        (put("x.txt"), r"books/x\.txt new;"),
        (remove(3), r"books/03\.txt missing;"),
        (remove(1, 2, 3, 4, 5), r"books/01\.txt, books/02\.txt, books/03\.txt and 2 more missing;"),
        (
            lambda f: (remove(1)(f), put("2.txt", "03.txt")(f)),
            r"books/03.txt changed; books/01.txt missing; books/2.txt",
        ),
    ],
)
def test_the_first_files_that_differ_are_named(books, change, told):
    before = manifest(books)
    check_manifest("text", before, manifest(books))
    change(books)
    message = f"data.sources.text: its files are not those of the run: {told}"
    with pytest.raises(ValueError, match=message) as caught:
        check_manifest("text", before, manifest(books))
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_told(books):
    other = load_tokenizer({"bpe": 270}, [Documents(str(books), books.parent / "cache")])
    with pytest.raises(ValueError, match=r"data\.sources\.text: tokenizer .* of the same files, but the run has"):
        check_manifest("text", manifest(books), manifest(books, other))


@pytest.mark.parametrize("damaged", [{}, {"files": None}, {"files": [3]}, {"files": [{"path": "a"}]}, {"files": []}])
def test_a_damaged_manifest_is_one_line(books, damaged):
    with pytest.raises(ValueError, match=r"data\.sources\.text: the run's manifest is damaged"):
        check_manifest("text", damaged, manifest(books))


def test_files_left_out_change_nothing(books):
    before = manifest(books)
    (books / "picture.png").touch()
    (books / ".git").mkdir()
    (books / ".hg").mkdir()
    now = manifest(books)
    check_manifest("text", before, now)
    assert left_out(before) == "" and left_out(now) == "1 ending in .png, 2 hidden"


def write(path, count):
    question = {"documents": ["a document"], "positives": [0], "answer": "a"}
    path.write_text("".join(json.dumps({"query": f"question {i}"} | question) + "\n" for i in range(count)))


def test_questions_have_a_manifest_too(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        write(file, 30)
    manifests = [Questions([*map(str, order)], tmp_path / "cache").manifest for order in (files, files[::-1])]
    with pytest.raises(ValueError, match="their order differs"):
        check_manifest("asked", *manifests)
    write(files[1], 31)
    with pytest.raises(ValueError, match=r"data\.sources\.asked: .*: b\.jsonl changed; restore"):
        check_manifest("asked", manifests[0], Questions([*map(str, files)], tmp_path / "cache").manifest)


@pytest.mark.parametrize("kind", ["text", "questions"])
def test_a_run_goes_on_with_its_own_files_only(tmp_path, books, kind, capsys):
    write(tmp_path / "asked.jsonl", 30)
    paths = {"text": books, "questions": tmp_path / "asked.jsonl"}[kind]
    (books / "picture.png").touch()

    (books / "empty.txt").touch()

    def train():
        options = (f"data={kind}", f"data.sources.{kind}.paths={paths}", "data.seq_len=32", "model.hidden_size=32")
        folders = (f"run_dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache")
        run(composed(*options, *folders, "train.batch_size=2", "train.steps=2"))

    train()
    if kind == "text":
        told = " ".join(capsys.readouterr().out.split())
        assert "data.sources.text: 41 files; not read: 1 empty, 1 ending in .png (manifest-text.json)" in told
        assert "times" not in told
    before = (tmp_path / "run" / f"manifest-{kind}.json").read_bytes()
    train()
    if kind == "text":
        put("07.txt")(books)
    else:
        write(paths, 31)
    with pytest.raises(ValueError, match=rf"data\.sources\.{kind}: its files are not those of the run: .* changed"):
        train()
    assert (tmp_path / "run" / f"manifest-{kind}.json").read_bytes() == before
