"""Facts written into the weights of a model, in closed form: UltraEdit (arXiv:2505.14679).

A fact is a text whose last tokens are the answer. For a Linear layer, each token before a token of the answer has a
key h, the layer's input, and a direction g, the gradient of the answers' summed loss by its output. With the mean and
the deviation of [h; g] over all edits so far, which give [h'; g'],

    V_n = -rate |h'_n|^2 g'_n        W <- W + ((H^T H + 1)^-1 H^T V)^T

so the layer's output at each key moves along V, and keys at right angles to all H move nothing.

B facts, T tokens, N tokens before an answer, K inputs and D outputs of a layer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.data.row import IGNORE_INDEX
from memlm.settings import require, suggest
from memlm_kernels.segments import exact

# The part of the depth whose feed-forward layers the paper edits.
_FIRST, _LAST = 0.55, 0.85
_OF_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(?:gate_proj|up_proj)$")


class Editor:
    """Writes facts into some Linear layers of a model, batch by batch; what it has seen normalises later batches.

    >>> editor = Editor(model)
    >>> editor(input_ids, labels)  # the model now gives the labels

    model: any causal language model of transformers, changed in place
    modules: names of Linear layers; None: ``mlp.gate_proj`` and ``mlp.up_proj`` of the layers at 0.55 to 0.85 of the
        depth
    rate: the size of a step. An output moves by about rate x inputs of the layer, in deviations of its gradient: the
        paper's 1e-6 is for layers of thousands of inputs

    Raises ValueError if a module is not there or is no Linear layer with floating weights.
    """

    def __init__(self, model: PreTrainedModel, modules: Sequence[str] | None = None, rate: float = 1e-6) -> None:
        require(rate > 0, f"rate={rate} must be above 0")
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        names = _middle(linear) if modules is None else list(modules)
        require(bool(names), "modules: the model has no mlp.gate_proj and mlp.up_proj; name Linear layers of it")
        for name in names:
            if name not in linear:
                raise ValueError(f"modules: {name!r} is no Linear layer of the model; {suggest(name, [*linear])}")
            kind = linear[name].weight.dtype
            require(kind.is_floating_point, f"modules: {name} has weights of {kind}; load the model unquantised")
        self.model, self.rate = model, rate
        self.modules = {name: linear[name] for name in names}
        self._seen = {name: _Moments() for name in names}

    def __call__(self, input_ids_BT: Tensor, labels_BT: Tensor) -> None:
        """Write one batch of facts; they are weighed against each other, so many at once are better than one by one.

        input_ids_BT: padded at the end; labels_BT: the answers' tokens, not shifted; -100 elsewhere

        Raises ValueError if a shape differs or no label is scored.
        """
        require(
            input_ids_BT.shape == labels_BT.shape and input_ids_BT.ndim == 2,
            f"labels {list(labels_BT.shape)} and input_ids {list(input_ids_BT.shape)} must both be [facts, tokens]",
        )
        targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
        answers_BT = targets_BT != IGNORE_INDEX
        require(bool(answers_BT.any()), "labels: no token after the first is scored; mark the answers")
        with torch.enable_grad(), self._watched() as (keys, outputs):
            logits_BTV = self.model(input_ids_BT, use_cache=False).logits
            loss = F.cross_entropy(exact(logits_BTV[answers_BT]), targets_BT[answers_BT], reduction="sum")
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        with torch.no_grad():
            for (name, module), g_BTD in zip(self.modules.items(), gradients, strict=True):
                change_DK = self._change(name, exact(keys[name][answers_BT]), exact(g_BTD[answers_BT]))
                module.weight += change_DK.to(module.weight.dtype)

    def _change(self, name: str, keys_NK: Tensor, g_ND: Tensor) -> Tensor:
        width = keys_NK.shape[1]
        keys_hat_NK, g_hat_ND = self._seen[name](torch.cat([keys_NK, g_ND], 1)).split([width, g_ND.shape[1]], 1)
        moves_ND = -self.rate * keys_hat_NK.square().sum(1, keepdim=True) * g_hat_ND
        # (H^T H + 1)^-1 H^T = H^T (H H^T + 1)^-1, the smaller of the two systems.
        one_N = torch.eye(min(keys_NK.shape), device=keys_NK.device, dtype=keys_NK.dtype)
        if len(keys_NK) < width:
            return torch.linalg.solve(keys_NK @ keys_NK.T + one_N, moves_ND).T @ keys_NK
        return torch.linalg.solve(keys_NK.T @ keys_NK + one_N, keys_NK.T @ moves_ND).T

    @contextmanager
    def _watched(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The inputs and the outputs of the layers in the forward inside; outputs ask for a gradient."""
        keys: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def see(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                keys[name] = inputs[0].detach()
                # Frozen weights make an output without a graph.
                outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
                return outputs[name]

            return hook

        hooks = [module.register_forward_hook(see(name)) for name, module in self.modules.items()]
        try:
            yield keys, outputs
        finally:
            for hook in hooks:
                hook.remove()


class _Moments:
    """Mean and variance of all rows that it was given."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, x_NC: Tensor) -> Tensor:
        """The rows, now counted too, less the mean and over the deviation; 0 where they never differed."""
        more, mean = len(x_NC), x_NC.mean(0)
        apart, whole = mean - self.mean.to(mean), self.count + more
        between = apart.square() * (self.count * more / whole)
        self.square = self.square.to(mean) + (x_NC - mean).square().sum(0) + between
        self.mean, self.count = self.mean.to(mean) + apart * (more / whole), whole
        variance = self.square / whole
        return torch.where(variance > 0, (x_NC - self.mean) * variance.rsqrt(), 0.0)


def _middle(linear: Mapping[str, nn.Module]) -> list[str]:
    layer_of = {name: int(found[1]) for name in linear if (found := _OF_LAYER.search(name))}
    depth = max(layer_of.values(), default=0) + 1
    return [name for name, layer in layer_of.items() if int(_FIRST * depth) <= layer < _LAST * depth]
