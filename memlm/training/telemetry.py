"""Figures of a run's speed: rates, the parts of a step, memory, learning rates, gradient norms by part."""

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from memlm.training.devices import peak_flops
from memlm.training.shards import whole

_PARTS = ("data", "forward", "backward", "optimizer")


class StepClock:
    """The time of each part of a step, without a wait for the device: on a GPU, events in its queue mark the parts.

    There "data" is the time that the GPU waits for the next batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        self.lap("begin")

    def lap(self, part: str) -> None:
        """``part`` of the step ends here."""
        mark: float | torch.cuda.Event = time.perf_counter()
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((part, mark))

    def read(self, steps: int) -> dict[str, float]:
        """Seconds of each part in the mean of the last ``steps`` steps; waits for the end of the last one."""
        sums, last = dict.fromkeys(_PARTS, 0.0), self._marks[-1][1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        for (_, before), (part, now) in zip(self._marks, self._marks[1:], strict=False):
            if part in sums:
                sums[part] += _between(before, now)
        self._marks.clear()
        return {f"seconds/{part}": total / steps for part, total in sums.items()}


def _between(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        return before.elapsed_time(now) / 1000
    assert isinstance(now, float)
    return now - before


def rates(tokens_per_second: float, flops: float | None, device: torch.device, processes: int) -> dict[str, float]:
    """flops: of a token's forward, of which a training step costs three; None: unknown

    Returns tokens a second of all processes; FLOPs a second of one device, and their share of its dense bf16 peak, as
    far as they are known.
    """
    found = {"tokens_per_second": tokens_per_second}
    if flops is not None:
        found["tflops"] = 3 * flops * tokens_per_second / processes / 1e12
        if (peak := peak_flops(device)) is not None:
            found["mfu"] = found["tflops"] * 1e12 / peak
    return found


def over_processes(figures: dict[str, float]) -> dict[str, float]:
    """The mean of each figure over the processes that have it. All processes call this."""
    of_each = gather_object([figures])
    names = dict.fromkeys(name for of_one in of_each for name in of_one)
    return {name: fmean(of_one[name] for of_one in of_each if name in of_one) for name in names}


def peak_memory(device: torch.device) -> float:
    """GB: the most that tensors on a GPU had so far; on a CPU, that the process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # kB on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def learning_rates(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, float]:
    """lr/adamw, lr/muon."""
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    return {f"lr/{type(optimizer).__name__.lower()}": optimizer.param_groups[0]["lr"] for optimizer in inner}


def gradient_norms(model: nn.Module, norm: Tensor, clip: float) -> dict[str, Tensor]:
    """grad_norm/<part>: norms before clipping, of gradients that were clipped to ``clip`` from ``norm``.

    A part is a kind of module in the layers, such as all mixers, or a module outside.
    """
    parts = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            inner = re.search(r"\.\d+\.(\w+)\.", name)
            parts[inner[1] if inner else name.split(".")[-2:][0]].append(parameter.grad)
    scale = ((norm + 1e-6) / clip).clamp(min=1)
    return {f"grad_norm/{part}": whole(nn.utils.get_total_norm(grads)) * scale for part, grads in parts.items()}
