"""Tokenizers: the byte tokenizer, any tokenizer of Hugging Face, or a BPE trained on the corpus."""

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .documents import Corpus

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
# Part of the name of every cached BPE; increase it if training changes.
_BPE_FORMAT = 1
# Tables of this size are allocated before a token is read.
_MOST_ENTRIES = 2**22
# Characters of the longest token, above the mean of any text.
_LONGEST = 64
_TEXTS_AT_ONCE = 4096
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """259 entries: ids 0..255 are the bytes of the text in UTF-8, then <pad>, <bos>, <eos>, never added."""
    # The byte-level alphabet maps printable Latin-1 bytes to themselves, and the others to code points from 256 on.
    printable = {ord(sign): sign for sign in _ALPHABET if ord(sign) < 256}
    others = (sign for sign in _ALPHABET if ord(sign) >= 256)
    backend = Tokenizer(models.BPE({printable.get(byte) or next(others): byte for byte in range(256)}, []))
    backend.add_special_tokens([*_SPECIAL.values()])
    return _byte_level(backend, use_regex=False)


def load_tokenizer(spec: str | Mapping[str, int], corpora: Sequence[Corpus] = ()) -> PreTrainedTokenizerFast:
    """spec: "byte"; a folder or hub name for AutoTokenizer; or {"bpe": vocab_size}: a BPE trained on the training
        split of `corpora`, deterministic, and kept in their cache.

    Raises ValueError for another spec, a tokenizer without <eos>, or a BPE larger than the corpora can fill.
    """
    if spec == "byte":
        return byte_tokenizer()
    if isinstance(spec, str):
        try:
            return _check(read_tokenizer(AutoTokenizer, spec))
        except ValueError as error:
            raise ValueError(
                f"data.tokenizer: {spec!r} is not 'byte', a tokenizer's folder, or a hub name in reach ({error})"
            ) from error
    if not isinstance(spec, Mapping) or [*spec] != ["bpe"]:
        raise ValueError(f"data.tokenizer: {spec!r} is not 'byte', a path or name, or {{bpe: vocab_size}}")
    return _load_bpe(spec["bpe"], corpora)


def read_tokenizer(kind: type[AutoTokenizer | PreTrainedTokenizerFast], source: str | Path) -> PreTrainedTokenizerFast:
    """``kind.from_pretrained``. Raises ValueError in one line, whatever the files contain."""
    try:
        return kind.from_pretrained(source)
    except (KeyboardInterrupt, SystemExit):
        raise
    # `tokenizers` raises plain Exceptions, and panics, which are not Exceptions; transformers raises anything.
    except BaseException as error:
        raise ValueError(textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises OSError if it cannot be written, where `tokenizers` raises a plain Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"{folder}: {error}") from error


