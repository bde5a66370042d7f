"""The mean of each segment, one segment after the other: y_s = mean(x[start_s : end_s]), zeros where it is empty.

The form on a grid. The op lays the segments of a row on a grid g[S, longest], with zeros in slots without a token, so

    y_s = sum_{start_s <= t < end_s} x_t / (end_s - start_s) = sum_i g[s, i] / (end_s - start_s)

No difference of running sums is taken, so nothing cancels.
"""

import itertools

import torch
from torch import Tensor


def segment_mean_pool(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x: [B, T, ...]; cu_seqlens: [B, S + 1]. Returns [B, S, ...] in fp64."""
    rows = []
    for row, cu in zip(x.double(), cu_seqlens.tolist(), strict=True):
        pieces = [row[start:end] for start, end in itertools.pairwise(cu)]
        rows.append(torch.stack([p.mean(0) if len(p) else 0.0 * row[0] for p in pieces]))
    return torch.stack(rows)
