"""Parameter groups, optimisers and the learning-rate schedule."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memlm.layers import GroupedLinear
from memlm.training.settings import OptimSettings
from memlm.training.shards import at_owners, local


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a model in three groups: ``matrices``, ``head`` and ``rest``.

    matrices: weights of linear layers named ``*_proj``, in blocks and memories
    rest: norms, gates, biases, convolutions, embeddings, learned memories; without weight decay
    """
    matrices = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | GroupedLinear) and name.endswith("_proj")
    }
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "head": [], "rest": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        head = name.endswith("lm_head.weight") and parameter not in embeddings
        groups["matrices" if parameter in matrices else "head" if head else "rest"].append(parameter)
    return groups


class Muon(torch.optim.Muon):
    """torch's Muon with Nesterov momentum, but faster: it batches matrices of equal shape, and on a CPU uses fp32.

    Matrices that processes share have one owner each, which alone orthogonalises them.
    """

    # Elements orthogonalised at once: batching speeds up small matrices; large ones gain nothing.
    _AT_ONCE = 2**22

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.device, p.dtype, p.shape].append(p)
            for (*_, shape), parameters in alike.items():
                owners = parameters[0].device_mesh.shape[-1] if isinstance(parameters[0], DTensor) else 1
                size = max(1, self._AT_ONCE // shape.numel()) * owners
                for start in range(0, len(parameters), size):
                    self._update(parameters[start : start + size], group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in parameters:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
        grads = [local(p.grad) for p in parameters]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        moves, first = torch.stack(grads).lerp(torch.stack(buffers), group["momentum"]), parameters[0]
        if isinstance(first, DTensor):
            updates = at_owners(moves, first, lambda x: _orthogonalised(x, group))
        else:
            updates = _orthogonalised(moves, group)
        rows, columns = first.shape
        weights = [local(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def _orthogonalised(x: Tensor, group: dict[str, Any]) -> Tensor:
    """[N, rows, columns]: Muon's Newton-Schulz iteration; the resulting singular values are near 1."""
    a, b, c = group["ns_coefficients"]
    y = x.float() if x.device.type == "cpu" else x.bfloat16()
    if x.shape[1] > x.shape[2]:
        y = y.mT
    y = y / torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if x.shape[1] > x.shape[2] else y).to(x.dtype)


def build_optimizers(model: nn.Module, optim: OptimSettings) -> list[torch.optim.Optimizer]:
    """An AdamW, and with ``name: muon`` a Muon for the matrices, if they have parameters. Each group stores its peak
    as ``peak_lr``.
    """
    groups = parameter_groups(model)
    decayed = groups["head"] if optim.name == "muon" else groups["head"] + groups["matrices"]
    adamw = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": groups["rest"], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if adamw := [group for group in adamw if group["params"]]:
        optimizers.append(torch.optim.AdamW(adamw, lr=optim.lr, betas=tuple(optim.betas)))
    if optim.name == "muon" and groups["matrices"]:
        optimizers.append(Muon(groups["matrices"], lr=optim.muon_lr, weight_decay=optim.weight_decay, momentum=0.95))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, steps: int, optim: OptimSettings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the schedule to ``final_lr`` at ``steps``."""
    warmup, final = optim.warmup_steps, optim.final_lr
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, stable_steps(steps, optim.decay)) if optim.schedule == "wsd" else warmup
    done = min(1.0, max(0, step - start) / max(1, steps - start))
    if optim.schedule == "wsd":
        return 1 - (1 - final) * done
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def stable_steps(steps: int, decay: float) -> int:
    """The first step of WSD's fall."""
    return steps - round(decay * steps)


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
