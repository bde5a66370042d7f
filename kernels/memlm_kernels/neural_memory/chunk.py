"""The steps of the loop over chunks, for one chunk or for several at once.

N chunks, G rows and heads, C slots of a chunk, J = C + window - 1 tokens whose gradients act in it, L layers.
``reference`` has the equations.

A layer's weights W and momentum S are one tensor M, [G, s n, w], with W above S. n is the narrower of the layer's
sides and w the other; s is 2 with momentum, else 1. ``spread`` multiplies the narrow side of a product by a scalar for
W and one for S. ``collect`` sums the reads of both, each times its scalar. So one product covers both W and S.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.neural_memory.losses import InnerLoss
from memlm_kernels.neural_memory.network import Activation, OutputError, Tail
from memlm_kernels.neural_memory.rates import Rates


class Plan(NamedTuple):
    """The network and the inner loss. blocks: the number of blocks that share an anchor, if rows are not ragged;
    surprise: whether to compute the norms of the tokens' gradients.
    """

    depth: int
    blocks: int
    activation: Activation
    loss: InnerLoss
    surprise: bool


class Flags(NamedTuple):
    """[N, G, 1, 1], where a document and where a chunk starts."""

    opens_document: Tensor
    opens_chunk: Tensor


Layers = Sequence[Tensor]


def spread(x: Tensor, scales: Tensor) -> Tensor:
    """[..., n] times each of [..., s] -> [..., s n]"""
    return (x.unsqueeze(-2) * scales.unsqueeze(-1)).flatten(-2)


def collect(parts: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """[..., s n], [..., s] -> [..., n], the sum of the parts, each times its scalar; added to ``out`` in place."""
    pairs = list(zip(parts.chunk(scales.shape[-1], -1), scales.split(1, -1), strict=True))
    if out is None:
        part, scale = pairs.pop(0)
        out = part * scale
    for part, scale in pairs:
        out.addcmul_(part, scale)
    return out


def dots(parts: Tensor, x: Tensor) -> Tensor:
    """[..., s n], [..., n] -> [..., s], the product of each part and x: the gradient of scalars."""
    return (parts.unflatten(-1, (-1, x.shape[-1])) * x[..., None, :]).sum(-1)


def narrows(a: Tensor, e: Tensor) -> bool:
    """Whether a layer's input is the narrower side."""
    return a.shape[-1] <= e.shape[-1]


