"""Mutated data files: they give an error of one line that names the file, or content of the right form."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.data import Documents, Questions, byte_tokenizer, load_tokenizer

QUESTION = {"query": "a", "documents": ["b", "ü"], "positives": [1, 0], "answer": "d"}
JSONL = "\n".join(json.dumps({"id": i, "text": f"text {i} \u2028 ü"}, ensure_ascii=bool(i)) for i in range(3))
ASKED = "\n".join(json.dumps(QUESTION | {"query": f"{i}?"}, ensure_ascii=bool(i)) for i in range(4))
# Pieces of JSON, and bytes that are not JSON.
JUNK = b"""null -1 1e999 NaN [ ] { } " , : \\ \\ud800 "text": "positives":""".split()
DEEP = [b"9" * 4400, b"[" * 3000, b'{"a":' * 3000]
PIECES = st.sampled_from([*JUNK, *DEEP, b"", b"\n", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf"])
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), PIECES | st.binary(max_size=6)), min_size=1, max_size=2)


def edited(content, edits):
    for place, cut, new in edits:
        at = int(place * len(content))
        content = content[:at] + new + content[at + cut :]
    return content


def texts(folder, content):
    path = folder / "a.jsonl"
    path.write_bytes(content)
    documents = [*Documents(str(path), folder / "cache")]
    assert documents and b"\xed\xa0\x80" not in b"".join(d.text.encode() for d in documents)


def questions(folder, content):
    path = folder / "a.jsonl"
    path.write_bytes(content)
    for question in Questions(str(path), folder / "cache"):
        assert question.query and all(question.documents) and question.answer != ""
        assert all(0 <= i < len(question.documents) for i in question.positives) and question.positives


def tokenizer(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    assert max(load_tokenizer(str(folder)).get_vocab().values()) < 2**22


def fuzz(read, good, examples):
    seen = {"refused": 0, "read": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(EDITS)
    def check(edits):
        with tempfile.TemporaryDirectory() as folder:
            try:
                read(Path(folder), edited(good, edits))
                seen["read"] += 1
            except ValueError as error:
                message = str(error)
                assert folder in message and "\n" not in message and len(message) < 900, message
                seen["refused"] += 1

    check()
    return seen


GOOD = {
    texts: JSONL.encode(),
    questions: ASKED.encode(),
    tokenizer: byte_tokenizer().backend_tokenizer.to_str().encode(),
}


@pytest.mark.parametrize("read", GOOD)
def test_edited_files(read):
    assert fuzz(read, GOOD[read], 20)["refused"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("read", GOOD)
def test_edited_files_many(read):
    seen = fuzz(read, GOOD[read], 600)
    print(read.__name__, seen)
    assert seen["refused"] > 150
