"""Signals: a run that is asked to stop saves a checkpoint, and exits with the code that shells expect."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

# Clusters send SIGUSR1 some minutes before they end a job.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; holds its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupt:
    """Ctrl-C, SIGTERM or a closed terminal stops a run: at once, or, if ``patient``, when the run looks at ``number``.
    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.patient = False

    def __enter__(self) -> Self:
        # nohup ignores SIGHUP, and so must the run.
        taken = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._ask) for s in taken}
        return self

    def __exit__(self, *_: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    @contextmanager
    def after(self) -> Iterator[None]:
        """Stop after the block, not in it: for code that torch calls from C++, where an exception of a signal would
        end the process.
        """
        self.patient = True
        yield
        self.patient = False
        if self.number:
            raise Stopped(self.number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Launchers repeat SIGTERM, and send it after a Ctrl-C in the terminal.
        again = self.number == number == signal.SIGINT and not dist.is_initialized()
        if again or not self.patient:
            raise Stopped(number)
        self.number = self.number or number


class Agreement:
    """The signal that any process has received, agreed on by all.

    Every process calls ``poll`` once per step. ``number`` is then the result gathered during the last step, so nobody
    waits for a device. So several processes stop one step later than a single one.
    """

    def __init__(self, interrupt: Interrupt, processes: int) -> None:
        self._interrupt, self._agreed, self._work = interrupt, 0, None
        self._group = dist.new_group(backend="gloo") if processes > 1 else None

    @property
    def number(self) -> int:
        return self._agreed if self._group else self._interrupt.number

    def poll(self) -> None:
        if self._group is None:
            return
        if self._work is not None:
            self._work.wait()
            self._agreed = int(self._flag)
        self._flag = torch.tensor(self._interrupt.number)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
