"""Text of the Hugging Face hub, read as a stream: nothing but the encoded shards is stored.

A data set has parts, usually its files, which are encoded in parallel. `tokens` is divided among them, so a limited
corpus is a sample of the whole data set.
"""

import hashlib
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memlm.settings import require

from .disk_cache import DiskCache
from .documents import LARGE, Document, Part, is_trained
from .reading import Span, stretches

_MOST = 10**15


@dataclass(frozen=True)
class HubSettings:
    """dataset: a name on the hub, or a folder of files that `datasets` can load
    config, split, revision: of the data set; column: of its rows, a text
    tokens: the most tokens that are encoded; None: all
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.dataset.strip()), f"dataset={self.dataset!r} names no data set; name one of the hub")
        most = self.tokens is None or 1 <= self.tokens <= _MOST
        require(most, f"tokens={self.tokens} must lie between 1 and {_MOST:.0e}, or be null")


class Streamed:
    """The documents of a data set of the hub: the rows of a split.

    The hub is asked only if something is missing in the cache. Without a `revision`, the newest one counts when the
    text is encoded first.
    Raises ValueError with the data set's name if it cannot be read.
    """

    is_stdlib, is_large = False, True

    def __init__(self, settings: HubSettings, cache_dir: str | Path) -> None:
        self.settings, self.cache, self.left_out = settings, DiskCache(cache_dir), dict[str, str]()

    @property
    def fingerprint(self) -> str:
        content = json.dumps(["hub", asdict(self.settings), self._files()])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def part_tokens(self) -> int | None:
        """The most tokens of a part."""
        tokens = self.settings.tokens
        return None if tokens is None else max(1, int(tokens) // self._num_parts)

    def name(self, file: int, row: int) -> str:
        return f"{self._name(file)}:{row}"

    def _name(self, file: int) -> str:
        of = self.settings
        return ":".join(filter(None, (of.dataset, of.config, of.split, str(file))))

    def entries(self) -> list[dict[str, Any]]:
        return [{"path": self._name(span.file), "sha256": self._revision, "bytes": 0} for (span,) in self.parts]

    def identity(self, part: Part) -> list[Any]:
        of = self.settings
        return ["hub", of.dataset, of.config, of.split, of.column, self._revision, self._num_parts, part[0].file]

    @property
    def parts(self) -> list[Part]:
        """Their sizes are in tokens if these are limited; otherwise each counts as one."""
        return [(Span(i, 0, self.part_tokens or 1),) for i in range(self._num_parts)]

    @cached_property
    def _num_parts(self) -> int:
        with self._named():
            return int(self._load().num_shards)

    def read(self, part: Part) -> Iterator[tuple[Document, int]]:
        number = part[0].file
        with self._named():
            rows = iter(self._load().shard(self._num_parts, number).select_columns([self.settings.column]))
        for row in range(1, 2**62):
            with self._named():
                found = next(rows, None)
                if found is None:
                    return
                text = found[self.settings.column]
                require(isinstance(text, str), f"column {self.settings.column!r} of row {row} holds no text")
            starts = True
            for piece, ends in stretches([text]):
                if piece:
                    yield Document(number, row, piece, starts, ends, ""), 0
                starts = ends

    def training_texts(self) -> Iterator[str]:
        """Texts to train a tokenizer on: the first ones of each part, about a gibibyte together."""
        for part in self.parts:
            size = 0
            for document, _ in self.read(part):
                if is_trained(self.name(document.file, document.row)):
                    yield document.text
                    size += len(document.text)
                if size >= LARGE // self._num_parts:
                    break

    def _load(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError("streaming needs datasets; pip install datasets") from None
        of, revision = self.settings, None if self._files() else self._revision
        return load_dataset(of.dataset, of.config, split=of.split, revision=revision, streaming=True)

    @cached_property
    def _revision(self) -> str:
        if files := self._files():
            return hashlib.sha256(json.dumps(files).encode()).hexdigest()
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(self.settings.dataset, revision=self.settings.revision).sha)

    def _files(self) -> list[tuple[str, str]]:
        """The files of a folder, and their SHA-256."""
        folder = Path(self.settings.dataset)
        contents = self.cache.contents(sorted(path for path in folder.rglob("*") if path.is_file()))
        return [(path.relative_to(folder).as_posix(), content.sha256) for path, content in contents.items()]

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        # `datasets` reads files of many formats, and raises their readers' errors.
        except Exception as error:
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
            raise ValueError(
                f"dataset={self.settings.dataset!r} cannot be read ({reason}); check name, config, split, column and "
                "the network, or prepare it where there is one (scripts/prepare_data.py) and copy data.cache_dir"
            ) from error
