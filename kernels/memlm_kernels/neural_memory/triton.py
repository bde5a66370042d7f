"""The loop over chunks of a linear memory by Triton kernels, as an op of torch. It replaces ``scan.scan`` and the loop
in ``segmented``.
"""

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import asks_gradient, in_one_type
from memlm_kernels.launch import Tiles, arguments_of, at_least_16, cdiv, laid, precision
from memlm_kernels.neural_memory.chunk import Plan
from memlm_kernels.neural_memory.kernels import memory_backward, memory_forward, tokens_backward
from memlm_kernels.neural_memory.rates import Rates
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import ChunkedRows

# A memory is kept for backward every so many chunks; and so many chunks' gradients of memories are kept in backward.
GROUP, SPAN = 16, 64
_STARTS = ("initial", "initial_anchor", "initial_S")
_SHARED = ("q", "k", "C", "beta", "f", "P", "m")


def _outputs(has_S: bool, keep: bool) -> list[str]:
    """The names of the tensors that ``forward`` returns."""
    state = ["W", "anchor", *(["S"] if has_S else [])]
    return ["out", "squares", *state, *(["errors", *(f"kept_{name}" for name in state)] if keep else [])]


def _gradients(f: Tensor | None, has_owners: bool, has_initial: bool) -> list[str]:
    """The inputs of ``forward`` whose gradients ``backward`` returns."""
    momentum = ["f", "P", "m", "S"] if f is not None else []
    anchor = ["anchor"] if has_owners or has_initial else []
    return ["q", "k", "v", "C", "beta", "W", *momentum, *anchor, *(["initial"] if has_initial else [])]


def _sizes(q: Tensor, v: Tensor, blocks: int) -> dict[str, Any]:
    count, rows, width, keys = q.shape
    values = v.shape[-1]
    # The columns that a program carries: three matrices of them stay in registers.
    columns = 32 if keys <= 64 else 16
    tiles = {"BT": at_least_16(width), "BK": at_least_16(keys), "BV": min(columns, at_least_16(values))}
    sizes = {"N": count, "G": rows, "K": keys, "V": values, "W_C": width, "BLOCKS": blocks, "GROUP": GROUP}
    return {**sizes, **tiles, "PRECISION": precision(q)}


def _programs(sizes: dict[str, Any], groups: int = 1) -> Any:
    def programs(_: Tiles) -> int:
        return groups * sizes["G"] * cdiv(sizes["V"], sizes["BV"])

    return programs


@kernel_op("neural_memory")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    beta: Tensor,
    f: Tensor | None,
    P: Tensor | None,
    m: Tensor | None,
    opens_document: Tensor | None,
    opens_chunk: Tensor | None,
    owner: Tensor | None,
    closes: Tensor | None,
    W: Tensor,
    S: Tensor | None,
    anchor: Tensor | None,
    initial: Tensor | None,
    blocks: int,
    keep: bool,
) -> list[Tensor]:
    """out [N, G, C, V], squares of the errors' norms [N, G, C], W, anchor, then S if there is momentum. With ``keep``
    also the errors, and W, anchor and S before every ``GROUP``-th chunk, from which backward starts.

    owner: [N, G], for each chunk the index of its segment's W, S and anchor. ``closes`` then has the ends of segments,
        ``opens_*`` the starts of segments and of their chunks, and initial is None. None: each row has one W, S and
        anchor
    """
    q, k, v, C, beta, f, P, m = laid(q, k, v, C, beta, f, P, m)
    opens_document, opens_chunk, W, S, anchor, initial = laid(opens_document, opens_chunk, W, S, anchor, initial)
    sizes = _sizes(q, v, blocks)
    out, squares, last, errors, kept = _room(q, v, W, S, keep, sizes)
    if owner is not None:
        # A segment without tokens keeps its state.
        last = [None if x is None else x.clone() for x in (W, anchor, S)]
    there: dict[str, Any] = {
        **{"q": q, "k": k, "v": v, "C": C, "beta": beta, "f": f, "P": P, "m": m},
        **{"opens_document": opens_document, "opens_chunk": opens_chunk, "owner": owner, "closes": closes},
        **{"W": W, "S": S, "anchor": anchor, "initial": initial},
        **{"out": out, "errors": errors, "squares": squares},
        **dict(zip(("last_W", "last_anchor", "last_S"), last, strict=True)),
        **dict(zip(("kept_W", "kept_anchor", "kept_S"), kept, strict=True)),
        **sizes,
    }
    memory_forward(_programs(sizes), {}, **{name: there[name] for name in memory_forward.function.arg_names})
    present = [x for x in (*last, errors, *kept) if x is not None]
    return [out, squares.sum(0), *present]


