"""Parameter groups, optimisers and the learning-rate schedule."""

import math

import torch
from torch import nn

from memlm.training.settings import OptimSettings


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """``matrices``, ``head`` and ``rest`` of a model, every trained parameter in exactly one.

    matrices: weights of linear layers named ``*_proj``, the blocks' projections. rest: norms, gates,
    biases, convolutions, embeddings, learned memories: nothing that weight decay may touch.
    """
    matrices = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith("_proj")
    }
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "head": [], "rest": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        head = name.endswith("lm_head.weight") and parameter not in embeddings
        groups["matrices" if parameter in matrices else "head" if head else "rest"].append(parameter)
    return groups


def build_optimizers(model: nn.Module, optim: OptimSettings) -> list[torch.optim.Optimizer]:
    """One AdamW, and with ``name: muon`` a Muon for the matrices. Each group keeps its peak as ``peak_lr``."""
    groups = parameter_groups(model)
    decayed = groups["head"] if optim.name == "muon" else groups["head"] + groups["matrices"]
    adamw = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": groups["rest"], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in adamw if g["params"]], lr=optim.lr, betas=tuple(optim.betas))
    ]
    if optim.name == "muon":
        optimizers.append(
            torch.optim.Muon(groups["matrices"], lr=optim.muon_lr, weight_decay=optim.weight_decay, momentum=0.95)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to ``final``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
