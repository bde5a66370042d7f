"""Text corpora: documents encoded once into token files on disk, and read as endless rows.

Legend: T tokens of a row.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from memlm.files import read_json

from .disk_cache import Watched
from .documents import Corpus
from .encoding import Report
from .layout import LARGE, LARGE_FORMAT, SMALL, SMALL_FORMAT, STORE, build_large, build_small, large_shards, own_store
from .row import IGNORE_INDEX, SPLITS, Row, split_id
from .tokenizer import fingerprint

# Shards whose documents are shuffled together.
_TOGETHER = 16


class _TokenFile(NamedTuple):
    """table: reads ends, splits, files and rows of its documents; train: tokens for training, of a shard"""

    path: Path
    table: Callable[[], np.ndarray]
    train: int = 0


class _Opened(NamedTuple):
    """spans: [documents, 2], places of the documents' tokens in the corpus"""

    tokens: np.ndarray
    file: Watched
    spans: np.ndarray
    splits: np.ndarray
    files: np.ndarray
    rows: np.ndarray


class TextCorpus:
    """Encoded documents, each followed by the end-of-text token.

    They are encoded once, by up to `workers` processes (None: one for each core), into a cache folder named after the
    content of the files and the tokenizer, see `layout`. `report` is called with the bytes done and their total.
    `manifest` is that of the folder, with the files left out. Processes that need the same corpus take turns: one of
    them builds, and `wait` is called with a line in the others.
    """

    def __init__(
        self,
        documents: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        workers: int | None = None,
        report: Report = lambda done, total: None,
        wait: Callable[[str], None] = lambda line: None,
    ):
        large = documents.is_large
        names, build, form = (LARGE, build_large, LARGE_FORMAT) if large else (SMALL, build_small, SMALL_FORMAT)
        key = [form, documents.fingerprint, fingerprint(tokenizer)]
        self._store = documents.cache.root / STORE

        def fill(folder: Path) -> None:
            build(folder, documents, tokenizer, workers or _cores(), report)

        with documents.cache.turn(key, wait):
            self.folder = documents.cache.folder(
                key, names, fill, has_more=self._has_shards if large else lambda _: True
            )
            if not large:
                shutil.rmtree(own_store(documents, tokenizer), ignore_errors=True)
        left_out = [{"path": name, "reason": reason} for name, reason in documents.left_out.items()]
        self.manifest = read_json(self.folder / "manifest.json") | {"left_out": left_out}
        self._dtype = np.dtype(self.manifest["dtype"])
        if large:
            shards = large_shards(self.folder)
            self._files = [_TokenFile(of.bin(self._store), partial(of.table, self._store), of.train) for of in shards]
            self._files += [self._whole(split, split) for split in SPLITS[1:]]
            numbers = range(len(self._files))
            self._of_split = dict(zip(SPLITS, (numbers[:-2], numbers[-2:-1], numbers[-1:]), strict=True))
        else:
            self._files, self._of_split = [self._whole("tokens", "documents")], dict.fromkeys(SPLITS, range(1))
        sizes = [file.path.stat().st_size // self._dtype.itemsize for file in self._files]
        # The places of all token files, one after the other.
        self._starts = np.cumsum([0, *sizes])
        self._opened = lru_cache(maxsize=4 * _TOGETHER)(self._open)
        if not large:
            self._opened(0)

    def _has_shards(self, folder: Path) -> bool:
        return all(of.shard.is_whole(self._store) for of in large_shards(folder))

    def drop_damaged(self) -> list[Path]:
        """Remove the shards whose content is not that which was written; the next start encodes them again."""
        shards = large_shards(self.folder) if (self.folder / LARGE[0]).exists() else []
        damaged = [of for of in shards if not of.shard.is_whole(self._store, thorough=True)]
        for of in damaged:
            of.shard.remove(self._store)
        return [of.bin(self._store) for of in damaged]

    def documents(self, split: str) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tokens [length] of each document of the split, in the order of the files."""
        for number in self._of_split[SPLITS[split_id(split)]]:
            opened = self._opened(number)
            for index in np.flatnonzero(opened.splits == split_id(split)):
                name, row = self.manifest["files"][opened.files[index]]["path"], opened.rows[index]
                yield (f"{name}:{row}" if row else name), self.tokens(*opened.spans[index])

    def token_files(self, split: str) -> list[tuple[int, int]]:
        """The number of each token file that holds documents of the split, and their tokens."""
        numbers = self._of_split[SPLITS[split_id(split)]]
        if len(numbers) == 1:
            return [(numbers[0], self.manifest["splits"][split]["tokens"])]
        return [(number, self._files[number].train) for number in numbers]

    def spans(self, split: str, numbers: Iterable[int] | None = None) -> np.ndarray:
        """int64 [documents, 2]: the places of each document's first token and of the token after its last one, in
        these token files, or in all.
        """
        numbers = self._of_split[SPLITS[split_id(split)]] if numbers is None else numbers
        opened = map(self._opened, numbers)
        return np.concatenate([of_file.spans[of_file.splits == split_id(split)] for of_file in opened])

    def tokens(self, start: int, end: int) -> np.ndarray:
        """[end - start] tokens within a document, in their own small integer type; a view, not a copy.

        Raises ValueError if the file has changed: reading a truncated mapped file would kill the process.
        """
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        opened, base = self._opened(number), int(self._starts[number])
        opened.file.check()
        return opened.tokens[start - base : end - base]

    def _whole(self, tokens: str, table: str) -> _TokenFile:
        return _TokenFile(self.folder / f"{tokens}.bin", partial(np.load, self.folder / f"{table}.npy"))

    def _open(self, number: int) -> _Opened:
        file = self._files[number]
        try:
            # A plain view: slices of np.memmap itself are slow.
            tokens = np.asarray(np.memmap(file.path, self._dtype, mode="r"))
            ends, splits, files, rows = file.table()
            watched = Watched(file.path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file.path} cannot be read ({error}); start again, and it is made anew") from error
        spans = np.column_stack([np.append(0, ends[:-1]), ends]) + self._starts[number]
        return _Opened(tokens, watched, spans, splits, files, rows)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TextSource:
    """Endless rows of `seq_len` tokens of a corpus, drawn anew each epoch.

    An epoch concatenates the split's documents in random order, cuts them into rows (the last, shorter one is
    dropped), and shuffles the rows. In a corpus of many shards, it takes these in random order, and does so with
    groups of them; the last row of a group is filled up with the beginning of its first document. Nothing is copied: a
    row is looked up on demand. Positions restart at 0 at each document's start; the first token is not scored, because
    nothing before it predicts it. `epoch_rows` has the rows of an epoch of each split.

    With `streams`, training rows are those of so many streams: row i is the next one of stream i % streams. Positions
    go on from row to row of a stream. An epoch cuts its documents into one long text for each stream.
    Raises ValueError if a split is smaller than one row.
    """

    def __init__(self, corpus: TextCorpus, seq_len: int, seed: int):
        self.corpus, self.seq_len, self.seed, self.manifest = corpus, seq_len, seed, corpus.manifest
        self.streams: int | None = None
        sizes = {split: corpus.manifest["splits"][split]["tokens"] for split in SPLITS}
        for split, tokens in sizes.items():
            if tokens < seq_len:
                raise ValueError(
                    f"the {split} split has {tokens} tokens, less than one row of seq_len={seq_len};"
                    " add text or lower seq_len"
                )
        self.epoch_rows = {split: tokens // seq_len for split, tokens in sizes.items()}
        self._groups = lru_cache(maxsize=2 * len(SPLITS))(self._draw_groups)
        self._group = lru_cache(maxsize=2 * len(SPLITS))(self._draw_group)

    def row(self, index: int, split: str, step: int) -> Row:
        split_id(split)
        if split == "train" and self.streams:
            return self._row_of_stream(*divmod(index, self.streams))
        epoch, index = divmod(index, self.epoch_rows[split])
        _, bounds = self._groups(split, epoch)
        group = int(np.searchsorted(bounds, index, side="right")) - 1
        spans, ends, rows = self._group(split, epoch, group)
        return self._read(spans, ends, int(rows[index - bounds[group]]) * self.seq_len)

    def _row_of_stream(self, turn: int, stream: int) -> Row:
        """A group is divided among the streams; each begins anew in the next one."""
        assert self.streams
        epoch, turn = divmod(turn, self.epoch_rows["train"] // self.streams)
        bounds = self._groups("train", epoch)[1] // self.streams
        group = int(np.searchsorted(bounds, turn, side="right")) - 1
        spans, ends, _ = self._group("train", epoch, group)
        turn, tokens = turn - int(bounds[group]), int(ends[-1])
        # The end of a group is filled up with its beginning.
        position = (stream * tokens // self.streams + turn * self.seq_len) % tokens
        return self._read(spans, ends, position, turn * self.seq_len)

    def _read(self, spans: np.ndarray, ends: np.ndarray, position: int, before: int = 0) -> Row:
        """The row at a position of documents. before: the tokens that its reader has read right before it"""
        document = int(np.searchsorted(ends, position, side="right"))
        before = min(before, position - int(ends[document] - (spans[document, 1] - spans[document, 0])))
        pieces, starts, missing = [], [], self.seq_len
        while missing:
            if document == len(spans):
                document = position = 0
            start, end = spans[document].tolist()
            start = end - int(ends[document]) + position
            piece = self.corpus.tokens(start, min(end, start + missing))
            pieces.append(piece)
            starts.append(self.seq_len - missing)
            position += len(piece)
            missing -= len(piece)
            document += 1
        input_ids = np.concatenate(pieces).astype(np.int64)
        starts[0] = -before
        position_ids = np.arange(self.seq_len) - np.repeat(starts, [len(piece) for piece in pieces])
        return Row(input_ids, np.where(position_ids == 0, IGNORE_INDEX, input_ids), position_ids)

    def _draw_groups(self, split: str, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        """The token files of each group, in this epoch's order, and the number of rows before each group."""
        files = self.corpus.token_files(split)
        if len(files) > 1:
            order = np.random.default_rng([self.seed, split_id(split), epoch]).permutation(len(files))
            files = [files[i] for i in order]
        groups = [files[i : i + _TOGETHER] for i in range(0, len(files), _TOGETHER)]
        tokens = [sum(of_file for _, of_file in group) for group in groups]
        return [[number for number, _ in group] for group in groups], np.cumsum([0, *tokens]) // self.seq_len

    def _draw_group(self, split: str, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Spans of a group's documents in this epoch's order, their cumulative ends, and the order of its rows."""
        groups, bounds = self._groups(split, epoch)
        # A corpus of one group is drawn as before there were groups.
        own = [group] if len(self.corpus.token_files(split)) > 1 else []
        rng = np.random.default_rng([self.seed, split_id(split), epoch, *own])
        spans = rng.permutation(self.corpus.spans(split, groups[group]))
        ends = np.cumsum(spans[:, 1] - spans[:, 0])
        return spans, ends, rng.permutation(int(bounds[group + 1] - bounds[group]))
