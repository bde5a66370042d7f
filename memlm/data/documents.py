"""Text documents on disk: read one by one, and split into train, validation and test.

``Documents`` are a corpus, ``Texts`` the documents of a bank.
A document is one txt, md or py file, or one row of a jsonl or parquet file (its field "text"). Files other than
parquet may be compressed: a.txt.gz, .xz or .zst.
"""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .disk_cache import Content, DiskCache
from .find import Found, find
from .manifest import file_entry
from .reading import ENDINGS, Span, byte_offsets, cut_at, find_spans, is_plain, read, stretches

# Bytes of a part; the parts are part of a large corpus's fingerprint.
PART = 2**25
# Corpora of more bytes stay in shards (`text`), and are split in another way.
LARGE = 2**30
Part = tuple[Span, ...]
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class File(NamedTuple):
    """`name` is a path: relative to the parent of a given folder, file or glob root, or to the standard library's
    root.
    """

    name: str
    path: Path
    content: Content


class Document(NamedTuple):
    """A document's text, or a stretch of it if it is long.

    file: an index into `Documents.files`; row: the line or row, from 1, or 0 for a whole file
    starts, ends: whether the document starts and ends with this stretch
    unit: distinguishes stretches of one file that may be in different splits
    """

    file: int
    row: int
    text: str
    starts: bool
    ends: bool
    unit: str


class Corpus(Protocol):
    """Documents in parts that can be read separately: `Documents`, or `Streamed`.

    part_tokens: the most tokens of a part; entries: its files, for the manifest
    """

    cache: DiskCache
    is_large: bool
    is_stdlib: bool
    left_out: dict[str, str]

    @property
    def fingerprint(self) -> str: ...
    @property
    def parts(self) -> list[Part]: ...
    @property
    def part_tokens(self) -> int | None: ...
    def training_texts(self) -> Iterator[str]: ...
    def entries(self) -> list[dict[str, Any]]: ...
    def identity(self, part: Part) -> list[Any]: ...
    def name(self, file: int, row: int) -> str: ...
    def read(self, part: Part) -> Iterator[tuple[Document, int]]: ...


