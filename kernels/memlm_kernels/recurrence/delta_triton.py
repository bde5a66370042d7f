"""The delta rule by Triton kernels, as an op of torch; see ``linear_triton``, whose kernels it shares."""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import in_one_type
from memlm_kernels.launch import laid
from memlm_kernels.ops import kernel_op
from memlm_kernels.recurrence.channel_kernels import corrections_backward
from memlm_kernels.recurrence.delta_kernels import (
    delta_states_backward,
    delta_states_forward,
    inverses,
    pairs_backward,
    solutions,
    solutions_backward,
)
from memlm_kernels.recurrence.linear_kernels import outputs_forward, values_backward
from memlm_kernels.recurrence.linear_triton import (
    RecurrenceCall,
    cdiv,
    channel_gradients,
    decay_gradient,
    decayed,
    flops,
    scores_gradient,
    scores_of,
)
from memlm_kernels.recurrence.step import is_step, step
from memlm_kernels.segments import segments_of


def _solve(call: RecurrenceCall, x: Tensor, beta: Tensor, log_decay: Tensor | None, Y: Tensor) -> Tensor:
    """Y (beta exp(g) x)"""
    out, size = call.room(x), x.shape[-1]
    solutions(
        call.at_once(size, "BX"),
        {"BX": call.limits["BK" if size == call.keys else "BV"]},
        **{"x": x, "beta": beta, "log_decay": log_decay, "chunks": call.chunks, "Y": Y, "out": out, "X": size},
        **call.sizes,
    )
    return out


class _Factors(NamedTuple):
    """The factors of a chunk's reads, corrections and writes, with their decays if these are per channel.

    solved: of W = Y (beta exp(g) k); decay: of the kernels, None per channel; kept: see ``states_forward``
    """

    reads: Tensor
    solved: Tensor
    writes: Tensor
    decay: Tensor | None
    kept: Tensor | None

    @classmethod
    def of(cls, call: RecurrenceCall, q: Tensor, k: Tensor, log_decay: Tensor | None) -> "_Factors":
        if not per_channel(log_decay):
            return cls(q, k, k, log_decay, None)
        k_carried = torch.empty_like(k)
        reads, writes, kept = decayed(call, q, k, log_decay, k_carried)
        return cls(reads, k_carried, writes, None, kept)


def per_channel(log_decay: Tensor | None) -> TypeGuard[Tensor]:
    return log_decay is not None and log_decay.ndim == 4


