"""Linear attention by Triton kernels, as an op of torch: it compiles whole, and its floating-point work is counted."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import in_one_type
from memlm_kernels.launch import Tiles, at_least_16, cdiv, laid, precision, spans
from memlm_kernels.ops import kernel_op
from memlm_kernels.recurrence.channel_kernels import (
    channel_keys_backward,
    channel_scores,
    channel_scores_backward,
    decay_channels,
    scores_backward,
)
from memlm_kernels.recurrence.linear_kernels import (
    keys_backward,
    outputs_forward,
    states_backward,
    states_forward,
    values_backward,
)
from memlm_kernels.recurrence.step import is_step, step
from memlm_kernels.segments import chunk_width, segments_of

WIDTH, BLOCK = 64, 16


def width_of(length: int, cu_seqlens: Tensor | None) -> int:
    """Tokens of a chunk."""
    return max(16, chunk_width(length, cu_seqlens, WIDTH))


class RecurrenceCall:
    """Sizes of a call, how its rows are cut into chunks, and how many programs a kernel needs.

    Rows of q are [B, T, H, K]; see ``launch`` for the rest.
    """

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.length, self.heads, self.keys = q.shape
        self.values = v.shape[-1]
        self.width = width_of(self.length, cu_seqlens)
        self.segments = segments_of(cu_seqlens)
        self.cu = cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()
        self.count, self.chunks, self.first = spans(cu_seqlens, self.length, self.width)
        # fp32 takes twice the registers.
        most = 32 if q.dtype == torch.float32 else 64
        self.limits = {"BK": at_least_16(self.keys), "BV": min(most, at_least_16(self.values))}
        # For kernels with more tiles at a time.
        self.narrow_limits = {**self.limits, "BK": min(most, self.limits["BK"])}
        # More warps on a block of 16 tokens would compute the same scores.
        self.limits_of_pairs = {"num_warps": 2 if self.limits["BK"] <= 128 else 4}
        # Kernels without products take no precision.
        self.plain_sizes = {"T": self.length, "N": self.count, "H": self.heads, "BT": self.width}
        self.sizes = {**self.plain_sizes, "PRECISION": precision(q)}

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.batch, self.segments, self.heads, self.keys, self.values

    @property
    def states_shape(self) -> tuple[int, ...]:
        return self.batch, self.count, self.heads, self.keys, self.values

    @property
    def scores_shape(self) -> tuple[int, ...]:
        return self.batch, self.count, self.heads, self.width, self.width

    def along(self, tiles: Tiles) -> int:
        """Programs of a pass along segments, one for each tile of a state."""
        tiles_of_state = cdiv(self.keys, tiles["BK"]) * cdiv(self.values, tiles["BV"])
        return self.batch * self.segments * self.heads * tiles_of_state

    def at_once(self, size: int, tile: str | None = None) -> Any:
        """Programs of a pass over all chunks, one for each ``tile`` of ``size``."""
        chunks = self.batch * self.count * self.heads
        return lambda tiles: chunks * (size if tile is None else cdiv(size, tiles[tile]))

    def room(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor like x; zeros if there may be padding, which no program writes."""
        make = torch.empty_like if self.cu is None else torch.zeros_like
        return make(x, dtype=dtype, memory_format=torch.contiguous_format)


