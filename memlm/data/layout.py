"""The files of an encoded corpus.

A small corpus is one token file, `tokens.bin`, and `documents.npy`: for each document its end in the token file, its
split, its file and its row; the shards that it is joined from are its own, and removed. A large one
(`documents.LARGE`) stays in the shards it was encoded to: `shards.json` names them, and the documents held out are
copied to `validation.bin` and `test.bin`, each with such a table.
Both have `manifest.json`.
"""

import hashlib
import json
import platform
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from memlm import files

from .documents import Corpus, Part, assign_splits
from .encoding import ENDS, FILE, KEY, ROW, WHOLE, Encoding, Report, TokenShard, remove_remains
from .row import SPLITS
from .tokenizer import fingerprint

# The folder of the shards of a cache that large corpora share.
STORE = "shards"
SMALL = ("tokens.bin", "documents.npy", "manifest.json")
LARGE = ("shards.json", "validation.bin", "validation.npy", "test.bin", "test.npy", "manifest.json")
# Part of every corpus's fingerprint; increase one if the files or the splitting change.
SMALL_FORMAT, LARGE_FORMAT = 2, 3
# Tokens of each split that is held out of a large corpus, at most 5 % of it.
_HELD_OUT = 2**23
# Documents are held out by the first bits of their place in the order of hashes.
_BITS = 16


