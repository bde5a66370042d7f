"""Intervals: of a share of independent trials, and of a difference over the same documents or texts."""

import math
from collections.abc import Sequence

import numpy as np

# The two-sided 95 % point of the normal distribution.
_Z = 1.959963984540054


def wilson(share: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent trials (Wilson, 1927). (0, 1) without a trial.

    For means of scores between 0 and 1, whose variance is smaller than that of their share, it is too wide, never too
    narrow.
    """
    if trials == 0:
        return 0.0, 1.0
    z2 = _Z * _Z / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    # Rounding would leave 0 and 1 just outside their intervals.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 10_000
) -> tuple[float, float]:
    """The 95 % percentile interval of a weighted mean when its units, such as documents, are drawn anew.

    Pairs are compared by the units' differences: pass (a - b) of each document, and its bytes as the weight.
    The draws are the same in every call, so an evaluation repeated gives the same interval. One unit alone gives no
    interval: nan.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if len(x) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    # A unit's number of appearances in a draw; all draws of many units at once would not fit.
    means = []
    for part in np.array_split(np.arange(draws), max(1, draws * len(x) // 2**24)):
        counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=len(part))
        means.append(counts @ (x * w) / np.maximum(counts @ w, 1e-300))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
