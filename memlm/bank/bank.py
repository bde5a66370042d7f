"""``MemoryBank``: a library of documents that a model has read. Build it, change it, save it, ask it.

For models of Memory Sparse Attention (arXiv:2603.23516), where a document's kept chunks depend on it alone. A bank is
a list of shards of whole documents. A document keeps its number forever; memories refer to documents by number.

On disk, a shard never changes. ``index.json`` lists shards and deleted documents. A save replaces it last, in one
step, so a killed save leaves the old bank. A folder has one writer at a time, who must have loaded or saved its
present index.

B rows, A tokens, C chunks, G groups of H heads, K head dim, L layers that route.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedTokenizerFast

from memlm.bank.ask import BARE, Reply, ask, readings
from memlm.bank.folder import INDEX, Folders, read_finished, read_index, writing
from memlm.bank.ingest import (
    Entry,
    Given,
    GivenDocuments,
    decoder_of,
    entry_of,
    hash_of,
    number_of,
    origin_of,
    pairs_of,
    progress_bar,
    read_batch,
)
from memlm.bank.ranks import Ranks
from memlm.bank.shard import Shard
from memlm.bank.shelf import Shelf
from memlm.bank.texts import Wording
from memlm.cache import MemoryCache
from memlm.configuration import MemLMConfig
from memlm.data import Templates
from memlm.fingerprint import fingerprint, made_by
from memlm.memory.state import State
from memlm.modeling import MemLMForCausalLM, MemLMModel
from memlm.roles import Roles
from memlm.settings import suggest
from memlm_kernels.route_documents import bank_keys, nominate_documents

_RULE = ("top_k", "similarity", "head_reduce", "query_reduce", "chunk_reduce")
# Documents are sorted by length within so many batches, so that batches need little padding.
AHEAD = 4
# Seconds of a build that a kill may lose.
COMMIT_SECONDS = 30.0
# Places of the content, and dtypes of the routers' keys (float64 for models in float64).
TIERS = ("mapped", "host", "device")
KEY_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn")}


class MemoryBank:
    """Documents by name, for one model; ``model.generate(question, memory_bank=bank)`` asks it.

    >>> bank = memlm.MemoryBank.build(model, {"a": "some text"}, "banks/mine", tokenizer=tokenizer)
    >>> bank.ask("a question").text

    The routers' keys stay on the model's device. The content, keys and values of attention, is fetched only for
    documents that a query may choose. Both take 1 / chunk_size of the space of a document's tokens in a cache.
    model: a model with kind ``msa`` in every layer, of which at least one routes
    content: place of the content: "mapped" (from disk, once saved), "host" (pinned for a GPU) or "device"
    key_dtype: of the routers' keys: "auto" (the model's), "float32", "bfloat16", "float16", or "float8_e4m3fn" with a
        scale per head and chunk; nearly equal scores may then change their order
    group: a torch.distributed group whose processes share the bank. All have the same model, see the bank's folder,
        and make the same calls in the same order. ``stats`` then counts the bytes of this process
    tokenizer: of the model; the bank then takes texts in place of token ids, and keeps them
    Raises ValueError if the model has no routers, or a layer of another kind.
    """

    def __init__(
        self,
        model: MemLMForCausalLM,
        tokens_per_batch: int = 4096,
        group: ProcessGroup | None = None,
        content: str = "mapped",
        key_dtype: str = "auto",
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch={tokens_per_batch} must be at least 1")
        for name, value, known in (("content", content, TIERS), ("key_dtype", key_dtype, ("auto", *KEY_DTYPES))):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        self.model, self.tokens_per_batch, self.content = model, tokens_per_batch, content
        self.key_dtype = str(model.dtype).removeprefix("torch.") if key_dtype == "auto" else key_dtype
        if not isinstance(model.config, MemLMConfig):
            raise ValueError(
                f"model: a {model.config.model_type} of transformers has no bank; use one with kind 'msa'"
            )
        settings = [model.config.mixers[name] for name in model.config.layer_mixers()]
        for mixer in settings:
            if mixer["kind"] != "msa":
                raise ValueError(
                    f"model.mixers.*.kind={mixer['kind']!r}: a bank needs 'msa' in every layer, where the kept "
                    "chunks of a document depend on it alone"
                )
        self.layers = [i for i, mixer in enumerate(settings) if mixer["routes"]]
        if not self.layers:
            raise ValueError("model.mixers.*.routes is false in every layer; a bank needs one that routes")
        self.settings = [dict(settings[i]) for i in self.layers]
        self.rules = [{name: mixer[name] for name in _RULE} for mixer in self.settings]
        sizes = sorted({mixer["chunk_size"] for mixer in self.settings})
        if len(sizes) > 1:
            raise ValueError(f"model.mixers.*.chunk_size is {sizes[0]} and {sizes[1]}; a bank needs one")
        self.chunk_size: int = sizes[0]
        self.fingerprint, self.ranks = fingerprint(decoder_of(model)), Ranks(group)
        if len(said := set(self.ranks.all_say(self.fingerprint))) > 1:
            raise ValueError(f"group: its processes have models of {len(said)} fingerprints; load one in all of them")
        # Number of documents ever read, deleted ones too.
        self.read = 0
        self.shelf = Shelf(model, content, self.chunk_size, self.ranks)
        self.wording = Wording(tokenizer)
        self.folders = Folders(model, content, self.ranks, self.wording)

    @classmethod
    def build(
        cls,
        model: MemLMForCausalLM,
        documents: GivenDocuments,
        directory: str | Path | None = None,
        tokens_per_batch: int = 4096,
        progress: bool = True,
        group: ProcessGroup | None = None,
        content: str = "mapped",
        key_dtype: str = "auto",
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> "MemoryBank":
        """Read documents, ``tokens_per_batch`` tokens at a time.

        documents: a mapping, or an iterable of pairs, of names and token ids or texts; ``memlm.data.Texts(paths)`` are
            those of files
        directory: the bank is saved here while it grows. The same call continues a build that was killed: it reads
            only missing documents, and drops documents that are no longer given

        Raises ValueError if the directory holds a finished bank or one of another model.
        """
        bank = cls(model, tokens_per_batch, group, content, key_dtype, tokenizer)
        if directory is None:
            bank._build(documents, progress, None)
        else:
            with writing(Path(directory), bank.ranks):
                bank._build(documents, progress, Path(directory))
        return bank

    def _build(self, documents: GivenDocuments, progress: bool, directory: Path | None) -> None:
        if directory is not None and self.ranks.first((directory / INDEX).exists):
            index = self.ranks.first(lambda: read_index(directory))
            if index["complete"]:
                raise ValueError(f"directory={directory} holds a finished bank; load it and add, or name another")
            if index["key_dtype"] != self.key_dtype:
                raise ValueError(
                    f"key_dtype={self.key_dtype!r}: the build in {directory} began with {index['key_dtype']!r}; name "
                    "that, or another folder"
                )
            self._open(directory)
        given: set[str] = set()
        committed = time.monotonic()
        for shard in self._read(self._not_read(documents, given), progress, _count(documents)):
            self.shelf.append(shard)
            if directory is not None and self.ranks.told(time.monotonic() - committed >= COMMIT_SECONDS):
                self._save(directory, complete=False)
                committed = time.monotonic()
        self.delete([name for name in self.documents() if name not in given])
        if directory is not None:
            self._save(directory, complete=True)

    def add(self, documents: GivenDocuments, progress: bool = False) -> None:
        """Read new documents, all or none. Raises ValueError if a name exists."""
        self._take(documents, self._unknown, progress)

    def update(self, documents: GivenDocuments, progress: bool = False) -> None:
        """Read changed documents again, all or none; they move to the end. Unchanged documents cost nothing.

        Raises ValueError if a name does not exist.
        """
        self._take(documents, self._known, progress)

    def put(self, documents: GivenDocuments, progress: bool = False) -> dict[str, int]:
        """``add`` the new ones and ``update`` the others, all or none; how many were added, updated, and unchanged."""
        return self._take(documents, lambda name: None, progress)

    def _take(self, documents: GivenDocuments, check: Callable[[str], None], progress: bool) -> dict[str, int]:
        self.check(self.model)
        kinds: dict[str, str] = {}

        def wanted() -> Iterator[Entry | None]:
            for name, given in pairs_of(documents):
                check(name)
                if name in kinds:
                    raise ValueError(f"documents[{name!r}] is given twice; names must differ")
                entry = self._entry(name, given)
                kinds[name] = "added" if name not in self else "unchanged" if self._holds(entry) else "updated"
                yield None if kinds[name] == "unchanged" else entry

        shards = list(self._read(wanted(), progress, _count(documents)))
        self.delete([name for name, kind in kinds.items() if kind == "updated"])
        for shard in shards:
            self.shelf.append(shard)
        return {kind: [*kinds.values()].count(kind) for kind in ("added", "updated", "unchanged")}

    def delete(self, names: str | Iterable[str]) -> None:
        """Delete documents, all or none. Raises ValueError if a name does not exist."""
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in names:
            self._known(name)
        self.shelf.delete(names)

    def documents(self) -> list[str]:
        """The names, in the order of reading."""
        return self.shelf.names()

    def text(self, name: str) -> str | None:
        """The text of a document; None if it was given as token ids. Raises ValueError if the file is damaged."""
        return self._text(name)[0]

    def passage(self, name: str, chunk: int) -> str | None:
        """The text of a document's chunk, counted from 0; None if the document has no text."""
        text, ids = self._text(name)
        return None if text is None else self.wording.decode(ids[chunk * self.chunk_size :][: self.chunk_size])

    def _text(self, name: str) -> tuple[str | None, Tensor]:
        self._known(name)
        shard, i = self.shelf.find(name)
        if shard.lengths[i] < 0:
            return None, torch.zeros(0, dtype=torch.int64)
        text = shard.text_of(i).numpy().tobytes().decode(errors="replace")
        ids = self.wording.ids(text)
        if hash_of(ids) != shard.hashes[i]:
            raise ValueError(f"{shard.file}: the text of {name!r} is not as it was saved; restore the file")
        return text, ids

    def __contains__(self, name: str) -> bool:
        return name in self.shelf

    def __len__(self) -> int:
        return len(self.shelf)

    def stats(self) -> dict[str, Any]:
        """Counts and bytes: documents, tokens, chunks; dead_chunks (deleted, not yet removed); shards; text_bytes;
        key_dtype and content as given; and, without texts, of this process device_bytes (with the routers' keys),
        host_bytes and disk_bytes (mapped).
        """
        return self.shelf.stats() | {"key_dtype": self.key_dtype, "content": self.content}

    def save(self, directory: str | Path) -> None:
        """Write the shards that the folder lacks, then replace its index in one step.

        Raises ValueError if the folder holds another bank, if another process has saved there since this bank was
        loaded or saved, or if another process is writing now.
        """
        with writing(Path(directory), self.ranks):
            self._save(Path(directory), complete=True)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        model: MemLMForCausalLM,
        group: ProcessGroup | None = None,
        content: str = "mapped",
        verify: bool = False,
    ) -> "MemoryBank":
        """The bank that ``save`` wrote.

        verify: read all files now and compare every bit. Otherwise ``load`` compares sizes, samples and tables of
            documents. The routers' keys are compared at their first read, the content when it is copied

        Raises ValueError if the bank belongs to another model, is not finished, or has a damaged file.
        """
        index = Ranks(group).first(lambda: read_finished(Path(directory)))
        bank = cls(model, group=group, content=content, key_dtype=index["key_dtype"])
        bank._open(Path(directory), verify)
        return bank

    def check(self, model: MemLMForCausalLM | MemLMModel) -> None:
        """Raise ValueError unless the bank was made by this model with these weights."""
        if not made_by(decoder_of(model), self.fingerprint):
            found = fingerprint(decoder_of(model))
            raise ValueError(
                f"memory_bank: made by a model of fingerprint {self.fingerprint}, not {found}; use that model, or "
                "build the bank with this one"
            )

    @torch.no_grad()
    def search(
        self, question: Tensor | str, doc_ids: Tensor | None = None, **inputs: Any
    ) -> dict[int, list[dict[str, float]]]:
        """The documents that each row's question reads, and their scores, best first: layer -> a dict per row.

        >>> name, score = next(iter(bank.search("a question")[layer][0].items()))  # the best
        question: a text, or input_ids [B, T]; doc_ids, inputs: as for ``generate``
        """
        if isinstance(question, str):
            question, doc_ids = (x.to(self.model.device) for x in self.wording.asked(question, BARE))
        roles, memory = Roles.query(self, question) if doc_ids is None else Roles(doc_ids, bank=self), MemoryCache()
        decoder_of(self.model)(question, roles=roles, past_key_values=memory, **inputs)
        found = readings(self, memory)
        return {layer: [{r.name: r.score for r in row} for row in rows] for layer, rows in found.items()}

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 64, templates: Templates = BARE) -> Reply:
        """Answer a question, greedily, and name the documents and passages that were read.

        templates: the texts around the question, as in the model's training; ``BARE``: none
        """
        return ask(self, question, max_new_tokens, templates)

    def candidates(self, layer_idx: int, q_BAHK: Tensor, asks_BA: Tensor, held_BC: Tensor) -> State:
        """See ``memlm.roles.BankLike``."""
        numbers = self._nominated(self.layers.index(layer_idx), q_BAHK, asks_BA)
        new = [sorted(set(row) - set(held)) for row, held in zip(numbers, held_BC.tolist(), strict=True)]
        return self.shelf.fetched(self.layers.index(layer_idx), new, q_BAHK)

    def _nominated(self, layer: int, q_BAHK: Tensor, asks_BA: Tensor) -> list[set[int]]:
        """Each row's candidates: the numbers of a few documents, among them all that it can choose."""
        config = self.settings[layer]
        with torch.autocast(q_BAHK.device.type, enabled=False):
            index, score = nominate_documents(
                q_BAHK,
                self.shelf.parts(layer),
                asks=asks_BA,
                running=config["routing"] == "causal",
                **self.rules[layer],
            )
        index = self.ranks.best(index, score, config["top_k"])
        return [{*row} - {-1} for row in index.flatten(1).tolist()]

    def _not_read(self, documents: GivenDocuments, given: set[str]) -> Iterator[Entry | None]:
        """The documents that a build has not read yet. Adds all names to ``given``."""
        for name, document in pairs_of(documents):
            if name in given:
                raise ValueError(f"documents[{name!r}] is given twice; names must differ")
            given.add(name)
            entry = self._entry(name, document)
            held = name in self and self._holds(entry)
            if name in self and not held:
                self.delete(name)
            yield None if held else entry

    def _entry(self, name: str, given: Given) -> Entry:
        return entry_of(name, given, self.model.config.vocab_size, self.wording.ids)

    def _unknown(self, name: str) -> None:
        if name in self:
            raise ValueError(f"documents[{name!r}] is in the bank already; update it, or give it another name")

    def _known(self, name: str) -> None:
        if name not in self:
            advice = suggest(name, self.documents(), "see bank.documents()")
            raise ValueError(f"document {name!r} is not in the bank of {len(self)}; {advice}")

    def _holds(self, entry: Entry) -> bool:
        shard, i = self.shelf.find(entry.name)
        return shard.hashes[i] == hash_of(entry.ids)

    def _read(self, documents: Iterable[Entry | None], progress: bool, total: int | None) -> Iterator[Shard]:
        """Yields a shard for every few batches; documents: None for one that need not be read; total: their number, if
        known, for the progress bar.
        """
        ahead: list[Entry] = []
        size = 0
        with progress_bar(progress, total) as advance:
            for entry in documents:
                tokens = 0 if entry is None else len(entry.ids)
                advance(tokens)
                if entry is None:
                    continue
                if ahead and size + tokens > AHEAD * self.tokens_per_batch:
                    yield self._shard(ahead)
                    ahead, size = [], 0
                ahead.append(entry)
                size += tokens
            if ahead:
                yield self._shard(ahead)

    def _shard(self, entries: list[Entry]) -> Shard:
        names, documents, texts, sources = zip(*entries, strict=True)
        own_N, lengths_N = self.ranks.own(names), torch.tensor([len(ids) for ids in documents])
        hashes, alive_N = [hash_of(ids) for ids in documents], torch.ones(len(names), dtype=torch.bool)
        numbers = [number_of(self.read + i, tokens) for i, tokens in enumerate(hashes)]
        self.read += len(names)
        order_N = lengths_N.where(own_N, -1).argsort(stable=True)[int((~own_N).sum()) :]
        batches: list[list[Tensor]] = [[]]
        for i in order_N.tolist():
            if batches[-1] and sum(map(len, batches[-1])) + len(documents[i]) > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(documents[i])
        read = [read_batch(self.model, self.layers, batch, self.tokens_per_batch) for batch in batches]
        router, content = (torch.cat(parts, 1) for parts in zip(*read, strict=True))
        # Back from the order of lengths to the given order.
        count_N = (lengths_N[order_N] + self.chunk_size - 1) // self.chunk_size
        back_C = order_N.repeat_interleave(count_N).argsort(stable=True)
        keys = [
            bank_keys(x, c["similarity"], KEY_DTYPES[self.key_dtype])
            for x, c in zip(router[:, back_C], self.settings, strict=True)
        ]
        of_keys, scales = zip(*keys, strict=True)
        scale = None if scales[0] is None else torch.stack(scales)
        kept = [b"" if text is None else text.encode() for text in texts]
        lengths = [-1 if text is None else len(of) for text, of in zip(texts, kept, strict=True)]
        table = list(names), hashes, lengths_N.tolist(), numbers, list(sources), [time.time()] * len(names), lengths
        text = torch.from_numpy(np.frombuffer(bytearray(b"".join(kept)), np.uint8))
        rest = text, self.chunk_size, alive_N, own_N
        shard = Shard(torch.stack(of_keys), scale, content[:, back_C], *table, *rest)
        return shard.housed(self.content, self.model.device)

    def _save(self, directory: Path, complete: bool) -> None:
        self.shelf.drop_texts()
        said = {"fingerprint": self.fingerprint, "key_dtype": self.key_dtype, "complete": complete, "read": self.read}
        said["model"] = origin_of(self.model)
        self.shelf.exchange(self.folders.save(directory, self.shelf.shards, said))

    def _open(self, directory: Path, verify: bool = False) -> None:
        index, shards = self.folders.open(directory, self.chunk_size, verify)
        self.read = index["read"]
        self.shelf.fill(shards)


def _count(documents: GivenDocuments) -> int | None:
    return len(documents) if isinstance(documents, Sized) else None