def own_store(documents: Corpus, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of the shards of a small corpus, which are not needed once it is complete. No other corpus may use
    them, because they are then removed.
    """
    name = hashlib.sha256(f"{documents.fingerprint} {fingerprint(tokenizer)}".encode()).hexdigest()[:32]
    return documents.cache.root / STORE / name


def build_small(
    folder: Path, documents: Corpus, tokenizer: PreTrainedTokenizerFast, workers: int, report: Report
) -> None:
    """Encode into shards, and join them."""
    store = own_store(documents, tokenizer)
    shards = _encoded(documents, tokenizer, store, workers, report)
    total, tables = 0, []
    with (folder / "tokens.bin").open("wb") as file:
        for part, shard in shards:
            tokens, table = shard.paths(store)
            with tokens.open("rb") as content:
                shutil.copyfileobj(content, file, 2**20)
            rows = np.load(table)
            rows = rows[rows[:, WHOLE] == 1]
            tables.append(np.stack([rows[:, ENDS] + total, _files(part)[rows[:, FILE]], rows[:, ROW]]))
            total += shard.tokens
    ends, numbers, rows = np.concatenate(tables, 1)
    splits = assign_splits(map(documents.name, numbers.tolist(), rows.tolist()))
    np.save(folder / "documents.npy", np.array([ends, splits, numbers, rows], np.int64))
    lengths = np.diff(ends, prepend=0)
    sizes = {
        name: {"documents": int((splits == split).sum()), "tokens": int(lengths[splits == split].sum())}
        for split, name in enumerate(SPLITS)
    }
    splits_of_file = [set() for _ in documents.entries()]
    for index, split in zip(numbers.tolist(), splits, strict=True):
        splits_of_file[index].add(SPLITS[split])
    entries = [
        entry | {"splits": sorted(in_splits)}
        for entry, in_splits in zip(documents.entries(), splits_of_file, strict=True)
    ]
    _write_manifest(folder, SMALL_FORMAT, documents, tokenizer, sizes, entries)


def build_large(
    folder: Path, documents: Corpus, tokenizer: PreTrainedTokenizerFast, workers: int, report: Report
) -> None:
    """Encode into shards, which are kept, and hold out the last documents in the order of hashes."""
    store = documents.cache.root / STORE
    shards = [(part, shard) for part, shard in _encoded(documents, tokenizer, store, workers, report) if shard.tokens]
    tokens = np.zeros(2**_BITS, np.int64)
    seen: set[int] = set()
    for part, shard in shards:
        table = np.load(shard.paths(store)[1])
        np.add.at(tokens, _first_bits(table), np.diff(table[:, ENDS], prepend=0))
        seen.update(_files(part)[table[:, FILE]].tolist())
    if not shards:
        raise ValueError(f"{documents.name(0, 0)} and all other files are empty; give some text")
    # Splits in the order of hashes, from the last one.
    above = np.cumsum(tokens[::-1])
    least = min(_HELD_OUT, int(above[-1]) // 20)
    first_test = 2**_BITS - 1 - int(np.searchsorted(above, least))
    before = above[2**_BITS - 1 - first_test]
    first = 2**_BITS - 1 - int(np.searchsorted(above, before + least))
    sizes = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    entries = []
    held = {"validation": _Copy(folder, "validation"), "test": _Copy(folder, "test")}
    for part, shard in shards:
        bin, npy = shard.paths(store)
        table, content = np.load(npy), np.memmap(bin, Encoding(documents, tokenizer, store).dtype, mode="r")
        bits, lengths = _first_bits(table), np.diff(table[:, ENDS], prepend=0)
        of = {"train": bits < first, "validation": (first <= bits) & (bits < first_test), "test": bits >= first_test}
        for split, chosen in of.items():
            sizes[split]["documents"] += int(chosen.sum())
            sizes[split]["tokens"] += int(lengths[chosen].sum())
        for split, copy in held.items():
            for index in np.flatnonzero(of[split]).tolist():
                end = table[index, ENDS]
                copy.add(content[end - lengths[index] : end], _files(part)[table[index, FILE]], table[index, ROW])
        train = int(lengths[of["train"]].sum())
        entries.append(asdict(LargeShard(shard, train, _files(part).tolist(), first)))
    for copy in held.values():
        copy.close()
    (folder / "shards.json").write_text(json.dumps(entries))
    found = [entry | ({} if index in seen else {"splits": []}) for index, entry in enumerate(documents.entries())]
    _write_manifest(folder, LARGE_FORMAT, documents, tokenizer, sizes, found)


class _Copy:
    """Documents of one split, copied into a token file."""

    def __init__(self, folder: Path, split: str) -> None:
        self._file, self._table, self._path = (folder / f"{split}.bin").open("wb"), array("q"), folder / f"{split}.npy"
        self._split, self._total = SPLITS.index(split), 0

    def add(self, tokens: np.ndarray, file: int, row: int) -> None:
        self._file.write(tokens.tobytes())
        self._total += len(tokens)
        self._table.extend((self._total, self._split, int(file), int(row)))

    def close(self) -> None:
        self._file.close()
        np.save(self._path, np.array(self._table, np.int64).reshape(-1, 4).T)


@dataclass(frozen=True)
class LargeShard:
    """train: number of its tokens for training; files: index of the file of each span of its part
    held_out_from: the first bits from which documents are held out
    """

    shard: TokenShard
    train: int
    files: list[int]
    held_out_from: int

    def bin(self, store: Path) -> Path:
        return self.shard.paths(store)[0]

    def table(self, store: Path) -> np.ndarray:
        """Its table in the form of `documents.npy`; documents held out are in no split."""
        table = np.load(self.shard.paths(store)[1])
        splits = np.where(_first_bits(table) < self.held_out_from, 0, len(SPLITS))
        return np.stack([table[:, ENDS], splits, np.array(self.files)[table[:, FILE]], table[:, ROW]])


def large_shards(folder: Path) -> list[LargeShard]:
    return [
        LargeShard(**of | {"shard": TokenShard(**of["shard"])}) for of in files.read_json(folder / "shards.json", list)
    ]


def _encoded(
    documents: Corpus, tokenizer: PreTrainedTokenizerFast, store: Path, workers: int, report: Report
) -> Iterator[tuple[Part, TokenShard]]:
    """The shards, and the part of each, encoded now or earlier."""
    if tokenizer.eos_token_id is None:
        raise ValueError("data tokenizer has no end-of-text token; set its eos_token")
    store.mkdir(parents=True, exist_ok=True)
    remove_remains(store)
    shards = Encoding(documents, tokenizer, store).run(workers, report)
    return ((part, shard) for part, of_part in zip(documents.parts, shards, strict=True) for shard in of_part)


def _first_bits(table: np.ndarray) -> np.ndarray:
    return (table[:, KEY] >> (64 - _BITS)) + 2 ** (_BITS - 1)


def _files(part: Part) -> np.ndarray:
    return np.array([span.file for span in part])


def _write_manifest(
    folder: Path,
    form: int,
    documents: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    sizes: dict[str, dict[str, int]],
    entries: list[dict[str, Any]],
) -> None:
    manifest = {
        "format": form,
        "tokenizer": {"fingerprint": fingerprint(tokenizer), "vocab_size": len(tokenizer)},
        "python": platform.python_version() if documents.is_stdlib else None,
        "dtype": Encoding(documents, tokenizer, folder).dtype.name,
        "splits": sizes,
        "files": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
