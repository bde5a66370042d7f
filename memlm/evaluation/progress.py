"""The screen during an evaluation: one bar of tokens read, or plain lines if there is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from memlm.training.display import Screen, bar

# Seconds between plain lines.
_EVERY = 10.0


class Progress:
    """Progress through ``total`` tokens, an estimate that follows the parts; silent unless ``shown``."""

    def __init__(self, shown: bool = True) -> None:
        self.console = Screen(quiet=not shown, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and shown
        self.total = self._done = self._cost = self._inside = 0
        self._label, self._started, self._told = "", time.perf_counter(), time.perf_counter()
        counted = "tokens {task.completed:,.0f}/{task.total:,.0f}"
        self._bar = bar(counted, console=self.console, transient=True, disable=not self.live)
        self._task = self._bar.add_task("")

    def __enter__(self) -> Self:
        self._bar.start()
        self._started = self._told = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    @contextmanager
    def part(self, label: str, cost: int) -> Iterator[None]:
        """A part that reads about ``cost`` tokens."""
        self._label, self._cost, self._inside = label, cost, 0
        self._show()
        try:
            yield
        finally:
            self._done += self._cost
            self._cost = self._inside = 0
            self._show()

    def skip(self, cost: int) -> None:
        """A part was measured earlier."""
        self.total -= cost
        self._show()

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Count the tokens of a model's forwards."""

        def count(module: nn.Module, args: Any, words: dict[str, Any]) -> None:
            ids = words.get("input_ids", args[0] if args else None)
            if isinstance(ids, torch.Tensor):
                self.advance(ids.numel())

        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def advance(self, tokens: int) -> None:
        self._inside += tokens
        if self._inside > self._cost:
            self.total += self._inside - self._cost
            self._cost = self._inside
        self._show()

    def _show(self) -> None:
        done, now = self._done + self._inside, time.perf_counter()
        if self.live:
            self._bar.update(self._task, completed=done, total=self.total, description=self._label)
        elif now - self._told > _EVERY and done:
            self._told = now
            left = (now - self._started) / done * (self.total - done)
            self.say(f"tokens {done:,}/{self.total:,}  {self._label}  left {left:.0f}s")