def _room(q: Tensor, v: Tensor, W: Tensor, S: Tensor | None, keep: bool, sizes: dict[str, Any]) -> tuple[Any, ...]:
    tiles = cdiv(sizes["V"], sizes["BV"])
    squares = q.new_empty(tiles, *q.shape[:3], dtype=torch.float32)
    last = [torch.empty_like(W), torch.empty_like(W), None if S is None else torch.empty_like(W)]
    errors: Tensor | None = None
    kept: list[Tensor | None] = [None] * 3
    if keep:
        errors = torch.empty_like(v)
        shape = (cdiv(sizes["N"], GROUP), q.shape[1], *W.shape[1:])
        kept = [W.new_empty(shape), W.new_empty(shape), None if S is None else W.new_empty(shape)]
    return torch.empty_like(v), squares, last, errors, kept


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    beta: Tensor,
    f: Tensor | None,
    P: Tensor | None,
    m: Tensor | None,
    opens_document: Tensor | None,
    opens_chunk: Tensor | None,
    owner: Tensor | None,
    closes: Tensor | None,
    W: Tensor,
    S: Tensor | None,
    anchor: Tensor | None,
    initial: Tensor | None,
    blocks: int,
    keep: bool,
) -> list[Tensor]:
    W = W.new_empty(W.shape)
    out, squares, last, errors, kept = _room(q, v.new_empty(v.shape), W, S, keep, _sizes(q, v, blocks))
    present = [x for x in (*last, errors, *kept) if x is not None]
    return [out, squares.sum(0), *present]


