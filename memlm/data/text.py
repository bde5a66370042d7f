"""Text corpora: documents encoded once into a token file on disk, and read as endless rows.

Legend: T tokens of a row.
"""

import json
import platform
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from memlm.files import read_json

from .disk_cache import Watched
from .documents import Documents, assign_splits
from .manifest import file_entry
from .row import IGNORE_INDEX, SPLITS, Row, split_id
from .tokenizer import encoder, fingerprint

_FILES = ("tokens.bin", "documents.npy", "manifest.json")
# Part of every corpus's fingerprint; increase it if the files or the splitting change.
_FORMAT = 2


class TextCorpus:
    """Encoded documents, each followed by the end-of-text token.

    They are encoded once, into a cache folder named after the content of the files and the tokenizer: `tokens.bin`,
    `documents.npy` and `manifest.json`. `manifest` holds the last one, and the files left out. Processes that start
    together should let one of them build first; otherwise each builds, and the first one to finish counts.
    """

    def __init__(self, documents: Documents, tokenizer: PreTrainedTokenizerFast):
        key = [_FORMAT, documents.fingerprint, fingerprint(tokenizer)]
        self.folder = documents.cache.folder(key, _FILES, lambda folder: _build(folder, documents, tokenizer))
        left_out = [{"path": name, "reason": reason} for name, reason in documents.left_out.items()]
        self.manifest = read_json(self.folder / "manifest.json") | {"left_out": left_out}
        dtype = np.dtype(self.manifest["dtype"])
        # A plain view: slices of np.memmap itself are slow.
        self._tokens = np.asarray(np.memmap(self.folder / "tokens.bin", dtype, mode="r"))
        self._file = Watched(self.folder / "tokens.bin")
        ends, self._splits, self._files, self._rows = np.load(self.folder / "documents.npy")
        self._spans = np.column_stack([np.append(0, ends[:-1]), ends])

    def documents(self, split: str) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tokens [length] of each document of the split, in the order of the files."""
        for index in np.flatnonzero(self._splits == split_id(split)):
            name, row = self.manifest["files"][self._files[index]]["path"], self._rows[index]
            yield (f"{name}:{row}" if row else name), self.tokens(*self._spans[index])

    def spans(self, split: str) -> np.ndarray:
        """int64 [documents, 2]: the start and end of each document's tokens in the token file."""
        return self._spans[self._splits == split_id(split)]

    def tokens(self, start: int, end: int) -> np.ndarray:
        """[end - start] tokens of the token file, in its own small integer type; a view, not a copy.

        Raises ValueError if the file has changed: reading a truncated mapped file would kill the process.
        """
        self._file.check()
        return self._tokens[start:end]


class TextSource:
    """Endless rows of `seq_len` tokens of a corpus, drawn anew each epoch.

    An epoch concatenates the split's documents in random order, cuts them into rows (the last, shorter one is
    dropped), and shuffles the rows. Nothing is copied: a row is looked up on demand. Positions restart at 0 at each
    document's start; the first token is not scored, because nothing before it predicts it.
    Raises ValueError if a split is smaller than one row.
    """

    def __init__(self, corpus: TextCorpus, seq_len: int, seed: int):
        self.corpus, self.seq_len, self.seed, self.manifest = corpus, seq_len, seed, corpus.manifest
        sizes = [corpus.manifest["splits"][split]["tokens"] for split in SPLITS]
        for split, tokens in zip(SPLITS, sizes, strict=True):
            if tokens < seq_len:
                raise ValueError(
                    f"the {split} split has {tokens} tokens, less than one row of seq_len={seq_len};"
                    " add text or lower seq_len"
                )
        self._num_rows = [tokens // seq_len for tokens in sizes]
        self._epoch = lru_cache(maxsize=2 * len(SPLITS))(self._draw_epoch)

    def row(self, index: int, split: str, step: int) -> Row:
        epoch, index = divmod(index, self._num_rows[split_id(split)])
        spans, ends, rows = self._epoch(split, epoch)
        position = int(rows[index]) * self.seq_len
        document = int(np.searchsorted(ends, position, side="right"))
        pieces, starts, missing = [], [], self.seq_len
        while missing:
            start, end = spans[document].tolist()
            start = end - int(ends[document]) + position
            piece = self.corpus.tokens(start, min(end, start + missing))
            pieces.append(piece)
            starts.append(self.seq_len - missing)
            position += len(piece)
            missing -= len(piece)
            document += 1
        input_ids = np.concatenate(pieces).astype(np.int64)
        position_ids = np.arange(self.seq_len) - np.repeat(starts, [len(piece) for piece in pieces])
        return Row(input_ids, np.where(position_ids == 0, IGNORE_INDEX, input_ids), position_ids)

    def _draw_epoch(self, split: str, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Spans of the documents in this epoch's order, their cumulative ends, and the order of the rows."""
        rng = np.random.default_rng([self.seed, split_id(split), epoch])
        spans = rng.permutation(self.corpus.spans(split))
        ends = np.cumsum(spans[:, 1] - spans[:, 0])
        return spans, ends, rng.permutation(self._num_rows[split_id(split)])


def _build(folder: Path, documents: Documents, tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("data tokenizer has no end-of-text token; set its eos_token")
    encode = encoder(tokenizer)
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
    ends, files, rows, names = array("q"), array("q"), array("q"), []
    total = 0
    with (folder / "tokens.bin").open("wb") as file:
        for document in documents:
            tokens = np.append(encode(document.text), tokenizer.eos_token_id).astype(dtype)
            file.write(tokens.tobytes())
            total += len(tokens)
            ends.append(total)
            files.append(document.file)
            rows.append(document.row)
            names.append(documents.name(document))
    splits = assign_splits(names)
    np.save(folder / "documents.npy", np.array([ends, splits, files, rows], np.int64))
    lengths = np.diff(np.array(ends), prepend=0)
    splits_of_file = [set() for _ in documents.files]
    for index, split in zip(files, splits, strict=True):
        splits_of_file[index].add(SPLITS[split])
    manifest = {
        "format": _FORMAT,
        "tokenizer": {"fingerprint": fingerprint(tokenizer), "vocab_size": len(tokenizer)},
        "python": platform.python_version() if documents.is_stdlib else None,
        "dtype": np.dtype(dtype).name,
        "splits": {
            name: {"documents": int((splits == split).sum()), "tokens": int(lengths[splits == split].sum())}
            for split, name in enumerate(SPLITS)
        },
        "files": [
            file_entry(file.name, file.content) | {"splits": sorted(in_splits)}
            for file, in_splits in zip(documents.files, splits_of_file, strict=True)
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
