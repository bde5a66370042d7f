"""Titans' neural long-term memory: an MLP whose weights gradient descent writes, token by token.

Files:

    naive               the paper's recurrence, one token at a time, and the derivation of the chunked form
    reference           the exact dual form in PyTorch, with the equations
    step                one token of rows that continue
    scan                the loop over chunks, with its own backward
    chunk, chunk_backward  one step of that loop, and its gradients
    rates               the scalars of the dual form, and their gradients
    blocks, block_rates  a memory of one layer in blocks of tokens: its chunks as one triangular system
    network, losses     the network of the memory, and the inner losses
    segmented           the linear memory over segments: many memories in a row of tokens
    block_kernels, block_backward_kernels, triton  Triton: the memory of one layer in blocks, and the op around it
    block_gates_kernels  Triton: the gradients of its gates
    deep, deep_kernels  Triton: a memory of two layers
    deep_backward_kernels, deep_read_backward_kernels  Triton: the gradients of its writes and of its reads
    step_kernels, step_triton  Triton: decoding a token, for one layer and for two
    limits              Triton: the memories that the kernels take
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm_kernels.backend import as_autocast, pick
from memlm_kernels.checks import asks_gradient, check_sizes, check_tensors, named, once_a_kind
from memlm_kernels.neural_memory.limits import WIDTH, memory_limit
from memlm_kernels.neural_memory.losses import InnerLoss, dot_product, huber, lp, squared_error
from memlm_kernels.neural_memory.network import ACTIVATIONS, Tail
from memlm_kernels.neural_memory.reference import (
    BLOCKS,
    Blocks,
    LoopOverChunks,
    NeuralMemoryState,
    Tokens,
    block_size,
    neural_memory_reference,
)
from memlm_kernels.neural_memory.segmented import SegmentedMemoryOutput, SegmentedMemoryState, segmented_neural_memory
from memlm_kernels.segments import check_documents, exact

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "InnerLoss",
    "NeuralMemoryOutput",
    "NeuralMemoryState",
    "SegmentedMemoryOutput",
    "SegmentedMemoryState",
    "block_size",
    "dot_product",
    "huber",
    "lp",
    "neural_memory",
    "read_memory",
    "segmented_neural_memory",
    "squared_error",
]


class NeuralMemoryOutput(NamedTuple):
    """o: [B, T, H, V]; state: after each row's last real token
    surprise: [B, T, H], norm of each token's gradient; None if it was not requested
    """

    o: Tensor
    state: NeuralMemoryState
    surprise: Tensor | None


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    *,
    weights: Sequence[Tensor],
    chunk_size: int,
    activation: str = "gelu",
    norm: tuple[Tensor, Tensor] | None = None,
    loss: InnerLoss = squared_error,
    window: int = 1,
    weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    start: int | None = None,
    state: NeuralMemoryState | None = None,
    with_surprise: bool = True,
    backend: str = "auto",
) -> NeuralMemoryOutput:
    """Neural memory in its exact chunked dual form (Titans, arXiv:2501.00663, eqs. 9-15).

    The memory M is an MLP without biases. Each token takes one step of gradient descent with momentum on the inner
    loss of (M(k), v), then reads M(q)::

        S_t = momentum_t S_{t-1} - lr_t grad(M_anchor; k_t, v_t)
        M_t = (1 - decay_t) M_{t-1} + S_t
        o_t = M_t(q_t)

    where ``anchor`` is M at the start of the token's chunk. Chunks are counted from the first token of each document.

    q, k: [B, T, H, K]   v: [B, T, H, V]
    lr: [B, T, H], the learning rate of each token
    momentum, decay: [B, T, H] in (0, 1); None for no momentum (S_t is the step alone), for no decay
    weights: M at the start of a document, one [H, in, out] for each layer, from K to V
    chunk_size: tokens whose gradients are taken at one anchor; above 64 a multiple of a number from 16 to 64
    activation: between layers, one of ``ACTIVATIONS``
    norm: gain and bias [H, V]; M(x) is then x + LayerNorm(MLP(x)) (TTT, arXiv:2407.04620), and K = V
    loss: gradient of the inner loss in M(k), see ``losses``
    window: the step of token t descends on the losses of the last ``window`` tokens, each times its weight: the Omega
        rule (ATLAS, arXiv:2505.23735, eq. 9)
    weight: [B, T, H], the weights of these losses; None: 1
    cu_seqlens: [B, D + 1] integers, ascending, from 0 to at most T: document d of row b holds the tokens
        cu_seqlens[b, d] to cu_seqlens[b, d + 1] - 1, and may be empty. Tokens behind the last document are padding:
        they write nothing and read zeros. None: each row is one document
    start: a promise: in every row, ``start`` tokens of its document came before the call. The op then finds chunks
        without reading positions. Not allowed with cu_seqlens. With 0 the state is not used
    state: the state that an earlier call returned. The first document of a row continues it, unless its position is 0;
        the other documents start at ``weights``. None: all documents start there
    with_surprise: whether to compute the norms of the tokens' gradients

    o has v's dtype. Accumulates in fp32 (fp64 for fp64 inputs). Differentiable once. Raises ValueError if a size is
    out of range, shapes, types or devices disagree, the state is of another memory, or the backend cannot run.
    cu_seqlens are checked on a CPU; on a GPU, numbers outside the row count as the nearest inside. ``naive`` derives
    the chunked form.
    """
    _check(q, k, v, lr, momentum, decay, weight, weights, norm, activation, chunk_size, window, state)
    cu_seqlens = check_documents(q, cu_seqlens, start, state is not None)
    q, k, v = as_autocast(q, k, v)
    tokens = Tokens(q, k, v, lr, momentum, decay, weight)
    limit = memory_limit(q, v, weights, norm, loss, window, chunk_size)
    scan: LoopOverChunks | None = None
    blocks: Blocks | None = None
    widest = 64
    kind = "neural_memory" if len(weights) == 1 else "neural_memory, two layers"
    if pick(kind, backend, q, limit, v) == "triton":
        if q.shape[1] == 1 and state is not None and start != 0:
            held = (x for part in state[:3] for x in part)
            if not asks_gradient(*tokens, *weights, *(norm or ()), *held):
                from memlm_kernels.neural_memory.step_triton import step_triton

                places = (chunk_size, start, cu_seqlens)
                return NeuralMemoryOutput(
                    *step_triton(tokens, state, weights, norm, activation == "silu", *places, with_surprise)
                )
        from memlm_kernels.neural_memory.deep import scan_deep
        from memlm_kernels.neural_memory.triton import memory_triton

        scan, blocks, widest = scan_deep, memory_triton, WIDTH
    return NeuralMemoryOutput(
        *neural_memory_reference(
            tokens,
            tuple(weights),
            chunk_size=chunk_size,
            activation=activation,
            norm=norm,
            loss=loss,
            window=window,
            state=state,
            cu_seqlens=cu_seqlens,
            start=start,
            with_surprise=with_surprise,
            scan=scan,
            widest=widest,
            blocks=blocks,
        )
    )


def read_memory(
    q: Tensor,
    weights: Sequence[Tensor],
    *,
    activation: str = "gelu",
    norm: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Read M(q) without writing.

    q: [B, T, H, K]   weights: one [B, H, in, out] for each layer, from K to V, as ``state.weights`` of
        ``neural_memory``   activation, norm: as in ``neural_memory``

    Returns [B, T, H, V] in q's dtype; computes in fp32 (fp64 for fp64 inputs). Raises ValueError if shapes, types or
    devices disagree, or the activation is unknown.
    """
    if q.ndim != 4:
        raise ValueError(f"q {list(q.shape)} must be [B, T, H, K]")
    check_sizes("q", q)
    _check_chain(q, weights, weights[-1].shape[-1] if weights and weights[-1].ndim else 0, "B, H", q.shape[::2])
    _check_network(q, weights[-1].shape[-1], norm, activation)
    check_tensors({"q": q, **named("weights", weights), **named("norm", norm or ())})
    start = exact(q.transpose(1, 2))
    x = start.flatten(0, 1)
    with torch.autocast(q.device.type, enabled=False):
        for layer, w in enumerate(map(exact, weights)):
            x = torch.bmm(ACTIVATIONS[activation].value(x) if layer else x, w.flatten(0, 1))
        x = x.unflatten(0, start.shape[:2])
        if norm is not None:
            x = Tail(*(n.to(x.dtype)[:, None] for n in norm)).read(start, x)
    return x.transpose(1, 2).to(q.dtype)


