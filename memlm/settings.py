"""Checks of a user's settings before anything is built: each mistake is one line with the key, the value and a fix."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) for a user's mistake; messages start with ``key=value``."""
    if not condition:
        raise ValueError(message)


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put the key in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def suggest(wrong: str, known: Sequence[str], otherwise: str = "") -> str:
    """'did you mean ...' for a misspelt name; otherwise ``otherwise``, or a list of all names."""
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise or f"one of: {', '.join(known)}"


def check_type(value: Any, hint: Any, key: str) -> None:
    """Raise ValueError with ``key`` unless the value has the annotated type; an int may stand for a float."""
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = [typing.get_origin(t) or t for t in union]
    number = float in allowed and type(value) is int
    if not number and type(value) not in allowed:
        wanted = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{key}={value!r:.80} must be {wanted}")


def build_config(cls: type, values: dict[str, Any], key: str) -> Any:
    """A configuration dataclass from plain values; ``key`` is their place in the configuration.

    Raises ValueError with the key for unknown names, wrong types, and values that ``__post_init__`` refuses.
    """
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{key}.{name}={value!r} is not a setting; {suggest(name, list(hints))}")
        check_type(value, hints[name], f"{key}.{name}")
    try:
        return cls(**values)
    except TypeError:
        missing = next(f.name for f in dataclasses.fields(cls) if f.name not in values)
        raise ValueError(f"{key}.{missing} is missing; set it") from None
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
