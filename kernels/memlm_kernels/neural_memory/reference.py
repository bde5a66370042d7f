"""The dual form in plain PyTorch: matrix products inside chunks, a short loop over chunks.

Let r be a token's place in its chunk, g_i the gradient of token i at the chunk's anchor, and W, S
the memory and momentum on entry. Unrolling the two recurrences gives, with scalars only,

    M_r = beta_r W + f_r S - sum_{i<=r} C[r, i] g_i        S_r = m_r S - sum_{i<=r} P[r, i] g_i
    P[r, i] = lr_i prod_{i<l<=r} momentum_l                m_r = prod_{l<=r} momentum_l
    C = L P,  f = L m,  L[r, i] = prod_{i<l<=r} (1 - decay_l),  beta_r = prod_{l<=r} (1 - decay_l)

Every product is at most 1 and nothing is divided, so nothing overflows. Each g_i is an outer
product a_i d_i^T for each layer (input times backpropagated error), so M_r(q) needs no M_r:
``q W`` and ``q S`` scaled, minus masked attention from q over a with values d.

A slot that holds no token has lr 0, momentum 1, decay 0 and ``write`` 0, and changes nothing;
``write`` multiplies the S that enters M, for momentum would go on moving M otherwise.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-30


class NeuralMemoryState(NamedTuple):
    """weights M, momentum S, anchor: one fp32 [B, H, in, out] for each layer; position: [B] int64.

    ``position`` counts the tokens of the current document, ``anchor`` is M at the start of the open chunk.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    position: Tensor


class _Chunks(NamedTuple):
    """Tokens laid out on the chunk grid: [B, H, N, C, ...], flags [B, N] or None where all are trivial."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor
    decay: Tensor
    write: Tensor
    starts_document: Tensor | None
    starts_chunk: Tensor | None


def neural_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: tuple[Tensor, ...],
    chunk_size: int,
    state: NeuralMemoryState | None,
    positions: Tensor | None,
    lengths: Tensor | None,
    max_documents: int,
) -> tuple[Tensor, NeuralMemoryState]:
    batch, length, _heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    on_grid = state is None and positions is None and lengths is None
    with torch.autocast(q.device.type, enabled=False):
        initial = tuple(w.to(dtype).expand(batch, *w.shape) for w in weights)
        if state is None:
            zeros = tuple(torch.zeros_like(w) for w in initial)
            state = NeuralMemoryState(initial, zeros, initial, q.new_zeros(batch, dtype=torch.int64))
        else:
            exact = [tuple(w.to(dtype) for w in part) for part in state[:3]]
            state = NeuralMemoryState(exact[0], exact[1], exact[2], state.position)
        if length == 0:
            return torch.zeros_like(v), state
        if positions is None:
            positions = state.position[:, None] + torch.arange(length, device=q.device)
        tokens = [x.to(dtype) for x in (q, k, v, lr, momentum, decay)]
        if on_grid:
            chunks, slots = _pad_to_grid(tokens, chunk_size), None
        else:
            chunks, slots = _scatter_to_grid(tokens, positions, lengths, chunk_size, max_documents)
        out, memory, surprise, anchor = _scan(chunks, initial, state)
        out = out.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if slots is None:
            out = out[:, :length]
        else:
            # One more slot, always zero, for the tokens that are not real.
            out = F.pad(out, (0, 0, 0, 0, 0, 1)).gather(1, _like(slots, out))
    last = positions[:, -1] if lengths is None else positions.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    position = last + 1
    if lengths is not None:
        position = torch.where(lengths > 0, position, state.position)
    return out.to(v.dtype), NeuralMemoryState(memory, surprise, anchor, position)


def _like(index: Tensor, x: Tensor) -> Tensor:
    """A [B, S] index, expanded for gather and scatter along dimension 1 of x: [B, *, ...]."""
    return index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])


def _to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """[B, N * C, H, ...] -> [B, H, N, C, ...]"""
    return x.unflatten(1, (-1, chunk_size)).movedim(3, 1)


def _pad_to_grid(tokens: list[Tensor], chunk_size: int) -> _Chunks:
    """Every row starts at the start of a chunk and has only real tokens: slots are the tokens themselves."""
    pad = -tokens[0].shape[1] % chunk_size

    def lay(x: Tensor, fill: float = 0.0) -> Tensor:
        return _to_chunks(F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad), value=fill), chunk_size)

    q, k, v, lr, momentum, decay = tokens
    write = lay(torch.ones_like(lr[:1, :, :1]))
    return _Chunks(lay(q), lay(k), lay(v), lay(lr), lay(momentum, 1.0), lay(decay), write, None, None)


def _scatter_to_grid(
    tokens: list[Tensor], positions: Tensor, lengths: Tensor | None, chunk_size: int, max_documents: int
) -> tuple[_Chunks, Tensor]:
    """Give each token the slot of its place in its chunk; rows may start anywhere and hold several documents.

    The number of chunks is bounded from shapes alone: each document's last chunk may be short, and
    the first piece may start inside a chunk. Returns the chunks and each token's slot [B, T].
    """
    batch, length = positions.shape
    if length == 1:
        width, count = 1, 1
    else:
        width = chunk_size
        count = min(length, (length + (max_documents + 1) * (width - 1)) // width)
    place = positions % chunk_size
    opens = place == 0
    chunk = opens.cumsum(1) - opens[:, :1].long()
    slots = chunk * width + (place if width > 1 else 0)
    if lengths is not None:
        real = torch.arange(length, device=positions.device) < lengths[:, None]
        slots = torch.where(real, slots, count * width)

    def lay(x: Tensor, fill: float = 0.0) -> Tensor:
        grid = x.new_full((batch, count * width + 1, *x.shape[2:]), fill)
        return _to_chunks(grid.scatter(1, _like(slots, x), x)[:, :-1], width)

    def flag(x: Tensor) -> Tensor:
        return lay(x[..., None].to(tokens[0].dtype))[:, 0].amax(-1) > 0

    q, k, v, lr, momentum, decay = tokens
    write = lay(torch.ones_like(lr[..., :1]))
    chunks = _Chunks(
        lay(q),
        lay(k),
        lay(v),
        lay(lr),
        lay(momentum, 1.0),
        lay(decay),
        write,
        starts_document=flag(positions == 0),
        starts_chunk=flag(opens),
    )
    return chunks, slots


def _decay_products(log_factor: Tensor) -> Tensor:
    """[..., C] -> [..., C, C]: entry (r, i) is exp(sum of log_factor over i < l <= r), 0 above the diagonal.

    A masked cumulative sum instead of a difference of sums: no cancellation at long chunks.
    """
    size = log_factor.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_factor.device)
    below = log_factor[..., :, None].expand(*log_factor.shape, size).masked_fill(~ones.tril(-1), 0.0)
    return below.cumsum(-2).masked_fill(~ones.tril(), float("-inf")).exp()


class _Gates(NamedTuple):
    """The scalar recurrences of every chunk, [B, H, N, C(, C)]; ``last`` rows drive the state."""

    C: Tensor
    beta: Tensor
    f: Tensor
    m_last: Tensor
    P_last: Tensor


def _gates(chunks: _Chunks) -> _Gates:
    log_momentum = chunks.momentum.clamp(min=_TINY).log()
    log_keep = torch.log1p(-chunks.decay.clamp(max=1 - 2**-24))
    P = _decay_products(log_momentum) * chunks.lr[..., None, :]
    m = log_momentum.cumsum(-1).exp()
    L = _decay_products(log_keep) * chunks.write[..., None, :]
    f = (L @ m[..., None]).squeeze(-1)
    return _Gates(L @ P, log_keep.cumsum(-1).exp(), f, m[..., -1], P[..., -1, :])


def _gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(x * 2**-0.5))
    return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5


def _inner_gradient(k: Tensor, v: Tensor, anchor: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs a_l and errors d_l of each layer for 1/2 |M(k) - v|^2 at ``anchor``: its gradient is a_l^T d_l."""
    inputs, slopes = [k], []
    for w in anchor[:-1]:
        activated, slope = _gelu_and_slope(inputs[-1] @ w)
        inputs.append(activated)
        slopes.append(slope)
    errors = [inputs[-1] @ anchor[-1] - v]
    for w, slope in zip(reversed(anchor[1:]), reversed(slopes), strict=True):
        errors.append(errors[-1] @ w.mT * slope)
    return inputs, errors[::-1]


