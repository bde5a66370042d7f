"""What one chunk does, and several at once.

N chunks, G rows and heads, C slots of a chunk, J = C + window - 1 tokens whose gradients count in it, L layers.
``reference`` has the equations.

A layer's weights W and momentum S are one tensor M, [G, s n, w]: n is the narrower of the layer's sides and w the
other, W above S; s is 1 without momentum. What stands at the narrow side of a product is multiplied by a scalar of W's
and by one of S's, ``spread``, or read of both and put together, ``collect``: so both memories are one product.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.neural_memory.losses import InnerLoss
from memlm_kernels.neural_memory.network import Activation, OutputError, Tail


class Plan(NamedTuple):
    """What the memory is and minimises; blocks: how many share an anchor, where rows are not ragged; surprise: whether
    the norms of the tokens' gradients are made.
    """

    depth: int
    blocks: int
    activation: Activation
    loss: InnerLoss
    surprise: bool


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


class Rates(NamedTuple):
    """The gates as products take them. C: [N, G, C, J]; reads: [N, G, C, s], beta and f; writes: [N, G, J, s], minus
    the last rows of C and P; carries: [N, G, s, s, 1, 1], the last beta and f above 0 and m. Several chunks at once,
    and one, have no N.
    """

    C: Tensor
    reads: Tensor
    writes: Tensor
    carries: Tensor

    @staticmethod
    def of(gates: Gates) -> "Rates":
        C, beta, momentum = gates
        reads, writes = [beta], [C[:, :, -1]]
        if momentum is not None:
            reads.append(momentum.f)
            writes.append(momentum.P)
        s = len(reads)
        carries = beta.new_zeros(*beta.shape[:2], s, s, 1, 1)
        for i, x in enumerate(reads):
            carries[:, :, 0, i, 0, 0] = x[:, :, -1]
        if momentum is not None:
            carries[:, :, 1, 1, 0, 0] = momentum.m
        return Rates(C, torch.stack(reads, -1), torch.stack(writes, -1).neg_(), carries)

    def gradients(self, d: "Rates") -> tuple[Tensor | None, ...]:
        """Of C, beta, f, P, m, from those of these."""
        d.C[:, :, -1] -= d.writes[..., 0]
        d.reads[:, :, -1] += d.carries[:, :, 0, :, 0, 0]
        if self.reads.shape[-1] == 1:
            return d.C, d.reads[..., 0], None, None, None
        return d.C, d.reads[..., 0], d.reads[..., 1], -d.writes[..., 1], d.carries[:, :, 1, 1, 0, 0]

    def at(self, chunks: slice) -> "Rates":
        return Rates(*(x[chunks].flatten(0, 1) for x in self))

    def split(self, rows: int) -> list["Rates"]:
        return [Rates(*x) for x in zip(*(x.split(rows) for x in self), strict=True)]


class Flags(NamedTuple):
    """[N, G, 1, 1], where a document and where a chunk starts."""

    opens_document: Tensor
    opens_chunk: Tensor


Layers = Sequence[Tensor]


def spread(x: Tensor, scales: Tensor) -> Tensor:
    """[..., n] times each of [..., s] -> [..., s n]"""
    out = x.new_empty(*x.shape[:-1], scales.shape[-1], x.shape[-1])
    for part, scale in zip(out.unbind(-2), scales.split(1, -1), strict=True):
        torch.mul(x, scale, out=part)
    return out.flatten(-2)


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
    """In place: where block n opens a document its memory starts afresh."""
    for x, i in zip(M, initial, strict=True):
        torch.where(flags.opens_document[n], i, x, out=x)


def set_anchor(anchor: Sequence[Tensor], M: Layers, plan: Plan, flags: Flags | None, n: int) -> Sequence[Tensor]:
    """Where block n opens a chunk its W is its anchor, [G, n, w]."""
    if flags is None and n % plan.blocks:
        return anchor
    weights = [x[:, : a.shape[1]] for x, a in zip(M, anchor, strict=True)]
    if flags is None:
        return weights
    return [torch.where(flags.opens_chunk[n], w, a) for w, a in zip(weights, anchor, strict=True)]


def maps(anchor: Layers, k: Tensor) -> list[Tensor]:
    """An anchor's layers as [G, in, out]."""
    out, width = [], k.shape[-1]
    for w in anchor:
        out.append(w if w.shape[1] == width else w.mT)
        width = out[-1].shape[-1]
    return out


def leave(M: Layers, rates: Rates, writes: Sequence[tuple[Tensor, Tensor]], out: Layers) -> None:
    """``out`` is the memory after a chunk; writes: for each layer what the gradients are the products of."""
    for old, new, (narrow, wide) in zip(M, out, writes, strict=True):
        (W, *S), (new_W, *new_S) = (x.chunk(rates.carries.shape[1], 1) for x in (old, new))
        torch.mul(W, rates.carries[:, 0, 0], out=new_W)
        for s, new_s in zip(S, new_S, strict=True):
            new_W.addcmul_(s, rates.carries[:, 0, 1])
            torch.mul(s, rates.carries[:, 1, 1], out=new_s)
        new.baddbmm_(narrow.mT, wide)


def writes_of(rates: Rates, inputs: Layers, errors: Layers) -> list[tuple[Tensor, Tensor]]:
    """What each layer's M changes by, as the factors of a product: narrow.mT @ wide."""
    pairs = (narrow_first(a, e) for a, e in zip(inputs, errors, strict=True))
    return [(spread(narrow, rates.writes), wide) for narrow, wide in pairs]


class Inner(NamedTuple):
    """The inner network on the tokens of a chunk, or of several: [..., J, width].

    hidden: before each activation; behind: what comes back to each activation's output; f: the MLP's output
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
    """What the backward pass makes again. inputs a and errors e of each layer: token i's gradient is the outer product
    of a[i] and e[i]; slopes of the activations; bends: how the errors before them change with what stands there.
    """

    inputs: Layers
    errors: Layers
    slopes: Layers
    bends: Layers
    output: OutputError

    def split(self, rows: int) -> list["Again"]:
        """Those of each chunk."""
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
    """Forward to the inner loss and back, through the anchor's layers [G, in, out]. With the inputs a and the errors e
    of each layer: token i's gradient is the outer product of a[i] and e[i].
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
    """Norm of each token's gradient over all layers; that of an outer product is the product of the norms."""
    squares = [torch.linalg.vecdot(a, a) * torch.linalg.vecdot(e, e) for a, e in zip(inputs, errors, strict=True)]
    return sum(squares[1:], squares[0]).sqrt()


class Reads(NamedTuple):
    """What the backward pass keeps of the reads of n chunks, [n G, C, ...] for each layer: what stood before its
    activation, x a^T, and x W beside x S where the output is the narrower side.
    """

    before: Layers
    scores: Layers
    recalled: Layers


def read(plan: Plan, q: Tensor, M: Layers, rates: Rates, inputs: Layers, errors: Layers) -> tuple[Tensor, Reads]:
    """The MLP's output of M_r(q_r) at every slot of n chunks, [n G, C, V]."""
    x, weights = q, -rates.C
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
        z.baddbmm_(weights * scores[-1], e)
        if layer < plan.depth - 1:
            before.append(z)
            x = plan.activation.value(z)
    return z, Reads(before, scores, recalled)
