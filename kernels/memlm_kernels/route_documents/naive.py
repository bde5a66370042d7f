"""Scores of documents (Memory Sparse Attention, arXiv:2603.23516), one token, head and chunk after the other::

    s[d] = reduce over chunks c of d, reduce over tokens t, reduce over heads h of sim(q[t, h], k[c, group of h])

where each reduction is a mean or a maximum, and sim is the cosine or q . k / sqrt(K).

The tiled form. Let the chunks of document d come in tiles C_1, C_2, ... Then

    max_{c in d} s_c = max(max_{c in C_1} s_c, max_{c in C_2} s_c, ...)
    mean_{c in d} s_c = (sum_{c in C_1} s_c + sum_{c in C_2} s_c + ...) / |d|

so one number per document carries over from tile to tile, and no tile's scores are kept. A mean over heads is linear
in q and goes into the query, q~[t, g] = sum_{h in g} q[t, h] / H (with q[t, h] of unit length for the cosine), so that

    mean_h q[t, h] . k[c, group of h] = sum_g q~[t, g] . k[c, g]

is one product for each token and chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

REDUCE: dict[str, Callable[[list[Tensor]], Tensor]] = {"mean": lambda x: torch.stack(x).mean(0), "max": max}


def similarity(kind: str, q: Tensor, k: Tensor) -> Tensor:
    if kind == "cosine":
        return q @ k / ((q @ q + 1e-12) * (k @ k + 1e-12)).sqrt()
    return q @ k * len(q) ** -0.5


def document_scores(
    q: Tensor, k: Tensor, document: Tensor, num_documents: int, rule: tuple[str, str, str, str], knows: Tensor
) -> Tensor:
    """q: [M, H, K]   k: [C, G, K]   document: [C]   rule: similarity, and reductions over heads, tokens and chunks
    knows: [M, N] bool, the documents that a token may choose

    Returns the scores of one row, [N], -inf where no token may choose the document.
    """
    kind, heads, tokens, chunks = rule
    share, scores = q.shape[1] // k.shape[1], []
    for d in range(num_documents):
        of_chunks = []
        for c in (document == d).nonzero()[:, 0].tolist():
            of_tokens = [
                REDUCE[heads]([similarity(kind, q[t, h], k[c, h // share]) for h in range(q.shape[1])])
                for t in knows[:, d].nonzero()[:, 0].tolist()
            ]
            of_chunks += [REDUCE[tokens](of_tokens)] if of_tokens else []
        scores.append(REDUCE[chunks](of_chunks) if of_chunks else q.new_tensor(float("-inf")))
    return torch.stack(scores)


def best(scores: Tensor, top_k: int) -> list[int]:
    """The documents with the largest scores, among equal scores the lowest; -1 where there are fewer."""
    order = sorted((d for d in range(len(scores)) if scores[d] > float("-inf")), key=lambda d: (-scores[d].item(), d))
    return (order + [-1] * top_k)[:top_k]