class Documents:
    """The documents under `paths`: files, folders (recursively) or globs, see `find`. None or "stdlib" means the
    Python standard library's own sources, without its tests. left_out: files that are not read, with reasons.

    Iteration yields documents in a fixed order, in stretches, without empty ones. If there are fewer than three, each
    is cut into three of the same name: the first 90 %, the next 5 % and the last 5 % of its characters. `parts` are
    parts of this order that can be read separately; they depend on the files alone.
    Raises ValueError with the path, file or line that cannot be read.
    """

    def __init__(self, paths: str | Sequence[str] | None, cache_dir: str | Path):
        self.is_stdlib = paths is None or paths == "stdlib"
        names, self.left_out = Found(_find_stdlib(), {}) if self.is_stdlib else _find_texts(paths)
        self.cache = DiskCache(cache_dir)
        contents = self.cache.contents(names)
        # Sorted, so that the order of paths does not matter.
        self.files = sorted(File(name, path, contents[path]) for path, name in names.items())
        self.is_large = sum(file.content.num_bytes for file in self.files) > LARGE

    @property
    def fingerprint(self) -> str:
        content = json.dumps([(file.name, file.content.sha256) for file in self.files])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def part_tokens(self) -> None:
        """A part is encoded as a whole."""

    def name(self, file: int, row: int) -> str:
        name = self.files[file].name
        return f"{name}:{row}" if row else name

    def entries(self) -> list[dict[str, Any]]:
        """The files, for the manifest."""
        return [file_entry(file.name, file.content) for file in self.files]

    def identity(self, part: Part) -> list[Any]:
        """Everything that determines the documents of a part."""
        files = [self.files[span.file] for span in part]
        cuts = [[row, *places] for (_, row), places in sorted(self._cuts.items())]
        return [cuts, *([f.name, f.content.sha256, *span[1:]] for f, span in zip(files, part, strict=True))]

    @cached_property
    def parts(self) -> list[Part]:
        parts, part, size = [], list[Span](), 0
        for span in chain.from_iterable(map(self._spans, range(len(self.files)))):
            part.append(span)
            size += span.end - span.start
            if size >= PART:
                parts.append(tuple(part))
                part, size = [], 0
        return [*parts, tuple(part)] if part else parts

    def _spans(self, index: int) -> list[Span]:
        file, size = self.files[index], self.files[index].content.num_bytes
        span = Span(index, 0, size)
        if not self._cuts:
            return find_spans(file.path, span, PART)
        if (places := self._cuts.get((index, 0))) is None or not is_plain(file.path) or size <= PART:
            return [span]
        bounds = [0, *byte_offsets(file.path, places), size]
        return [part for a, b in pairwise(bounds) for part in find_spans(file.path, Span(index, a, b), PART)]

    def read(self, part: Part) -> Iterator[tuple[Document, int]]:
        """Yields the documents, and for each the bytes of the part read so far."""
        done = 0
        for span in part:
            path, content = self.files[span.file].path, self.files[span.file].content
            ranged = is_plain(path) and span.end - span.start < content.num_bytes
            for row, chunks, tell in read(path, span):
                for number, (text, starts, ends) in enumerate(self._stretches(span, row, chunks, ranged)):
                    unit = f":{span.start}:{number}" if ranged else ""
                    yield Document(span.file, row, text, starts, ends, unit), done + tell() - span.start
            content.check(path.stat(), path)
            done += span.end - span.start

    def _stretches(
        self, span: Span, row: int, chunks: Iterable[str], ranged: bool
    ) -> Iterator[tuple[str, bool, bool]]:
        pieces, starts = stretches(chunks), span.starts or not ranged
        places = None if ranged else self._cuts.get((span.file, row))
        for text, ends in pieces if places is None else cut_at(pieces, places):
            if text or places:
                yield text, starts, ends and (span.ends or not ranged)
            starts = ends

    def __iter__(self) -> Iterator[Document]:
        return (document for part in self.parts for document, _ in self.read(part))

    @cached_property
    def _cuts(self) -> dict[tuple[int, int], tuple[int, int]]:
        """The characters at which documents are cut, by file and row, if they are fewer than three."""
        if self.is_large:
            return {}
        lengths: dict[tuple[int, int], int] = {}
        for index, file in enumerate(self.files):
            for row, chunks, _ in read(file.path, Span(index, 0, file.content.num_bytes)):
                if length := sum(map(len, chunks)):
                    lengths[index, row] = length
                if len(lengths) == 3:
                    return {}
        if not lengths:
            raise ValueError(f"paths: {self.files[0].path} and all other files are empty; give some text")
        return {place: (length * 90 // 100, length * 95 // 100) for place, length in lengths.items()}

    def training_texts(self) -> Iterator[str]:
        """Texts to train a tokenizer on: those for training, of a large corpus about a gibibyte of them."""
        if self.is_large:
            size = sum(file.content.num_bytes for file in self.files)
            for document in chain.from_iterable(map(self.read, self.parts[:: -(-size // LARGE)])):
                if is_trained(self.name(document[0].file, document[0].row) + document[0].unit):
                    yield document[0].text
            return
        splits = assign_splits(self.name(document.file, document.row) for document in self if document.ends)
        number = 0
        for document in self:
            if splits[number] == 0:
                yield document.text
            number += document.ends


@dataclass(frozen=True)
class WholeText:
    """A whole document; source: the file that it came from, "" for none."""

    text: str
    source: str = ""


class Texts:
    """The documents that ``Documents`` reads under `paths`, whole and without empty ones: name and ``WholeText``.

    Nothing is cached. The number of documents costs one reading of all files, which finds those that cannot be read.
    Raises ValueError with the path, file or line that cannot be read, or if there is no document.
    """

    def __init__(self, paths: str | Sequence[str]):
        names, self.left_out = _find_texts(paths)
        self._files = sorted((name, path) for path, name in names.items())

    def __iter__(self) -> Iterator[tuple[str, WholeText]]:
        for name, path in self._files:
            for row, chunks, _ in read(path, Span(0, 0, path.stat().st_size)):
                if text := "".join(chunks):
                    yield f"{name}:{row}" if row else name, WholeText(text, str(path))

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        if not (count := sum(1 for _ in self)):
            raise ValueError(f"paths: {self._files[0][1]} and all other files are empty; give some text")
        return count


def place(name: str) -> int:
    """A document's place, in 64 bits, in the order of the names' hashes."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8])


def is_trained(name: str) -> bool:
    """Whether a document of a large corpus is certainly not held out: the last ones in the order of hashes are."""
    return place(name) < 7 * 2**61


def assign_splits(names: Iterable[str]) -> np.ndarray:
    """The split of each document: uint8 [documents], indices into SPLITS.

    In the order of the names' hashes, the last 5 % (rounded up) are test, the 5 % before them validation. The pieces
    of one or two documents that were cut take turns.
    """
    keys = np.fromiter(map(place, names), np.uint64)
    if len(keys) in (3, 6) and len(np.unique(keys)) < 3:
        return np.arange(len(keys), dtype=np.uint8) % 3
    held_out = -(-len(keys) // 20)
    splits = np.zeros(len(keys), np.uint8)
    order = np.argsort(keys, kind="stable")[::-1]
    splits[order[held_out : 2 * held_out]] = 1
    splits[order[:held_out]] = 2
    return splits


def _find_texts(paths: str | Sequence[str]) -> Found:
    """Files of text, whose names differ."""
    found = find(paths, ENDINGS)
    if not found.files:
        raise ValueError("paths is an empty list; name a file, a folder or a glob, or use null")
    twice = [name for name, count in Counter(found.files.values()).items() if count > 1]
    if twice:
        raise ValueError(f"paths: two files are named {twice[0]}; give their common folder instead")
    return found


def _find_stdlib() -> dict[Path, str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = {}
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        paths = (Path(parent, name) for name in files if name.endswith(".py"))
        names |= {path: path.relative_to(root).as_posix() for path in paths}
    return names
