"""Files of text, read in stretches of bounded size, from the beginning or within a span of bytes.

A document's text comes in stretches of about a million characters. They end after a line end between two characters
that are no white space: tokenizers divide a text there, so its tokens are those of the whole. Only a text without such
a place is cut elsewhere.
"""

import codecs
import gzip
import io
import json
import lzma
import mmap
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .find import PACKED, ending

STRETCH = 2**20
_LONGEST = 4 * STRETCH
_CUT = re.compile(r"\S\n(?=\S)")
_CUT_OF_BYTES = re.compile(rb"[!-~\x80-\xbf]\n(?=[!-~\xc2-\xf4])")


class Span(NamedTuple):
    """Bytes [start, end) of a file.

    file: an index into `Documents.files`; rows: number of rows before `start`
    starts, ends: whether the first document starts here, and the last one ends here
    """

    file: int
    start: int
    end: int
    rows: int = 0
    starts: bool = True
    ends: bool = True


def stretches(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The stretches of a text, and whether each is the last. The result does not depend on the chunks' sizes."""
    held = ""
    for chunk in chunks:
        held += chunk
        while cut := _find_cut(held):
            yield held[:cut], False
            held = held[cut:]
    yield held, True


def _find_cut(text: str) -> int:
    if found := _CUT.search(text, STRETCH, _LONGEST + 1):
        return found.end()
    return _LONGEST if len(text) > _LONGEST else 0


def cut_at(pieces: Iterable[tuple[str, bool]], places: Iterable[int]) -> Iterator[tuple[str, bool]]:
    """The stretches, ended also at these places of the text."""
    at, left = 0, [*places]
    for text, ends in pieces:
        while left and left[0] <= at + len(text):
            place = left.pop(0)
            yield text[: place - at], True
            text, at = text[place - at :], place
        if text or ends:
            yield text, ends
        at += len(text)


def read(path: Path, span: Span) -> Iterator[tuple[int, Iterable[str], Callable[[], int]]]:
    """Yields each document's row, the chunks of its text, and a function that tells the file's place.

    Raises ValueError with the file's name if it is damaged.
    """
    reader = _READERS[ending(path).removesuffix(_packing(path))]
    with _named(path), path.open("rb") as raw:
        raw.seek(span.start)
        file = _unpacked(raw, path)
        for row, chunks in reader(_Within(raw, span.end) if file is raw else file, path, span):
            yield row, chunks, lambda: min(raw.tell(), span.end)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read ({error}); repair it, or leave it out") from error


def find_spans(path: Path, span: Span, size: int) -> list[Span]:
    """The span in parts of about `size` bytes, if its file can be read from within."""
    kind = ending(path)
    if span.end - span.start <= size or kind not in _CUTS:
        return [span]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        places = {_CUTS[kind](content, place, span.end) for place in range(span.start + size, span.end, size)}
        bounds = [span.start, *sorted(places - {span.start, span.end}), span.end]
        spans, rows = [], span.rows
        for start, end in pairwise(bounds):
            whole = kind == ".jsonl"
            starts, ends = whole or start == span.start, whole or end == span.end
            spans.append(Span(span.file, start, end, rows, starts and span.starts, ends and span.ends))
            rows += content[start:end].count(b"\n") if whole else 0
    return spans


def byte_offsets(path: Path, places: Iterable[int]) -> list[int]:
    """The bytes at which these characters of a plain text file start."""
    found, left, chars, at = [], [*places], 0, 0
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            at = 3
        file.seek(at)
        while left and (data := file.read(STRETCH)):
            # Every byte that continues no character starts one.
            starts = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
            while left and left[0] < chars + len(starts):
                found.append(at + int(starts[left.pop(0) - chars]))
            chars, at = chars + len(starts), at + len(data)
    return [*found, *[at for _ in left]]


def is_plain(path: Path) -> bool:
    """Whether a file is one document, which can be read from within."""
    return _CUTS.get(ending(path)) is _between_lines


def _after_line(content: mmap.mmap, place: int, end: int) -> int:
    return min(content.find(b"\n", place - 1) + 1 or end, end)


def _between_lines(content: mmap.mmap, place: int, end: int) -> int:
    if found := _CUT_OF_BYTES.search(content, place, min(place + _LONGEST, end)):
        return found.end()
    while place < end and content[place] & 0xC0 == 0x80:
        place += 1
    return place


class _Within:
    """A file that ends at a byte."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self._end = file, end

    def __iter__(self) -> Iterator[bytes]:
        while self.file.tell() < self._end and (line := self.file.readline()):
            yield line

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, self._end - self.file.tell()))


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


def _whole_file(file: BinaryIO, path: Path, span: Span) -> Iterator[tuple[int, Iterable[str]]]:
    decoder = codecs.getincrementaldecoder("utf-8" if span.start else "utf-8-sig")()

    def chunks() -> Iterator[str]:
        try:
            # The caller reads the chunks, so ``read`` does not see their errors.
            with _named(path):
                while data := file.read(STRETCH):
                    yield _text(decoder.decode(data))
            yield decoder.decode(b"", True)
        except UnicodeError:
            raise ValueError(f"{path} is not UTF-8 text; convert it, or leave it out") from None

    yield 0, chunks()


def _text(text: str) -> str:
    if "\0" in text:
        raise UnicodeError
    return text


def _jsonl_rows(file: BinaryIO, path: Path, span: Span) -> Iterator[tuple[int, Iterable[str]]]:
    for number, line in enumerate(file, start=span.rows + 1):
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
        yield number, [text]


def _parquet_rows(file: "_Within", path: Path, span: Span) -> Iterator[tuple[int, Iterable[str]]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        # A buffer, because a row group may be as large as the file.
        with pyarrow.parquet.ParquetFile(file.file, pre_buffer=False, buffer_size=STRETCH) as parquet:
            columns = (batch["text"].to_pylist() for batch in parquet.iter_batches(64, columns=["text"]))
            for number, text in enumerate(chain.from_iterable(columns), start=1):
                if not isinstance(text, str):
                    raise ValueError(f"row {number} has no string")
                yield number, [text]
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
ENDINGS = (*_READERS, *(end + packed for end in _READERS if end != ".parquet" for packed in PACKED))
_CUTS = {".jsonl": _after_line, **dict.fromkeys((".txt", ".md", ".py"), _between_lines)}
