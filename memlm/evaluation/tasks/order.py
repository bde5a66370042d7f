"""Order: which of two passages of a text came first?"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from memlm.evaluation.events import Ask, Event, Read, Stream
from memlm.evaluation.tasks import Setting, Task
from memlm.evaluation.tasks.haystack import Haystack
from memlm.evaluation.tasks.invented import sentences
from memlm.settings import named, require


@dataclass(frozen=True, kw_only=True)
class Order(Task):
    """segment: tokens of each of the two passages, A and B
    distances: tokens from the start of A to that of B
    paths: files of plain text; "sources" for the test documents of the evaluation's sources of text; [] for invented
        sentences
    """

    name = "order"
    title = "Which passage came first"
    note = (
        "A text is read, then a line end and two of its passages, once as they came and once exchanged; the likelier "
        "order counts. Tokens and their number are the same in both, so a passage that is likelier alone does not "
        "help. 'Not read' is the same without the text: the order that the passages themselves tell."
    )
    across = "distance"
    down = "text"
    segment: int = 32
    distances: list = field(default_factory=lambda: [32, 64, 128])
    paths: list | str = field(default_factory=list)

    def check(self, setting: Setting) -> None:
        with named(f"eval.ask.{self.name}"):
            require(self.segment >= 1, f"segment={self.segment} must be at least 1")
            fit = self.distances and all(type(d) is int and d >= self.segment for d in self.distances)
            require(bool(fit), f"distances={self.distances} must be whole numbers from segment={self.segment} on")
            least = self.segment + max(self.distances)
            require(min(self.lengths) >= least, f"lengths={self.lengths} must be at least {least}; lower distances")
            require(self.paths == "sources" or isinstance(self.paths, list), f"paths={self.paths!r} must be a list")
            for length in self.lengths:
                found = sum(1 for _ in self._texts(setting, length))
                told = f"rows={self.rows}: only {found} texts have {length} tokens"
                require(found == self.rows, f"{told}; lower rows, or give longer files")

    def cost(self) -> int:
        return self.rows * (sum(self.lengths) + 8 * self.segment * len(self.distances) * len(self.lengths))

    def floors(self) -> dict:
        return {"chance": 0.5}

    def _texts(self, setting: Setting, length: int) -> Iterator[np.ndarray]:
        """Pieces [T] of texts, none of them twice."""
        if self.paths == []:
            for row in range(self.rows):
                yield Haystack(setting, sentences(setting.rng(self.name, "text", row))).ids(length)
            return
        documents = setting.documents() if self.paths == "sources" else map(setting.encode, map(_read, self.paths))
        pieces = (ids[i : i + length] for ids in documents for i in range(0, len(ids) - length + 1, length))
        yield from islice(pieces, self.rows)

    def streams(self, setting: Setting) -> Iterator[Stream]:
        front = setting.encode("\n")
        for length in self.lengths:
            for row, ids in enumerate(self._texts(setting, length)):
                rng = setting.rng(self.name, length, row)
                asks: dict[str, list[Event]] = {"read": [Read(np.concatenate([setting.start, ids]))], "not read": []}
                for distance in self.distances:
                    first = rng.integers(length - distance - self.segment + 1)
                    a, b = (ids[i : i + self.segment] for i in (first, first + distance))
                    # log P(AB) - log P(BA) is symmetric in the passages: it equals
                    # [log P(B|A) - log P(B)] - [log P(A|B) - log P(A)], each after the text.
                    orders = [np.concatenate([a, b]), np.concatenate([b, a])]
                    for text, stream in asks.items():
                        tag = {"length": length, "distance": distance, "text": f"{text}, {length} tokens"}
                        question = front if text == "read" else np.concatenate([setting.start, front])
                        stream.append(Ask(question, orders, tag))
                yield from asks.values()


def _read(path: str) -> str:
    place = Path(path).expanduser()
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"paths: {path}: {reason}; name files of plain text") from None
