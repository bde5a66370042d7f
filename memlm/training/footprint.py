"""The memory of a training step, found by running a layer of each kind on tensors without data."""

import copy
import weakref
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlm.configuration import MemLMConfig
from memlm.modeling import MemLMForCausalLM
from memlm.training import trainable
from memlm.training.objective import Objective
from memlm.training.settings import TrainSettings
from memlm.training.sharding import matrices
from memlm_kernels import set_backend

# Bytes that a stretch of a step adds, and the most that exist during it above its begin.
Lap = tuple[int, int]


class StepPart(NamedTuple):
    """A part of the model in a step.

    output: bytes of the tensor that it hands on; gradients: of its parameters' gradients
    """

    forward: Lap
    backward: Lap
    output: int
    gradients: int


class Footprint(NamedTuple):
    """The parts of a model with one layer of each mixer.

    shared: bytes that all layers of a call read, such as positions and masks
    """

    embedding: StepPart
    layers: dict[str, StepPart]
    head: StepPart
    shared: int

    def peak(self, names: Sequence[str], checkpointed: Collection[int], kept: float = 0.0) -> float:
        """The most bytes of activations and gradients in the step of a model with these layers.

        checkpointed: numbers of layers that keep their input alone, and whose forward runs again in their backward
        kept: the share of gradients that a device keeps after the backward of their part
        """
        now = most = float(self.shared)

        def take(lap: tuple[float, float]) -> None:
            nonlocal now, most
            now, most = now + lap[0], max(most, now + lap[1])

        layers = [(self.layers[name], i in checkpointed) for i, name in enumerate(names)]
        parts = [(self.embedding, False), *layers, (self.head, False)]
        for part, again in parts:
            take((part.output, part.forward[1]) if again else part.forward)
        for part, again in reversed(parts):
            if again:
                take(part.forward)
            added, above = part.backward
            take((added - again * part.output - (1 - kept) * part.gradients, above))
        return most


def of_step(
    config: MemLMConfig, train: TrainSettings, inputs: dict[str, Any], autocast: AbstractContextManager, rounded: bool
) -> Footprint:
    """inputs: of ``Objective.forward``, for one forward of one device
    rounded: whether the layers' matrices arrive in bf16, so that autocast copies none

    The ops are their references; a GPU's kernels keep less. Taps (``model.taps``) are left out.
    """
    names = [*dict.fromkeys(config.layer_mixers())]
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.mixer_pattern, config.taps = len(names), names, None
    with FakeTensorMode(allow_non_fake_inputs=True), set_backend("reference"):
        model = MemLMForCausalLM(config).train()
        trainable.train_only(model, trainable.choose(model, train.trainable))
        for module in (module for layer in model.model.layers for module in matrices(layer) if rounded):
            for name, p in [*module.named_parameters()]:
                setattr(module, name, nn.Parameter(p.bfloat16(), p.requires_grad))
        objective, live = Objective(model, train.lm_weight, train.z_loss), _Live()
        laps: dict[tuple[str, str], Lap] = {}
        outputs: dict[str, int] = {}
        # The parts whose outputs have a gradient; the first of them ends the backward.
        trained: list[str] = []

        def entered(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if name == names[0]:
                laps["embedding", "forward"] = live.lap()
                leave("embedding", inputs[0])
            # Values that all layers share are then made once, as in a model of more layers.
            with torch.no_grad():
                layer.forward(*inputs)
            laps[name, "shared"] = live.lap()

        def left(name: str, layer: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            laps[name, "forward"] = live.lap()
            leave(name, out.y_BTD)

        def leave(name: str, x: Tensor) -> None:
            outputs[name] = x.untyped_storage().nbytes()
            behind = [*names, "head"][0 if name == "embedding" else names.index(name) + 1]
            if x.requires_grad:
                trained.append(name)
                x.register_hook(lambda _: laps.__setitem__((behind, "backward"), live.lap()))

        for name, layer in zip(names, model.model.layers, strict=True):
            layer.register_forward_pre_hook(partial(entered, name))
            layer.register_forward_hook(partial(left, name))
        with live:
            with autocast:
                loss = objective(**inputs)[0]
            laps["head", "forward"] = live.lap()
            loss.backward()
            laps[[*trained, "head"][0], "backward"] = live.lap()
    modules = {
        "embedding": model.model.embed_tokens,
        **dict(zip(names, model.model.layers, strict=True)),
        "head": nn.ModuleList([model.model.norm, model.lm_head]),
    }
    parts = {
        name: StepPart(
            laps[name, "forward"],
            laps.get((name, "backward"), (0, 0)),
            outputs.get(name, 0),
            sum(p.grad.nbytes for p in module.parameters() if p.grad is not None),
        )
        for name, module in modules.items()
    }
    shared = sum(laps[name, "shared"][0] for name in names)
    embedding, head = parts.pop("embedding"), parts.pop("head")
    return Footprint(embedding, parts, head, shared)


def of_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> Lap:
    """Bytes of the state of new optimisers, and the most during their step; their parameters have no data."""
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.empty_like(p)
    with _Live() as live:
        for optimizer in optimizers:
            optimizer.step()
    return live.lap()


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self._most = self._begin = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, made=True)
        return out

    def _meet(self, values: Any, made: bool) -> None:
        """Count storages seen for the first time if an operation made them."""
        for x in tree_leaves(values):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self._known:
                key, size = storage._cdata, made * storage.nbytes()
                self._known.add(key)
                self._now += size
                self._most = max(self._most, self._now)
                weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size

    def lap(self) -> Lap:
        """The lap since the last one."""
        lap = self._now - self._begin, self._most - self._begin
        self._begin = self._most = self._now
        return lap
