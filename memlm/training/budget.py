"""A run's length and its batch in tokens, converted to steps and rows."""

import math
from collections.abc import Mapping
from typing import Any

from memlm.settings import check_type, require


def in_steps(train: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The train group with ``steps`` and ``batch_size`` alone: a run's record is the same in either unit.

    Raises ValueError, with the key, if a size is set in both units or in none, or a batch has no whole rows.
    """
    train = dict(train)
    tokens, batch_tokens = _taken(train, "tokens", "steps"), _taken(train, "batch_tokens", "batch_size")
    if tokens is None and batch_tokens is None:
        return train
    check_type(length := data.get("seq_len"), int, "data.seq_len")
    require(length > 0, f"data.seq_len={length} must be above 0")
    if batch_tokens is not None:
        rows, rest = divmod(batch_tokens, length)
        near = " or ".join(f"{n * length:.0f}" for n in (rows, rows + 1) if n)
        require(
            rest == 0, f"train.batch_tokens={batch_tokens:.0f} is no multiple of data.seq_len={length}; use {near}"
        )
        train["batch_size"] = int(rows)
    if tokens is not None:
        check_type(rows := train.get("batch_size"), int, "train.batch_size")
        require(rows > 0, f"train.batch_size={rows} must be above 0")
        train["steps"] = math.ceil(tokens / (rows * length))
    return train


def _taken(train: dict[str, Any], key: str, other: str) -> float | None:
    """The size in tokens, removed from ``train``; None if it is given in the other unit."""
    tokens = train.pop(key, None)
    check_type(tokens, float | None, f"train.{key}")
    if tokens is None:
        missing = other in train and train[other] is None
        require(not missing, f"train.{other}=null: no size is given; set it, or train.{key}")
        return None
    require(0 < tokens < math.inf, f"train.{key}={tokens} must be above 0, and finite")
    twice = train.get(other) is not None
    require(not twice, f"train.{other}={train.get(other)} and train.{key}={tokens}: set one, and the other to null")
    return float(tokens)
