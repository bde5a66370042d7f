"""Metrics of a run: always in ``metrics.jsonl``, and in other places if configured."""

import json
import os
import uuid
from pathlib import Path

from memlm import files
from memlm.training.settings import RunSettings


class Tracker:
    """Appends to ``run_dir/metrics.jsonl``; a resumed run first removes lines after its step."""

    def __init__(self, settings: RunSettings, step: int) -> None:
        self.path = settings.run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if _before(line, step)]
        files.write(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))
        # The validation after this step, which is not done again.
        now = [{name: x for name, x in line.items() if name != "step"} for line in kept if line["step"] == step]
        self._others = [_TRACKERS[name](settings, step, now) for name in settings.tracker.names]
        self._file = self.path.open("a")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **{k: _short(v) for k, v in figures.items()}}) + "\n")
        self._file.flush()
        for other in self._others:
            other.log(step, figures)

    def sync(self) -> None:
        """Flush all figures to the disk, so that a checkpoint is never ahead of them."""
        os.fsync(self._file.fileno())
        for other in self._others:
            other.flush()

    def close(self, failed: bool) -> None:
        self._file.close()
        for other in self._others:
            other.close(failed)


class WeightsAndBiases:
    """Raises ValueError if it cannot be reached. It has what an earlier run wrote after this step."""

    def __init__(self, settings: RunSettings, step: int, now: list[dict[str, float]]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=settings.tracker.project,
                name=settings.name,
                id=_wandb_id(settings.run_dir),
                resume="allow",
                dir=str(settings.run_dir),
                config=settings.config,
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"tracker.name=wandb: {reason}; log in, set the variable WANDB_MODE=offline, or use tracker=none"
            ) from error

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def flush(self) -> None:
        """A process of its own writes."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in ``run_dir/tensorboard``."""

    def __init__(self, settings: RunSettings, step: int, now: list[dict[str, float]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Figures that an earlier run wrote from this step on are hidden, so those of this step are written again.
        self._writer = SummaryWriter(str(settings.run_dir / "tensorboard"), purge_step=step)
        for figures in now:
            self.log(step, figures)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


_TRACKERS = {"wandb": WeightsAndBiases, "tensorboard": TensorBoard}


def _wandb_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases, drawn once, so equally named folders on two machines are two runs."""
    path = run_dir / "wandb-id"
    if not path.exists():
        files.write(path, uuid.uuid4().hex[:12])
    return path.read_text().strip()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``, without torn lines and values that are not numbers."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append({name: value for name, value in line.items() if type(value) in (int, float)})
    return lines


def is_validated(run_dir: Path, step: int) -> bool:
    """Whether ``metrics.jsonl`` has the validation after ``step`` steps."""
    return any(line["step"] == step and "loss" not in line for line in read_metrics(run_dir / "metrics.jsonl"))


def _before(line: dict[str, float], step: int) -> bool:
    """Whether a line precedes the checkpoint of ``step``: batches up to step - 1, validations up to step."""
    return line["step"] < step or (line["step"] == step and "loss" not in line)


def _short(value: float) -> float:
    return float(f"{value:.6g}")
