"""Text documents on disk: found, read one by one, and split into train, validation and test.

One document is one txt, md or py file, or one row of a jsonl or parquet file (its field "text").
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .cache import cache_path, write_text

_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class File(NamedTuple):
    """`name` is the path from the parent of what was asked for (a folder, a file, a glob's root), or from the
    standard library's root.
    """

    name: str
    path: Path
    num_bytes: int
    sha256: str


class Document(NamedTuple):
    """`file` counts in `Documents.files`; `row` is the line or row, from 1, or 0 for a whole file."""

    file: int
    row: int
    text: str


class Documents:
    """The documents under `paths`: files, folders (with all below) or globs; None or "stdlib" is the Python
    standard library's own sources, without its tests.

    Iterating streams the documents in a fixed order, the empty ones left out. A corpus of one document is cut
    into three of the same name: the first 90 %, the next 5 % and the last 5 % of its characters.
    Raises FileNotFoundError or ValueError, naming the path, the file or the line, for what cannot be read.
    """

    def __init__(self, paths: str | Sequence[str] | None, cache_dir: str | Path):
        self.is_stdlib = paths is None or paths == "stdlib"
        names = _find_stdlib() if self.is_stdlib else {}
        if not self.is_stdlib:
            # Where two specs overlap, a file counts once; sorted, so that their order does not matter.
            for spec in sorted([paths] if isinstance(paths, str) else paths):
                names |= _find(spec)
        if not names:
            raise ValueError("data paths is an empty list; name a file, a folder or a glob, or use null")
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise ValueError(f"data paths: two files are named {twice[0]}; give their common folder instead")
        self.cache = cache_path(cache_dir)
        hashes = hash_files(names, self.cache / "sha256.json")
        self.files = sorted(File(name, path, *hashes[path]) for path, name in names.items())

    @property
    def fingerprint(self) -> str:
        content = json.dumps([(file.name, file.sha256) for file in self.files])
        return hashlib.sha256(content.encode()).hexdigest()

    def name(self, document: Document) -> str:
        name = self.files[document.file].name
        return f"{name}:{document.row}" if document.row else name

    def __iter__(self) -> Iterator[Document]:
        documents = (
            Document(index, row, text)
            for index, file in enumerate(self.files)
            for row, text in _READERS[file.path.suffix](file.path)
            if text
        )
        head = list(islice(documents, 2))
        if not head:
            raise ValueError(f"data paths: {self.files[0].path} and all other files are empty; give some text")
        if len(head) == 1:
            text = head[0].text
            cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
            head = [head[0]._replace(text=text[a:b]) for a, b in pairwise(cuts)]
        return chain(head, documents)

    def training_texts(self) -> Iterator[str]:
        splits = assign_splits(self.name(document) for document in self)
        return (document.text for document, split in zip(self, splits, strict=True) if split == 0)


def assign_splits(names: Iterable[str]) -> np.ndarray:
    """uint8 [documents], places in SPLITS: in the order of the names' hashes, the last 5 % (rounded up) are
    test, the 5 % before them validation. Equal names keep their order, so a cut document's end is test.
    """
    hashes = (hashlib.sha256(os.fsencode(name)).digest() for name in names)
    keys = np.fromiter((int.from_bytes(digest[:8]) for digest in hashes), np.uint64)
    held_out = -(-len(keys) // 20)
    splits = np.zeros(len(keys), np.uint8)
    order = np.argsort(keys, kind="stable")[::-1]
    splits[order[held_out : 2 * held_out]] = 1
    splits[order[:held_out]] = 2
    return splits


def _find(spec: str) -> dict[Path, str]:
    path = Path(os.path.abspath(os.path.expanduser(spec)))
    if path.exists():
        root, matches = path, [path]
    elif glob.has_magic(spec):
        root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        if not matches:
            raise FileNotFoundError(f"data paths: nothing matches {path}; correct the glob")
    else:
        raise FileNotFoundError(f"data paths: {path} does not exist; give a file, a folder or a glob")
    files = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
    files = [file for file in files if file.suffix in _READERS]
    if not files:
        raise ValueError(f"data paths: {path} holds no text; supported are {', '.join(_READERS)}")
    return {file: file.relative_to(root.parent).as_posix() for file in files}


def _walk(folder: Path, left_out: Iterable[str] = ()) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        yield from (Path(parent, name) for name in files)


def _find_stdlib() -> dict[Path, str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in _walk(root, _NOT_STDLIB) if file.suffix == ".py")
    return {file: file.relative_to(root).as_posix() for file in files}


def hash_files(paths: Iterable[Path], known_file: Path) -> dict[Path, tuple[int, str]]:
    """Size and sha256 of each file; `known_file` remembers them by size and time of change, as git does."""
    known = json.loads(known_file.read_text()) if known_file.exists() else {}
    current = {}
    for path in paths:
        stat = path.stat()
        entry = known.get(str(path))
        if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            with path.open("rb") as file:
                entry = [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        current[str(path)] = entry
    if not current.items() <= known.items():
        write_text(known_file, json.dumps(known | current))
    return {Path(path): (size, sha256) for path, (size, _, sha256) in current.items()}


def _whole_file(path: Path) -> Iterator[tuple[int, str]]:
    yield 0, _decode(path.read_bytes(), path)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(_decode(line, path))["text"]
                # JSON may spell half of a surrogate pair, which no UTF-8 text holds.
                text.encode()
            except (json.JSONDecodeError, UnicodeEncodeError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {number}: no string "text"; correct or remove it') from None
            yield number, text


def _parquet_rows(path: Path) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = (batch["text"].to_pylist() for batch in file.iter_batches(columns=["text"]))
            for number, text in enumerate(chain.from_iterable(columns), start=1):
                if not isinstance(text, str):
                    raise ValueError(f"row {number} has no string")
                yield number, text
    except (ValueError, KeyError) as error:
        raise ValueError(f'{path}: not a parquet file with a column "text" of strings ({error})') from error


def _decode(data: bytes, path: Path) -> str:
    try:
        if b"\0" not in data:
            return data.decode()
    except UnicodeDecodeError:
        pass
    raise ValueError(f"{path} is not UTF-8 text; convert it or leave it out")


_READERS = {
    ".txt": _whole_file,
    ".md": _whole_file,
    ".py": _whole_file,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}
