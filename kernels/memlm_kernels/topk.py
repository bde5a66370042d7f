"""The largest scores and the numbers of their entries."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

NEVER = float("-inf")


class Best(NamedTuple):
    """number, score: [..., top_k], best first; -1 and -inf where there are fewer entries."""

    number: Tensor
    score: Tensor


def best_of(index: Tensor, score: Tensor, top_k: int) -> Best:
    """The top_k largest along the last dimension; among equal scores the first. Padded with -1 and -inf."""
    missing = max(0, top_k - score.shape[-1])
    index, score = F.pad(index, (0, missing), value=-1), F.pad(score, (0, missing), value=NEVER)
    score, order = score.sort(dim=-1, descending=True, stable=True)
    score = score[..., :top_k]
    return Best(index.gather(-1, order[..., :top_k]).masked_fill(score == NEVER, -1), score)
