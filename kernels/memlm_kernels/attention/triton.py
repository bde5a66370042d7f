"""Softmax attention by Triton kernels, as an op of torch: it compiles whole, and its floating-point work is counted.

One op serves all ops of attention; ``chunks`` calls it with chosen chunks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.attention.cut import AttentionCall
from memlm_kernels.attention.gathering import (
    add_key_gradients,
    add_query_gradients,
    read_chunks,
    readers_of,
    sort,
    unite,
)
from memlm_kernels.attention.kernels import (
    attend_forward,
    attended_keys_backward,
    merge_splits,
    queries_backward,
)
from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import in_one_type
from memlm_kernels.launch import arguments_of, cdiv, laid
from memlm_kernels.ops import kernel_op

_LOG2E = 1.4426950408889634
# The inputs that have gradients.
_LEARN = ("q", "k", "v", "other_q", "prefix_k", "prefix_v", "far_k")


@kernel_op("attention")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    other_q: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    document: Tensor | None,
    chosen: Tensor | None,
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V], lse [B, T, H]; and choices in order and their tokens, [B, G, T J], of which backward makes the
    readers of chunks: arbitrary where no tile of queries can gather.

    first, end: [B, T] int32, the span of the LK keys k that each token sees, at most ``most`` of them. Without
        gradients end may be None: a token sees the last ``most`` keys, but of those before it at most ``first``, its
        position (None: all)
    v: [B, L, G, V]; k are the last LK of L keys, far_k (None: k) all, of which index (int32) chooses
    other_q: queries for the prefix, or for far_k; None: q
    document: the document of each key of the prefix, and chosen, [B, T, D], those that a token sees
    """
    q, k, v, other_q, far_k, index, starts = laid(q, k, v, other_q, far_k, index, starts)
    prefix_k, prefix_v, document, chosen, first, end = laid(prefix_k, prefix_v, document, chosen, first, end)
    call = AttentionCall(q, k, v, prefix_k, far_k, index, chunk_size)
    splits = call.splits(min(most, k.shape[1]))
    union = unite(call, index, starts)
    o, lse = q.new_empty(*q.shape[:3], call.values), q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = [x if splits == 1 else x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (o, lse)]
    attend_forward(
        lambda _: splits * call.batch * call.tiles * call.groups,
        call.limits,
        **{"q": q, "k": k, "v": v, "first": first, "end": end, "other_q": other_q, "index": index, "starts": starts},
        **{"prefix_k": prefix_k, "prefix_v": prefix_v, "far_k": _or(far_k, k), "o": parts[0], "lse": parts[1]},
        **{"scale": scale * _LOG2E, "window": window, "most": most, "SPLITS": splits, "B": call.batch},
        **{"BM": call.rows},
        **_shared(call, prefix_k, starts),
        **_documents(document, chosen),
        **union.given,
        **call.sizes,
        **call.of_choice,
    )
    if splits > 1:
        merge_splits(
            lambda tiles: cdiv(lse.numel(), tiles["BM"]),
            {},
            **{"parts": parts[0], "lse_parts": parts[1], "o": o, "lse": lse, "ROWS": lse.numel(), "SPLITS": splits},
            **{"H": call.heads, "V": call.values, "BV": call.sizes["BV"]},
        )
    if union.gathered is None or index is None or starts is None:
        return o, lse, *_no_order(q, index)
    keys, token = sort(call, index, union.gathered, starts)
    readers = readers_of(call, keys, token, True, starts)
    of_chunks = {"q": _or(other_q, q), "k": _or(far_k, k), "v": v, "scale": scale * _LOG2E}
    read_chunks(call, of_chunks, union.gathered, readers, starts, window, o, lse)
    return o, lse, keys, token


