"""The chunks that each token reads, and the tokens that read each chunk.

The sum over heads is linear, so it goes into the query: one product for each token, group and chunk.

B rows, T tokens, H query heads in G groups, K key dim, N chunks, J = top_k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.segments import exact
from memlm_kernels.topk import NEVER


@torch.no_grad()
def chunk_topk_reference(q: Tensor, k: Tensor, top_k: int, spans: tuple[Tensor, Tensor] | None, tile: int) -> Tensor:
    (batch, length, *_), (_, chunks, groups, _) = q.shape, k.shape
    if length == 0 or chunks == 0:
        return torch.full((batch, length, groups, top_k), -1, device=q.device)
    keys = exact(k).transpose(1, 2).flatten(0, 1)
    parts = []
    # One token scores all chunks at once.
    width, firsts = (chunks, (0,)) if length == 1 else (tile, range(0, chunks, tile))
    for token in range(0, length, tile):
        of_tile = slice(token, token + tile)
        folded = exact(q[:, of_tile]).unflatten(2, (groups, -1)).sum(3).transpose(1, 2).flatten(0, 1)
        best: tuple[Tensor, Tensor] | None = None
        for first in firsts:
            score = torch.bmm(folded, keys[:, first : first + width].mT).unflatten(0, (batch, groups))
            number = torch.arange(first, first + score.shape[3], device=q.device)
            if spans is not None:
                starts, ends = (x[:, None, of_tile, None] for x in spans)
                score = score.masked_fill((number < starts) | (number >= ends), NEVER)
            if best is not None:
                # The best so far come first, because their numbers are lower.
                number = torch.cat([best[0], number.expand(score.shape)], -1)
                score = torch.cat([best[1], score], -1)
            score, order = score.sort(dim=-1, descending=True, stable=True)
            score, order = score[..., :top_k], order[..., :top_k]
            best = (order if best is None else number.gather(-1, order)), score
        assert best is not None
        index = best[0].masked_fill(best[1] == NEVER, -1)
        parts.append(F.pad(index, (0, top_k - index.shape[3]), value=-1).transpose(1, 2))
    return torch.cat(parts, 1)


def invert_chunks_reference(index: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    taken = index.movedim(2, 1).flatten(2)
    taken = torch.where((taken < 0) | (taken > num_chunks), num_chunks, taken)
    chunk, order = taken.sort(dim=-1, stable=True)
    number = torch.arange(num_chunks + 1, device=index.device).expand(*chunk.shape[:2], -1).contiguous()
    return order // max(1, index.shape[3]), torch.searchsorted(chunk, number)