def _scan(
    chunks: _Chunks, initial: tuple[Tensor, ...], state: NeuralMemoryState
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Loop over chunks for the state, then read all of them at once. Returns o [B, H, N, C, V], M, S, anchor."""
    gates = _gates(chunks)
    weights, momentum, anchor = state.weights, state.momentum, state.anchor
    # What scales the old M and S, and each token's gradient, in the state after the chunk.
    beta, f, m = (x[..., None, None].unbind(2) for x in (gates.beta[..., -1], gates.f[..., -1], gates.m_last))
    to_weights, to_momentum = (x[..., None].unbind(2) for x in (gates.C[..., -1, :], gates.P_last))
    k, v = chunks.k.unbind(2), chunks.v.unbind(2)
    entered: list[tuple[Tensor, ...]] = []
    inputs: list[list[Tensor]] = []
    errors: list[list[Tensor]] = []
    for n in range(len(k)):
        if chunks.starts_chunk is None or chunks.starts_document is None:
            anchor = weights
        else:
            new, opened = (x[:, n, None, None, None] for x in (chunks.starts_document, chunks.starts_chunk))
            weights = tuple(torch.where(new, i, w) for i, w in zip(initial, weights, strict=True))
            momentum = tuple(s.masked_fill(new, 0.0) for s in momentum)
            anchor = tuple(torch.where(opened, w, a) for w, a in zip(weights, anchor, strict=True))
        entered.append((*weights, *momentum))
        a, d = _inner_gradient(k[n], v[n], anchor)
        inputs.append(a)
        errors.append(d)
        layers = list(zip(weights, momentum, a, d, strict=True))
        weights = tuple(beta[n] * w + f[n] * s - x.mT @ (to_weights[n] * e) for w, s, x, e in layers)
        momentum = tuple(m[n] * s - x.mT @ (to_momentum[n] * e) for _, s, x, e in layers)

    depth = len(weights)
    states = [torch.stack(x, 2) for x in zip(*entered, strict=True)]
    stacked = [[torch.stack(x, 2) for x in zip(*of_chunks, strict=True)] for of_chunks in (inputs, errors)]
    x = chunks.q
    for layer, (a_all, d_all) in enumerate(zip(*stacked, strict=True)):
        old = gates.beta[..., None] * (x @ states[layer]) + gates.f[..., None] * (x @ states[depth + layer])
        x = old - (gates.C * (x @ a_all.mT)) @ d_all
        if layer < depth - 1:
            x = F.gelu(x)
    return x, weights, momentum, anchor
