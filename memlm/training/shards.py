"""Tensors that processes share: each has some rows, in a DTensor. Other tensors pass as they are."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(x: Any) -> Tensor:
    """This process's part."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Any) -> Tensor:
    """All of a tensor, or a number as a tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else torch.as_tensor(x)


def divided(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as another is."""
    return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


def at_owners(shards: Tensor, like: DTensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """``work`` on N matrices of one shape, each by one process, its owner.

    shards: [N, own rows, columns], this process's part of each; the result is too
    like: one of the matrices
    work: [n, rows, columns] -> the same shape, on the matrices that a process owns

    Two exchanges, whatever N. Copies in other groups of processes do the same work.
    """
    group = like.device_mesh.get_group(-1)
    owners, me, (count, own, columns) = dist.get_world_size(group), dist.get_rank(group), shards.shape
    most = -(-like.shape[0] // owners)
    rows = [min(most, max(0, like.shape[0] - i * most)) for i in range(owners)]
    assert rows[me] == own
    owned = [len(part) for part in torch.arange(count).tensor_split(owners)]
    sent, got = [n * own * columns for n in owned], [owned[me] * r * columns for r in rows]
    parts, result = shards.new_empty(sum(got)), torch.empty_like(shards)
    dist.all_to_all_single(parts, shards.flatten(), got, sent, group=group)
    of_rows = zip(parts.split(got), rows, strict=True)
    matrices = torch.cat([part.view(owned[me], r, columns) for part, r in of_rows], 1)
    if owned[me]:
        matrices = work(matrices)
    parts = torch.cat([part.flatten() for part in matrices.split(rows, 1)])
    dist.all_to_all_single(result.view(-1), parts, sent, got, group=group)
    return result
