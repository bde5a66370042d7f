"""Softmax attention by Triton kernels, as an op of torch: it compiles whole, and its floating-point work is counted.

One op serves all ops of attention; ``chunks`` calls it with chosen chunks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.attention.choice_triton import invert
from memlm_kernels.attention.chunk_kernels import add_parts, chunks_backward, unite_chunks
from memlm_kernels.attention.kernels import (
    attend_forward,
    attended_keys_backward,
    merge_splits,
    queries_backward,
)
from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import in_one_type
from memlm_kernels.launch import Tiles, arguments_of, at_least_16, cdiv, laid, precision
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import power_of_two

# The number of programs that keeps a GPU busy; the number of a chunk's readers that one program sums.
ENOUGH, PER = 256, 1024
_LOG2E = 1.4426950408889634
# The inputs that have gradients.
_LEARN = ("q", "k", "v", "other_q", "prefix_k", "prefix_v", "far_k")


class AttentionCall:
    """Sizes of a call, and how it is cut; see ``kernels``."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        far_k: Tensor | None,
        index: Tensor | None,
        chunk: int,
    ):
        self.batch, self.length, self.heads, self.keys = q.shape
        self.groups, self.values = k.shape[2], v.shape[-1]
        self.padded = power_of_two(self.heads // self.groups)
        wide = max(at_least_16(self.keys), at_least_16(self.values)) * q.element_size()
        # As large as registers can hold; fp32 takes twice as many.
        most = 64 if wide <= 256 and q.element_size() == 2 else 32
        self.rows = min(most, max(self.padded, at_least_16(self.length * self.padded)))
        self.tiles = cdiv(self.length, self.rows // self.padded)
        crowded = wide > 512 or (wide > 256 and q.element_size() == 4 and self.rows > 16)
        self.most_keys = 16 if crowded else most
        self.most_stages = 2 if wide <= 256 else 1
        self.stages_of_keys = self.most_stages if q.element_size() == 2 else 1
        self.prefix = 0 if prefix_k is None else prefix_k.shape[1]
        self.chosen = 0 if index is None else index.shape[3]
        self.chunk = chunk
        self.limits = self.limit(k.shape[1])
        sizes: dict[str, Any] = {
            "T": self.length,
            "LK": k.shape[1],
            "L": v.shape[1],
            "H": self.heads,
            "G": self.groups,
        }
        sizes |= {"K": self.keys, "V": self.values, "PRECISION": precision(q), "RP": self.padded}
        self.sizes = sizes | {"BK": at_least_16(self.keys), "BV": at_least_16(self.values)}
        # Beside a second set of keys, and in few rows, registers hold fewer chosen keys.
        most_chosen = 32 if far_k is not None or self.rows < 64 else 64
        self.of_choice = {"J": self.chosen, "C": chunk, "BC": min(most_chosen, self.limit(chunk)["BN"])}

    def limit(self, keys: int) -> Tiles:
        return {"BN": min(self.most_keys, at_least_16(keys)), "num_stages": self.most_stages}

    def splits(self, most: int) -> int:
        """The number of splits of the keys (at most ``most``) of a program, a power of two: more than 1 where there
        are too few programs.
        """
        if self.tiles > 1:
            return 1
        programs, tile = self.batch * self.groups, self.limits["BN"]
        items = cdiv(most, tile) + cdiv(self.prefix, tile) + self.chosen * cdiv(self.chunk, self.of_choice["BC"])
        return 1 << max(0, min(ENOUGH // programs, items, 32).bit_length() - 1)

    def parts(self, keys: int, tiles: Tiles) -> int:
        """The number of parts of the queries, a power of two: more than 1 where there are few keys."""
        programs = max(1, self.batch * self.groups * cdiv(keys, tiles["BN"]))
        return 1 << max(0, min(ENOUGH // programs, cdiv(self.tiles, 8)).bit_length() - 1)


def _united(call: AttentionCall, index: Tensor | None, chunks: int) -> dict[str, Any]:
    """The union of the chunks that the queries of each tile chose."""
    if index is None:
        return {"united": None, "count": None, "U": 0, "BJ": 1}
    taken = {"U": call.chosen, "BJ": power_of_two(call.chosen)}
    tokens = min(call.rows // call.padded, call.length)
    if tokens == 1:
        return taken | {"united": index, "count": None}
    tokens = call.rows // call.padded
    room = tokens * call.chosen
    united = index.new_empty(call.batch, call.tiles, call.groups, room)
    count = index.new_empty(united.shape[:3])
    unite_chunks(
        lambda _: count.numel(),
        {},
        **{"index": index, "united": united, "count": count, "T": call.length, "N": chunks, "U": room},
        **{"G": call.groups, "J": call.chosen, "BT": tokens, "W": power_of_two(room)},
    )
    return taken | {"united": united, "count": count, "U": room}


@kernel_op("attention")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    other_q: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and lse [B, T, H].

    first, end: [B, T] int32, the span of the LK keys k that each token sees, at most ``most`` of them
    v: [B, L, G, V]; k are the last LK of L keys, far_k (None: k) all, of which index (int32) chooses
    other_q: queries for the prefix, or for far_k; None: q
    """
    q, k, v, other_q, far_k, index, starts = laid(q, k, v, other_q, far_k, index, starts)
    prefix_k, prefix_v, first, end = laid(prefix_k, prefix_v, first, end)
    call = AttentionCall(q, k, v, prefix_k, far_k, index, chunk_size)
    splits = call.splits(min(most, k.shape[1]))
    o, lse = q.new_empty(*q.shape[:3], call.values), q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = [x if splits == 1 else x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (o, lse)]
    attend_forward(
        lambda _: splits * call.batch * call.tiles * call.groups,
        call.limits,
        **{"q": q, "k": k, "v": v, "first": first, "end": end, "other_q": other_q, "index": index, "starts": starts},
        **{"prefix_k": prefix_k, "prefix_v": prefix_v, "far_k": _or(far_k, k), "o": parts[0], "lse": parts[1]},
        **{"scale": scale * _LOG2E, "window": window, "SPLITS": splits, "B": call.batch, "BM": call.rows},
        **_shared(call, prefix_k, starts),
        **_united(call, index, 0 if starts is None else starts.shape[1]),
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
    return o, lse


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _shared(call: AttentionCall, prefix_k: Tensor | None, starts: Tensor | None) -> dict[str, int]:
    one = prefix_k is not None and len(prefix_k) == 1
    return {"shared": 0 if one else 1, "P": call.prefix, "N": 0 if starts is None else starts.shape[1]}


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    other_q: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


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
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``_LEARN``; empty for an input that is None."""
    q, k, v, other_q, far_k, index, starts = laid(q, k, v, other_q, far_k, index, starts)
    prefix_k, prefix_v, first, end, d_o, d_lse = laid(prefix_k, prefix_v, first, end, d_o, d_lse)
    call = AttentionCall(q, k, v, prefix_k, far_k, index, chunk_size)
    d_q, d_other = torch.empty_like(q), None if other_q is None else torch.empty_like(q)
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
        **_united(call, index, 0 if starts is None else starts.shape[1]),
        **call.sizes,
        **call.of_choice,
    )
    queries = {"q": q, "lse": lse, "delta": delta, "d_o": d_o, **scales}
    d_k, d_v = _keys_gradients(call, {**queries, "first": first, "end": end, "bounds": bounds}, k, v)
    others = queries if other_q is None else {**queries, "q": other_q}
    d_prefix_k = d_prefix_v = d_far_k = None
    if prefix_k is not None and prefix_v is not None:
        everyone = {**others, "first": None, "end": None, "bounds": None}
        d_prefix_k, d_prefix_v = _keys_gradients(call, everyone, prefix_k, prefix_v)
    if index is not None and starts is not None:
        d_v = torch.nn.functional.pad(d_v, (0, 0, 0, 0, v.shape[1] - k.shape[1], 0))
        if far_k is not None:
            d_far_k = far_k.new_zeros(far_k.shape, dtype=torch.float32)
        chosen = {**others, "k": _or(far_k, k), "v": v, "window": window}
        _add_chunks(call, chosen, index, starts, d_k if d_far_k is None else d_far_k, d_v)
    gradients = (d_q, d_k, d_v, d_other, d_prefix_k, d_prefix_v, d_far_k)
    return _seven(q.new_empty(0) if x is None else x.to(q.dtype) for x in gradients)


def _keys_gradients(call: AttentionCall, queries: dict[str, Any], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys that queries see in spans, or as a whole, in fp32."""
    limits = call.limit(k.shape[1])
    parts = call.parts(k.shape[1], limits)
    shape = (parts, call.batch, k.shape[1], call.groups)
    d_k, d_v = (k.new_empty(*shape, size, dtype=torch.float32) for size in (call.keys, call.values))
    attended_keys_backward(
        lambda tiles: parts * call.batch * call.groups * cdiv(k.shape[1], tiles["BN"]),
        {**limits, "BM": call.rows, "num_stages": call.stages_of_keys},
        **{**queries, "k": k, "v": v, "d_k": d_k, "d_v": d_v, "shared": int(len(k) == call.batch), "B": call.batch},
        **{**call.sizes, "LK": k.shape[1], "L": v.shape[1], "TILES": call.tiles, "PARTS": parts},
        BOUND=call.rows // call.padded,
    )
    return _sum_parts(d_k, len(k)), _sum_parts(d_v, len(k))


def _sum_parts(x: Tensor, rows: int) -> Tensor:
    """[PARTS, B, ...] -> [rows, ...]"""
    x = x[0] if len(x) == 1 else x.sum(0)
    return x if len(x) == rows else x.sum(0, keepdim=True)


def _add_chunks(
    call: AttentionCall, given: dict[str, Any], index: Tensor, starts: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """Add the gradients of chosen keys to d_k and d_v."""
    chunks = starts.shape[1]
    token, offsets = invert(index, chunks)
    sizes = (offsets.diff(dim=-1) + PER - 1) // PER
    first = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0))
    count = (token.shape[2] + min(chunks, token.shape[2]) * (PER - 1)) // PER
    part = torch.arange(count, device=index.device).expand(*first.shape[:2], -1).contiguous()
    owner = torch.searchsorted(first[..., 1:].contiguous(), part, right=True).clamp(max=chunks - 1)
    room = (call.batch, call.groups, count, call.chunk)
    parts_k, parts_v = (d_k.new_empty(*room, size) for size in (call.keys, call.values))
    tiles = cdiv(call.chunk, call.of_choice["BC"])
    sizes_of_call = {name: x for name, x in call.sizes.items() if name != "LK"}
    chunks_backward(
        lambda _: call.batch * call.groups * count * tiles,
        {"BM": call.rows, "num_stages": call.stages_of_keys},
        **{**given, "starts": starts, "readers": token, "offsets": offsets, "owner": owner, "first": first},
        **{"d_k": parts_k, "d_v": parts_v, "N": chunks, "PARTS": count, "PER": PER},
        **sizes_of_call,
        **call.of_choice,
    )
    for x, parts, size in ((d_k, parts_k, "BK"), (d_v, parts_v, "BV")):
        add_parts(
            lambda _: call.batch * call.groups * chunks * tiles,
            {},
            **{"parts": parts, "starts": starts, "first": first, "d_x": x, "L": x.shape[1], "N": chunks},
            **{"PARTS": count, "G": call.groups, "K": x.shape[3], "C": call.chunk, "BC": call.of_choice["BC"]},
            BK=call.sizes[size],
        )


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
    far_k: Tensor | None,
    index: Tensor | None,
    starts: Tensor | None,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    chunk_size: int,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _seven(q.new_empty(0 if x is None else x.shape) for x in (q, k, v, other_q, prefix_k, prefix_v, far_k))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, chunk_size, window, most, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = chunk_size, window, most, scale


@outside_autocast
def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, o, lse = ctx.saved_tensors
    d_o = torch.zeros_like(o) if d_o is None else d_o
    found = dict(zip(_LEARN, backward(*inputs, o, lse, d_o, d_lse, *ctx.settings), strict=True))
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
    first: Tensor,
    end: Tensor,
    most: int,
    scale: float | None,
    *,
    prefix: tuple[Tensor | None, Tensor, Tensor] | None = None,
    far: tuple[Tensor | None, Tensor] | None = None,
    choice: tuple[Tensor, Tensor, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """prefix: queries (None: q), keys, values; far: queries, keys; choice: index, starts, chunk_size, window."""
    other_q, prefix_k, prefix_v = prefix or (None, None, None)
    far_q, far_k = far or (None, None)
    index, starts, chunk_size, window = choice or (None, None, 1, 1)
    given = [q, k, v, other_q if far is None else far_q, prefix_k, prefix_v, far_k]
    # One type for all factors of products; sums are fp32 in any case.
    q_, k_, v_, *others = in_one_type(*given)
    seen = [x.to(torch.int32) for x in (first, end)]
    if index is not None and starts is not None:
        # Numbers out of range become -1 here: in the kernels this test costs registers, which spill on sm_100.
        index = torch.where(index < starts.shape[1], index, -1).clamp(min=-1).to(torch.int32)
        starts = starts.to(torch.int32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, lse = forward(q_, k_, v_, *seen, *others, index, starts, chunk_size, window, most, scale)
    return o.to(q.dtype), lse
