"""A mixture of memories (MoM, arXiv:2502.13685, eqs. 3-8), one document and one memory after the other. The router
chooses the J memories m(t, 1) to m(t, J) for token t. Let read_m(t) be the read of memory m at token t, after m has
read and written the tokens sent to it before. Then

    y_t = shared_t + sum_j weight_tj read_{m(t, j)}(t)

The routed form. A memory depends only on its own tokens, in their order. So a stable sort by (document, memory) makes
the tokens that one memory gets from a document a segment of the sorted row, and one recurrence over segments reads all
memories at once. With place(t, j) the position of choice j of token t after the sort,

    x'[place(t, j)] = x_t      o' = recurrence(x', segments)      y_t = shared_t + sum_j weight_tj o'[place(t, j)]

``MemoryRoutes`` does the sort, ``dispatch_tokens`` the first of these steps, ``combine_reads`` the last.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pairs = list[tuple[int, int]]


def segments_of_row(
    memory: list[list[int]], document: list[int], num_memories: int, num_documents: int
) -> tuple[list[Pairs], Pairs]:
    """The (token, choice) pairs of a row, grouped by document and memory, and those of padding.

    memory: [T][J]; document: [T], num_documents for padding
    """
    pairs = [(t, j) for t, chosen in enumerate(memory) for j in range(len(chosen))]
    segments = [
        [(t, j) for t, j in pairs if (document[t], memory[t][j]) == (d, m)]
        for d in range(num_documents)
        for m in range(num_memories)
    ]
    return segments, [(t, j) for t, j in pairs if document[t] == num_documents]


def mixture(
    read: Callable[..., Tensor], tokens: Sequence[Tensor], weight: Tensor, shared: Tensor, segments: list[Pairs]
) -> Tensor:
    """One row.

    read: maps the tokens of one memory, [n, ...] of each of ``tokens`` [T, ...], to their reads
    weight: [T, J]; shared: [T, ...]; segments: from ``segments_of_row``
    """
    y = list(shared.unbind())
    for pairs in filter(None, segments):
        sent = [t for t, _ in pairs]
        for (t, j), o in zip(pairs, read(*(x[sent] for x in tokens)), strict=True):
            y[t] = y[t] + weight[t, j] * o
    return torch.stack(y)
