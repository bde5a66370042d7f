"""A part of a bank: some documents, whole, as the means of their chunks. Shards never change but for deletions.

What attention sees of them may live on disk (a file of the bank, mapped), in host memory, or on the model's device.

Where several processes share a bank, each has every shard's table of documents, and the keys of its own documents.

L layers that route, C chunks, G groups of heads, K head dim, N documents.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memlm.bank.ranks import Ranks
from memlm_kernels.route_documents import restored_keys

# Of a file, spread evenly over it, the first and the last among them.
_PAGES, _PAGE_BYTES = 64, 4096
# Of each document.
_TABLE = ("names", "hashes", "tokens", "numbers")


@dataclass
class Shard:
    """router_LCGK, scale_LCG1: keys of the router as ``bank_keys``, on the host, of this process's documents
    content_LC2GK: keys and values of attention, likewise, or wherever they live; if ``mapped`` of all processes'
    names, hashes, tokens, numbers: of each document, in the order of their chunks; numbers ascend over all shards
    alive_N: False for the deleted; own_N: False for other processes'
    file, digest: where all of it is saved
    """

    router_LCGK: Tensor
    scale_LCG1: Tensor | None
    content_LC2GK: Tensor
    names: list[str]
    hashes: list[str]
    tokens: list[int]
    numbers: list[int]
    chunk_size: int
    alive_N: Tensor
    own_N: Tensor
    mapped: bool = False
    file: Path | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        self.tokens_N, self.number_N = (torch.tensor(x, dtype=torch.int64) for x in (self.tokens, self.numbers))
        self.count_N = (self.tokens_N + self.chunk_size - 1) // self.chunk_size
        own_count_N = self.count_N * self.own_N
        self.first_N = own_count_N.cumsum(0) - own_count_N
        self.content_first_N = self.count_N.cumsum(0) - self.count_N if self.mapped else self.first_N
        place_N = torch.where(self.alive_N, torch.arange(len(self)), -1)
        self.document_C = place_N.repeat_interleave(own_count_N)
        self.place = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        """Documents, deleted ones too."""
        return len(self.names)

    @property
    def chunks(self) -> int:
        """Of all processes."""
        return int(self.count_N.sum())

    @property
    def live_chunks(self) -> int:
        return int(self.count_N[self.alive_N].sum())

    @property
    def nbytes(self) -> int:
        """Of all processes."""
        layers, _, groups, width = self.router_LCGK.shape
        kept = self.router_LCGK.element_size() + 2 * self.content_LC2GK.element_size()
        scales = 0 if self.scale_LCG1 is None else self.scale_LCG1.element_size()
        return self.chunks * layers * groups * (width * kept + scales)

    def living(self) -> list[str]:
        return [self.names[i] for i in self.alive_N.nonzero()[:, 0].tolist()]

    def delete(self, name: str) -> None:
        i = self.place[name]
        self.alive_N[i] = False
        if self.own_N[i]:
            self.document_C[self.first_N[i] : self.first_N[i] + self.count_N[i]] = -1

    def chunks_of(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the chunks of documents of this process, in their order: in router and in content."""
        count = self.count_N[documents]
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        first = (
            self.first_N[documents].repeat_interleave(count),
            self.content_first_N[documents].repeat_interleave(count),
        )
        return first[0] + within, first[1] + within

    def kept(self, layer: int, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Of documents of this process, content [C, 2, G, K], where it lives, and the router's keys [C, G, K]."""
        of_router, of_content = self.chunks_of(documents)
        scale = None if self.scale_LCG1 is None else self.scale_LCG1[layer, of_router]
        content = self.content_LC2GK[layer]
        return content[of_content.to(content.device)], restored_keys(self.router_LCGK[layer, of_router], scale)

    def housed(self, content: str, device: torch.device) -> "Shard":
        """The same with its content where it is to live, see ``MemoryBank``; unless that is mapped already."""
        if content == "mapped":
            return self
        _, chunks = self.chunks_of(self.own_N.nonzero()[:, 0])
        kept = self.content_LC2GK[:, chunks] if self.mapped else self.content_LC2GK
        kept = kept.to(device) if content == "device" else kept.pin_memory() if device.type == "cuda" else kept
        router, scale = self.router_LCGK, self.scale_LCG1
        if device.type == "cpu" and self.mapped:
            # A GPU has keys of its own, so that these are hardly read.
            router, scale = router.clone(), None if scale is None else scale.clone()
        return dataclasses.replace(self, router_LCGK=router, scale_LCG1=scale, content_LC2GK=kept, mapped=False)

    def write(self, directory: Path) -> Path:
        """A file of a name that no other has, whole once this returns."""
        path = directory / f"shard-{uuid.uuid4().hex[:16]}.safetensors"
        documents = json.dumps({name: getattr(self, name) for name in _TABLE})
        tensors = {
            "router": self.router_LCGK,
            "content": self.content_LC2GK.cpu(),
            "documents": torch.frombuffer(bytearray(documents.encode()), dtype=torch.uint8),
        }
        if self.scale_LCG1 is not None:
            tensors["scale"] = self.scale_LCG1
        save_file({name: x.contiguous() for name, x in tensors.items()}, path)
        sync(path)
        return path


def read_shard(path: Path, digest: str, deleted: Sequence[int], chunk_size: int, ranks: Ranks) -> Shard:
    """What ``Shard.write`` wrote, mapped. Raises ValueError if the file is not as it was."""
    advice = "restore the file, or build the bank again in an empty folder"
    if not path.exists():
        raise ValueError(f"{path}: a part of the bank is missing; {advice}")
    if digest_of(path) != digest:
        raise ValueError(f"{path}: torn or changed since it was saved; {advice}")
    try:
        with safe_open(path, "pt") as file:
            router, content, documents = (file.get_tensor(name) for name in ("router", "content", "documents"))
            scale = file.get_tensor("scale") if "scale" in file.keys() else None  # noqa: SIM118
            table = json.loads(bytes(documents.numpy()))
    except Exception as error:
        raise ValueError(f"{path}: not a part of a bank ({error}); {advice}") from None
    alive_N, own_N = torch.ones(len(table["names"]), dtype=torch.bool), ranks.own(table["names"])
    alive_N[list(deleted)] = False
    if not own_N.all():
        count_N = (torch.tensor(table["tokens"]) + chunk_size - 1) // chunk_size
        own_C = own_N.repeat_interleave(count_N)
        router, scale = router[:, own_C], None if scale is None else scale[:, own_C]
    return Shard(
        router,
        scale,
        content,
        **table,
        chunk_size=chunk_size,
        alive_N=alive_N,
        own_N=own_N,
        mapped=True,
        file=path,
        digest=digest,
    )


def merged(shards: Sequence[Shard]) -> Shard:
    """One shard of what lives in several, none of it mapped."""
    table, routers, scales, contents, own = {name: [] for name in _TABLE}, [], [], [], []
    for shard in shards:
        living = shard.alive_N.nonzero()[:, 0]
        own.append(shard.own_N[living])
        of_router, of_content = shard.chunks_of(living[own[-1]])
        routers.append((shard.router_LCGK, of_router))
        scales.append((shard.scale_LCG1, of_router))
        contents.append((shard.content_LC2GK, of_content))
        for name, of_all in table.items():
            of_all.extend(getattr(shard, name)[i] for i in living.tolist())
    router, content = _joined(routers), _joined(contents)
    scale = None if shards[0].scale_LCG1 is None else _joined(scales)
    own_N, size = torch.cat(own), shards[0].chunk_size
    return Shard(router, scale, content, **table, chunk_size=size, alive_N=torch.ones_like(own_N), own_N=own_N)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One after the other the chunks at some places, ascending, of each of several [L, C, ...]; copied once."""
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
    """The same with what all processes have of it. Every one must call it."""
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
    """On a device; to a GPU by way of pinned memory, so that nobody waits for it.

    Torch lends the same pinned memory out again and again, but only once a GPU has read it.
    """
    staged = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return staged.to(device, non_blocking=True)


def digest_of(path: Path) -> str:
    """Of a file's size and some of its pages: a file cut, or with a stretch missing, has another."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_PAGES):
            file.seek((size - min(size, _PAGE_BYTES)) * i // (_PAGES - 1))
            digest.update(file.read(_PAGE_BYTES))
    return digest.hexdigest()[:32]


def sync(path: Path) -> None:
    """Until a file, or the names in a folder, would outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
