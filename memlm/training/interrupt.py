"""Signals: a run that is asked to stop ends with a checkpoint, and with the exit code that shells expect."""

import signal
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A run ended by a signal, whose number it carries."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupt:
    """Ctrl-C, SIGTERM or a terminal that closes stops a run: at once, or, once it is ``patient``, where ``number`` is
    looked at. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.patient = False

    def __enter__(self) -> Self:
        # nohup has SIGHUP ignored; so it stays.
        taken = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._ask) for s in taken}
        return self

    def __exit__(self, *_: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Launchers repeat their SIGTERM, and send their own after a terminal's Ctrl-C.
        again = self.number == number == signal.SIGINT and not dist.is_initialized()
        if again or not self.patient:
            raise Stopped(number)
        self.number = self.number or number


class Agreement:
    """The signal that any process was sent, agreed on by all.

    ``poll`` is called once a step by every process. It gives what the last one gathered, so that nobody waits for a
    device: several processes stop one step later than one alone, which looks at once.
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