@kernel_op("neural_memory_backward")
def backward(
    q: Tensor,
    k: Tensor,
    C: Tensor,
    beta: Tensor,
    f: Tensor | None,
    P: Tensor | None,
    m: Tensor | None,
    opens_document: Tensor | None,
    opens_chunk: Tensor | None,
    owner: Tensor | None,
    closes: Tensor | None,
    initial: Tensor | None,
    owned: list[Tensor],
    errors: Tensor,
    kept: list[Tensor],
    d_out: Tensor,
    d_last: list[Tensor],
    blocks: int,
) -> list[Tensor]:
    """The gradients that ``_gradients`` names.

    owned: W, anchor and S if chunks have owners; then there is a gradient of the anchor and none of initial
    """
    q, k, C, beta, f, P, m = laid(q, k, C, beta, f, P, m)
    opens_document, opens_chunk, initial, d_out = laid(opens_document, opens_chunk, initial, d_out)
    owned = laid(*owned)
    sizes = _sizes(q, errors, blocks)
    # More columns would not fit into registers beside the tokens.
    of_tokens = sizes | {"BV": 16}
    tiles = cdiv(sizes["V"], of_tokens["BV"])
    # Each tile of values stores its own part of the gradients of tensors that all tiles read.
    shared = [q, k, C, beta, *((f, P, m) if f is not None else ())]
    d_shared = [x.new_empty(tiles, *x.shape, dtype=torch.float32) for x in shared]
    d_c = beta.new_empty(tiles, *beta.shape)
    d_errors, state = torch.empty_like(errors), kept[0][0]
    names = ["W", "anchor", *(["S"] if f is not None else []), *(["initial"] if initial is not None else [])]
    d_owned = {}
    if owned:
        d_owned = {name: x.clone(memory_format=torch.contiguous_format) for name, x in zip(names, d_last, strict=True)}
    carried = dict(zip(names, [torch.zeros_like(state) if owned else x.contiguous() for x in d_last], strict=False))
    if initial is not None:
        carried["initial"] = torch.zeros_like(state)
    count = sizes["N"]
    d_next = [state.new_empty(min(SPAN, count), *state.shape) for _ in range(1 if f is None else 2)]
    given: dict[str, Any] = {
        "q": q,
        "k": k,
        "C": C,
        "beta": beta,
        "f": f,
        "P": P,
        "m": m,
        "d_out": d_out,
        "d_errors": d_errors,
    }
    given |= {"opens_document": opens_document, "opens_chunk": opens_chunk, "owner": owner}
    given |= dict.fromkeys(("d_next_W", "d_next_S")) | dict(zip(("d_next_W", "d_next_S"), d_next, strict=False))
    for begin in reversed(range(0, count, SPAN)):
        span = {"begin": begin, "end": min(begin + SPAN, count)}
        before = {name: torch.empty_like(state) for name in names}
        without_group = {name: x for name, x in sizes.items() if name != "GROUP"}
        memory_backward(
            _programs(sizes),
            {},
            **given,
            **{f"d_last_{name}": carried.get(name) for name in ("W", "S", "anchor", "initial")},
            **{f"d_{name}": before.get(name) for name in ("W", "S", "anchor", "initial")},
            **{f"d_of_{name}": d_owned.get(name) for name in ("W", "S", "anchor")},
            **{"closes": closes},
            **span,
            **without_group,
        )
        groups = cdiv(span["end"] - begin, GROUP)
        tokens_backward(
            _programs(of_tokens, groups),
            {},
            **given,
            **{"errors": errors, "d_c": d_c},
            **dict(zip_longest(_STARTS, owned or [initial])),
            **{f"d_{name}": x for name, x in zip_longest(_SHARED, d_shared)},
            **{"kept_W": kept[0], "kept_anchor": kept[1], "kept_S": kept[2] if f is not None else None},
            **span,
            **of_tokens,
        )
        carried = before
    d = {name: d.sum(0).to(x.dtype) for name, d, x in zip(_SHARED, d_shared, shared, strict=False)}
    # The last row of C also scales the write to the memory.
    d["C"][:, :, -1] += d_c.sum(0)
    d |= {"v": -d_errors, **(d_owned or carried)}
    return [d[name] for name in _gradients(f, bool(owned), initial is not None)]


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    C: Tensor,
    beta: Tensor,
    f: Tensor | None,
    P: Tensor | None,
    m: Tensor | None,
    opens_document: Tensor | None,
    opens_chunk: Tensor | None,
    owner: Tensor | None,
    closes: Tensor | None,
    initial: Tensor | None,
    owned: list[Tensor],
    errors: Tensor,
    kept: list[Tensor],
    d_out: Tensor,
    d_last: list[Tensor],
    blocks: int,
) -> list[Tensor]:
    state = owned[0] if owned else kept[0][0]
    like = {"q": q, "k": k, "v": errors, "C": C, "beta": beta, "f": f, "P": P, "m": m}
    like |= dict.fromkeys(("W", "S", "anchor", "initial"), state)
    found = (like[name] for name in _gradients(f, bool(owned), initial is not None))
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in found if x is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given = arguments_of(torch.ops.memlm.neural_memory, inputs)
    ctx.set_materialize_grads(False)
    ctx.blocks, ctx.state = given["blocks"], given["W"].shape
    ctx.returned = _outputs(given["S"] is not None, given["keep"])
    ctx.given = tuple(given)
    saved = {name: x for name, x in given.items() if name not in ("v", "W", "S", "anchor", "blocks", "keep")}
    if given["owner"] is not None:
        saved |= {f"owned_{name}": given[name] for name in ("W", "anchor", "S") if given[name] is not None}
    results = dict(zip(ctx.returned, output, strict=True))
    saved |= {name: x for name, x in results.items() if name == "errors" or name.startswith("kept_")}
    ctx.names = tuple(saved)
    ctx.save_for_backward(*saved.values())


