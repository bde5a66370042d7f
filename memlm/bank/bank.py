"""``MemoryBank``: a library of documents that a model has read. Build it, change it, save it, ask it.

For models of Memory Sparse Attention (arXiv:2603.23516), where a document's kept chunks depend on it alone. A bank is
a list of shards of whole documents. A document keeps its number forever; memories refer to documents by number.

On disk, a shard never changes. ``index.json`` lists shards and deleted documents. A save replaces it last, in one
step, so a killed save leaves the old bank. A folder has one writer at a time, who must have loaded or saved its
present index.

B rows, A tokens, C chunks, G groups of H heads, K head dim, L layers that route.
"""

import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from memlm.bank.folder import INDEX, Folders, read_index, writing
from memlm.bank.ingest import (
    DocumentTokens,
    checked,
    decoder_of,
    hash_of,
    number_of,
    pairs_of,
    progress_bar,
    read_batch,
)
from memlm.bank.ranks import Ranks
from memlm.bank.shard import Shard
from memlm.bank.shelf import Shelf
from memlm.cache import MemoryCache
from memlm.fingerprint import fingerprint, made_by
from memlm.memory.state import State
from memlm.modeling import MemLMForCausalLM, MemLMModel
from memlm.roles import Roles
from memlm_kernels.route_documents import Scored, bank_keys, nominate_documents, route_documents

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

    >>> bank = memlm.MemoryBank.build(model, {"a": tokenizer("some text").input_ids}, "banks/mine")
    >>> answer = model.generate(question_ids, memory_bank=bank)

    The routers' keys stay on the model's device. The content, keys and values of attention, is fetched only for
    documents that a query may choose. Both take 1 / chunk_size of the space of a document's tokens in a cache.
    model: a model with kind ``msa`` in every layer, of which at least one routes
    content: place of the content: "mapped" (from disk, once saved), "host" (pinned for a GPU) or "device"
    key_dtype: of the routers' keys: "auto" (the model's), "float32", "bfloat16", "float16", or "float8_e4m3fn" with a
        scale per head and chunk; nearly equal scores may then change their order
    group: a torch.distributed group whose processes share the bank. All have the same model, see the bank's folder,
        and make the same calls in the same order. ``stats`` then counts the bytes of this process
    Raises ValueError if the model has no routers, or a layer of another kind.
    """

    def __init__(
        self,
        model: MemLMForCausalLM,
        tokens_per_batch: int = 4096,
        group: ProcessGroup | None = None,
        content: str = "mapped",
        key_dtype: str = "auto",
    ) -> None:
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch={tokens_per_batch} must be at least 1")
        for name, value, known in (("content", content, TIERS), ("key_dtype", key_dtype, ("auto", *KEY_DTYPES))):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        self.model, self.tokens_per_batch, self.content = model, tokens_per_batch, content
        self.key_dtype = str(model.dtype).removeprefix("torch.") if key_dtype == "auto" else key_dtype
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
        self.folders = Folders(model, content, self.ranks)

    @classmethod
    def build(
        cls,
        model: MemLMForCausalLM,
        documents: DocumentTokens,
        directory: str | Path | None = None,
        tokens_per_batch: int = 4096,
        progress: bool = True,
        group: ProcessGroup | None = None,
        content: str = "mapped",
        key_dtype: str = "auto",
    ) -> "MemoryBank":
        """Read documents, a mapping or an iterable of pairs (name, token ids), ``tokens_per_batch`` tokens at a time.

        directory: the bank is saved here while it grows. The same call continues a build that was killed: it reads
            only missing documents, and drops documents that are no longer given

        Raises ValueError if the directory holds a finished bank or one of another model.
        """
        bank = cls(model, tokens_per_batch, group, content, key_dtype)
        if directory is None:
            bank._build(documents, progress, None)
        else:
            with writing(Path(directory), bank.ranks):
                bank._build(documents, progress, Path(directory))
        return bank

    def _build(self, documents: DocumentTokens, progress: bool, directory: Path | None) -> None:
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
        total = len(documents) if isinstance(documents, Sized) else None
        for shard in self._read(self._not_read(documents, given), progress, total):
            self.shelf.append(shard)
            if directory is not None and self.ranks.told(time.monotonic() - committed >= COMMIT_SECONDS):
                self._save(directory, complete=False)
                committed = time.monotonic()
        self.delete([name for name in self.documents() if name not in given])
        if directory is not None:
            self._save(directory, complete=True)

    def add(self, documents: DocumentTokens) -> None:
        """Read new documents, all or none. Raises ValueError if a name exists."""
        self.check(self.model)
        for shard in list(self._read(self._new(documents), progress=False)):
            self.shelf.append(shard)

    def update(self, documents: DocumentTokens) -> None:
        """Read changed documents again, all or none; they move to the end. Unchanged documents cost nothing.

        Raises ValueError if a name does not exist.
        """
        self.check(self.model)
        changed = {}
        for name, tokens in pairs_of(documents):
            self._known(name)
            tokens = checked(name, tokens, self.model.config.vocab_size)
            if not self._holds(name, tokens):
                changed[name] = tokens
        new = list(self._read(changed.items(), progress=False))
        self.delete(changed)
        for shard in new:
            self.shelf.append(shard)

    def delete(self, names: str | Iterable[str]) -> None:
        """Delete documents, all or none. Raises ValueError if a name does not exist."""
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in names:
            self._known(name)
        self.shelf.delete(names)

    def documents(self) -> list[str]:
        """The names, in the order of reading."""
        return self.shelf.names()

    def __contains__(self, name: str) -> bool:
        return name in self.shelf

    def __len__(self) -> int:
        return len(self.shelf)

    def stats(self) -> dict[str, Any]:
        """Counts and bytes: documents, tokens, chunks; dead_chunks (deleted, not yet removed); shards; key_dtype and
        content as given; and of this process device_bytes (with the routers' keys), host_bytes and disk_bytes
        (mapped).
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
        index = Ranks(group).first(lambda: read_index(Path(directory)))
        bank = cls(model, group=group, content=content, key_dtype=index["key_dtype"])
        if not index["complete"]:
            raise ValueError(f"{directory}: the build was not finished; run it again to continue it")
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
        self, input_ids: Tensor, doc_ids: Tensor | None = None, **inputs: Any
    ) -> dict[int, list[dict[str, float]]]:
        """The documents that each row's question reads, and their scores, best first: layer -> a dict per row.

        >>> name, score = next(iter(bank.search(question_ids)[layer][0].items()))  # the best of the first row
        input_ids [B, T], doc_ids, inputs: as for ``generate``
        """
        roles = Roles.query(self, input_ids) if doc_ids is None else Roles(doc_ids, bank=self)
        memory, found = MemoryCache(), {}
        decoder_of(self.model)(input_ids, roles=roles, past_key_values=memory, **inputs)
        for layer, settings in zip(self.layers, self.settings, strict=True):
            bank = memory.states[layer]["bank"]
            chunks = bank["size"].shape[1]
            document_BC = torch.where(bank["size"] > 0, bank["document"], chunks)
            # The choice that tokens after the question see.
            routes = route_documents(
                None,
                bank["router_k"],
                document_BC,
                num_documents=chunks,
                scored=Scored(bank["score"], bank["asked"]),
                **{name: settings[name] for name in _RULE},
            )
            # Find each document by its first chunk; an empty bank has none.
            first = torch.searchsorted(document_BC, routes.document[:, 0].clamp(min=0))
            numbers = F.pad(bank["number"], (0, 1), value=-1).gather(1, first)
            rows = zip(numbers.tolist(), routes.document[:, 0].tolist(), routes.score[:, 0].tolist(), strict=True)
            name = self.shelf.name
            found[layer] = [{name(n): score for n, i, score in zip(*row, strict=True) if i >= 0} for row in rows]
        return found

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
                **{name: config[name] for name in _RULE},
            )
        index = self.ranks.best(index, score, config["top_k"])
        return [{*row} - {-1} for row in index.flatten(1).tolist()]

    def _new(self, documents: DocumentTokens) -> Iterator[tuple[str, Tensor]]:
        given = set()
        for name, tokens in pairs_of(documents):
            if name in self or name in given:
                raise ValueError(f"documents[{name!r}] is in the bank already; update it, or give it another name")
            given.add(name)
            yield name, checked(name, tokens, self.model.config.vocab_size)

    def _not_read(self, documents: DocumentTokens, given: set[str]) -> Iterator[tuple[str, Tensor]]:
        """The documents that a build has not read yet. Adds all names to ``given``."""
        for name, tokens in pairs_of(documents):
            if name in given:
                raise ValueError(f"documents[{name!r}] is given twice; names must differ")
            given.add(name)
            tokens = checked(name, tokens, self.model.config.vocab_size)
            if name in self:
                if self._holds(name, tokens):
                    continue
                self.delete(name)
            yield name, tokens

    def _known(self, name: str) -> None:
        if name not in self:
            raise ValueError(f"document {name!r} is not in the bank of {len(self)}; see bank.documents()")

    def _holds(self, name: str, tokens: Tensor) -> bool:
        shard, i = self.shelf.find(name)
        return shard.hashes[i] == hash_of(tokens)

    def _read(
        self, documents: Iterable[tuple[str, Tensor]], progress: bool, total: int | None = None
    ) -> Iterator[Shard]:
        """Yields a shard for every few batches; total: the number of documents, if known, for the progress bar."""
        ahead: list[tuple[str, Tensor]] = []
        size = 0
        with progress_bar(progress, total) as advance:
            for name, tokens in documents:
                if ahead and size + len(tokens) > AHEAD * self.tokens_per_batch:
                    yield self._shard(ahead)
                    ahead, size = [], 0
                ahead.append((name, tokens))
                size += len(tokens)
                advance(len(tokens))
            if ahead:
                yield self._shard(ahead)

    def _shard(self, pairs: list[tuple[str, Tensor]]) -> Shard:
        names, documents = zip(*pairs, strict=True)
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
        table = list(names), hashes, lengths_N.tolist(), numbers
        shard = Shard(torch.stack(of_keys), scale, content[:, back_C], *table, self.chunk_size, alive_N, own_N)
        return shard.housed(self.content, self.model.device)

    def _save(self, directory: Path, complete: bool) -> None:
        said = {"fingerprint": self.fingerprint, "key_dtype": self.key_dtype, "complete": complete, "read": self.read}
        self.shelf.exchange(self.folders.save(directory, self.shelf.shards, said))

    def _open(self, directory: Path, verify: bool = False) -> None:
        index, shards = self.folders.open(directory, self.chunk_size, verify)
        self.read = index["read"]
        self.shelf.fill(shards)
