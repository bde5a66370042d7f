"""Saturation: how many pairs of key and value does a state hold?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from memlm.evaluation.events import Ask, Event, Read, Record, Stream
from memlm.evaluation.tasks import Setting, Task, View
from memlm.evaluation.tasks.guesses import guesses
from memlm.evaluation.tasks.symbols import signs
from memlm.settings import named, require

# Streams drawn anew for the interval of the capacity.
_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Saturation(Task):
    """pairs: numbers of written pairs after which is asked; lengths play no part
    asked: old pairs that are asked, all if there are fewer
    gap: tokens of noise before each question, which the memory does not keep
    key_symbols: symbols of a key; more give more keys
    num_keys, num_values: symbols to choose from
    """

    name = "saturation"
    title = "Pairs of key and value until the state is full"
    note = (
        "Pairs are written one after another. At some numbers of them, old ones are asked; all values are candidates. "
        "The age counts the pairs written since. The capacity is the number of pairs at which the share right crosses "
        "one half, with a bootstrap over texts; a capacity at the last number is a lower bound. Values without keys "
        "have a capacity of 2 pairs."
    )
    pairs: list = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    asked: int = 32
    gap: int = 0
    key_symbols: int = 1
    num_keys: int = 32
    num_values: int = 32

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            for name, least in (("asked", 1), ("gap", 0), ("key_symbols", 1)):
                require(getattr(self, name) >= least, f"{name}={getattr(self, name)} must be at least {least}")
            signs(setting, self.num_keys, self.num_values)
            most = self.num_keys**self.key_symbols
            rising = all(type(n) is int and 1 <= n <= most for n in self.pairs) and sorted({*self.pairs}) == self.pairs
            fix = f"rising whole numbers in 1..{most}; more key_symbols give more keys"
            require(bool(self.pairs) and rising, f"pairs={self.pairs} must be {fix}")

    def tokens(self) -> int:
        return max(self.pairs, default=0) * (self.key_symbols + 1) + self.gap + self.key_symbols

    def cost(self) -> int:
        asked = sum(min(self.asked, stored) for stored in self.pairs) * (self.gap + self.key_symbols)
        return self.rows * (self.tokens() + asked)

    def views(self) -> Sequence[View]:
        floors = {"chance": 1 / self.num_values}
        return [View("pairs", floors=floors), View("age in pairs", "pairs", floors=floors, name="age")]

    def streams(self, setting: Setting) -> Iterator[Stream]:
        chosen = signs(setting, self.num_keys, self.num_values)
        most = max(self.pairs)
        for row in range(self.rows):
            rng = setting.rng(self.name, row)
            digits = np.unravel_index(rng.choice(self.num_keys**self.key_symbols, most, replace=False), self._shape)
            keys = chosen.keys[np.stack(digits, 1)]
            values = np.concatenate([rng.permutation(chosen.values) for _ in range(-(-most // self.num_values))])[
                :most
            ]
            written = np.concatenate([keys, values[:, None]], 1)
            stream: list[Event] = []
            for before, stored in zip([0, *self.pairs], self.pairs, strict=False):
                stream.append(Read(written[before:stored].ravel()))
                for i in rng.choice(stored, min(self.asked, stored), replace=False):
                    answers = [values[i : i + 1], *(chosen.values[chosen.values != values[i], None])]
                    # Ages 0, 1, 2-3, 4-7, ...; the latest pair's is 0.
                    age = int(stored - 1 - i)
                    least = 1 << age.bit_length() >> 1
                    named = f"{least}" if least < 2 else f"{least}-{2 * least - 1}"
                    ids = np.concatenate([chosen.filler(rng, self.gap), keys[i]])
                    floors = guesses(values[:stored].tolist(), [int(a[0]) for a in answers])
                    stream.append(Ask(ids, answers, {"pairs": stored, "age in pairs": named, "guesses": floors}))
            yield stream

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_keys,) * self.key_symbols

    def totals(self, records: Sequence[Record]) -> dict[str, tuple[float, float, float]]:
        streams = {number: i for i, number in enumerate(dict.fromkeys(r["stream"] for r in records))}
        right_SP = np.zeros((len(streams), len(self.pairs)))
        asked_SP, bytes_P = np.zeros_like(right_SP), np.zeros(len(self.pairs))
        for r in records:
            place = streams[r["stream"]], self.pairs.index(r["pairs"])
            right_SP[place] += r["correct"]
            asked_SP[place] += 1
            bytes_P[place[1]] = r["bytes"]
        share_SP = right_SP / asked_SP
        counts_DS = np.random.default_rng(0).multinomial(
            len(streams), np.full(len(streams), 1 / len(streams)), size=_DRAWS
        )
        shares_DP = np.concatenate([share_SP.mean(0, keepdims=True), counts_DS @ share_SP / len(streams)])
        capacity_D = np.array([_crossing(self.pairs, share_P) for share_P in shares_DP])
        kilobytes_D = np.interp(capacity_D, self.pairs, bytes_P) / 1024
        return {
            "capacity, pairs": _interval(capacity_D),
            "capacity, pairs per KB of state": _interval(capacity_D / kilobytes_D),
            "KB of state there": _interval(kilobytes_D),
        }


def _crossing(pairs: Sequence[int], share_P: np.ndarray) -> float:
    """The number of pairs at which a share, 1 without a pair, first falls below one half, linearly between points."""
    x, y = [0, *pairs], [1.0, *share_P]
    for i in range(len(pairs)):
        if y[i + 1] < 0.5:
            return x[i] + (x[i + 1] - x[i]) * (y[i] - 0.5) / (y[i] - y[i + 1])
    return float(x[-1])


def _interval(values_D: np.ndarray) -> tuple[float, float, float]:
    """The first value, and the 95 % interval of the others."""
    low, high = np.quantile(values_D[1:], [0.025, 0.975])
    return float(values_D[0]), float(low), float(high)
