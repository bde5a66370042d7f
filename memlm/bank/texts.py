"""Texts in place of tokens: the tokenizer that a bank keeps, and the facts on its documents."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memlm import files
from memlm.data import Templates, Writer, encoder, fingerprint, read_tokenizer, save_tokenizer


class About(NamedTuple):
    """Facts on a document; source: the file that it came from, "" for none; added: seconds since 1970."""

    name: str
    tokens: int
    source: str
    added: float


def abouts(table: dict[str, list[Any]]) -> list[About]:
    """The facts on the documents of a shard's table."""
    return [About(*of) for of in zip(*(table[key] for key in ("names", "tokens", "sources", "added")), strict=True)]


class Wording:
    """A bank's tokenizer, which its folder keeps, and which is read there when it is first needed.

    tokenizer: None for a bank that takes token ids alone; its methods then raise ValueError
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self._given = tokenizer
        self._folder: Path | None = None

    def open(self, directory: Path, name: str | None) -> None:
        """Take the tokenizer that ``save`` wrote."""
        self._folder = None if name is None else directory / name

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        if self._given is not None:
            return self._given
        if self._folder is None:
            raise ValueError("this bank has no tokenizer: build it with tokenizer=..., or give token ids")
        try:
            files.check_seal(self._folder)
            return read_tokenizer(AutoTokenizer, self._folder)
        except ValueError as error:
            raise ValueError(f"{self._folder}: not the bank's tokenizer ({error}); restore the folder") from None

    def save(self, directory: Path) -> str | None:
        """Write the tokenizer, if the folder lacks it; its name there."""
        if self._folder is None or self._folder.parent != directory or not files.is_sealed(self._folder):
            if self._given is None and self._folder is None:
                return None
            place = directory / f"tokenizer-{fingerprint(self.tokenizer)[:16]}"
            if not files.is_sealed(place):
                with files.new_folder(place) as folder:
                    save_tokenizer(self.tokenizer, folder)
            self._folder = place
        return self._folder.name

    @cached_property
    def _encode(self) -> Any:
        return encoder(self.tokenizer)

    def ids(self, text: str) -> Tensor:
        """Token ids [T] of a document, as in a corpus."""
        return torch.from_numpy(self._encode(text).astype(np.int64))

    def asked(self, question: str, templates: Templates) -> tuple[Tensor, Tensor]:
        """Token ids and roles of a question, [1, T]."""
        parts = [*Writer(templates, self.tokenizer).asked(question)]
        ids = [token for of_part, _ in parts for token in of_part]
        roles = [role for of_part, role in parts for _ in of_part]
        return torch.tensor([ids]), torch.tensor([roles])

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
