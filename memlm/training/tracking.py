"""Figures of a run: always ``metrics.jsonl``, and Weights & Biases where asked for."""

import json
from pathlib import Path
from typing import Any


class Tracker:
    """Appends to ``run_dir/metrics.jsonl``; a resumed run first drops what lies beyond its step."""

    def __init__(self, run_dir: Path, name: str, tracker: dict[str, Any], config: dict[str, Any], step: int) -> None:
        if tracker["name"] not in ("none", "wandb"):
            raise ValueError(f"tracker.name={tracker['name']!r} is unknown; use none or wandb")
        self.path = run_dir / "metrics.jsonl"
        lines = [line for line in _whole_lines(self.path) if _before(json.loads(line), step)]
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in lines))
        partial.replace(self.path)
        self._file = self.path.open("a")
        self._run = None
        if tracker["name"] == "wandb":
            import wandb

            run_id = "-".join(run_dir.parts[-2:])
            self._run = wandb.init(
                project=tracker["project"],
                name=name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=config,
            )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **{k: _short(v) for k, v in figures.items()}}) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log(figures, step=step)

    def close(self) -> None:
        self._file.close()
        if self._run is not None:
            self._run.finish()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``; a torn last line is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _before(line: dict[str, float], step: int) -> bool:
    """Whether a line was written before the checkpoint of ``step``: batches up to step - 1, validation of step."""
    return line["step"] < step or (line["step"] == step and "loss" not in line)


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    whole = []
    for line in path.read_text().splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        whole.append(line)
    return whole


def _short(value: float) -> float:
    return float(f"{value:.6g}")
