"""The scalars of the dual form, see ``reference`` for their equations.

N chunks, G rows and heads, C slots of a chunk, J = C + window - 1 tokens whose gradients act in it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.grid import Grid

_TINY = 1e-30


class Momentum(NamedTuple):
    """f: [N, G, C]; P: [N, G, J] and m: [N, G], those of the last slot."""

    f: Tensor
    P: Tensor
    m: Tensor


class Gates(NamedTuple):
    """C: [N, G, C, J]; reads: [N, G, C, s], beta and, with momentum, f; last: [N, G, 1 + J], m and P of the last slot,
    None without momentum. s is 2 with momentum, else 1.
    """

    C: Tensor
    reads: Tensor
    last: Tensor | None

    @property
    def beta(self) -> Tensor:
        return self.reads[..., 0]

    @property
    def momentum(self) -> Momentum | None:
        return None if self.last is None else Momentum(self.reads[..., 1], self.last[..., 1:], self.last[..., 0])


class Rates(NamedTuple):
    """``Gates`` in the form of the products. writes: [N, G, J, s], the last rows of C and P; carries: [N, G, s, s],
    the rows (beta, f) and (0, m) of the last slot. Several chunks at once have no N.
    """

    C: Tensor
    reads: Tensor
    writes: Tensor
    carries: Tensor

    @staticmethod
    def of(gates: Gates) -> "Rates":
        C, reads, last = gates
        if last is None:
            return Rates(C, reads, C[:, :, -1:].mT, reads[:, :, -1:])
        writes = torch.stack([C[:, :, -1], last[..., 1:]], -1)
        carries = torch.stack([reads[:, :, -1], F.pad(last[..., :1], (1, 0))], 2)
        return Rates(C, reads, writes, carries)

    def gradients(self) -> Gates:
        """The gradients of ``Gates`` from these, which are gradients of ``Rates``; in place."""
        self.C[:, :, -1].add_(self.writes[..., 0])
        self.reads[:, :, -1].add_(self.carries[:, :, 0])
        last = None
        if self.reads.shape[-1] > 1:
            last = torch.cat([self.carries[:, :, 1, 1:], self.writes[..., 1]], -1)
        return Gates(self.C, self.reads, last)

    def split(self, size: int) -> list["Rates"]:
        """The rates of each group of ``size`` chunks."""
        return [Rates(*x) for x in zip(*(x.split(size) for x in self), strict=True)]

    def at_once(self) -> "Rates":
        """The rates of all chunks, with chunks and rows in one dimension."""
        return Rates(*(x.flatten(0, 1) for x in self))


def scalar_recurrences(
    lr: Tensor, momentum: Tensor | None, decay: Tensor | None, grid: Grid, U: Tensor | None = None
) -> Gates:
    """The gates of every chunk. lr, momentum, decay: [B, T, H]; U: [N, G, C, J], None for the identity."""
    streams = [lr, torch.zeros_like(lr) if decay is None else torch.log1p(-decay.clamp(max=1 - 2**-24))]
    if momentum is not None:
        streams.append(momentum.clamp(min=_TINY).log())
    if grid.slots is not None or grid.count * grid.width > grid.length:
        streams.append(torch.ones_like(lr))
    laid = grid.lay(torch.cat(streams, -1)).unflatten(-1, (len(streams), lr.shape[2]))
    laid = laid.permute(3, 1, 0, 4, 2).flatten(2, 3)
    W = None if U is None else laid[0, ..., None] * U
    if torch.is_grad_enabled() and (laid.requires_grad or (W is not None and W.requires_grad)):
        return Gates(*_DualForm.apply(laid, W, momentum is not None))
    # Without gradients no Function is needed, and a compiler would not take one.
    return _dual_form(laid, W, momentum is not None)[0]


def _dual_form(streams: Tensor, W: Tensor | None, has_momentum: bool) -> tuple[Gates, Tensor, Tensor | None]:
    """The gates of ``_DualForm``, and two tensors that its backward pass needs."""
    count, rows, _ = streams.shape[1:]
    lr, logs, write = _apart(streams, has_momentum)
    products = _products(logs).unflatten(0, (1 + has_momentum, count * rows))
    keep = products[0] if write is None else products[0] * write
    P = last = None
    if has_momentum:
        P = _steps(products[1], lr, W)
        last = P[:, -1].unflatten(0, (count, rows))
        both = torch.cat([keep[..., :1], torch.bmm(keep[..., 1:], P)], -1)
    else:
        both = _steps(keep, lr, W)
    reads, C = both.unflatten(0, (count, rows)).split([len(products), both.shape[-1] - len(products)], -1)
    return Gates(C, reads, last), products, P


class _DualForm(torch.autograd.Function):
    """apply(streams, W, has_momentum) -> ``Gates``

    streams: [n, N, G, C], lr, log(1 - decay), with momentum its log, and where there are slots without tokens
    ``write``; W: [N, G, C, J], lr U, None for the diagonal of lr.

    A factor (E or L) of ``reference`` has one more column here, the first: the products from the chunk's start on. So
    the factors are [beta, L] and [m, E]; P has m as its first column too, and L [m, P] = [f, C].
    """

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, W: Tensor | None, has_momentum: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        gates, products, P = _dual_form(streams, W, has_momentum)
        ctx.has_momentum = has_momentum
        ctx.save_for_backward(streams, W, products, P)
        return gates

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, d_C: Tensor, d_reads: Tensor, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        streams, W, products, P = ctx.saved_tensors
        lr, _, write = _apart(streams, ctx.has_momentum)
        keep = products[0] if write is None else products[0] * write
        d_both = torch.cat([d_reads, d_C], -1).flatten(0, 1)
        if P is None:
            d_keep, d_lr, d_W = _steps_backward(d_both, keep, lr, W)
            d_products = d_keep[None]
        else:
            d_beta, d_read = d_both.split([1, d_both.shape[-1] - 1], -1)
            d_P = torch.bmm(keep[..., 1:].mT, d_read)
            assert d_last is not None
            d_P[:, -1].add_(d_last.flatten(0, 1))
            d_keep = torch.cat([d_beta, torch.bmm(d_read, P.mT)], -1)
            d_momentum, d_lr, d_W = _steps_backward(d_P, products[1], lr, W)
            d_products = torch.stack([d_keep, d_momentum])
        if write is not None:
            d_products[0].mul_(write)
        d_logs = _products_backward(d_products.mul_(products).flatten(0, 1))
        absent = [torch.zeros_like(lr)] * (0 if write is None else 1)
        d_streams = torch.cat([torch.zeros_like(lr) if d_lr is None else d_lr, d_logs, *absent])
        return d_streams.view_as(streams), d_W, None


def _apart(streams: Tensor, has_momentum: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """lr [N G, C], the logs one below the other, and, for each column of [beta, L], whether it writes."""
    end = 3 if has_momentum else 2
    lr, logs = streams[0].flatten(0, 1), streams[1:end].flatten(0, 2)
    write = F.pad(streams[end].flatten(0, 1), (1, 0), value=1.0)[:, None] if len(streams) > end else None
    return lr, logs, write


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
