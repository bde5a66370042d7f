"""A part of a bank: whole documents, as the means of their chunks. Only deletions change a shard.

The content, which attention reads, is on disk (mapped from the bank's file), in host memory, or on the model's device.
If several processes share a bank, each has every shard's table of documents, and the keys of its own documents.

L layers that route, C chunks, G groups of heads, K head dim, N documents.
"""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from memlm import files
from memlm.bank.ranks import Ranks
from memlm.fingerprint import digest_of
from memlm_kernels.route_documents import restored_keys

# Pages of ``sample_of``, spread evenly over the file, with its first and last.
_PAGES, _PAGE_BYTES = 64, 4096
# Columns of the table of documents.
_TABLE = ("names", "hashes", "tokens", "numbers", "sources", "added", "lengths")
_KEYS = ("router", "scale")
_ADVICE = "restore the file, or build the bank again in an empty folder"


@dataclass
class Shard:
    """router_LCGK, scale_LCG1: router keys from ``bank_keys``, on the host, of this process's documents
    content_LC2GK: attention's keys and values of these documents; if ``mapped``, of all processes' documents
    names, hashes, tokens, numbers: one per document, in the order of their chunks; numbers ascend over all shards
    sources, added: as in ``About``; lengths: bytes of the documents' texts, -1 for documents without text
    text_X: the texts in UTF-8, one after the other, of all processes' documents
    alive_N: false for deleted documents; own_N: false for documents of other processes
    file, sample: the shard's file and its ``sample_of``
    unchecked: digests of mapped tensors that were not read in full yet
    """

    router_LCGK: Tensor
    scale_LCG1: Tensor | None
    content_LC2GK: Tensor
    names: list[str]
    hashes: list[str]
    tokens: list[int]
    numbers: list[int]
    sources: list[str]
    added: list[float]
    lengths: list[int]
    text_X: Tensor
    chunk_size: int
    alive_N: Tensor
    own_N: Tensor
    mapped: bool = False
    file: Path | None = None
    sample: str = ""
    unchecked: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens_N, self.number_N = (torch.tensor(x, dtype=torch.int64) for x in (self.tokens, self.numbers))
        self.count_N = (self.tokens_N + self.chunk_size - 1) // self.chunk_size
        own_count_N = self.count_N * self.own_N
        self.first_N = own_count_N.cumsum(0) - own_count_N
        self.content_first_N = self.count_N.cumsum(0) - self.count_N if self.mapped else self.first_N
        place_N = torch.where(self.alive_N, torch.arange(len(self)), -1)
        self.document_C = place_N.repeat_interleave(own_count_N)
        self.text_end_N = torch.tensor(self.lengths, dtype=torch.int64).clamp(min=0).cumsum(0)
        self.place = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        """Number of documents, deleted ones too."""
        return len(self.names)

    @property
    def chunks(self) -> int:
        """Number of chunks of all processes."""
        return int(self.count_N.sum())

    @property
    def live_chunks(self) -> int:
        return int(self.count_N[self.alive_N].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all processes."""
        layers, _, groups, width = self.router_LCGK.shape
        kept = self.router_LCGK.element_size() + 2 * self.content_LC2GK.element_size()
        scales = 0 if self.scale_LCG1 is None else self.scale_LCG1.element_size()
        return self.chunks * layers * groups * (width * kept + scales) + self.text_X.nbytes

    def living(self) -> list[str]:
        return [self.names[i] for i in self.alive_N.nonzero()[:, 0].tolist()]

    def table(self) -> dict[str, list[Any]]:
        """The columns of the table of documents, deleted ones too."""
        return {name: getattr(self, name) for name in _TABLE}

    def text_of(self, i: int) -> Tensor:
        """The bytes of a document's text."""
        end = int(self.text_end_N[i])
        return self.text_X[end - max(0, self.lengths[i]) : end]

    def delete(self, name: str) -> None:
        i = self.place[name]
        self.alive_N[i] = False
        if self.own_N[i]:
            self.document_C[self.first_N[i] : self.first_N[i] + self.count_N[i]] = -1

    def chunks_of(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the chunks of this process's documents, in order: among router keys, and in the content."""
        count = self.count_N[documents]
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        first = (
            self.first_N[documents].repeat_interleave(count),
            self.content_first_N[documents].repeat_interleave(count),
        )
        return first[0] + within, first[1] + within

    def kept(self, layer: int, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Content [C, 2, G, K], where it is kept, and router keys [C, G, K], of this process's documents."""
        of_router, of_content = self.chunks_of(documents)
        scale = None if self.scale_LCG1 is None else self.scale_LCG1[layer, of_router]
        content = self.content_LC2GK[layer]
        return content[of_content.to(content.device)], restored_keys(self.router_LCGK[layer, of_router], scale)

    def housed(self, content: str, device: torch.device) -> "Shard":
        """The shard with its content moved to where ``content`` of ``MemoryBank`` puts it; "mapped" moves nothing."""
        if content == "mapped":
            return self
        self.check("content")
        _, chunks = self.chunks_of(self.own_N.nonzero()[:, 0])
        kept = self.content_LC2GK[:, chunks] if self.mapped else self.content_LC2GK
        kept = kept.to(device) if content == "device" else kept.pin_memory() if device.type == "cuda" else kept
        router, scale = self.router_LCGK, self.scale_LCG1
        if device.type == "cpu" and self.mapped:
            self.check(*_KEYS)
            # Copies of the keys; a GPU holds its own copy, so there the mapped ones are rarely read.
            router, scale = router.clone(), None if scale is None else scale.clone()
        return dataclasses.replace(self, router_LCGK=router, scale_LCG1=scale, content_LC2GK=kept, mapped=False)

    def check(self, *names: str) -> None:
        """Raise ValueError if the named tensors (default: all) differ from the saved ones. Each is read once,
        in full.
        """
        kept = {"router": self.router_LCGK, "scale": self.scale_LCG1, "content": self.content_LC2GK}
        kept["text"] = self.text_X
        for name in names or tuple(kept):
            if name in self.unchecked and digest_of([(name, kept[name])]) != self.unchecked[name]:
                raise ValueError(f"{self.file}: its {name} is not as it was saved; {_ADVICE}")
            self.unchecked.pop(name, None)

    def check_keys(self) -> None:
        if self.unchecked:
            self.check(*_KEYS)

    def write(self, directory: Path) -> tuple[Path, str]:
        """Write a file with a unique name, complete when this returns; returns it and its ``sample_of``."""
        self.check()
        path = directory / f"shard-{uuid.uuid4().hex[:16]}.safetensors"
        documents = json.dumps(self.table())
        tensors = {
            "router": self.router_LCGK,
            "content": self.content_LC2GK.cpu(),
            "text": self.text_X,
            "documents": torch.frombuffer(bytearray(documents.encode()), dtype=torch.uint8),
        }
        if self.scale_LCG1 is not None:
            tensors["scale"] = self.scale_LCG1
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        files.write_tensors(path, tensors, {name: digest_of([(name, x)]) for name, x in tensors.items()})
        return path, sample_of(path)


def without_texts(documents: int) -> dict[str, Any]:
    """The part of a shard about texts, if its documents have none."""
    columns = {"sources": [""] * documents, "added": [0.0] * documents, "lengths": [-1] * documents}
    return columns | {"text_X": torch.zeros(0, dtype=torch.uint8)}


def read_file(
    directory: Path, entry: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, list[Any]], dict[str, str]]:
    """Map the file that ``Shard.write`` wrote; entry: its entry in the index. Returns its tensors, its table of
    documents, and the digests of the tensors.

    Raises ValueError if the file has visibly changed. This does not read all of it; ``Shard.check`` does.
    """
    path = directory / entry["file"]
    try:
        sample = sample_of(path)
    except FileNotFoundError:
        # Also if another save removes it at this moment.
        raise ValueError(f"{path}: a part of the bank is missing; {_ADVICE}") from None
    if sample != entry["sample"]:
        raise ValueError(f"{path}: torn or changed since it was saved; {_ADVICE}")
    try:
        with safe_open(path, "pt") as file:
            digests = dict(file.metadata())
            kept = {name: file.get_tensor(name) for name in digests}
        documents = kept.pop("documents")
        if digest_of([("documents", documents)]) != digests.pop("documents"):
            raise ValueError("its table of documents is not as it was saved")
        table = json.loads(bytes(documents.numpy()))
        if "lengths" not in table:
            # A file of an earlier version.
            table |= without_texts(len(table["names"]))
            kept["text"] = table.pop("text_X")
        if len(kept["text"]) != sum(length for length in table["lengths"] if length > 0):
            raise ValueError("its texts are missing")
    except Exception as error:
        raise ValueError(f"{path}: not a part of a bank ({error}); {_ADVICE}") from None
    return kept, table, digests


def read_shard(directory: Path, entry: dict[str, Any], chunk_size: int, ranks: Ranks) -> Shard:
    """A shard, mapped; see ``read_file``."""
    kept, table, digests = read_file(directory, entry)
    alive_N, own_N = torch.ones(len(table["names"]), dtype=torch.bool), ranks.own(table["names"])
    alive_N[entry["deleted"]] = False
    router, scale, content, text = kept["router"], kept.get("scale"), kept["content"], kept["text"]
    rest = dict(chunk_size=chunk_size, mapped=True, file=directory / entry["file"], sample=entry["sample"])
    shard = Shard(
        router,
        scale,
        content,
        **table,
        text_X=text,
        alive_N=alive_N,
        own_N=torch.ones_like(own_N),
        unchecked=digests,
        **rest,
    )
    if own_N.all():
        return shard
    shard.check_keys()
    own_C = own_N.repeat_interleave(shard.count_N)
    router, scale = router[:, own_C], None if scale is None else scale[:, own_C]
    return dataclasses.replace(shard, router_LCGK=router, scale_LCG1=scale, own_N=own_N)


def merged(shards: Sequence[Shard]) -> Shard:
    """One shard, not mapped, of several shards' documents without the deleted ones."""
    table, routers, scales, contents, own = {name: [] for name in _TABLE}, [], [], [], []
    texts = [torch.zeros(0, dtype=torch.uint8)]
    for shard in shards:
        shard.check()
        living = shard.alive_N.nonzero()[:, 0]
        own.append(shard.own_N[living])
        of_router, of_content = shard.chunks_of(living[own[-1]])
        routers.append((shard.router_LCGK, of_router))
        scales.append((shard.scale_LCG1, of_router))
        contents.append((shard.content_LC2GK, of_content))
        for name, of_all in table.items():
            of_all.extend(getattr(shard, name)[i] for i in living.tolist())
        texts += [shard.text_of(i) for i in living.tolist()]
    router, content = _joined(routers), _joined(contents)
    scale = None if shards[0].scale_LCG1 is None else _joined(scales)
    own_N, size = torch.cat(own), shards[0].chunk_size
    rest = dict(text_X=torch.cat(texts), chunk_size=size, alive_N=torch.ones_like(own_N), own_N=own_N)
    return Shard(router, scale, content, **table, **rest)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The chunks at ascending indices of each [L, C, ...], concatenated with one copy."""
    of_first, _ = parts[0]
    size, start = sum(len(place) for _, place in parts), 0
    joined = of_first.new_empty(len(of_first), size, *of_first.shape[2:])
    for x, place in parts:
        into = joined[:, start : start + len(place)]
        start += len(place)
        if len(place) == x.shape[1]:
            into.copy_(x)
            continue
        for layer, of_layer in zip(x, into, strict=True):
            torch.index_select(layer, 0, place.to(x.device), out=of_layer)
    return joined


def whole(shard: Shard, device: torch.device, ranks: Ranks) -> Shard:
    """The shard with the content of all processes. All of them must call it."""
    if ranks.size == 1:
        return shard
    own_C = shard.own_N.repeat_interleave(shard.count_N).to(device)

    def of_all(x: Tensor) -> Tensor:
        full = torch.zeros(len(x), shard.chunks, *x.shape[2:], dtype=x.dtype, device=device)
        full[:, own_C] = x.to(device)
        return ranks.total(full).cpu()

    content = shard.content_LC2GK if shard.mapped else of_all(shard.content_LC2GK)
    scale = None if shard.scale_LCG1 is None else of_all(shard.scale_LCG1)
    own_N = torch.ones_like(shard.own_N)
    router = of_all(shard.router_LCGK)
    return dataclasses.replace(shard, router_LCGK=router, scale_LCG1=scale, content_LC2GK=content, own_N=own_N)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. On the way to a GPU it is pinned, so that the host does not wait.

    torch reuses pinned memory only after the GPU has read it.
    """
    staged = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return staged.to(device, non_blocking=True)


def sample_of(path: Path) -> str:
    """A digest of a file's size and 64 of its pages; it detects a truncated file or a large missing part."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_PAGES):
            file.seek((size - min(size, _PAGE_BYTES)) * i // (_PAGES - 1))
            digest.update(file.read(_PAGE_BYTES))
    return digest.hexdigest()[:32]
