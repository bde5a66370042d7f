"""The keys that tokens outside documents see: chunks of the documents that they chose, and a span of local keys.

B batch, A tokens, J documents chosen, C chunks, L local keys, G groups of heads, K head dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.msa import held
from memlm.memory.msa.layout import Stream


class ChosenDocuments(nn.Module):
    """The documents that tokens see, [B, A, J], counted from 1 (0: none), of those that chunks belong to, [B, C].
    Without a document per chunk: the chunks that they see, [B, A, C] bool. Long-term memory enters the layer here.
    """

    long_term = True

    def forward(self, chosen: Tensor, document_BC: Tensor | None = None) -> Tensor:
        return chosen


class DocumentChoice(NamedTuple):
    """The documents that tokens chose, -1: none; the document of each chunk; its key and value [B, C, G, K]."""

    document_BAJ: Tensor
    document_BC: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def nothing(cls, q: Tensor, k: Tensor, v: Tensor) -> "DocumentChoice":
        none = torch.zeros(len(q), 0, dtype=torch.int64, device=q.device)
        return cls(none[:, None].expand(-1, q.shape[1], -1), none, k[:, :0], v[:, :0])


def spans(stream: Stream, past: int, injected: bool) -> tuple[Tensor, Tensor]:
    """The first local key that each token sees, and the end of its keys, [B, A] each.

    past: local keys before the call; injected: whether the call's tokens see each other in both directions
    """
    place_BA = stream.place_BA.clamp(min=0)
    (rows, new), device = place_BA.shape, place_BA.device
    here_A = torch.arange(past, past + new, device=device)
    first_BA = here_A - torch.minimum(here_A, place_BA)
    if not injected:
        return first_BA, (here_A + 1).expand(rows, -1)
    count_B = torch.full((rows,), new, device=device) if stream.lengths_B is None else stream.lengths_B
    # Padding sees a key too.
    return first_BA.clamp(max=past), (past + count_B.clamp(min=1))[:, None].expand(-1, new)


def masked(k: Tensor, v: Tensor, chosen: DocumentChoice, spans: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """All keys and values, and FlexAttention's mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    first_BA, end_BA = spans
    number_L = torch.arange(k.shape[1], device=k.device)
    seen_BAL = (number_L >= first_BA[..., None]) & (number_L < end_BA[..., None])
    seen_BAL = torch.cat([held.chunks_of(chosen.document_BAJ, chosen.document_BC), seen_BAL], 2)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen_BAL[b, i, j]

    mask = create_block_mask(sees, len(k), None, seen_BAL.shape[1], seen_BAL.shape[2], device=k.device)
    return torch.cat([chosen.k.to(k.dtype), k], 1), torch.cat([chosen.v.to(v.dtype), v], 1), mask