@kernel_op("delta_rule")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the state after each segment, and for backward: the states before the chunks [B, N, H, K, V], d, Y, and with
    a decay per channel q k^T and k k^T of the chunks (empty without one).
    """
    q, k, v, beta, log_decay, state = laid(q, k, v, beta, log_decay, state)
    call = RecurrenceCall(q, v, cu_seqlens)
    sizes = {**call.sizes, "K": call.keys, "V": call.values}
    scores, pairs = None, None
    if per_channel(log_decay):
        scores, pairs = scores_of(call, q, k, log_decay, q.dtype), scores_of(call, k, k, log_decay, torch.float32)
    of = _Factors.of(call, q, k, log_decay)
    Y = q.new_empty(call.scores_shape)
    inverses(
        call.at_once(1),
        {"BK": call.limits["BK"]},
        **{"k": k, "beta": beta, "log_decay": of.decay, "pairs": pairs, "chunks": call.chunks, "Y": Y},
        **{"K": call.keys, **call.sizes},
    )
    W, U = _solve(call, of.solved, beta, of.decay, Y), _solve(call, v, beta, None, Y)
    states, final = q.new_empty(call.states_shape), q.new_empty(call.state_shape, dtype=torch.float32)
    d, o = call.room(v), call.room(v)
    limits = {"BV": call.limits["BV"]}
    if q.dtype == torch.float32 and (call.keys <= 64 or of.decay is None):
        # Factors of fp32 in registers (sm_80) leave none to load ahead.
        limits = {"BV": 16, "num_stages": 1 if call.keys <= 64 else 2}
    delta_states_forward(
        lambda tiles: call.batch * call.segments * call.heads * cdiv(call.values, tiles["BV"]),
        limits,
        **{"k": of.writes, "W": W, "U": U, "log_decay": of.decay, "kept": of.kept, "cu": call.cu, "first": call.first},
        **{"initial": state, "states": states, "final": final, "d": d, "S": call.segments, "BK": call.limits["BK"]},
        **sizes,
    )
    outputs_forward(
        call.at_once(call.values, "BV"),
        call.limits if scores is None else call.narrow_limits,
        **{"q": of.reads, "k": k, "v": d, "log_decay": of.decay, "scores": scores, "chunks": call.chunks},
        **{"states": states, "o": o, **sizes},
    )
    none = q.new_empty(0)
    return o, final, states, d, Y, none if scores is None else scores, none.clone() if pairs is None else pairs


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = RecurrenceCall(q, v, cu_seqlens)
    final, states = q.new_empty(call.state_shape, dtype=torch.float32), q.new_empty(call.states_shape)
    Y, shape = q.new_empty(call.scores_shape), call.scores_shape if per_channel(log_decay) else (0,)
    pairs = q.new_empty(shape, dtype=torch.float32 if per_channel(log_decay) else q.dtype)
    return v.new_empty(v.shape), final, states, v.new_empty(v.shape), Y, q.new_empty(shape), pairs


@kernel_op("delta_rule_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    d: Tensor,
    Y: Tensor,
    scores: Tensor,
    pairs: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay (empty without one) and the state before each segment."""
    q, k, v, beta, log_decay, d_o, d_final = laid(q, k, v, beta, log_decay, d_o, d_final)
    call, channels = RecurrenceCall(q, v, cu_seqlens), per_channel(log_decay)
    sizes = {**call.sizes, "K": call.keys, "V": call.values}
    of = _Factors.of(call, q, k, log_decay)
    W, U = _solve(call, of.solved, beta, of.decay, Y), _solve(call, v, beta, None, Y)
    d_local, d_d = call.room(v), call.room(v)
    values_backward(
        call.at_once(call.values, "BV"),
        call.limits,
        **{"q": q, "k": k, "log_decay": of.decay, "scores": scores if channels else None, "chunks": call.chunks},
        **{"d_o": d_o, "d_states": None, "d_v": d_local, **sizes},
    )
    d_states, d_initial = torch.empty_like(states), q.new_empty(call.state_shape, dtype=torch.float32)
    # A state with so many rows takes more registers: fewer columns in more warps.
    wide, stages = call.keys * q.element_size() > 256, 1 if q.dtype == torch.float32 else 2
    delta_states_backward(
        lambda tiles: call.batch * call.segments * call.heads * cdiv(call.values, tiles["BV"]),
        {"BV": 16, **({"num_warps": 8, "num_stages": 1} if wide else {"num_warps": 4, "num_stages": stages})},
        **{"q": of.reads, "k": of.writes, "W": W, "log_decay": of.decay, "kept": of.kept, "cu": call.cu},
        **{"first": call.first, "d_o": d_o, "d_final": d_final, "d_states": d_states, "d_initial": d_initial},
        **{"d_local": d_local, "d_d": d_d, "S": call.segments, "BK": call.limits["BK"], **sizes},
    )
    d_q, d_k, d_v = (call.room(x) for x in (q, k, v))
    of_reads, of_solutions = (torch.empty_like(k, dtype=torch.float32) for _ in range(2))
    given = {"q": q, "k": k, "v": d, "log_decay": log_decay, "chunks": call.chunks, "states": states}
    given |= {"d_o": d_o, "d_states": d_states}
    if channels:
        d_decay = torch.empty_like(log_decay, dtype=torch.float32)
        channel_gradients(call, given, sizes, {"d_q": d_q, "d_k": of_reads, "d_decay": d_decay})
    else:
        d_decay = decay_gradient(call, log_decay, given, sizes, {"d_q": d_q, "d_k": of_reads})
    d_beta = call.room(beta)
    through_solutions = None if of.decay is None else call.room(of.decay)
    d_pairs = torch.empty_like(Y, dtype=torch.float32)
    solutions_backward(
        call.at_once(1),
        {**call.narrow_limits, "num_stages": 1 if wide else 2},
        **{"k": of.solved, "v": v, "beta": beta, "log_decay": of.decay, "pairs": pairs if channels else None},
        **{"chunks": call.chunks, "Y": Y, "W": W, "U": U, "states": states, "d_d": d_d, "d_k": of_solutions},
        **{"d_v": d_v, "d_beta": d_beta, "d_decay": through_solutions, "d_pairs": d_pairs, **sizes},
    )
    if channels:
        of_rows, of_columns = scores_gradient(call, k, k, log_decay, d_pairs)
        parts = {"of_reads": of_reads, "of_solutions": of_solutions, "of_rows": of_rows, "of_columns": of_columns}
        parts |= {"decay_of_reads": d_decay, "d_k": d_k, "d_decay": (d_decay := call.room(log_decay))}
        corrections_backward(
            call.at_once(call.keys, "BK"),
            {"BK": call.limits["BK"]},
            **{"k": k, "log_decay": log_decay, "chunks": call.chunks, **parts, "K": call.keys, **call.plain_sizes},
        )
    else:
        pairs_backward(
            call.at_once(call.keys, "BK"),
            {"BK": call.limits["BK"]},
            **{"k": k, "chunks": call.chunks, "d_pairs": d_pairs, "of_reads": of_reads, "of_solutions": of_solutions},
            **{"d_k": d_k, "K": call.keys, **call.sizes},
        )
    if through_solutions is not None:
        d_decay = d_decay + through_solutions
    return d_q, d_k, d_v, d_beta, d_decay, d_initial


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    d: Tensor,
    Y: Tensor,
    scores: Tensor,
    pairs: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_initial = q.new_empty(len(q), segments_of(cu_seqlens), *q.shape[2:], v.shape[-1], dtype=torch.float32)
    d_decay = q.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    d_q, d_k, d_v, d_beta = (x.new_empty(x.shape) for x in (q, k, v, beta))
    return d_q, d_k, d_v, d_beta, d_decay, d_initial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    (*tensors, _), (_, _, *kept) = inputs, output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


