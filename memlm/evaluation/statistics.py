"""Intervals: of a share of independent trials, and of a difference over the same documents or texts."""

import math
from collections.abc import Callable, Sequence

import numpy as np

# The two-sided 95 % point of the normal distribution.
_Z = 1.959963984540054
# That of Student's t distribution with 2, 3, ... 10 degrees of freedom.
_T = (4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)


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

    Pairs are compared by the units' differences: pass (a - b) of each document, and its bytes as the weight; or by
    ``paired``, if their weights differ.
    The draws are the same in every call, so an evaluation repeated gives the same interval. One unit alone gives no
    interval: nan.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    return _quantiles(len(x), draws, lambda counts: _mean(counts, x, w))


def paired(
    a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]], draws: int = 2000
) -> tuple[float, float, float]:
    """The difference of two weighted means over the same units, and its 95 % interval when these are drawn anew.

    a, b: value and weight of each unit, such as bits per byte and bytes of a document
    """
    (x, v), (y, w) = (np.asarray(pairs, np.float64).reshape(-1, 2).T for pairs in (a, b))
    all_units = np.ones((1, len(x)))
    value = (_mean(all_units, x, v) - _mean(all_units, y, w))[0]
    low, high = _quantiles(len(x), draws, lambda counts: _mean(counts, x, v) - _mean(counts, y, w))
    return float(value), low, high


def _mean(counts: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted means of draws; counts: [draws, units], a unit's number of appearances in a draw."""
    return counts @ (x * w) / np.maximum(counts @ w, 1e-300)


def _quantiles(units: int, draws: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    if units < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    # All draws of many units at once would not fit.
    parts = np.array_split(np.arange(draws), max(1, draws * units // 2**24))
    found = [statistic(rng.multinomial(units, np.full(units, 1 / units), size=len(part))) for part in parts]
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


def of_seeds(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over runs of several seeds (Student's t); nan below three runs."""
    n = len(values)
    if n < 3:
        return math.nan, math.nan
    # Between the last entry and infinity, linear in the reciprocal of the degrees of freedom.
    t = _T[n - 3] if n - 3 < len(_T) else _Z + (_T[-1] - _Z) * (len(_T) + 1) / (n - 1)
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def unpaired(
    a: float, interval_a: tuple[float, float], b: float, interval_b: tuple[float, float]
) -> tuple[float, float]:
    """The 95 % interval of a - b for two independent estimates, from theirs (Newcombe, 1998, method 10)."""
    (low_a, high_a), (low_b, high_b) = interval_a, interval_b
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)
