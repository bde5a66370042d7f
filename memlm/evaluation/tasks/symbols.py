"""Keys, values and noise of tasks that write pairs, each one token of any tokenizer."""

from dataclasses import dataclass

import numpy as np

from memlm.data.recall import ASK, KEYS, MQAR, NOISE, VALUES
from memlm.evaluation.tasks import Setting
from memlm.evaluation.tasks.recall import symbols


@dataclass(frozen=True)
class Signs:
    """Token ids; ask: the sign before a question to documents."""

    ask: int
    keys: np.ndarray
    values: np.ndarray
    noise: np.ndarray

    def filler(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return self.noise[rng.integers(len(self.noise), size=size)]


def signs(setting: Setting, num_keys: int, num_values: int) -> Signs:
    """Those of ``MQAR``. Raises ValueError if the tokenizer has too few."""
    token = symbols(setting, MQAR(length=4, num_pairs=1, gap=0, num_keys=num_keys, num_values=num_values))
    return Signs(int(token[ASK]), token[KEYS[:num_keys]], token[VALUES[:num_values]], token[NOISE])
