"""Titans' neural long-term memory: an MLP whose weights are written by gradient descent as it reads."""

import itertools
from collections.abc import Sequence

from torch import Tensor

from memlm_kernels.backend import choose
from memlm_kernels.neural_memory.reference import NeuralMemoryState, neural_memory_reference

__all__ = ["NeuralMemoryState", "neural_memory"]


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    *,
    weights: Sequence[Tensor],
    chunk_size: int,
    state: NeuralMemoryState | None = None,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    max_documents: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, NeuralMemoryState]:
    """Neural memory in its exact chunked dual form (Titans, arXiv:2501.00663, eqs. 9-15).

    The memory M is an MLP without biases, GELU between its layers. Each token takes one step of
    gradient descent with momentum on 1/2 |M(k) - v|^2, then reads M(q)::

        S_t = momentum_t S_{t-1} - lr_t grad(M_anchor; k_t, v_t)
        M_t = (1 - decay_t) M_{t-1} + S_t
        o_t = M_t(q_t)

    where ``anchor`` is M at the start of the token's chunk. Chunks are counted from the first
    token of each document.

    q, k: [B, T, H, K]   v: [B, T, H, V]   lr, momentum, decay: [B, T, H], momentum and decay in (0, 1)
    weights: M at the start of a document, one [H, in, out] for each layer, from K to V
    state: what an earlier call returned; None starts every row at position 0 of a document
    positions: [B, T], tokens before each one in its own document; a 0 starts a document. None
        continues at ``state.position``
    lengths: [B], the real tokens of each row come first; the others write nothing and read zeros
    max_documents: an upper bound on the documents that one row has tokens of, as a Python int:
        it sizes buffers without asking the device

    Returns o: [B, T, H, V] in v's dtype, and the state after each row's last real token.
    Accumulates in fp32 (fp64 for fp64 inputs). Raises ValueError if chunk_size < 1, the shapes
    disagree or the backend cannot run.
    """
    _check(q, k, v, lr, momentum, decay, weights, chunk_size)
    _check_places(q, weights, state, positions, lengths, max_documents)
    choose("neural_memory", backend, ("reference",))
    return neural_memory_reference(
        q, k, v, lr, momentum, decay, tuple(weights), chunk_size, state, positions, lengths, max_documents
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: Sequence[Tensor],
    chunk_size: int,
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must be [B, T, H, K], v {list(v.shape)} [B, T, H, V]"
        )
    for name, gate in (("lr", lr), ("momentum", momentum), ("decay", decay)):
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} {list(gate.shape)} must be [B, T, H] = {list(q.shape[:3])}")
    sizes = [q.shape[-1], *(w.shape[-1] for w in weights)]
    expected = [(q.shape[2], i, o) for i, o in itertools.pairwise(sizes)]
    if not weights or [tuple(w.shape) for w in weights] != expected or sizes[-1] != v.shape[-1]:
        raise ValueError(
            f"weights {[list(w.shape) for w in weights]} must chain [H, in, out] from "
            f"K={q.shape[-1]} to V={v.shape[-1]} with H={q.shape[2]}"
        )


def _check_places(
    q: Tensor,
    weights: Sequence[Tensor],
    state: NeuralMemoryState | None,
    positions: Tensor | None,
    lengths: Tensor | None,
    max_documents: int,
) -> None:
    batch, length = q.shape[:2]
    if max_documents < 1:
        raise ValueError(f"max_documents={max_documents} must be at least 1")
    if positions is not None and (positions.shape != (batch, length) or positions.is_floating_point()):
        raise ValueError(f"positions {list(positions.shape)} must be integers [B, T] = {[batch, length]}")
    if lengths is not None and (lengths.shape != (batch,) or lengths.is_floating_point()):
        raise ValueError(f"lengths {list(lengths.shape)} must be integers [B] = {[batch]}")
    if state is not None:
        found = [list(w.shape) for w in state.weights]
        expected = [[batch, *w.shape] for w in weights]
        if found != expected or state.position.shape != (batch,):
            raise ValueError(f"state holds weights {found}, expected {expected} and position {[batch]}")