def _no_order(q: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for choices in order."""
    if index is None:
        shape: tuple[int, ...] = (0,)
    else:
        batch, length, groups, chosen = index.shape
        shape = (batch, groups, length * chosen)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _shared(call: AttentionCall, prefix_k: Tensor | None, starts: Tensor | None) -> dict[str, int]:
    one = prefix_k is not None and len(prefix_k) == 1
    return {"shared": 0 if one else 1, "P": call.prefix, "N": 0 if starts is None else starts.shape[1]}


def _documents(document: Tensor | None = None, chosen: Tensor | None = None) -> dict[str, Any]:
    return {"document": document, "chosen": chosen, "D": 0 if chosen is None else chosen.shape[2]}


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    other_q: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    document: Tensor | None,
    chosen: Tensor | None,
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, *_no_order(q, index)


def _seven(gradients: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e, f, g = gradients
    return a, b, c, d, e, f, g


@kernel_op("attention_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    other_q: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    document: Tensor | None,
    chosen: Tensor | None,
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    o: Tensor,
    lse: Tensor,
    keys: Tensor,
    token: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``_LEARN``; empty for an input that is None."""
    q, k, v, other_q, far_k, index, starts = laid(q, k, v, other_q, far_k, index, starts)
    prefix_k, prefix_v, document, chosen = laid(prefix_k, prefix_v, document, chosen)
    first, end, d_o, d_lse = laid(first, end, d_o, d_lse)
    call = AttentionCall(q, k, v, prefix_k, far_k, index, chunk_size)
    union = unite(call, index, starts)
    # Partial results are added to gradients in fp32.
    exact = torch.float32 if union.gathered is not None else q.dtype
    d_q, d_other = torch.empty_like(q, dtype=exact), None if other_q is None else torch.empty_like(q, dtype=exact)
    delta = torch.empty_like(lse)
    bounds = first.new_empty(call.batch, call.tiles, 2)
    scales = {"scale": scale * _LOG2E, "factor": scale}
    queries_backward(
        lambda _: call.batch * call.tiles * call.groups,
        call.limits,
        **{"q": q, "k": k, "v": v, "first": first, "end": end, "other_q": other_q, "index": index, "starts": starts},
        **{"prefix_k": prefix_k, "prefix_v": prefix_v, "far_k": _or(far_k, k), "o": o, "lse": lse, "d_o": d_o},
        **{"d_lse": d_lse, "d_q": d_q, "d_other_q": d_other, "delta": delta, "bounds": bounds, **scales},
        **{"window": window, "BM": call.rows},
        **_shared(call, prefix_k, starts),
        **_documents(document, chosen),
        **union.given,
        **call.sizes,
        **call.of_choice,
    )
    queries = {"q": q, "lse": lse, "delta": delta, "d_o": d_o, **scales}
    spans = {"first": first, "end": end, "bounds": bounds, **_documents()}
    d_k, d_v = _keys_gradients(call, {**queries, **spans}, k, v)
    others = queries if other_q is None else {**queries, "q": other_q}
    d_prefix_k = d_prefix_v = d_far_k = None
    if prefix_k is not None and prefix_v is not None:
        of_prefix = {"first": None, "end": None, "bounds": None, **_documents(document, chosen)}
        d_prefix_k, d_prefix_v = _keys_gradients(call, {**others, **of_prefix}, prefix_k, prefix_v)
    if index is not None and starts is not None:
        d_v = torch.nn.functional.pad(d_v, (0, 0, 0, 0, v.shape[1] - k.shape[1], 0))
        if far_k is not None:
            d_far_k = far_k.new_zeros(far_k.shape, dtype=torch.float32)
        of_chunks = {**others, "k": _or(far_k, k), "v": v}
        if union.gathered is None:
            keys, token = sort(call, index, None, starts)
        readers = readers_of(call, keys, token, union.gathered is not None, starts)
        if union.gathered is not None:
            add_query_gradients(call, of_chunks, union.gathered, readers, starts, window, _or(d_other, d_q))
        add_key_gradients(call, of_chunks, readers, starts, window, _or(d_far_k, d_k), d_v)
    gradients = (d_q, d_k, d_v, d_other, d_prefix_k, d_prefix_v, d_far_k)
    return _seven(q.new_empty(0) if x is None else x.to(q.dtype) for x in gradients)


def _keys_gradients(call: AttentionCall, queries: dict[str, Any], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys that queries see in spans, or as a whole, in fp32."""
    limits = call.limit(k.shape[1])
    parts = call.parts(k.shape[1], limits)
    shape = (parts, call.batch, k.shape[1], call.groups)
    d_k, d_v = (k.new_empty(*shape, size, dtype=torch.float32) for size in (call.keys, call.values))
    # The documents of keys and of queries take registers too.
    narrow = {} if queries.get("document") is None else {"BN": max(limits.get("BN", 64) // 2, 16), "num_stages": 1}
    attended_keys_backward(
        lambda tiles: parts * call.batch * call.groups * cdiv(k.shape[1], tiles["BN"]),
        {**limits, "BM": call.rows, "num_stages": call.stages_of_keys, **narrow},
        **{**queries, "k": k, "v": v, "d_k": d_k, "d_v": d_v, "shared": int(len(k) == call.batch), "B": call.batch},
        **{**call.sizes, "LK": k.shape[1], "L": v.shape[1], "TILES": call.tiles, "PARTS": parts},
        BOUND=call.rows // call.padded,
    )
    return _sum_parts(d_k, len(k)), _sum_parts(d_v, len(k))


def _sum_parts(x: Tensor, rows: int) -> Tensor:
    """[PARTS, B, ...] -> [rows, ...]"""
    x = x[0] if len(x) == 1 else x.sum(0)
    return x if len(x) == rows else x.sum(0, keepdim=True)


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    other_q: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    document: Tensor | None,
    chosen: Tensor | None,
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    o: Tensor,
    lse: Tensor,
    keys: Tensor,
    token: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _seven(q.new_empty(0 if x is None else x.shape) for x in (q, k, v, other_q, prefix_k, prefix_v, far_k))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, chunk_size, window, most, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = chunk_size, window, most, scale


@outside_autocast
def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *inputs, o, lse, keys, token = ctx.saved_tensors
    d_o = torch.zeros_like(o) if d_o is None else d_o
    found = dict(zip(_LEARN, backward(*inputs, o, lse, keys, token, d_o, d_lse, *ctx.settings), strict=True))
    given = arguments_of(torch.ops.memlm.attention, (*inputs, *ctx.settings))
    return tuple(None if x is None else found.get(name) for name, x in given.items())


forward.register_autograd(_backward, setup_context=_setup)


def _flops(given: dict[str, Any], products: int) -> int:
    """FLOPs of ``products`` products: one with keys and one with values, or the five of a backward."""
    q, k, v, prefix, index = (given[name] for name in ("q", "k", "v", "prefix_k", "index"))
    keys = min(given["most"], k[1]) + (prefix[1] if prefix else 0) + (index[3] * given["chunk_size"] if index else 0)
    return 2 * q[0] * q[1] * q[2] * keys * ((products + 1) // 2 * q[3] + products // 2 * v[3])


@register_flop_formula(torch.ops.memlm.attention)
def _forward_flops(*shapes: Any, **_: Any) -> int:
    return _flops(arguments_of(torch.ops.memlm.attention, shapes), 2)


@register_flop_formula(torch.ops.memlm.attention_backward)
def _backward_flops(*shapes: Any, **_: Any) -> int:
    return _flops(arguments_of(torch.ops.memlm.attention_backward, shapes), 5)


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    most: int,
    scale: float | None,
    *,
    prefix: tuple[Tensor | None, Tensor, Tensor] | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    far: tuple[Tensor | None, Tensor] | None = None,
    choice: tuple[Tensor, Tensor, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """prefix: queries (None: q), keys, values; documents: the document of each key of the prefix, and those that each
    token chose; far: queries, keys; choice: index, starts, chunk_size, window.
    """
    other_q, prefix_k, prefix_v = prefix or (None, None, None)
    far_q, far_k = far or (None, None)
    index, starts, chunk_size, window = choice or (None, None, 1, 1)
    document, chosen = documents or (None, None)
    given = [q, k, v, other_q if far is None else far_q, prefix_k, prefix_v, far_k]
    # One type for all factors of products; sums are fp32 in any case.
    q_, k_, v_, other_q, prefix_k, prefix_v, far_k = in_one_type(*given)
    if first is not None and end is not None:
        first, end = first.to(torch.int32), end.to(torch.int32)
    if index is not None and starts is not None:
        # Numbers out of range become -1 here: in the kernels this test costs registers, which spill on sm_100.
        index = torch.where(index < starts.shape[1], index, -1).clamp(min=-1).to(torch.int32)
        starts = starts.to(torch.int32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    others = other_q, prefix_k, prefix_v, document, chosen, far_k, index, starts
    o, lse, *_ = forward(q_, k_, v_, first, end, *others, chunk_size, window, most, scale)
    return o.to(q.dtype), lse
