"""The parts of a model's evaluation: each is measured once, kept on the disk, and may fail alone."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memlm import files
from memlm.cli import is_mistake
from memlm.evaluation import storage
from memlm.evaluation.progress import Progress
from memlm.settings import require

Record = dict[str, Any]


class Parts:
    """The parts of one model.

    folder: of kept results; without one, nothing is kept
    about: everything but the parts' settings that determines their results
    model: a part whose forwards of it give logits that are not finite fails

    missing: part -> the reason why it could not be measured
    seconds: part -> of its measurement, also if that was earlier
    records: part -> its records; kept: the parts that were measured earlier
    """

    def __init__(
        self,
        name: str = "",
        folder: Path | None = None,
        about: Any = None,
        progress: Progress | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.name, self.folder, self.about, self.model = name, folder, about, model
        self.progress = Progress(shown=False) if progress is None else progress
        self.missing: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.records: dict[str, list[Record]] = {}
        self.kept: list[str] = []

    def measure(self, name: str, settings: Any, make: Callable[[list[Record]], Any], cost: int = 0) -> Any:
        """The result of ``make``, kept or measured; None if it raises an error that is a user's to mend.

        settings: what the result depends on, beside the model and its data: a dataclass or ready for JSON
        make: gets an empty list for records, returns a result ready for JSON
        cost: tokens that the model reads for it, roughly
        """
        path = None
        if self.folder:
            path = self.folder / f"{storage.digest([name, storage.content(settings), self.about])}.json"
            if found := _kept(path):
                self.kept.append(name)
                self.progress.skip(cost)
                return self._take(name, found)
        started, records = time.perf_counter(), list[Record]()
        try:
            with self.progress.part(f"{self.name}, {name}", cost), _finite(self.model):
                result = make(records)
        except Exception as error:
            if not is_mistake(error):
                raise
            self.leave_out(name, str(error))
            return None
        seconds = round(time.perf_counter() - started, 2)
        # Kept results and new ones have passed through JSON alike.
        text = json.dumps(
            {"part": name, "seconds": seconds, "result": result, "records": records}, default=storage.plain
        )
        if path:
            files.write(path, text)
        return self._take(name, json.loads(text))

    def leave_out(self, name: str, reason: str) -> None:
        self.missing[name] = " ".join(reason.split())
        self.progress.say(f"{self.name}: {name} is missing: {self.missing[name]}")

    def _take(self, name: str, found: dict[str, Any]) -> Any:
        self.seconds[name] = found["seconds"]
        if found["records"]:
            self.records[name] = found["records"]
        return found["result"]


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found = files.read_json(path)
    except ValueError:
        # Not there, or damaged: measured anew.
        return None
    return found if found.keys() >= {"seconds", "result", "records"} else None


@contextmanager
def _finite(model: nn.Module | None) -> Iterator[None]:
    """Raise ValueError at the end if a forward of the model gave logits that are not finite: the choice of a token by
    them would count as wrong. A device is not waited for before.
    """
    fine: Tensor | bool = True

    def look(module: nn.Module, inputs: Any, out: Any) -> None:
        nonlocal fine
        logits = getattr(out, "logits", None)
        if isinstance(logits, Tensor) and logits.numel():
            # The largest is nan if one is.
            fine = logits.detach().amax(-1).isfinite().all() & fine

    hook = model.register_forward_hook(look) if model else None
    try:
        yield
    finally:
        if hook:
            hook.remove()
    require(bool(fine), "the model's logits are not finite")
