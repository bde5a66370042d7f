import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from memlm.data.documents import Documents, assign_splits


def read(path, tmp_path):
    return [*Documents([str(path)], tmp_path / "cache")]


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("prepare", "paths", "error", "message"),
    [
        (write("a", b""), ["gone.txt"], ValueError, "gone.txt does not exist; give a file"),
        (write("a", b""), ["*.gone"], ValueError, r"nothing matches .*\*.gone"),
        (write("a.png", b"x"), ["."], ValueError, r"holds no text \(1 ending in .png\); supported are .txt, .md"),
        (write("a.png", b"x"), ["a.png"], ValueError, "a.png holds no text"),
        (write("a.txt", b""), ["."], ValueError, "a.txt and all other files are empty"),
        (write("a.txt", b"x\0y"), ["."], ValueError, "a.txt is not UTF-8 text; convert it"),
        (write("a.txt", b"\xff\xfe"), ["."], ValueError, "a.txt is not UTF-8 text"),
        (
            write("a.jsonl", b'{"text": "x"}\n{"txt": "y"}'),
            ["."],
            ValueError,
            'a.jsonl, line 2: no string "text"',
        ),
        (write("a.jsonl", b'{"text": 1}'), ["."], ValueError, "a.jsonl, line 1"),
        (write("a.jsonl", b'"text"'), ["."], ValueError, "a.jsonl, line 1"),
        (write("a.jsonl", b'\n{"text": "x"'), ["."], ValueError, "a.jsonl, line 2"),
        (write("a.jsonl", b'{"text": "\\ud800"}'), ["."], ValueError, "a.jsonl, line 1"),
        (write("a.jsonl", b"\xff"), ["."], ValueError, "a.jsonl, line 1"),
        (write("a.parquet", b"PAR1"), ["."], ValueError, "a.parquet: not a parquet file"),
        (write("a.txt", b"x"), [], ValueError, "paths is an empty list"),
    ],
)
def test_errors(tmp_path, monkeypatch, prepare, paths, error, message):
    folder = tmp_path / "corpus"
    folder.mkdir()
    prepare(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=message) as caught:
        [*Documents(paths, tmp_path / "cache")]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", [{"txt": ["a"]}, {"text": [1]}, {"text": ["a", None]}])
def test_parquet_without_text(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r'a\.parquet: not a parquet file with a column "text" of strings'):
        read(tmp_path / "a.parquet", tmp_path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="reading parquet needs pyarrow; pip install pyarrow"):
        read(tmp_path / "a.parquet", tmp_path)


@pytest.mark.parametrize("count", [2, 3, 21, 40, 41])
def test_split_sizes(count):
    sizes = np.bincount(assign_splits([str(i) for i in range(count)]), minlength=3)
    held_out = -(-count // 20)
    assert sizes.tolist() == [count - 2 * held_out, held_out, held_out]
