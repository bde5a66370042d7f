"""Steps whose loss or gradients are not finite, or whose loss spikes: ``train.on_nan`` and ``train.spike``."""

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from memlm.data import Batch
from memlm.settings import require
from memlm.training.settings import TrainSettings

BATCHES = "bad_batches"
_RECENT = 50
_FEW = 20
# Steps in a row that may be skipped; more have another cause than their batches.
_MOST_IN_A_ROW = 10


class Guard:
    """By default a bad step ends the run at the next log, and nothing waits for the device before. Otherwise each step
    is judged before its update, and the host waits for its loss.

    recent: losses of good steps, the newest last; bad: whether the last step was
    """

    def __init__(self, settings: TrainSettings, recent: Iterable[float] = ()) -> None:
        self.action, self._spike = settings.on_nan, settings.spike
        self.recent, self.bad = deque(recent, maxlen=_RECENT), False
        self._row = 0
        self._first: Tensor | None = None

    @property
    def judges(self) -> bool:
        return self.action != "stop" or self._spike is not None

    def note(self, step: int, finite: Tensor) -> None:
        """Remember on the device the first step that is not finite."""
        if self._first is None:
            self._first = torch.full((), -1, device=finite.device)
        self._first = torch.where((self._first < 0) & ~finite, step, self._first)

    @property
    def first(self) -> int | None:
        """The first noted step that was not finite; the host waits for it."""
        first = -1 if self._first is None else int(self._first.item())
        return first if first >= 0 else None

    def judge(self, loss: float, norm: float) -> str | None:
        """The reason to leave out the update of a step, if there is one. Raises ValueError if the run must end."""
        usual = median(self.recent) if len(self.recent) >= _FEW else math.inf
        reason = None
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"loss is {loss:.4g}, gradient norm {norm:.4g}"
        elif self._spike is not None and loss > self._spike * usual:
            reason = f"loss is {loss:.4g}, more than train.spike={self._spike:g} times its median {usual:.4g}"
        self.bad = reason is not None
        if reason is None:
            self.recent.append(loss)
            self._row = 0
            return None
        self._row += 1
        most = 1 if self.action == "rewind" else _MOST_IN_A_ROW
        fix = "lower optim.lr or optim.muon_lr"
        require(self.action != "stop", f"{reason}; {fix}, or set train.on_nan=skip")
        require(self._row <= most, f"{reason}, in step {self._row} in a row; {fix}")
        return reason


def keep_batches(run_dir: Path, step: int, rank: int, batches: Iterable[Batch]) -> Path:
    """Save the tensors of a process's batches of a step; returns their file."""
    path = run_dir / BATCHES / f"step_{step:06d}-rank{rank}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [vars(b) | (vars(b.roles) if b.roles else {}) for b in batches]
    torch.save([{name: x for name, x in of_part.items() if isinstance(x, Tensor)} for of_part in parts], path)
    return path