def narrow_first(a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    return (a, e) if narrows(a, e) else (e, a)


def lay_out(W: Tensor, S: Tensor | None = None) -> Tensor:
    """[G, in, out] -> [G, s n, w]"""
    memories = W if S is None else torch.cat([W, S], 1 if W.shape[1] <= W.shape[2] else 2)
    return memories if W.shape[1] <= W.shape[2] else memories.mT.contiguous()


def take_apart(M: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """[G, s n, w] -> s tensors of the shapes of ``like``."""
    W = like[0]
    parts = M.split(min(W.shape[1:]), 1)
    return [(part if W.shape[1] <= W.shape[2] else part.mT).contiguous() for part in parts]


def start_documents(M: Layers, flags: Flags, initial: Layers, n: int) -> None:
    """In place: if block n starts a document, its memory becomes the initial one."""
    for x, i in zip(M, initial, strict=True):
        torch.where(flags.opens_document[n], i, x, out=x)


def set_anchor(anchor: Layers, W: Layers, plan: Plan, flags: Flags | None, n: int) -> Layers:
    """The anchor of block n, [G, n, w] for each layer: the block's own W if it starts a chunk."""
    if flags is None:
        return anchor if n % plan.blocks else W
    return [torch.where(flags.opens_chunk[n], w, a) for w, a in zip(W, anchor, strict=True)]


def maps(anchor: Layers, k: Tensor) -> list[Tensor]:
    """An anchor's layers as [G, in, out]."""
    out, width = [], k.shape[-1]
    for w in anchor:
        out.append(w if w.shape[1] == width else w.mT)
        width = out[-1].shape[-1]
    return out


class Places(NamedTuple):
    """A layer's memories before each chunk and after the last one, in P places.

    all: [P, G, s n, w]; for each place M [G, s n, w], ``parts`` [G, s, n w] with W and S apart, and ``W`` [G, n, w]
    """

    all: Tensor
    M: Layers
    parts: Layers
    W: Layers

    @staticmethod
    def of(memories: Tensor, s: int) -> "Places":
        W = memories[:, :, : memories.shape[2] // s]
        return Places(memories, memories.unbind(), by_part(memories, s).unbind(), W.unbind())


def by_part(memories: Tensor, s: int) -> Tensor:
    """[..., s n, w] -> [..., s, n w]: W and, with momentum, S."""
    return memories.view(*memories.shape[:-2], s, -1)


def leave(places: Places, i: int, carry: Tensor, to_M: Tensor, wide: Tensor) -> None:
    """The memory of place i + 1 from that of place i and the writes of its chunk: the product of to_M [G, s n, J], the
    narrow side times ``rates.writes``, and of the wide side.
    """
    torch.bmm(carry, places.parts[i], out=places.parts[i + 1])
    places.M[i + 1].baddbmm_(to_M, wide)


class Writes(NamedTuple):
    """The writes of several chunks to a layer's M, ``to_M`` times ``wide`` for each chunk.

    scaled: the narrow side times ``rates.writes``; to_M: its transpose; of_keys: whether the narrow side is the keys
    """

    narrow: Tensor
    scaled: Layers
    to_M: Layers
    wide: Layers
    of_keys: bool

    @staticmethod
    def of(a: Tensor, e: Tensor, k: Tensor, scales: Tensor, rows: int) -> "Writes":
        """a, e: the layer's inputs and errors of several chunks at once; k: the keys."""
        narrow, wide = narrow_first(a, e)
        scaled = spread(narrow, scales)
        return Writes(narrow, scaled.split(rows), scaled.mT.split(rows), wide.split(rows), narrow is k)


class Inner(NamedTuple):
    """The inner network on the tokens of a chunk, or of several: [..., J, width].

    hidden: values before each activation; behind: gradients of each activation's output; f: the MLP's output
    """

    hidden: Layers
    behind: Layers
    f: Tensor

    def again(self, plan: Plan, k: Tensor, v: Tensor, tail: Tail | None) -> "Again":
        activation = plan.activation
        inputs = [k, *(activation.value(h) for h in self.hidden)]
        slopes = [activation.pull_back(torch.ones_like(h), h) for h in self.hidden]
        output = OutputError.of(plan.loss, self.f, k, v, tail)
        errors = [*(b * s for b, s in zip(self.behind, slopes, strict=True)), output.error]
        bends = [activation.curvature(h).mul_(b) for h, b in zip(self.hidden, self.behind, strict=True)]
        return Again(inputs, errors, slopes, bends, output)


class Again(NamedTuple):
    """Tensors that the backward pass computes again.

    inputs a, errors e of each layer: the gradient of token i is the outer product of a[i] and e[i]
    slopes: derivatives of the activations; bends: derivatives of the errors with respect to the hidden values
    """

    inputs: Layers
    errors: Layers
    slopes: Layers
    bends: Layers
    output: OutputError

    def split(self, rows: int) -> list["Again"]:
        """The parts of each chunk."""
        count = len(self.output.f) // rows
        parts = [self.inputs, self.errors, self.slopes, self.bends, [x for x in self.output if x is not None]]
        of_chunks = zip(*(split_rows(part, rows, count) for part in parts), strict=True)
        return [Again(a, e, slopes, bends, OutputError(*output)) for a, e, slopes, bends, output in of_chunks]


def split_rows(tensors: Layers, rows: int, count: int) -> list[tuple[Tensor, ...]]:
    """[count rows, ...] each -> for each of ``count`` chunks its part of every tensor."""
    return list(zip(*(x.split(rows) for x in tensors), strict=True)) if tensors else [()] * count


def inner(
    plan: Plan, k: Tensor, v: Tensor, weights: Layers, tail: Tail | None
) -> tuple[Inner, list[Tensor], list[Tensor]]:
    """Forward to the inner loss and back, through the anchor's layers [G, in, out]. Returns also the inputs a and the
    errors e of each layer: the gradient of token i is the outer product of a[i] and e[i].
    """
    hidden: list[Tensor] = []
    behind: list[Tensor] = []
    inputs = [k]
    for w in weights[:-1]:
        hidden.append(torch.bmm(inputs[-1], w))
        inputs.append(plan.activation.value(hidden[-1]))
    f = torch.bmm(inputs[-1], weights[-1])
    errors = [OutputError.of(plan.loss, f, k, v, tail).error]
    for w, h in zip(reversed(weights[1:]), reversed(hidden), strict=True):
        behind.insert(0, torch.bmm(errors[0], w.mT))
        errors.insert(0, plan.activation.pull_back(behind[0], h))
    return Inner(hidden, behind, f), inputs, errors


def gradient_norm(inputs: Layers, errors: Layers) -> Tensor:
    """The norm of each token's gradient over all layers. The norm of an outer product is the product of the norms."""
    norms = [
        torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(e, dim=-1)
        for a, e in zip(inputs, errors, strict=True)
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


class Reads(NamedTuple):
    """Tensors of the reads of n chunks that are kept for backward, [n G, C, ...] for each layer: values before the
    activation, scores x a^T, and x W beside x S if the output is the narrower side.
    """

    before: Layers
    scores: Layers
    recalled: Layers


def read(plan: Plan, q: Tensor, M: Layers, rates: Rates, inputs: Layers, errors: Layers) -> tuple[Tensor, Reads]:
    """The MLP's output of M_r(q_r) at every slot of n chunks, [n G, C, V]."""
    x = q
    before: list[Tensor] = []
    scores: list[Tensor] = []
    recalled: list[Tensor] = []
    for layer, (a, e) in enumerate(zip(inputs, errors, strict=True)):
        if narrows(a, e):
            z = torch.bmm(spread(x, rates.reads), M[layer])
        else:
            recalled.append(torch.bmm(x, M[layer].mT))
            z = collect(recalled[-1], rates.reads)
        scores.append(torch.bmm(x, a.mT))
        z.baddbmm_(rates.C * scores[-1], e)
        if layer < plan.depth - 1:
            before.append(z)
            x = plan.activation.value(z)
    return z, Reads(before, scores, recalled)
