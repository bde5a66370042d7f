"""Linear attention with an optional decay: the additive linear recurrences."""

from torch import Tensor

from memlm_kernels.backend import as_autocast, choose, with_triton
from memlm_kernels.pieces import long_rows
from memlm_kernels.recurrence.decay import kind_of
from memlm_kernels.recurrence.fla import limit_of, recurrence, with_fla
from memlm_kernels.recurrence.linear_reference import linear_attention_reference
from memlm_kernels.segments import RecurrenceOutput, check_recurrence


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    backend: str = "auto",
) -> RecurrenceOutput:
    """Linear attention: a matrix M adds up outer products of keys and values, and decays::

        M_t = diag(exp(log_decay_t)) M_{t-1} + k_t^T v_t
        o_t = q_t M_t

    Without a decay this is linear attention (arXiv:2006.16236). With one decay per head it is the rule of RetNet
    (arXiv:2307.08621) or Mamba-2 (arXiv:2405.21060), with one per channel of the key that of GLA (arXiv:2312.06635).

    q, k: [B, T, H, K]   v: [B, T, H, V]   log_decay: [B, T, H] or [B, T, H, K], natural logarithms, at most 0; None: 0
    cu_seqlens: [B, S + 1] integers from 0 to T, ascending; segment s of row b holds the tokens cu_seqlens[b, s] to
        cu_seqlens[b, s + 1] - 1, and tokens outside all segments are padding. None: each row is one segment. On a
        GPU the values are not checked: one out of range, or below an earlier one, counts as the nearest allowed
    state: [B, S, H, K, V], M before each segment's first token; None: zeros

    Returns o [B, T, H, V] in v's dtype, zeros at padding, and state [B, S, H, K, V], M after each segment's last
    token. Accumulates in fp32 (fp64 for fp64 inputs). Raises ValueError if shapes, types or devices disagree,
    cu_seqlens are out of range, or the backend cannot run. ``naive`` derives the chunked form.
    """
    cu_seqlens = check_recurrence(q, k, v, {"log_decay": log_decay}, cu_seqlens, state, ["log_decay"])
    q, k, v = as_autocast(q, k, v)
    known = with_triton(kind_of("linear_attention", log_decay), backend, q, _limit(q, log_decay), v, cu_seqlens)
    chosen = choose("linear_attention", backend, *with_fla(known, backend, q, limit_of(q, v, log_decay, None)))
    if chosen == "reference" or q.numel() == 0:
        return RecurrenceOutput(*linear_attention_reference(q, k, v, log_decay, cu_seqlens, state))
    if chosen == "fla":
        return RecurrenceOutput(*recurrence(q, k, v, None, log_decay, cu_seqlens, state))
    from memlm_kernels.recurrence.linear_triton import linear_attention_triton

    def op(v: Tensor, cu_seqlens: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_attention_triton(q, k, v, log_decay, cu_seqlens, state)

    return RecurrenceOutput(*long_rows(op, q, v, cu_seqlens, state, diagonal=True))


def _limit(q: Tensor, log_decay: Tensor | None) -> str | None:
    if log_decay is not None and log_decay.ndim == 4 and q.shape[-1] > 256:
        return f"its kernels take a decay for each of at most 256 channels, not K={q.shape[-1]}"
    return None
