"""The screen during training: a banner and one progress bar, or plain lines if there is no terminal."""

import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class Screen(Console):
    """A terminal or a pipe that may close while a run continues."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True


class Left(ProgressColumn):
    """The time left at the mean speed so far, from the first step on."""

    def render(self, task: Task) -> Text:
        # A run that goes on begins above 0.
        done = task.completed - task.fields.get("begun", 0)
        if not done or task.total is None or task.elapsed is None:
            return Text("-:--:--", style="progress.remaining")
        seconds = round(task.elapsed / done * (task.total - task.completed))
        return Text(str(timedelta(seconds=seconds)), style="progress.remaining")


def bar(counted: str, **options: Any) -> Progress:
    """A bar behind its count; options: of ``rich.progress.Progress``."""
    return Progress(
        TextColumn(counted),
        BarColumn(bar_width=None),
        # Sources and models have user-chosen names, which are not markup.
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        Left(),
        **options,
    )


class Display:
    """Progress of a run of ``steps`` steps; silent unless ``shown`` (ranks above 0 are silent)."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.console = Screen(quiet=not shown, highlight=False, soft_wrap=True)
        self.steps = steps
        self.live = self.console.is_terminal and shown
        self._started, self._begun = time.perf_counter(), 0
        self._bar = bar("step {task.completed:.0f}/{task.total:.0f}", console=self.console, disable=not self.live)
        self._task = self._bar.add_task("", total=steps, start=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        (self._bar.console if self.live else self.console).print(text, markup=False)

    def begin(self, step: int) -> None:
        """The steps after ``step`` begin now."""
        self._started, self._begun = time.perf_counter(), step
        self._bar.update(self._task, completed=step, begun=step)
        self._bar.start_task(self._task)

    def advance(self, step: int, figures: dict[str, str] | None = None) -> None:
        """Show that ``step`` steps are done, and figures if they are new."""
        if figures is None:
            self._bar.update(self._task, completed=step)
            return
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self.live:
            self._bar.update(self._task, completed=step, description=text)
            return
        left = (time.perf_counter() - self._started) / (step - self._begun) * (self.steps - step)
        self.say(f"step {step}/{self.steps}  {text}  left {left:.0f}s")
