"""The folder of a bank: one writer, an index that is replaced in one step, and the files that it names."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from memlm import files
from memlm.bank.ingest import decoder_of
from memlm.bank.ranks import Ranks
from memlm.bank.shard import Shard, read_file, read_shard, whole
from memlm.bank.texts import About, Wording, abouts
from memlm.fingerprint import fingerprint, made_by
from memlm.modeling import MemLMForCausalLM

INDEX = "index.json"
_OURS = re.compile(
    r"(shard-[0-9a-f]{16}\.safetensors|tokenizer-[0-9a-f]{16})(\.partial-\w+)?|index\.json\.partial-\w+"
)


@contextmanager
def writing(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder's lock, together with all processes of a group. Raises ValueError if another process
    holds it.
    """
    with ExitStack() as held:
        ranks.first(lambda: held.enter_context(files.lock(directory)) or True)
        yield


def read_index(directory: Path) -> dict[str, Any]:
    """The index: fingerprint, key_dtype, complete, read; model, the checkpoint, and tokenizer, its folder, null if
    there is none; shards (file, sample, deleted); digest, of all these.
    """
    path, advice = directory / INDEX, "restore it, or build the bank in another folder"
    if not path.exists():
        raise ValueError(f"{path}: no such file; a bank is written by MemoryBank.save")
    try:
        index = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; it is damaged or not a bank's: {advice}") from None
    if "digest" not in index:
        raise ValueError(f"{path}: not a bank's, or of an earlier version; build the bank in another folder")
    if index["digest"] != _digest(index):
        raise ValueError(f"{path}: damaged, or changed by hand; {advice}")
    return index


def read_finished(directory: Path) -> dict[str, Any]:
    """``read_index`` of a bank whose build has ended."""
    index = read_index(directory)
    if not index["complete"]:
        raise ValueError(f"{directory}: the build was not finished; run it again to continue it")
    return index


def listed(directory: str | Path) -> list[About]:
    """Facts on the documents of a saved bank, in the order of reading, without its model."""
    directory, found = Path(directory), list[About]()
    for entry in read_finished(directory)["shards"]:
        deleted = {*entry["deleted"]}
        found += [about for i, about in enumerate(abouts(read_file(directory, entry)[1])) if i not in deleted]
    return found


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Replace the index in one step, then remove the shards that it does not name, also those of killed saves.

    Only the holder of the lock writes, so no other save needs them. A process that is loading by the old index starts
    over.
    """
    files.sync(directory)
    files.write(directory / INDEX, json.dumps(index))
    drop(directory, (path for path in directory.iterdir() if _OURS.fullmatch(path.name)))


def drop(directory: Path, paths: Iterable[Path]) -> None:
    """Unlink the files among ``paths`` that the index does not name."""
    index = read_index(directory) if (directory / INDEX).exists() else {"shards": []}
    kept = {index.get("tokenizer"), *(entry["file"] for entry in index["shards"])}
    for path in paths:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _digest(index: dict[str, Any]) -> str:
    said = json.dumps({name: value for name, value in index.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


class Folders:
    """The folders that one bank is saved in. It replaces only indices that it has read or written."""

    def __init__(self, model: MemLMForCausalLM, content: str, ranks: Ranks, wording: Wording) -> None:
        self.model, self.content, self.ranks, self.wording = model, content, ranks, wording
        # Digests of the indices that this bank has loaded or written.
        self._known: set[str] = set()

    def save(self, directory: Path, shards: Sequence[Shard], said: dict[str, Any]) -> list[Shard]:
        """Write the shards that have no file yet, and an index with the entries of ``said``; the caller holds the
        lock.

        Returns the shards as saved. Raises ValueError if the folder holds another bank.
        """
        directory = directory.resolve()
        self.ranks.first(lambda: self._may_replace(directory))
        saved, written = [], list[Path]()
        try:
            for shard in shards:
                there = self.ranks.first(lambda file=shard.file: file and file.parent == directory and file.exists())
                saved.append(shard if there else self._written(shard, directory, written))
            entries = [_entry(shard.file, shard.sample, shard) for shard in saved]
            tokenizer = self.ranks.first(lambda: self.wording.save(directory))
            index = said | {"tokenizer": tokenizer, "shards": entries}
            index["digest"] = _digest(index)
            # Known from here on: the index may be on disk even if the next lines fail.
            self._known.add(index["digest"])
            self.ranks.first(lambda: write_index(directory, index))
        except BaseException:
            drop(directory, written)
            raise
        return saved

    def _may_replace(self, directory: Path) -> None:
        if not (directory / INDEX).exists():
            return
        index = read_index(directory)
        self._same_model(directory, index)
        if index["digest"] not in self._known:
            raise ValueError(
                f"{directory}: holds a bank that this one does not know, perhaps saved by another process since; load "
                "it and change it again, or save to another folder"
            )

    def _written(self, shard: Shard, directory: Path, written: list[Path]) -> Shard:
        full = whole(shard, self.model.device, self.ranks)
        path, sample = self.ranks.first(lambda: full.write(directory))
        written.append(path)
        if self.content != "mapped":
            return dataclasses.replace(shard, file=path, sample=sample)
        # A mapped bank now reads the saved file and frees the memory.
        entry = _entry(path, sample, shard)
        return self.ranks.each(lambda: read_shard(directory, entry, shard.chunk_size, self.ranks))

    def open(self, directory: Path, chunk_size: int, verify: bool) -> tuple[dict[str, Any], list[Shard]]:
        """The index and the shards of a folder, consistent even if others save meanwhile; see ``MemoryBank.load``."""
        directory = directory.resolve()
        index = self.ranks.first(lambda: read_index(directory))
        while True:
            try:
                shards = self.ranks.each(lambda index=index: self._shards(directory, index, chunk_size, verify))
                self._known.add(index["digest"])
                self.wording.open(directory, index.get("tokenizer"))
                return index, shards
            except ValueError:
                # Another save has removed files that this index names: read the new index.
                before, index = index, self.ranks.first(lambda: read_index(directory))
                if index == before:
                    raise

    def _shards(self, directory: Path, index: dict[str, Any], chunk_size: int, verify: bool) -> list[Shard]:
        self._same_model(directory, index)
        shards = []
        for entry in index["shards"]:
            shard = read_shard(directory, entry, chunk_size, self.ranks)
            if verify:
                shard.check()
            elif self.model.device.type != "cpu":
                shard.check_keys()
            shards.append(shard.housed(self.content, self.model.device))
        return shards

    def _same_model(self, directory: Path, index: dict[str, Any]) -> None:
        if not made_by(decoder_of(self.model), index["fingerprint"]):
            raise ValueError(
                f"{directory}: a bank of the model of fingerprint {index['fingerprint']}, not "
                f"{fingerprint(decoder_of(self.model))}; give that model, or another folder"
            )


def _entry(path: Path, sample: str, shard: Shard) -> dict[str, Any]:
    return {"file": path.name, "sample": sample, "deleted": (~shard.alive_N).nonzero()[:, 0].tolist()}
