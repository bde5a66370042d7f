"""The chunked form in plain PyTorch. Let g_i be the sum of log_decay up to token i of a chunk, i included, and

    d_i = beta_i (v_i - exp(g_i - g_{i-1}) k_i M_{i-1})

what token i corrects, so that M_i = exp(g_i - g_{i-1}) M_{i-1} + k_i^T d_i. Unrolled to the chunk's start M this is a
triangular system,

    (I + A) d = beta v - (beta exp(g) k) M        A[i, j] = beta_i exp(g_i - g_j) k_i . k_j  for j < i

whose solution is linear in M: d = U - W M. Then, with E[i, j] = exp(g_i - g_j) for j <= i,

    o = (exp(g) q) M + (E * q k^T) d              M' = exp(g_C) M + (exp(g_C - g) k)^T d
"""

import torch
from torch import Tensor

from memlm_kernels.recurrence import one_token
from memlm_kernels.segments import chunk_width, exact, lay_out, state_of, sums_after, sums_between

_WIDTH = 64


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    length, values = q.shape[1], v.shape[-1]
    with torch.autocast(q.device.type, enabled=False):
        exact_q = exact(q)
        state = state_of(exact_q, cu_seqlens, *k.shape[2:], values) if state is None else exact(state)
        if length == 0:
            return v.clone(), state
        if length == 1 and cu_seqlens is None:
            o, state = one_token.of_rows(exact_q, exact(k), exact(v), beta, log_decay, state)
            return o.to(v.dtype), state
        segments = lay_out(cu_seqlens, length, chunk_width(length, cu_seqlens, _WIDTH))
        q_c, k_c, v_c = (segments.lay(x) for x in (exact_q, exact(k), exact(v)))
        beta_c = segments.lay(exact(beta)[..., None])
        weighted, scores = beta_c * k_c, q_c @ k_c.mT
        A = weighted @ k_c.mT
        if log_decay is None:
            keep, reads, writes = None, q_c, k_c
            A, scores, corrected = A.tril(-1), scores.tril(), weighted
        else:
            g = segments.lay(exact(log_decay)[..., None])
            keep, from_start, E = g.sum(-2).exp()[..., None], g.cumsum(-2).exp(), sums_between(g).exp()[..., 0]
            reads, writes, corrected = q_c * from_start, k_c * sums_after(g).exp(), weighted * from_start
            A, scores = (A * E).tril(-1), scores * E
        solved = torch.linalg.solve_triangular(
            A, torch.cat([beta_c * v_c, corrected], -1), upper=False, unitriangular=True
        )
        # Unbound, for the gradient of an index is a tensor as large as all chunks.
        U, W = (x.unbind() for x in solved.split([values, k.shape[-1]], -1))
        to_memory, kept, corrections = writes.mT.unbind(), None if keep is None else keep.unbind(), []

        def step(n: int, memory: Tensor) -> Tensor:
            corrections.append(U[n] - W[n] @ memory)
            return (memory if kept is None else memory * kept[n]) + to_memory[n] @ corrections[-1]

        starts, state = segments.scan(state, step)
        return segments.take(reads @ starts + scores @ torch.stack(corrections)).to(v.dtype), state
