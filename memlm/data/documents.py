"""Text documents on disk: read one by one, and split into train, validation and test.

A document is one txt, md or py file, or one row of a jsonl or parquet file (its field "text"). Files other than
parquet may be compressed: a.txt.gz, .xz or .zst.
"""

import codecs
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .disk_cache import Content, DiskCache
from .find import PACKED, ending, find

_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class File(NamedTuple):
    """`name` is a path: relative to the parent of a given folder, file or glob root, or to the standard library's
    root.
    """

    name: str
    path: Path
    content: Content


class Document(NamedTuple):
    """`file` is an index into `Documents.files`; `row` is the line or row, from 1, or 0 for a whole file."""

    file: int
    row: int
    text: str


class Documents:
    """The documents under `paths`: files, folders (recursively) or globs, see `find`. None or "stdlib" means the
    Python standard library's own sources, without its tests. left_out: files that are not read, with reasons.

    Iteration yields documents in a fixed order, without empty ones. If there are fewer than three, each is cut into
    three of the same name: the first 90 %, the next 5 % and the last 5 % of its characters.
    Raises ValueError with the path, file or line that cannot be read.
    """

    def __init__(self, paths: str | Sequence[str] | None, cache_dir: str | Path):
        self.is_stdlib = paths is None or paths == "stdlib"
        if self.is_stdlib:
            names, self.left_out = _find_stdlib(), dict[str, str]()
        else:
            names, self.left_out = find(paths, _ENDINGS)
        if not names:
            raise ValueError("paths is an empty list; name a file, a folder or a glob, or use null")
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise ValueError(f"paths: two files are named {twice[0]}; give their common folder instead")
        self.cache = DiskCache(cache_dir)
        contents = self.cache.contents(names)
        # Sorted, so that the order of paths does not matter.
        self.files = sorted(File(name, path, contents[path]) for path, name in names.items())

    @property
    def fingerprint(self) -> str:
        content = json.dumps([(file.name, file.content.sha256) for file in self.files])
        return hashlib.sha256(content.encode()).hexdigest()

    def name(self, document: Document) -> str:
        name = self.files[document.file].name
        return f"{name}:{document.row}" if document.row else name

    def __iter__(self) -> Iterator[Document]:
        documents = (
            Document(index, row, text) for index, file in enumerate(self.files) for row, text in _read(file) if text
        )
        head = list(islice(documents, 3))
        if not head:
            raise ValueError(f"paths: {self.files[0].path} and all other files are empty; give some text")
        if len(head) < 3:
            head = [piece for document in head for piece in _cut(document)]
        return chain(head, documents)

    def training_texts(self) -> Iterator[str]:
        splits = assign_splits(self.name(document) for document in self)
        return (document.text for document, split in zip(self, splits, strict=True) if split == 0)


def _cut(document: Document) -> list[Document]:
    text = document.text
    cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    return [document._replace(text=text[a:b]) for a, b in pairwise(cuts)]


def assign_splits(names: Iterable[str]) -> np.ndarray:
    """The split of each document: uint8 [documents], indices into SPLITS.

    In the order of the names' hashes, the last 5 % (rounded up) are test, the 5 % before them validation. The pieces
    of one or two documents that were cut take turns.
    """
    hashes = (hashlib.sha256(os.fsencode(name)).digest() for name in names)
    keys = np.fromiter((int.from_bytes(digest[:8]) for digest in hashes), np.uint64)
    if len(keys) in (3, 6) and len(np.unique(keys)) < 3:
        return np.arange(len(keys), dtype=np.uint8) % 3
    held_out = -(-len(keys) // 20)
    splits = np.zeros(len(keys), np.uint8)
    order = np.argsort(keys, kind="stable")[::-1]
    splits[order[held_out : 2 * held_out]] = 1
    splits[order[:held_out]] = 2
    return splits


def _find_stdlib() -> dict[Path, str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = {}
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        paths = (Path(parent, name) for name in files if name.endswith(".py"))
        names |= {path: path.relative_to(root).as_posix() for path in paths}
    return names


def _read(file: File) -> Iterator[tuple[int, str]]:
    """Yields row numbers and texts. Raises ValueError with the file's name if it is damaged or has changed."""
    reader = _READERS[ending(file.path).removesuffix(_packing(file.path))]
    try:
        with file.path.open("rb") as raw:
            yield from reader(_unpacked(raw, file.path), file.path)
        file.content.check(file.path.stat(), file.path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file.path} cannot be read ({error}); repair it, or leave it out") from error


def _packing(path: Path) -> str:
    return path.suffix.lower() if path.suffix.lower() in PACKED else ""


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    match _packing(path):
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".xz":
            return lzma.LZMAFile(raw)
        case ".zst":
            try:
                import pyarrow
            except ImportError:
                raise ValueError(f"{path}: reading zst needs pyarrow; pip install pyarrow") from None
            return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
    return raw


def _whole_file(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text; convert it, or leave it out")
    yield 0, text


def _jsonl_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            # JSON can encode half a surrogate pair, which UTF-8 cannot.
            text.encode()
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{path}, line {number}: no string "text" in JSON and UTF-8; correct or remove it'
            ) from None
        yield number, text


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            columns = (batch["text"].to_pylist() for batch in parquet.iter_batches(columns=["text"]))
            for number, text in enumerate(chain.from_iterable(columns), start=1):
                if not isinstance(text, str):
                    raise ValueError(f"row {number} has no string")
                yield number, text
    except (pyarrow.ArrowException, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f'{path}: not a parquet file with a column "text" of strings ({reason})') from error


_READERS = {
    ".txt": _whole_file,
    ".md": _whole_file,
    ".py": _whole_file,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}
# Parquet compresses its own columns.
_ENDINGS = (*_READERS, *(end + packed for end in _READERS if end != ".parquet" for packed in PACKED))
