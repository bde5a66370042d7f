"""The scalars of the dual form, see ``reference`` for their equations.

N chunks, G rows and heads, C slots of a chunk, J = C + window - 1 tokens whose gradients act in it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.grid import Grid

# A product with one such momentum is above the threshold of ``_products``, so a momentum of 0 has its gradient.
_TINY = 1e-13


class Rates(NamedTuple):
    """C: [N, G, C, J]; reads: [N, G, C, s], beta and, with momentum, f; writes: [N, G, J, s], the last rows of C and
    P; carries: [N, G, s, s], the rows (beta, f) and (0, m) of the last slot. s is 2 with momentum, else 1.
    """

    C: Tensor
    reads: Tensor
    writes: Tensor
    carries: Tensor

    def apart(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """C, beta, f, P and m; P and m only for the last slot, [N, G, J] and [N, G]."""
        C, reads, writes, carries = self
        if reads.shape[-1] == 1:
            return C, reads[..., 0], None, None, None
        return C, reads[..., 0], reads[..., 1], writes[..., 1], carries[..., 1, 1]

    def split(self, size: int) -> list["Rates"]:
        """The rates of each group of ``size`` chunks."""
        return [Rates(*x) for x in zip(*(groups(x, size) for x in self), strict=True)]

    def at_once(self) -> "Rates":
        """The rates of all chunks, with chunks and rows in one dimension; the carries keep both."""
        C, reads, writes = (x.flatten(0, 1) for x in self[:3])
        return Rates(C, reads, writes, self.carries)


def groups(x: Tensor, size: int) -> Sequence[Tensor]:
    """[N, ...] -> parts of ``size``, the last may be shorter."""
    return [x] if len(x) <= size else x.split(size)


def scalar_recurrences(
    lr: Tensor, momentum: Tensor | None, decay: Tensor | None, grid: Grid, U: Tensor | None = None
) -> Rates:
    """The rates of every chunk. lr, momentum, decay: [B, T, H]; U: [N, G, C, J], None for the identity."""
    streams = [lr, torch.zeros_like(lr) if decay is None else decay, *([] if momentum is None else [momentum])]
    if grid.slots is not None or grid.count * grid.width > grid.length:
        streams.append(torch.ones_like(lr))
    laid = grid.lay(torch.cat(streams, -1)).unflatten(-1, (len(streams), lr.shape[2]))
    laid = laid.permute(3, 1, 0, 4, 2).flatten(2, 3)
    W = None if U is None else laid[0, ..., None] * U
    if torch.is_grad_enabled() and (laid.requires_grad or (W is not None and W.requires_grad)):
        return Rates(*_DualForm.apply(laid, W, momentum is not None))
    # Without gradients no Function is needed, and a compiler would not take one.
    return _dual_form(laid, W, momentum is not None)[0]


def _dual_form(streams: Tensor, W: Tensor | None, has_momentum: bool) -> tuple[Rates, tuple[Tensor | None, ...]]:
    """The rates of ``_DualForm``, and the tensors that its backward pass needs."""
    of_chunks, (lr, *gates) = streams.shape[1:3], streams.flatten(1, 2)
    write = gates.pop() if len(gates) > 1 + has_momentum else None
    logs = [torch.log1p(-gates[0].clamp(max=1 - 2**-24))]
    if has_momentum:
        # A slot without a token has momentum 1.
        momentum = gates[1] if write is None else gates[1] + (1 - write)
        logs.append(momentum.clamp(min=_TINY).log())
    all_logs = torch.stack(logs)
    products = _products(all_logs.flatten(0, 1)).unflatten(0, all_logs.shape[:2])
    keep, *P = products.unbind()
    if write is not None:
        write = F.pad(write, (1, 0), value=1.0)[:, None]
        keep = keep * write
    if has_momentum:
        P = [_steps(P[0], lr, W)]
        both = torch.cat([keep[..., :1], torch.bmm(keep[..., 1:], P[0])], -1)
        last = torch.stack([both[:, -1], F.pad(P[0][:, -1], (1, 0))], 1)
    else:
        both = _steps(keep, lr, W)
        last = both[:, -1:]
    sizes = [len(products), both.shape[-1] - len(products)]
    (reads, C), (carries, writes) = (x.unflatten(0, of_chunks).split(sizes, -1) for x in (both, last))
    # Laid out as it is multiplied, or each product with it would be laid out anew.
    return Rates(C, reads, writes.mT.contiguous(), carries), (lr, all_logs, write, W, products, keep, *P)


class _DualForm(torch.autograd.Function):
    """apply(streams, W, has_momentum) -> ``Rates``

    streams: [n, N, G, C]: lr and decay, then momentum if ``has_momentum``, then ``write`` if some slots have no token
    W: [N, G, C, J], lr U, None for the diagonal of lr

    A factor (E or L) of ``reference`` has one more column here, the first: the products from the chunk's start on. So
    the factors are [beta, L] and [m, E]; P has m as its first column too, and L [m, P] = [f, C].
    """

    @staticmethod
    def forward(ctx: Any, streams: Tensor, W: Tensor | None, has_momentum: bool) -> Rates:
        rates, kept = _dual_form(streams, W, has_momentum)
        ctx.save_for_backward(*kept)
        ctx.shape = streams.shape
        return rates

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, *d_rates: Tensor) -> tuple[Tensor | None, ...]:
        lr, logs, write, W, products, keep, *rest = ctx.saved_tensors
        d_C, d_reads, d_writes, d_carries = d_rates
        d_both = torch.cat([d_reads, d_C], -1).flatten(0, 1)
        d_last = torch.cat([d_carries, d_writes.mT], -1).flatten(0, 1)
        d_both[:, -1].add_(d_last[:, 0])
        if rest:
            (P,) = rest
            d_beta, d_read = d_both.split([1, d_both.shape[-1] - 1], -1)
            d_P = torch.bmm(keep[..., 1:].mT, d_read)
            d_P[:, -1].add_(d_last[:, 1, 1:])
            d_keep = torch.cat([d_beta, torch.bmm(d_read, P.mT)], -1)
            d_momentum, d_lr, d_W = _steps_backward(d_P, products[1], lr, W)
        else:
            d_keep, d_lr, d_W = _steps_backward(d_both, keep, lr, W)
        if write is not None:
            d_keep = d_keep * write
        d_products = torch.stack([d_keep, d_momentum] if rest else [d_keep]).mul_(products)
        d_logs = _products_backward(d_products.flatten(0, 1)).view_as(logs)
        # The gradient of x from that of log(x); for decay, x is 1 - decay.
        d_gates = d_logs.mul_(logs.neg().exp_())
        d_gates[0].neg_()
        found = [torch.zeros_like(lr) if d_lr is None else d_lr, *d_gates.unbind()]
        absent = [torch.zeros_like(lr)] * (ctx.shape[0] - len(found))
        return torch.stack([*found, *absent]).view(ctx.shape), d_W, None


def _products(logs: Tensor) -> Tensor:
    """[..., C] -> [..., C, 1 + C]: entry (r, i) is exp(sum of logs over i <= l <= r), 1 for i = r + 1, 0 beyond.

    Masked sums instead of differences of sums do not cancel in long chunks. They are products, because torch's
    cumulative sum is slow along this dimension. Values below 1e-18 become 0: this is far below rounding beside a
    weight of 1, and products of two such values would be denormal numbers, which take a CPU about thirty times as
    long.
    """
    before, until = _masks(logs)
    sums = torch.bmm(until, logs[..., None] * before)
    return torch.threshold_(sums.exp_(), 1e-18, 0.0).tril_(1)


def _products_backward(d_sums: Tensor) -> Tensor:
    before, until = _masks(d_sums[..., 0])
    return torch.bmm(until.mT, d_sums).mul_(before).sum(-1)


def _masks(like: Tensor) -> tuple[Tensor, Tensor]:
    """For [R, C]: a mask of i <= l, [C, 1 + C], and one of l <= r, [R, C, C]."""
    rows, size = like.shape
    before = like.new_ones(size, size + 1).tril_()
    return before, before[:, :size].expand(rows, -1, -1)


def _steps(x: Tensor, lr: Tensor, W: Tensor | None) -> Tensor:
    """[x_0, x W]"""
    if W is None:
        return x * F.pad(lr, (1, 0), value=1.0)[:, None]
    return torch.cat([x[..., :1], torch.bmm(x[..., 1:], W.flatten(0, 1))], -1)


def _steps_backward(d: Tensor, x: Tensor, lr: Tensor, W: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, and of lr or W."""
    if W is None:
        return d * F.pad(lr, (1, 0), value=1.0)[:, None], (d * x).sum(1)[:, 1:], None
    d_W = torch.bmm(x[..., 1:].mT, d[..., 1:]).view_as(W)
    return torch.cat([d[..., :1], torch.bmm(d[..., 1:], W.flatten(0, 1).mT)], -1), None, d_W
