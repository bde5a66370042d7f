"""A forward through the layers of a decoder, in any order: states, losses and metrics of each.

B batch, T tokens, D hidden.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memlm.cache import MemoryCache
from memlm.memory.rows import Rows
from memlm.memory.state import State


class LayerCalls:
    """A forward through the layers, for a side network its ``side.Decoder``: it gathers states, losses and metrics.

    inputs: of each layer, if they are kept; states: those after the call, in the order of ``every_layer``
    """

    def __init__(self, model: Any, memory: MemoryCache | None, rows: Rows, keep_inputs: bool) -> None:
        self.model, self.memory, self.rows, self.keep_inputs = model, memory, rows, keep_inputs
        # A module looks its attributes up in Python, which a decoded token would do many times.
        self.layers, self.count, self.stretches = model.every_layer, len(model.layers), model.stretches
        self.again = model.gradient_checkpointing and model.training
        self.inputs: list[Tensor] = []
        # Those that later layers add, by the layers' numbers.
        self.reads: dict[int, Tensor] = {}
        self.states: list[State] = [{} for _ in self.layers]
        self.aux_losses: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}

    def frozen(self, i: int, h_BTD: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(i, h_BTD)

    def keys_values(self, i: int, h_BTD: Tensor) -> State:
        layer = self.layers[i]
        with torch.no_grad():
            (_, k, v), _ = layer.mixer.project(layer.mixer_input(h_BTD), self._state(i, h_BTD), self.rows)
        return {"k": k, "v": v}

    def side(self, j: int, s_BTD: Tensor, given: State | None = None) -> Tensor:
        return self.layer(self.count + j, s_BTD, given)

    def layer(self, i: int, x_BTD: Tensor, given: State | None = None) -> Tensor:
        """The output of layer i of ``every_layer``."""
        layer, rows, stretches = self.layers[i], self.rows, self.stretches
        if self.keep_inputs:
            self.inputs.append(x_BTD)
        state, read_BTD = self._state(i, x_BTD), self.reads.pop(i, None)
        handed = stretches is not None and not layer.mixer.at_once
        if handed:
            key = (i, x_BTD.shape, x_BTD.dtype)
            rows = rows.once("alone", lambda: replace(self.rows, stretches=None, made={}))
            x_BTD, state = stretches.receive(key, x_BTD, state)
        state = state if given is None else {**state, **given}
        if self.again and torch.is_grad_enabled() and i in self.model.checkpointed_layers:
            # The reentrant way loses gradients of non-tensor arguments, such as states; results are equal.
            again = self.model._gradient_checkpointing_func
            out = again(layer.__call__, x_BTD, state, rows, read_BTD, use_reentrant=False)
        else:
            out = layer(x_BTD, state, rows, read_BTD)
        x_BTD = out.y_BTD
        if handed:
            x_BTD = stretches.send(key, x_BTD, out.state)
            stretches.refuse(i, out.aux_losses)
        self.states[i] = out.state
        if out.reads:
            self.reads = dict(enumerate(out.reads, i + 1))
        name = f"layer{i}" if i < self.count else f"side{i - self.count}"
        # Beside a side network, the model's own layers do not learn.
        if i >= self.count or len(self.layers) == self.count:
            self.aux_losses |= {f"{name}/{of}": x for of, x in out.aux_losses.items()}
        self.metrics |= {f"{name}/{of}": x for of, x in out.metrics.items() if rows.length}
        return x_BTD

    def _state(self, i: int, x_BTD: Tensor) -> State:
        """The state of a layer; before the first call, layers of one mixer share a state."""
        if self.memory is not None and self.memory.states:
            return self.memory.states[i]
        kind = self.model.config.layer_mixers()[i] if i < self.count else i
        init = self.layers[i].mixer.init_state
        key = ("empty", kind, x_BTD.device, x_BTD.dtype)
        return self.rows.once(key, lambda: init(len(x_BTD), x_BTD.device, x_BTD.dtype))