def _check(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError("it must be a fast tokenizer with an end-of-text token")
    largest = max(tokenizer.get_vocab().values())
    if largest >= _MOST_ENTRIES:
        raise ValueError(f"it has an entry of id {largest}; ids must be below {_MOST_ENTRIES}")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that determines how a text is encoded."""
    content = f"{tokenizer.eos_token_id} {_plain_backend(tokenizer).to_str()}"
    return hashlib.sha256(content.encode()).hexdigest()


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerFast) -> bool:
    return len(tokenizer) == 256 + len(_SPECIAL) and fingerprint(tokenizer) == fingerprint(byte_tokenizer())


def first_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that the tokenizer puts before a text, if it does."""
    first = tokenizer.bos_token_id
    return first if first is not None and tokenizer("a").input_ids[:1] == [first] else None


def encoder(tokenizer: PreTrainedTokenizerFast, special: bool = False) -> Callable[[str], np.ndarray]:
    """text -> token ids [T]. Names of special tokens count as text unless `special`, and no token is added."""
    if is_byte_tokenizer(tokenizer):
        return lambda text: np.frombuffer(text.encode(), np.uint8)
    backend = _plain_backend(tokenizer)
    backend.encode_special_tokens = not special
    return lambda text: np.array(backend.encode(text, add_special_tokens=False).ids, np.uint32)


def continuer(tokenizer: PreTrainedTokenizerFast) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """texts -> token ids [T] of each, as they follow a line end, without a space that the tokenizer puts before texts.

    Texts that begin with a space, or that follow a line end, are then encoded as in their concatenation.
    """
    if is_byte_tokenizer(tokenizer):
        return lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
    backend = _plain_backend(tokenizer)
    backend.encode_special_tokens = True
    front = backend.encode("\n", add_special_tokens=False).ids

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        found: list[list[int]] = []
        # Encodings are much larger than their ids.
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = ["\n" + text for text in texts[first : first + _TEXTS_AT_ONCE]]
            found += [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
        return [np.array(ids[len(front) :] if ids[: len(front)] == front else ids, np.uint32) for ids in found]

    return encode


class Piece(NamedTuple):
    """A piece of a text; own: whether names of special tokens in it stand for these tokens."""

    text: str
    own: bool


def piece_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[Iterable[Piece]], list[int]]:
    """pieces -> token ids of their concatenation; between special tokens, a token may span several pieces."""
    return _piece_encoder(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _piece_encoder(tokenizer: PreTrainedTokenizerFast, entries: int) -> Callable[[Iterable[Piece]], list[int]]:
    # Copying a large tokenizer takes longer than encoding a question; entries may have been added since.
    encode = encoder(tokenizer)
    ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {} if is_byte_tokenizer(tokenizer) else ids
    # The longest first; the group keeps the separators.
    names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
    special = re.compile(f"({names})" if names else "(?!)")

    def encode_pieces(pieces: Iterable[Piece]) -> list[int]:
        encoded, run = [], ""
        for text, own in pieces:
            first, *rest = special.split(text) if own else [text]
            run += first
            for name, behind in zip(rest[::2], rest[1::2], strict=True):
                encoded += [*encode(run).tolist(), ids[name]]
                run = behind
        return encoded + encode(run).tolist()

    return encode_pieces


def shortener(tokenizer: PreTrainedTokenizerFast) -> Callable[[str, int], str]:
    """(text, limit) -> a beginning of at most `limit` tokens and at least one character. The cost depends on the
    result's length.
    """
    if is_byte_tokenizer(tokenizer):
        return lambda text, limit: text[:limit].encode()[:limit].decode(errors="ignore") or text[:1]
    backend = _plain_backend(tokenizer)
    backend.encode_special_tokens = True

    def shortened(text: str, limit: int) -> str:
        text = text[: _LONGEST * limit]
        while len(text) > 1 and len(tokens := backend.encode(text, add_special_tokens=False).offsets) > limit:
            # The beginning alone may be encoded differently, into more tokens.
            text = text[: max(1, min(tokens[limit][0], len(text) - 1))]
        return text

    return shortened


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int64 [vocabulary]: the number of UTF-8 bytes of text for each token, 0 for special tokens.

    Bits per byte are the summed nats of the tokens / (ln 2 * their summed bytes). Exact for byte-level tokenizers; a
    SentencePiece one that prepends a space to a text counts one byte too many.
    Raises ValueError for tokenizers that lose bytes of the text, such as WordPiece.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([backend["pre_tokenizer"], backend["decoder"]])
    if not byte_level and "▁" not in json.dumps(backend["decoder"], ensure_ascii=False):
        raise ValueError("bits per byte need a byte-level or SentencePiece tokenizer; this one loses bytes")
    vocab = tokenizer.get_vocab()
    counts = np.zeros(max(vocab.values()) + 1, np.int64)
    for token, index in vocab.items():
        if byte_level:
            counts[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            counts[index] = 1
        else:
            counts[index] = len(token.replace("▁", " ").encode())
    for index, token in tokenizer.added_tokens_decoder.items():
        counts[index] = 0 if token.special else len(token.content.encode())
    counts[tokenizer.all_special_ids] = 0
    return counts


def _load_bpe(vocab_size: int, corpora: Sequence[Corpus]) -> PreTrainedTokenizerFast:
    least = len(_ALPHABET) + len(_SPECIAL)
    if type(vocab_size) is not int or not least <= vocab_size <= _MOST_ENTRIES:
        raise ValueError(
            f"data.tokenizer: bpe={vocab_size!r} must be a number of entries, at least {least}, "
            f"at most {_MOST_ENTRIES}"
        )
    if not corpora:
        raise ValueError(f"data.tokenizer: bpe={vocab_size} has no text to train on; add a text source")

    def train(folder: Path) -> None:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*_SPECIAL.values()],
            initial_alphabet=_ALPHABET,
            show_progress=False,
        )
        texts = chain.from_iterable(corpus.training_texts() for corpus in corpora)
        backend.train_from_iterator(texts, trainer)
        if backend.get_vocab_size() < vocab_size:
            raise ValueError(
                f"data.tokenizer: bpe={vocab_size} is more than the training text can fill;"
                f" ask for at most {backend.get_vocab_size()}"
            )
        save_tokenizer(_byte_level(backend, use_regex=True), folder)

    key = [_BPE_FORMAT, vocab_size, *(corpus.fingerprint for corpus in corpora)]
    folder = corpora[0].cache.folder(key, ("tokenizer.json",), train, below="tokenizers")
    return read_tokenizer(AutoTokenizer, folder)


def _byte_level(backend: Tokenizer, use_regex: bool) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **_SPECIAL,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy without state from earlier calls."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
