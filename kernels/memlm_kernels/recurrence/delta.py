"""The delta rule with an optional decay: linear recurrences that correct their stored values."""

from typing import Any

import torch
from torch import Tensor

from memlm_kernels.backend import as_autocast, choose, with_triton
from memlm_kernels.pieces import long_rows
from memlm_kernels.recurrence.decay import kind_of
from memlm_kernels.recurrence.delta_reference import delta_rule_reference
from memlm_kernels.recurrence.fla import limit_of, recurrence, with_fla
from memlm_kernels.segments import DeltaOutput, check_recurrence, exact


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    with_residual: bool = False,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    backend: str = "auto",
) -> DeltaOutput:
    """The delta rule: a matrix M decays, then moves the value that it holds for a key towards the key's new value::

        D_t = diag(exp(log_decay_t)) M_{t-1}
        M_t = D_t + beta_t k_t^T (v_t - k_t D_t)
        o_t = q_t M_t

    This is the rule of DeltaNet (arXiv:2406.06484), with one decay per head that of Gated DeltaNet (arXiv:2412.06464,
    eq. 10), with one per channel of the key Kimi Delta Attention (arXiv:2510.26692). Keys should have unit length,
    otherwise the recurrence may diverge.

    q, k: [B, T, H, K]   v: [B, T, H, V]   beta: [B, T, H], 0 to 1   log_decay: [B, T, H] or [B, T, H, K], natural
        logarithms, at most 0; None: 0
    with_residual: whether to return beta_t |v_t - k_t D_t|, the size of each token's correction
    cu_seqlens: [B, S + 1] integers from 0 to T, ascending; segment s of row b holds the tokens cu_seqlens[b, s] to
        cu_seqlens[b, s + 1] - 1, and tokens outside all segments are padding. None: each row is one segment. On a
        GPU the values are not checked: one out of range, or below an earlier one, counts as the nearest allowed
    state: [B, S, H, K, V], M before each segment's first token; None: zeros

    Returns o [B, T, H, V] in v's dtype, zeros at padding; state [B, S, H, K, V], M after each segment's last token;
    and the residual, see ``DeltaOutput``. Accumulates in fp32 (fp64 for fp64 inputs). Raises ValueError if shapes,
    types or devices disagree, cu_seqlens are out of range, or the backend cannot run. ``naive`` derives the chunked
    form.
    """
    cu_seqlens = check_recurrence(q, k, v, {"beta": beta, "log_decay": log_decay}, cu_seqlens, state, ["log_decay"])
    q, k, v = as_autocast(q, k, v)
    limit = None if q.shape[-1] <= 256 else f"its kernels take keys of at most 256 channels, not K={q.shape[-1]}"
    known = with_triton(kind_of("delta_rule", log_decay), backend, q, limit, v, cu_seqlens)
    refused = "flash-linear-attention gives no residual" if with_residual else limit_of(q, v, log_decay, beta)
    chosen = choose("delta_rule", backend, *with_fla(known, backend, q, refused))
    if chosen == "fla":
        return DeltaOutput(*recurrence(q, k, v, beta, log_decay, cu_seqlens, state), None)
    if chosen == "reference" or q.numel() == 0:
        o, after, d = delta_rule_reference(q, k, v, beta, log_decay, cu_seqlens, state, with_residual)
    else:
        from memlm_kernels.recurrence.delta_triton import delta_rule_triton

        def op(v: Tensor, cu_seqlens: Tensor | None, state: Tensor | None) -> tuple[Any, ...]:
            return delta_rule_triton(q, k, v, beta, log_decay, cu_seqlens, state, with_residual)

        o, after, d = long_rows(op, q, v, cu_seqlens, state, diagonal=False)
    residual = None
    if with_residual:
        assert d is not None
        residual = torch.linalg.vector_norm(exact(d.detach()), dim=-1)
    return DeltaOutput(o, after, residual)
