"""A moving average of the trained weights, saved with each checkpoint, for evaluation."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memlm.training.shards import divided

NAME = "ema.safetensors"


class WeightAverage:
    """average = d * average + (1 - d) * weight after each step, in fp32; d grows from 0.18 to ``decay``, so the first
    weights are soon forgotten.

    averages: by the parameter's name
    """

    def __init__(self, model: nn.Module, decay: float, folder: Path | None = None) -> None:
        """folder: the checkpoint to continue from"""
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in self._weights.items()}
        if folder is not None:
            self.load(folder)

    def load(self, folder: Path) -> None:
        for name, saved in load_file(folder / NAME).items():
            self.averages[name].copy_(divided(saved, self.averages[name]))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """step: the number of steps that were taken"""
        decay = min(self.decay, (step + 1) / (step + 10))
        weights = [p.float() for p in self._weights.values()]
        torch._foreach_lerp_([*self.averages.values()], weights, 1 - decay)

    def save(self, folder: Path) -> None:
        save_file({name: x.contiguous() for name, x in self.averages.items()}, folder / NAME)


@torch.no_grad()
def use_average(model: nn.Module, folder: Path | str, key: str) -> None:
    """Give a model the averages that its checkpoint holds. Raises ValueError, with the key, if it has none."""
    path = Path(folder) / NAME
    if not path.exists():
        raise ValueError(f"{key}: {folder} has no {NAME}; leave it out, or train with train.ema=0.999")
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, average in load_file(path).items():
        weights[name].copy_(average)
