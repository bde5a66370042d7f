"""The shards of a bank, and the place of each document in them.

Deletion only marks a document. A shard is rewritten when half of its chunks are deleted, and, before a save, if it
holds the text of a deleted document. The last two shards are
merged while they are small and the later one has at least half the chunks of the other, so there are few shards.

C chunks, G groups of heads, K head dim, N documents.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memlm.bank.ranks import Ranks
from memlm.bank.resident import Resident
from memlm.bank.shard import Shard, merged, sent
from memlm.memory.state import State
from memlm.modeling import MemLMForCausalLM
from memlm_kernels.route_documents import RouterShard

# Larger shards are not merged: this bounds the cost of adding or deleting one document.
SHARD_BYTES = 1 << 25


class Shelf:
    """Shards in the order of their documents' numbers; content: its place, see ``MemoryBank``."""

    def __init__(self, model: MemLMForCausalLM, content: str, chunk_size: int, ranks: Ranks) -> None:
        self.model, self.content, self.chunk_size, self.ranks = model, content, chunk_size, ranks
        self.shards: list[Shard] = []
        self.resident = Resident(model.device) if model.device.type != "cpu" else None
        self._home: dict[str, Shard] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __len__(self) -> int:
        return len(self._home)

    def names(self) -> list[str]:
        """The documents, in the order of reading."""
        return [name for shard in self.shards for name in shard.living()]

    def stats(self) -> dict[str, Any]:
        """The counts and bytes of ``MemoryBank.stats``."""
        live, content = sum(s.live_chunks for s in self.shards), {"mapped": 0, "host": 0, "device": 0}
        keys = sum(x.nbytes for s in self.shards for x in (s.router_LCGK, s.scale_LCG1) if x is not None)
        for shard in self.shards:
            tier = "mapped" if shard.mapped else "device" if self.content == "device" else "host"
            content[tier] += shard.content_LC2GK.nbytes
        return {
            "documents": len(self),
            "tokens": sum(int(s.tokens_N[s.alive_N].sum()) for s in self.shards),
            "chunks": live,
            "dead_chunks": sum(s.chunks for s in self.shards) - live,
            "shards": len(self.shards),
            "text_bytes": sum(s.text_X.nbytes for s in self.shards),
            "device_bytes": (keys if self.resident is None else self.resident.nbytes) + content["device"],
            "host_bytes": content["host"],
            "disk_bytes": content["mapped"],
        }

    def find(self, name: str) -> tuple[Shard, int]:
        """The shard and the index of a document."""
        shard = self._home[name]
        return shard, shard.place[name]

    def name(self, number: int) -> str:
        shard, i = self._place(number)
        return shard.names[i]

    def _place(self, number: int) -> tuple[Shard, int]:
        """The shard and the index of a document that is not deleted."""
        at = bisect.bisect_right(self.shards, number, key=lambda shard: shard.numbers[0]) - 1
        return self.shards[at], bisect.bisect_left(self.shards[at].numbers, number)

    def fill(self, shards: list[Shard]) -> None:
        """Take the shards of a folder."""
        self.shards = shards
        for shard in shards:
            self._home |= dict.fromkeys(shard.living(), shard)
        if self.resident is not None:
            expected = sum(shard.router_LCGK.shape[1] for shard in shards)
            for shard in shards:
                self.resident.append(shard, expected)

    def exchange(self, saved: list[Shard]) -> None:
        """Take the same shards as they were saved."""
        for old, new in zip(self.shards, saved, strict=True):
            if new is not old:
                self._home |= dict.fromkeys(new.living(), new)
        self.shards = saved

    def append(self, shard: Shard) -> None:
        if self.resident is not None:
            self.resident.append(shard)
        self.shards.append(shard)
        self._home |= dict.fromkeys(shard.living(), shard)
        while len(self.shards) > 1:
            a, b = self.shards[-2:]
            if b.chunks * 2 < a.chunks or a.nbytes + b.nbytes > SHARD_BYTES:
                return
            self._replace(len(self.shards) - 2, len(self.shards))

    def delete(self, names: Iterable[str]) -> None:
        touched = {}
        for name in names:
            shard = self._home.pop(name)
            shard.delete(name)
            if self.resident is not None:
                self.resident.forget(shard.numbers[shard.place[name]])
            touched[id(shard)] = shard
        for shard in touched.values():
            if shard.live_chunks * 2 <= shard.chunks:
                at = next(i for i, other in enumerate(self.shards) if other is shard)
                self._replace(at, at + 1)

    def drop_texts(self) -> None:
        """Rewrite the shards that hold the text of a deleted document."""
        for at in reversed(range(len(self.shards))):
            dead = (~self.shards[at].alive_N).nonzero()[:, 0].tolist()
            if any(self.shards[at].lengths[i] > 0 for i in dead):
                self._replace(at, at + 1)

    def _replace(self, start: int, end: int) -> None:
        """Merge neighbouring shards, without deleted documents."""
        new = merged(self.shards[start:end]).housed(self.content, self.model.device)
        self.shards[start:end] = [new] if len(new) else []
        self._home |= dict.fromkeys(new.names, new)

    def parts(self, layer: int) -> list[RouterShard]:
        """The routers' keys of this process's documents."""
        if self.resident is not None:
            return self.resident.parts(layer)
        for shard in self.shards:
            shard.check_keys()
        scales = [None if s.scale_LCG1 is None else s.scale_LCG1[layer] for s in self.shards]
        return [
            RouterShard(s.router_LCGK[layer], s.document_C, s.number_N, scale)
            for s, scale in zip(self.shards, scales, strict=True)
        ]

    def fetched(self, layer: int, numbers: Sequence[Sequence[int]], like: Tensor) -> State:
        """The result of ``BankLike.candidates`` for each row's documents; like: a tensor of the target device and
        dtype.
        """
        rows = [self._fetched_row(layer, of_row, like) for of_row in numbers]
        width = max(len(row["size"]) for row in rows)
        state = {name: torch.stack([_padded(row[name], width) for row in rows]) for name in rows[0]}
        k, v, router_k = self.ranks.total(state.pop("kept")).unbind(2)
        return state | {"k": k, "v": v, "router_k": router_k}

    def _fetched_row(self, layer: int, numbers: Sequence[int], like: Tensor) -> State:
        """The chunks of documents: size, number, and this process's content and keys, zeros for others'."""
        none = torch.zeros(0, dtype=torch.int64)
        sizes, owners, own, contents, routers = [none], [none], [none.bool()], [], []
        for _, group in itertools.groupby(map(self._place, numbers), key=lambda place: id(place[0])):
            (shard, *_), places = zip(*group, strict=True)
            local_N = torch.tensor(places)
            count_N, own_N = shard.count_N[local_N], shard.own_N[local_N]
            content, router = shard.kept(layer, local_N[own_N])
            contents.append(content)
            routers.append(router)
            before = torch.arange(int(count_N.sum())) - (count_N.cumsum(0) - count_N).repeat_interleave(count_N)
            left = shard.tokens_N[local_N].repeat_interleave(count_N) - before * self.chunk_size
            sizes.append(left.clamp(max=self.chunk_size))
            owners.append(shard.number_N[local_N].repeat_interleave(count_N))
            own.append(own_N.repeat_interleave(count_N))
        own_C, config = torch.cat(own), self.model.config
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (len(own_C), 3, config.num_key_value_heads, config.head_dim)
        kept = torch.zeros(shape, device=like.device, dtype=dtype)
        if contents:
            parts = sent(torch.cat(contents), like.device), sent(torch.cat(routers)[:, None], like.device)
            kept[sent(own_C.nonzero()[:, 0], like.device)] = torch.cat([x.to(dtype) for x in parts], 1)
        integers = {"size": torch.cat(sizes), "number": torch.cat(owners)}
        return {"kept": kept, **{name: sent(x, like.device) for name, x in integers.items()}}


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])
