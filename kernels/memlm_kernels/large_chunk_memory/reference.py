"""The loop over chunks in plain PyTorch.

With W the memory that a chunk finds, every token of it reads, and adds to the chunk's ascent on f(k) . v,

    o = f(q; W),    f(x; W) = (silu(x W1) * (x W3)) W2,    D_j += lr_j d(f(k; W) . v) / dW_j

and its last token writes, with n_j the norm of each column (the inputs of one output) of the learned W_j:

    S_j <- mean(momentum) S_j + D_j,    W_j <- n_j normalize(W_j + orthogonal(S_j)),    D_j <- 0

A slot that holds no token has k, v, lr and momentum 0, and adds nothing.

G rows and heads; N, C as in ``grid``. Chunks run in groups of sqrt(N): each keeps the memory it found, and makes those
in it again in backward.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm_kernels.backend import outside_autocast
from memlm_kernels.grid import aligned_grid, from_rows, next_position, ragged_grid, row_flags, to_rows

# Coefficients of x, x^3, x^5 in each Newton-Schulz step, those of the paper's released code.
MUON = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Below it a column counts as zero.
_EPS = 1e-5


class LargeChunkMemoryState(NamedTuple):
    """weights W, gradient D of the open chunk, momentum S (empty without momentum): three fp32 [B, H, in, out] each.

    momentum_sum: one fp32 [B, H, 1, 1], over the tokens of the open chunk; empty without momentum
    position: [B] int64, tokens of the current document
    """

    weights: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    momentum_sum: tuple[Tensor, ...]
    position: Tensor


class Tokens(NamedTuple):
    """q, k, v: [B, T, H, ...]; lr: [B, T, H, 3]; momentum: [B, T, H] or None. In the loop: [N, G, C, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None


class _Memory(NamedTuple):
    """A state without its position, [G, ...] in the loop."""

    weights: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    momentum_sum: tuple[Tensor, ...]

    @staticmethod
    def fresh(weights: tuple[Tensor, ...], has_momentum: bool) -> "_Memory":
        zeros = tuple(torch.zeros_like(w) for w in weights)
        momentum_sum = weights[0].new_zeros(len(weights[0]), 1, 1)
        return _Memory(weights, zeros, zeros, (momentum_sum,)) if has_momentum else _Memory(weights, zeros, (), ())

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "_Memory":
        """The same from ``flat``."""
        return _Memory(*(tuple(tensors[i : i + 3]) for i in (0, 3, 6, 9)))

    def flat(self) -> list[Tensor]:
        return [x for part in self for x in part]


class _Plan(NamedTuple):
    """For each chunk of a group whether it is a document's first, and whether it is whole by its end: as the host
    knows, or [G, 1, 1]. And how a whole one is written.
    """

    opens: Sequence[bool | Tensor]
    closes: Sequence[bool | Tensor]
    chunk_size: int
    muon_steps: int


def large_chunk_memory_reference(
    tokens: Tokens,
    weights: tuple[Tensor, ...],
    chunk_size: int,
    muon_steps: int,
    state: LargeChunkMemoryState | None,
    positions: Tensor | None,
    lengths: Tensor | None,
    max_documents: int,
) -> tuple[Tensor, LargeChunkMemoryState]:
    """Returns o and the new state; see ``large_chunk_memory``."""
    q, v = tokens.q, tokens.v
    batch, length, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    aligned = state is None and positions is None and lengths is None
    # Copies, so that no state shares memory with a parameter.
    initial = tuple(w.to(dtype).repeat(batch, 1, 1) for w in weights)
    if state is None:
        memory, place = _Memory.fresh(initial, tokens.momentum is not None), q.new_zeros(batch, dtype=torch.int64)
    else:
        memory = _Memory(*(tuple(x.to(dtype).flatten(0, 1) for x in part) for part in state[:4]))
        place = state.position
    if length == 0:
        return v.clone(), _pack(memory, heads, place)
    if positions is None:
        positions = place[:, None] + torch.arange(length, device=q.device)
    opens: Sequence[bool | Tensor]
    closes: Sequence[bool | Tensor]
    if aligned:
        grid = aligned_grid(length, min(length, chunk_size))
        opens, closes = [False] * grid.count, [n < length // chunk_size for n in range(grid.count)]
    else:
        grid = ragged_grid(positions, lengths, chunk_size, max_documents)
        ends = (grid.lay(x).any(-1) for x in (positions == 0, (positions + 1) % chunk_size == 0))
        opens, closes = (row_flags(x, heads).unbind() for x in ends)
    laid = [None if x is None else to_rows(grid.lay(x.to(dtype))) for x in tokens]
    size = math.isqrt(grid.count - 1) + 1
    out = []
    for n in range(0, grid.count, size):
        group = slice(n, n + size)
        plan = _Plan(opens[group], closes[group], chunk_size, muon_steps)
        o, *after = _Group.apply(plan, *(None if x is None else x[group] for x in laid), *initial, *memory.flat())
        memory = _Memory.of(after)
        out.append(o)
    o = grid.take(from_rows(torch.cat(out), heads))
    return o.to(v.dtype), _pack(memory, heads, next_position(positions, lengths, place))


def _pack(memory: _Memory, heads: int, position: Tensor) -> LargeChunkMemoryState:
    parts = (tuple(x.unflatten(0, (-1, heads)) for x in part) for part in memory)
    return LargeChunkMemoryState._make((*parts, position))


class _Group(torch.autograd.Function):
    """apply(plan, *tokens, *initial, *memory) -> what the queries of several chunks read, [N, G, C, V], and the memory
    after them. Keeps its inputs alone, and runs again in backward: torch.utils.checkpoint, without its price for
    every small tensor.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return _read_and_write(plan, *tensors)

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        inputs: list[Any] = [
            None if x is None else x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            out = _read_and_write(ctx.plan, *inputs)
        reached = [i for i, x in enumerate(out) if x.requires_grad]
        leaves = [x for x, w in zip(inputs, wanted, strict=True) if w]
        found = iter(
            torch.autograd.grad([out[i] for i in reached], leaves, [d_out[i] for i in reached], allow_unused=True)
        )
        return None, *(next(found) if w else None for w in wanted)


def _read_and_write(plan: _Plan, *tensors: Any) -> tuple[Tensor, ...]:
    q, k, v, lr, momentum, w_1, w_2, w_3, *state = tensors
    tokens, initial, memory = Tokens(q, k, v, lr, momentum), (w_1, w_2, w_3), _Memory.of(state)
    with torch.autocast(tokens.q.device.type, enabled=False):
        start = _Memory.fresh(initial, tokens.momentum is not None)
        norms = [torch.linalg.vector_norm(w, dim=-2, keepdim=True) for w in initial]
        out = []
        for n, (opened, closed) in enumerate(zip(plan.opens, plan.closes, strict=True)):
            memory = _choose(opened, start, memory)
            out.append(_swiglu(tokens.q[n], memory.weights))
            momentum = None if tokens.momentum is None else tokens.momentum[n]
            memory = _add(memory, tokens.k[n], tokens.v[n], tokens.lr[n], momentum)
            if closed is not False:
                memory = _choose(closed, _write(memory, start, norms, plan), memory)
        return torch.stack(out), *memory.flat()


def _add(memory: _Memory, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None) -> _Memory:
    """The gradient of each token at the weights as they are."""
    ascent = _ascent(k, v, lr, memory.weights)
    gradient = tuple(d + a for d, a in zip(memory.gradient, ascent, strict=True))
    if momentum is None:
        return memory._replace(gradient=gradient)
    total = memory.momentum_sum[0] + momentum.sum(-1)[:, None, None]
    return memory._replace(gradient=gradient, momentum_sum=(total,))


def _choose(flag: Tensor | bool, new: _Memory, old: _Memory) -> _Memory:
    if isinstance(flag, bool):
        return new if flag else old
    parts = zip(new, old, strict=True)
    return _Memory(*(tuple(torch.where(flag, n, o) for n, o in zip(*part, strict=True)) for part in parts))


def _swiglu(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    gate, out, up = weights
    return (F.silu(x @ gate) * (x @ up)) @ out


def _ascent(k: Tensor, v: Tensor, lr: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient of the sum of f(k) . v in each matrix, each token times its lr for that matrix."""
    gate, up = k @ weights[0], k @ weights[2]
    share = torch.sigmoid(gate)
    silu, slope = gate * share, share * (1 + gate * (1 - share))
    d_hidden = v @ weights[1].mT
    lr_gate, lr_out, lr_up = lr.split(1, -1)
    return k.mT @ (lr_gate * d_hidden * up * slope), (lr_out * silu * up).mT @ v, k.mT @ (lr_up * d_hidden * silu)


def _write(memory: _Memory, start: _Memory, norms: Sequence[Tensor], plan: _Plan) -> _Memory:
    """What the last token of a chunk makes of the memory."""
    step = memory.gradient
    if memory.momentum:
        mean = memory.momentum_sum[0] / plan.chunk_size
        step = tuple(torch.addcmul(d, mean, s) for d, s in zip(step, memory.momentum, strict=True))
    moved = (w + _orthogonal(s, plan.muon_steps) for w, s in zip(memory.weights, step, strict=True))
    weights = tuple(n * F.normalize(w, dim=-2, eps=_EPS) for w, n in zip(moved, norms, strict=True))
    return start._replace(weights=weights, momentum=step if memory.momentum else ())


def _orthogonal(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: singular values of each matrix drawn to 1 (Muon); ``steps`` 0 leaves it as it is."""
    if steps == 0:
        return x
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    wide = F.normalize(wide.flatten(1), dim=-1, eps=1e-7).view_as(wide)
    for a, b, c in MUON[:steps]:
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide.mT if x.shape[-2] > x.shape[-1] else wide