@outside_autocast
def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    owned, kept = ([saved.pop(name) for name in ctx.names if name.startswith(part)] for part in ("owned_", "kept_"))
    given = dict(zip(ctx.returned, gradients, strict=True))
    d_out = torch.zeros_like(saved["errors"]) if given["out"] is None else given["out"]
    last = [given[name] for name in ("W", "anchor", "S") if name in given]
    d_last = [kept[0].new_zeros(ctx.state) if x is None else x for x in last]
    found = backward(**saved, owned=owned, kept=kept, d_out=d_out, d_last=d_last, blocks=ctx.blocks)
    d = dict(zip(_gradients(saved["f"], bool(owned), saved["initial"] is not None), found, strict=True))
    return tuple(d.get(name) for name in ctx.given)


forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.memlm.neural_memory)
def _forward_flops(*shapes: Any, **_: Any) -> int:
    """The products of ``kernels``."""
    given = arguments_of(torch.ops.memlm.neural_memory, shapes)
    (count, rows, width, keys), values, of_memory = given["q"], given["v"][-1], 5 if given["f"] else 3
    return 2 * count * rows * width * (of_memory * keys * values + width * (keys + values))


@register_flop_formula(torch.ops.memlm.neural_memory_backward)
def _backward_flops(*shapes: Any, **_: Any) -> int:
    given = arguments_of(torch.ops.memlm.neural_memory_backward, shapes)
    (count, rows, width, keys), values, of_memory = given["q"], given["errors"][-1], 12 if given["f"] else 7
    return 2 * count * rows * width * (of_memory * keys * values + width * (4 * keys + 2 * values))


def scan_triton(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rates: Rates, *rest: Tensor | None) -> tuple[Any, ...]:
    """``scan.scan`` for a plan of one layer; without anchor and initial the anchor is W."""
    _, _, opens_document, opens_chunk, W, *weights = rest
    of_rates = rates.apart()
    S = weights.pop(0) if of_rates[2] is not None else None
    anchor, initial = weights or (None, None)
    flags = [None if x is None else x.flatten(1).to(torch.int32) for x in (opens_document, opens_chunk)]
    tokens = in_one_type(q, k, v)
    tensors = (*tokens, *of_rates, *flags, None, None, W, S, anchor, initial)
    keep = asks_gradient(*tensors)
    found = dict(zip(_outputs(S is not None, keep), forward(*tensors, plan.blocks, keep), strict=True))
    surprise = None
    if plan.surprise:
        surprise = torch.linalg.vector_norm(k.detach().float(), dim=-1) * found["squares"].detach().sqrt()
    return found["out"], surprise, *(found[name] for name in ("W", "S", "anchor") if name in found)


def segments_triton(
    tokens: tuple[Tensor, ...], rates: Rates, opens: Tensor, segments: ChunkedRows, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The reads [N, B, H, C, V] and the memory after each segment.

    tokens: q, k, v [N, B, H, C, ...]; opens: [B, N], where a chunk sets its segment's anchor
    memory: [B, S, 3, H, K, V], W, S and the anchor of each segment; 2 without S
    """
    assert segments.segment is not None and segments.start is not None
    assert segments.enters is not None and segments.last is not None
    batch, count_of, _, heads = memory.shape[:4]
    index = torch.arange(segments.grid.count, device=memory.device)
    # A chunk without tokens ends no segment.
    closes = (index == segments.last.gather(1, segments.segment)) & (segments.start >= 0)

    def of_rows(x: Tensor) -> Tensor:
        """[B, N] -> [N, B * H]"""
        return x.mT.repeat_interleave(heads, 1)

    segment = torch.arange(batch, device=memory.device)[:, None] * count_of + segments.segment
    owner = of_rows(segment) * heads + torch.arange(heads, device=memory.device).repeat(batch)
    *flags, ended = (of_rows(x).to(torch.int32) for x in (segments.enters, opens, closes))
    W, *S, anchor = (x.flatten(0, 2) for x in memory.unbind(2))
    q, k, v = (x.flatten(1, 2) for x in tokens)
    tensors = (q, k, v, *rates.apart(), *flags, owner, ended, W, S[0] if S else None, anchor, None)
    keep = asks_gradient(*tensors)
    found = dict(zip(_outputs(bool(S), keep), forward(*tensors, 1, keep), strict=True))
    last = [found[name] for name in ("W", "S", "anchor") if name in found]
    after = [x.unflatten(0, (batch, count_of, heads)) for x in last]
    return found["out"].unflatten(1, (batch, heads)), torch.stack(after, 2)
