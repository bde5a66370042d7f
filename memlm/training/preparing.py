"""The screen while data is prepared: a bar with the time left, or a line now and then if there is no terminal."""

import time
from types import TracebackType
from typing import Self

from rich.progress import Progress

from memlm.data import Preparation
from memlm.training.display import Display, bar

# Seconds before the first sign, which short preparations do not reach, and between lines.
_FIRST, _BETWEEN = 2, 30


class Preparing(Preparation):
    def __init__(self, display: Display, workers: int | None = None) -> None:
        self._display, self.workers = display, workers
        self._name, self._started, self._told = "", 0.0, 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        self._display.say(line)

    def advance(self, name: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if name != self._name:
            self._name, self._started, self._told = name, now, now + _FIRST - _BETWEEN
        if done >= total:
            self._end()
        elif self._display.live:
            if self._bar is None and now - self._started > _FIRST:
                self._bar = bar("{task.percentage:.0f} %", console=self._display.console)
                self._bar.add_task(f"encoding data.sources.{name}", total=total)
                self._bar.start()
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=done)
        elif now - self._told >= _BETWEEN and 0 < done < total:
            self._told = now
            left = (now - self._started) * (total - done) / done
            self.say(f"encoding data.sources.{name}: {done / total:.0%}  left {left:.0f}s")