@kernel_op("linear_attention")
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the state after each segment, and for backward the states before the chunks, [B, N, H, K, V], and the scores
    with a decay per channel (empty without one).
    """
    q, k, v, log_decay, state = laid(q, k, v, log_decay, state)
    call = RecurrenceCall(q, v, cu_seqlens)
    sizes = {**call.sizes, "K": call.keys, "V": call.values}
    states, final = q.new_empty(call.states_shape), q.new_empty(call.state_shape, dtype=torch.float32)
    o, scores, kept = call.room(v), None, None
    if log_decay is not None and log_decay.ndim == 4:
        scores = scores_of(call, q, k, log_decay, q.dtype)
        q, k, kept = decayed(call, q, k, log_decay)
    states_forward(
        call.along,
        call.limits,
        **{"k": k, "v": v, "log_decay": log_decay, "kept": kept, "cu": call.cu, "first": call.first},
        **{"initial": state, "states": states, "final": final, "S": call.segments, **sizes},
    )
    outputs_forward(
        call.at_once(call.values, "BV"),
        call.limits if scores is None else call.narrow_limits,
        **{"q": q, "k": k, "v": v, "log_decay": log_decay, "scores": scores, "chunks": call.chunks},
        **{"states": states, "o": o, **sizes},
    )
    return o, final, states, q.new_empty(0) if scores is None else scores


def scores_of(call: RecurrenceCall, q: Tensor, k: Tensor, log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """q k^T of each chunk with a decay per channel, on and below the diagonal."""
    scores = q.new_empty(call.scores_shape, dtype=dtype)
    channel_scores(
        call.at_once(call.width // BLOCK),
        call.limits_of_pairs,
        **{"q": q, "k": k, "log_decay": log_decay, "chunks": call.chunks, "scores": scores},
        **{"K": call.keys, "BC": BLOCK, "BK": call.limits["BK"], **call.sizes},
    )
    return scores


def scores_gradient(
    call: RecurrenceCall, q: Tensor, k: Tensor, log_decay: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k through ``scores_of``, in fp32."""
    d_q, d_k = (q.new_empty(q.shape, dtype=torch.float32) for _ in "qk")
    channel_scores_backward(
        call.at_once(call.width // BLOCK),
        call.limits_of_pairs,
        **{"q": q, "k": k, "log_decay": log_decay, "chunks": call.chunks, "d_scores": d_scores},
        **{"d_q": d_q, "d_k": d_k, "K": call.keys, "BC": BLOCK, "BK": call.limits["BK"], **call.sizes},
    )
    return d_q, d_k


def decayed(
    call: RecurrenceCall, q: Tensor, k: Tensor, log_decay: Tensor, k_carried: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k with the decays per channel of their chunks, and the share that each chunk keeps of the state; fills
    k_carried, see ``decay_channels``.
    """
    q_decayed, k_decayed = torch.empty_like(q), torch.empty_like(k)
    kept = q.new_empty(call.states_shape[:-1], dtype=torch.float32)
    decay_channels(
        call.at_once(call.keys, "BK"),
        call.limits,
        **{"q": q, "k": k, "log_decay": log_decay, "chunks": call.chunks},
        **{"q_decayed": q_decayed, "k_decayed": k_decayed, "k_carried": k_carried, "kept": kept},
        **{"K": call.keys, **call.plain_sizes},
    )
    return q_decayed, k_decayed, kept


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = RecurrenceCall(q, v, cu_seqlens)
    final, states = q.new_empty(call.state_shape, dtype=torch.float32), q.new_empty(call.states_shape)
    channels = log_decay is not None and log_decay.ndim == 4
    return v.new_empty(v.shape), final, states, q.new_empty(call.scores_shape if channels else 0)


@kernel_op("linear_attention_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    scores: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty without one) and the state before each segment."""
    q, k, v, log_decay, d_o, d_final = laid(q, k, v, log_decay, d_o, d_final)
    call = RecurrenceCall(q, v, cu_seqlens)
    sizes = {**call.sizes, "K": call.keys, "V": call.values}
    of_q, of_k, kept, of_scores = q, k, None, None
    if log_decay is not None and log_decay.ndim == 4:
        (of_q, of_k, kept), of_scores = decayed(call, q, k, log_decay), scores
    d_states, d_initial = torch.empty_like(states), q.new_empty(call.state_shape, dtype=torch.float32)
    states_backward(
        call.along,
        call.limits,
        **{"q": of_q, "d_o": d_o, "log_decay": log_decay, "kept": kept, "cu": call.cu, "first": call.first},
        **{"d_final": d_final, "d_states": d_states, "d_initial": d_initial, "S": call.segments, **sizes},
    )
    d_q, d_k, d_v = (call.room(x) for x in (q, k, v))
    values_backward(
        call.at_once(call.values, "BV"),
        call.limits,
        **{"q": of_q, "k": of_k, "log_decay": log_decay, "scores": of_scores, "chunks": call.chunks},
        **{"d_o": d_o, "d_states": d_states, "d_v": d_v, **sizes},
    )
    given = {"q": q, "k": k, "v": v, "log_decay": log_decay, "chunks": call.chunks, "states": states}
    given |= {"d_o": d_o, "d_states": d_states}
    if kept is not None:
        d_decay = call.room(log_decay)
        channel_gradients(call, given, sizes, {"d_q": d_q, "d_k": d_k, "d_decay": d_decay})
    else:
        d_decay = decay_gradient(call, log_decay, given, sizes, {"d_q": d_q, "d_k": d_k})
    return d_q, d_k, d_v, d_decay, d_initial


def decay_gradient(
    call: RecurrenceCall,
    log_decay: Tensor | None,
    given: dict[str, Any],
    sizes: dict[str, Any],
    out: dict[str, Tensor],
) -> Tensor:
    """Fill ``out`` by ``keys_backward``, and return the gradient of a decay per head, [B, T, H]."""
    q = given["q"]
    tiles = cdiv(call.keys, min(32, call.limits["BK"]))
    parts = q.new_zeros(0 if log_decay is None else tiles, *q.shape[:3], dtype=torch.float32)
    limits = call.narrow_limits
    if call.keys % 64:
        # A part of wider tiles would be empty.
        limits = {**limits, "BK": min(32, limits["BK"])}
    keys_backward(call.at_once(call.keys, "BK"), limits, **given, **out, d_decay=parts, B=call.batch, **sizes)
    return q.new_empty(0) if log_decay is None else parts.sum(0).to(log_decay.dtype)


def channel_gradients(
    call: RecurrenceCall, given: dict[str, Any], sizes: dict[str, Any], out: dict[str, Tensor]
) -> None:
    """Fill ``out`` with the gradients of q, k and a decay per channel."""
    q, k, v, log_decay, d_o = (given[name] for name in ("q", "k", "v", "log_decay", "d_o"))
    d_scores = q.new_empty(call.scores_shape, dtype=torch.float32)
    scores_backward(
        call.at_once(1),
        {"BV": call.limits["BV"]},
        **{"v": v, "chunks": call.chunks, "d_o": d_o, "d_scores": d_scores, "V": call.values, **call.sizes},
    )
    inner_q, inner_k = scores_gradient(call, q, k, log_decay, d_scores)
    channel_keys_backward(
        call.at_once(call.keys, "BK"), call.limits, **given, inner_q=inner_q, inner_k=inner_k, **out, **sizes
    )


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    scores: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_initial = q.new_empty(len(q), segments_of(cu_seqlens), *q.shape[2:], v.shape[-1], dtype=torch.float32)
    d_decay = q.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_decay, d_initial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    (*tensors, _), (_, _, *kept) = inputs, output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


@outside_autocast
def _backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, cu_seqlens, *kept = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    d_q, d_k, d_v, d_decay, d_initial = backward(q, k, v, log_decay, cu_seqlens, *kept, d_o, d_final)
    needs_state = ctx.needs_input_grad[5]
    return d_q, d_k, d_v, None if log_decay is None else d_decay, None, d_initial if needs_state else None


forward.register_autograd(_backward, setup_context=_setup)


def flops(
    q: tuple[int, ...],
    v: tuple[int, ...],
    cu_seqlens: tuple[int, ...] | None,
    *,
    states: int,
    of_keys: int,
    of_values: int,
    inside: int = 0,
) -> int:
    """FLOPs of the products of each token with a state, and of the products that make or read the [C, C] matrices of a
    chunk, listed by their other size: that of keys, of values, or C. Masked entries count; a product that several
    tiles repeat counts once.
    """
    batch, length, heads, keys = q
    width = width_of(length, None if cu_seqlens is None else torch.empty(cu_seqlens, device="meta"))
    of_chunks = of_keys * keys + of_values * v[-1] + inside * width
    return 2 * batch * length * heads * (states * keys * v[-1] + width * of_chunks)


@register_flop_formula(torch.ops.memlm.linear_attention)
def _forward_flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], log_decay: Any, cu_seqlens: Any, *_: Any, **__: Any
) -> int:
    return flops(q, v, cu_seqlens, states=2, of_keys=1, of_values=1)


@register_flop_formula(torch.ops.memlm.linear_attention_backward)
def _backward_flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], log_decay: Any, cu_seqlens: Any, *_: Any, **__: Any
) -> int:
    return flops(q, v, cu_seqlens, states=4, of_keys=3 if log_decay is None else 4, of_values=2)


def linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    # One type for all factors of products; sums are fp32 in any case.
    tokens = in_one_type(q, k, v)
    if is_step(*tokens, log_decay, state):
        o, final, _ = step(*tokens, None, log_decay, cu_seqlens, state, False)
    else:
        o, final, *_ = forward(*tokens, log_decay, cu_seqlens, state)
    return o.to(v.dtype), final
