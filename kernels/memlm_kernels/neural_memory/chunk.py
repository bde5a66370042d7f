"""What one chunk does, and several at once.

N chunks, G rows and heads, C slots of a chunk, J = C + window - 1 tokens whose gradients count in it, L layers.
Each layer has weights W and momentum S, [G, in, out]; ``reference`` has the equations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.neural_memory.network import Activation, InnerLoss, Tail, output_error


class Plan(NamedTuple):
    """What the memory is and minimises; blocks: how many share an anchor, where rows are not ragged."""

    depth: int
    blocks: int
    activation: Activation
    loss: InnerLoss


class Momentum(NamedTuple):
    """f: [N, G, C]; P: [N, G, J] and m: [N, G], the last rows of theirs."""

    f: Tensor
    P: Tensor
    m: Tensor


class Gates(NamedTuple):
    """C: [N, G, C, J]; beta: [N, G, C]."""

    C: Tensor
    beta: Tensor
    momentum: Momentum | None

    def of(self, group: slice) -> "Gates":
        momentum = None if self.momentum is None else Momentum(*(x[group] for x in self.momentum))
        return Gates(self.C[group], self.beta[group], momentum)

    def unbind(self) -> list["Gates"]:
        """Those of each chunk, without N."""
        each = zip(*(x.unbind() for x in self.momentum), strict=True) if self.momentum else None
        momenta = [None] * len(self.C) if each is None else [Momentum(*x) for x in each]
        return [Gates(*x) for x in zip(self.C.unbind(), self.beta.unbind(), momenta, strict=True)]


class Flags(NamedTuple):
    """[N, G, 1, 1], where a document and where a chunk starts."""

    opens_document: Tensor
    opens_chunk: Tensor


class Memory(NamedTuple):
    """W, S (empty without momentum), and the weights at which gradients are taken: L tensors each."""

    W: tuple[Tensor, ...]
    S: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]


class Room(NamedTuple):
    """Where the memories of a group of n chunks lie: [n, G, in, out] for each layer."""

    W: tuple[Tensor, ...]
    S: tuple[Tensor, ...]

    @staticmethod
    def of(memory: Memory, size: int) -> "Room":
        return Room(*(tuple(x.new_empty(size, *x.shape) for x in part) for part in memory[:2]))

    def at(self, i: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(w[i] for w in self.W), tuple(s[i] for s in self.S)

    def move_in(self, memory: Memory) -> Memory:
        """The same memory, in the first place."""
        W, S = self.at(0)
        for place, x in zip((*W, *S), (*memory.W, *memory.S), strict=True):
            place.copy_(x)
        return memory._replace(W=W, S=S)


def start_documents(memory: Memory, flags: Flags, initial: Sequence[Tensor], n: int) -> None:
    """In place: where block n opens a document its memory starts afresh."""
    new = flags.opens_document[n]
    for w, i in zip(memory.W, initial, strict=True):
        w.copy_(torch.where(new, i, w))
    for s in memory.S:
        s.masked_fill_(new, 0.0)


def set_anchor(memory: Memory, plan: Plan, flags: Flags | None, n: int) -> Memory:
    """Where block n opens a chunk the memory is its anchor."""
    if flags is None:
        return memory if n % plan.blocks else memory._replace(anchor=memory.W)
    opened = flags.opens_chunk[n]
    anchor = (torch.where(opened, w, a) for w, a in zip(memory.W, memory.anchor, strict=True))
    return memory._replace(anchor=tuple(anchor))


def narrows(a: Tensor, e: Tensor) -> bool:
    """Whether a layer's input is the narrower side: a scalar for each token is cheaper to apply there."""
    return a.shape[-1] <= e.shape[-1]