@once_a_kind
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    weight: Tensor | None,
    weights: Sequence[Tensor],
    norm: tuple[Tensor, Tensor] | None,
    activation: str,
    chunk_size: int,
    window: int,
    state: NeuralMemoryState | None,
) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must be [B, T, H, K], v {list(v.shape)} [B, T, H, V]"
        )
    check_sizes("q", q)
    check_sizes("v", v)
    gates = {"lr": lr, "momentum": momentum, "decay": decay, "weight": weight}
    for name, gate in gates.items():
        if gate is not None and gate.shape != q.shape[:3]:
            raise ValueError(f"{name} {list(gate.shape)} must be [B, T, H] = {list(q.shape[:3])}")
    _check_chain(q, weights, v.shape[-1], "H", q.shape[2:3])
    for name, value in (("chunk_size", chunk_size), ("window", window)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if block_size(chunk_size) > 64:
        raise ValueError(f"chunk_size={chunk_size} {BLOCKS}")
    _check_network(q, v.shape[-1], norm, activation)
    check_tensors({"q": q, "k": k, "v": v, **gates, **named("weights", weights), **named("norm", norm or ())})
    if state is not None:
        _check_state(state, q, v, weights, momentum, window)


def _check_chain(q: Tensor, weights: Sequence[Tensor], values: int, letters: str, outer: tuple[int, ...]) -> None:
    """letters: the names of the sizes ``outer``, which come before in and out"""
    sizes = [q.shape[-1], *(w.shape[-1] if w.ndim else 0 for w in weights)]
    expected = [(*outer, i, o) for i, o in itertools.pairwise(sizes)]
    if not weights or [tuple(w.shape) for w in weights] != expected or sizes[-1] != values:
        raise ValueError(
            f"weights {[list(w.shape) for w in weights]} must chain [{letters}, in, out] from K={q.shape[-1]} to "
            f"V={values} with [{letters}] = {list(outer)}"
        )


def _check_network(q: Tensor, values: int, norm: tuple[Tensor, Tensor] | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    outer = (q.shape[2], values)
    if norm is not None and any(n.shape != outer for n in norm):
        raise ValueError(f"norm {[list(n.shape) for n in norm]} must be gain and bias [H, V] = {list(outer)}")
    if norm is not None and q.shape[-1] != values:
        raise ValueError(f"norm needs K={q.shape[-1]} equal to V={values}, because M(x) is x + LayerNorm(MLP(x))")


def _check_state(
    state: NeuralMemoryState, q: Tensor, v: Tensor, weights: Sequence[Tensor], momentum: Tensor | None, window: int
) -> None:
    batch, _, heads, keys = q.shape
    if bool(state.momentum) != (momentum is not None):
        raise ValueError(f"state {'has' if state.momentum else 'lacks'} momentum, unlike the call")
    memory, past = [[batch, *w.shape] for w in weights], [batch, window - 1, heads]
    recent = [[*past, keys], [*past, v.shape[-1]], past] if window > 1 else []
    expected = {"weights": memory, "momentum": memory if state.momentum else [], "anchor": memory, "recent": recent}
    for name, shapes in expected.items():
        found = [list(x.shape) for x in getattr(state, name)]
        if found != shapes:
            raise ValueError(f"state.{name} holds {found}, expected {shapes}")
    if state.position.shape != (batch,):
        raise ValueError(f"state.position {list(state.position.shape)} must be [B] = {[batch]}")
    parts = {name: getattr(state, name) for name in ("weights", "momentum", "anchor", "recent")}
    tensors = {name: x for part, of_part in parts.items() for name, x in named(f"state.{part}", of_part).items()}
    check_tensors({"q": q, **tensors}, {"state.position": state.position})