@outside_autocast
def _backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, cu_seqlens, *kept = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    *gradients, d_decay, d_initial = backward(q, k, v, beta, log_decay, cu_seqlens, *kept, d_o, d_final)
    needs_state = ctx.needs_input_grad[6]
    return *gradients, None if log_decay is None else d_decay, None, d_initial if needs_state else None


forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.memlm.delta_rule)
def _forward_flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    beta: Any,
    log_decay: Any,
    cu_seqlens: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Four products make a chunk's inverse."""
    return flops(q, v, cu_seqlens, states=3, of_keys=3, of_values=2, inside=4)


@register_flop_formula(torch.ops.memlm.delta_rule_backward)
def _backward_flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    beta: Any,
    log_decay: Any,
    cu_seqlens: Any,
    *_: Any,
    **__: Any,
) -> int:
    of_keys = {0: 8, 3: 9, 4: 7}[len(log_decay or ())]
    return flops(q, v, cu_seqlens, states=6, of_keys=of_keys, of_values=5)


def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    told: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    # One type for all factors of products; sums are fp32 in any case.
    tokens = in_one_type(q, k, v)
    if is_step(*tokens, beta, log_decay, state):
        o, final, d = step(*tokens, beta, log_decay, cu_seqlens, state, told)
    else:
        o, final, _, d, *_ = forward(*tokens, beta, log_decay, cu_seqlens, state)
    return o.to(v.dtype), final, d
