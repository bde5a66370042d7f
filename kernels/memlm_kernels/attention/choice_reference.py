"""The chunks that each token reads, and the tokens that read each chunk.

The sum over heads is linear, so it goes into the query: one product for each token, group and chunk.

B rows, T tokens, H query heads in G groups, K key dim, N chunks, J = top_k.
"""

import torch
from torch import Tensor

from memlm_kernels.segments import exact
from memlm_kernels.topk import NEVER, best_of


@torch.no_grad()
def chunk_topk_reference(q: Tensor, k: Tensor, top_k: int, spans: tuple[Tensor, Tensor] | None, tile: int) -> Tensor:
    length, chunks, groups = q.shape[1], k.shape[1], k.shape[2]
    parts = [q.new_zeros(len(q), 0, groups, top_k, dtype=torch.int64)]
    for token in range(0, length, tile):
        of_tile = slice(token, token + tile)
        folded = exact(q[:, of_tile]).unflatten(2, (groups, -1)).sum(3).movedim(2, 1)
        index = torch.full((*folded.shape[:3], 0), -1, device=q.device, dtype=torch.int64)
        best = best_of(index, folded.new_zeros(index.shape), top_k)
        for first in range(0, chunks, tile):
            keys = exact(k[:, first : first + tile]).permute(0, 2, 3, 1)
            score = folded @ keys
            number = torch.arange(first, first + keys.shape[3], device=q.device)
            if spans is not None:
                starts, ends = (x[:, None, of_tile, None] for x in spans)
                score = score.masked_fill((number < starts) | (number >= ends), NEVER)
            # The best so far come first, because their numbers are lower.
            index = torch.cat([best[0], number.expand(score.shape)], -1)
            best = best_of(index, torch.cat([best[1], score], -1), top_k)
        parts.append(best[0].movedim(1, 2))
    return torch.cat(parts, 1)


def invert_chunks_reference(index: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    taken = index.movedim(2, 1).flatten(2)
    taken = torch.where((taken < 0) | (taken > num_chunks), num_chunks, taken)
    chunk, order = taken.sort(dim=-1, stable=True)
    number = torch.arange(num_chunks + 1, device=index.device).expand(*chunk.shape[:2], -1).contiguous()
    return order // max(1, index.shape[3]), torch.searchsorted(chunk, number)
