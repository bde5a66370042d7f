"""Large-chunk test-time training (LaCT): a SwiGLU whose weights are written once per chunk.

Files:

    naive               the paper's recurrence, one token at a time, and the derivation of the chunked form
    reference           the layout of tokens and states, and the step of one token
    chunks              the loop over chunks in PyTorch, with its own backward
    chunks_triton       the same loop with torch's products and Triton's kernels for all else
    kernels, triton     those kernels, and the ops around them
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from memlm_kernels.backend import pick
from memlm_kernels.checks import check_sizes, check_tensors, named
from memlm_kernels.large_chunk_memory.chunks import MUON
from memlm_kernels.large_chunk_memory.reference import (
    LargeChunkMemoryState,
    LargeChunkTokens,
    large_chunk_memory_reference,
    write_reference,
)
from memlm_kernels.segments import check_documents

__all__ = ["MUON", "LargeChunkMemoryOutput", "LargeChunkMemoryState", "large_chunk_memory"]


class LargeChunkMemoryOutput(NamedTuple):
    """o: [B, T, H, V] in v's dtype; state: after each row's last real token."""

    o: Tensor
    state: LargeChunkMemoryState


def large_chunk_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None = None,
    *,
    weights: Sequence[Tensor],
    chunk_size: int,
    muon_steps: int = 0,
    cu_seqlens: Tensor | None = None,
    start: int | None = None,
    state: LargeChunkMemoryState | None = None,
    backend: str = "auto",
) -> LargeChunkMemoryOutput:
    """Large-chunk test-time training (LaCT, arXiv:2505.23884), apply then update.

    Every token of a chunk reads f(q) with the weights that earlier chunks wrote. The last token of a chunk writes the
    weights: one step along the chunk's gradient of f(k) . v, after which each column gets its initial norm again::

        f(x) = (silu(x W1) * (x W3)) W2
        S_j = mean(momentum) S_j + sum_t lr_tj d(f(k_t) . v_t) / dW_j
        W_j = |column of the learned W_j| * normalize(W_j + orthogonal(S_j))

    Chunks are counted from the first token of each document. The mean and the sum are over the chunk's tokens.

    q, k: [B, T, H, K]   v: [B, T, H, V]   momentum: [B, T, H] in (0, 1); None for no momentum (S_j is the sum alone)
    lr: [B, T, H, 3], at least 0, the learning rates of each token for W1, W2, W3
    weights: W1 [H, K, F], W2 [H, F, V], W3 [H, K, F] at the start of a document
    chunk_size: tokens of a chunk, at least 1
    muon_steps: Newton-Schulz steps of ``orthogonal`` (Muon); with 0, orthogonal(S_j) = S_j
    cu_seqlens, start, state: as in ``neural_memory``

    Returns o [B, T, H, V] in v's dtype and the state after each row's last real token. Accumulates in fp32 (fp64 for
    fp64 inputs). Raises ValueError if a size is out of range, shapes, types or devices disagree, the state is of
    another memory, or the backend cannot run; cu_seqlens are checked as in ``neural_memory``. ``naive`` derives the
    chunked form.
    """
    _check(q, k, v, lr, momentum, weights)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if not 0 <= muon_steps <= len(MUON):
        raise ValueError(f"muon_steps={muon_steps} must be 0 (none) to {len(MUON)}")
    cu_seqlens = check_documents(q, cu_seqlens, start, state is not None)
    check_tensors({"q": q, "k": k, "v": v, "lr": lr, "momentum": momentum, **named("weights", weights)})
    if state is not None:
        _check_state(state, q, momentum, weights)
    others = (k, v, lr, momentum, *weights)
    write = write_reference
    if pick("large_chunk_memory", backend, q, None, *others, products=False) == "triton":
        from memlm_kernels.large_chunk_memory.chunks_triton import write_triton as write
    tokens = LargeChunkTokens(q, k, v, lr, momentum)
    return LargeChunkMemoryOutput(
        *large_chunk_memory_reference(tokens, tuple(weights), chunk_size, muon_steps, state, cu_seqlens, start, write)
    )


def _check(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, weights: Sequence[Tensor]) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must be [B, T, H, K], v {list(v.shape)} [B, T, H, V]"
        )
    check_sizes("q", q)
    check_sizes("v", v)
    if lr.shape != (*q.shape[:3], 3):
        raise ValueError(f"lr {list(lr.shape)} must be [B, T, H, 3] = {[*q.shape[:3], 3]}")
    if momentum is not None and momentum.shape != q.shape[:3]:
        raise ValueError(f"momentum {list(momentum.shape)} must be [B, T, H] = {list(q.shape[:3])}")
    found = [list(w.shape) for w in weights]
    heads, key, value = q.shape[2], q.shape[3], v.shape[3]
    width = found[0][-1] if found and found[0] else 0
    if found != [[heads, key, width], [heads, width, value], [heads, key, width]]:
        raise ValueError(
            f"weights {found} must be [H, K, F], [H, F, V], [H, K, F] with H={heads}, K={key}, V={value} and one F"
        )


def _check_state(state: LargeChunkMemoryState, q: Tensor, momentum: Tensor | None, weights: Sequence[Tensor]) -> None:
    batch = len(q)
    if bool(state.momentum) != (momentum is not None):
        raise ValueError(f"state {'has' if state.momentum else 'lacks'} momentum, unlike the call")
    memory, has_momentum = [[batch, *w.shape] for w in weights], bool(state.momentum)
    of_momentum = {"momentum": memory, "momentum_sum": [[batch, len(weights[0]), 1, 1]]}
    expected = {"weights": memory, "gradient": memory}
    expected |= {name: shapes if has_momentum else [] for name, shapes in of_momentum.items()}
    for name, shapes in expected.items():
        found = [list(x.shape) for x in getattr(state, name)]
        if found != shapes:
            raise ValueError(f"state.{name} holds {found}, expected {shapes}")
    if state.position.shape != (batch,):
        raise ValueError(f"state.position {list(state.position.shape)} must be [B] = {[batch]}")
    parts = {name: x for part in state._fields[:4] for name, x in named(f"state.{part}", getattr(state, part)).items()}
    check_tensors({"q": q, **parts}, {"state.position": state.position})