def weighed(gate: Tensor, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors of each token, the narrower one multiplied by the token's gate."""
    return (gate[..., None] * a, e) if narrows(a, e) else (a, gate[..., None] * e)


def add_product(out: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """out += scale x y in place, for contiguous ``out`` of any leading dimensions."""
    out.view(-1, *out.shape[-2:]).baddbmm_(x.flatten(0, -3), y.flatten(0, -3), alpha=scale)
    return out


def leave(
    memory: Memory, gates: Gates, inputs: Sequence[Tensor], errors: Sequence[Tensor], room: Room, i: int
) -> Memory:
    """The memory after a chunk, in place i of a room; in one of its own if that is full."""
    W, S = room.at(i) if i < len(room.W[0]) else Room.of(memory, 1).at(0)
    for layer, (old, new, a, e) in enumerate(zip(memory.W, W, inputs, errors, strict=True)):
        torch.mul(old, gates.beta[:, -1, None, None], out=new)
        if gates.momentum is not None:
            s, (f, P, m) = memory.S[layer], gates.momentum
            new.addcmul_(s, f[:, -1, None, None])
            torch.mul(s, m[:, None, None], out=S[layer])
            kept, written = weighed(P, a, e)
            S[layer].baddbmm_(kept.mT, written, alpha=-1)
        kept, written = weighed(gates.C[:, -1], a, e)
        new.baddbmm_(kept.mT, written, alpha=-1)
    return memory._replace(W=W, S=S)


class Inner(NamedTuple):
    """The inner network on the tokens of a chunk, or of several: [..., G, J, width].

    hidden: before each activation; behind: what comes back to each activation's output; f: the MLP's output
    """

    hidden: tuple[Tensor, ...]
    behind: tuple[Tensor, ...]
    f: Tensor

    def gradients(
        self, plan: Plan, k: Tensor, v: Tensor, tail: Tail | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Inputs a and errors e of each layer: token i's gradient is the outer product of a[i] and e[i]. And the
        slopes of the activations, which made the errors.
        """
        inputs = [k, *(plan.activation.value(h) for h in self.hidden)]
        slopes = [plan.activation.pull_back(torch.ones_like(h), h) for h in self.hidden]
        errors = [b * s for b, s in zip(self.behind, slopes, strict=True)]
        return inputs, [*errors, output_error(plan.loss, self.f, k, v, tail)], slopes


def inner(
    plan: Plan, k: Tensor, v: Tensor, anchor: Sequence[Tensor], tail: Tail | None
) -> tuple[Inner, list[Tensor], list[Tensor]]:
    """Forward to the inner loss and back, at the anchor; with inputs and errors as in ``Inner.gradients``."""
    hidden: list[Tensor] = []
    behind: list[Tensor] = []
    inputs = [k]
    for w in anchor[:-1]:
        hidden.append(inputs[-1] @ w)
        inputs.append(plan.activation.value(hidden[-1]))
    f = inputs[-1] @ anchor[-1]
    errors = [output_error(plan.loss, f, k, v, tail)]
    for w, h in zip(reversed(anchor[1:]), reversed(hidden), strict=True):
        behind.insert(0, errors[0] @ w.mT)
        errors.insert(0, plan.activation.pull_back(behind[0], h))
    return Inner(tuple(hidden), tuple(behind), f), inputs, errors


def read(
    plan: Plan, q: Tensor, memories: Room, gates: Gates, inputs: Sequence[Tensor], errors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The MLP's output of M_r(q_r) at every slot of n chunks; what stands before each activation; and of the layers
    whose output is the narrower side x W and x S, for the backward pass.
    """
    x, before, recalled = q, [], []
    for layer, (a, e) in enumerate(zip(inputs, errors, strict=True)):
        W, beta = memories.W[layer], gates.beta[..., None]
        S, f = (None, None) if gates.momentum is None else (memories.S[layer], gates.momentum.f[..., None])
        if narrows(a, e):
            z = (beta * x) @ W
            if S is not None and f is not None:
                add_product(z, f * x, S)
        else:
            recalled.append(x @ W)
            z = beta * recalled[-1]
            if S is not None and f is not None:
                recalled.append(x @ S)
                z.addcmul_(recalled[-1], f)
        before.append(add_product(z, gates.C * (x @ a.mT), e, -1))
        if layer < plan.depth - 1:
            x = plan.activation.value(z)
    return z, before[:-1], recalled
