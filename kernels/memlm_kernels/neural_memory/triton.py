"""The loop over chunks of a linear memory by Triton kernels, as an op of torch; takes the place of ``scan.Scan``."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.launch import Tiles, at_least_16, cdiv, laid, precision
from memlm_kernels.neural_memory.chunk import Plan
from memlm_kernels.neural_memory.kernels import memory_backward, memory_forward, tokens_backward

# Chunks between memories that are kept for backward; and chunks whose memories' gradients are kept during backward.
GROUP, SPAN = 16, 64
_SHARED = ("d_q", "d_k", "d_C", "d_beta", "d_f", "d_P", "d_m")


def _sizes(q: Tensor, v: Tensor, blocks: int) -> dict[str, Any]:
    count, rows, width, keys = q.shape
    values = v.shape[-1]
    # Columns that a program carries: three matrices of them stay in registers.
    columns = 32 if keys <= 64 else 16
    tiles = {"BT": at_least_16(width), "BK": at_least_16(keys), "BV": min(columns, at_least_16(values))}
    sizes = {"N": count, "G": rows, "K": keys, "V": values, "W_C": width, "BLOCKS": blocks, "GROUP": GROUP}
    return {**sizes, **tiles, "PRECISION": precision(q)}


def _programs(sizes: dict[str, Any], groups: int = 1) -> Any:
    def programs(_: Tiles) -> int:
        return groups * sizes["G"] * cdiv(sizes["V"], sizes["BV"])

    return programs


@torch.library.custom_op("memlm::neural_memory", mutates_args=())
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
    W: Tensor,
    S: Tensor | None,
    anchor: Tensor | None,
    initial: Tensor | None,
    blocks: int,
    keep: bool,
) -> list[Tensor]:
    """out [N, G, C, V], squares of the errors' norms [N, G, C], W, anchor, then S if there is one; then the errors,
    and with ``keep`` what backward starts from: W, anchor and S before every ``GROUP``-th chunk.
    """
    q, k, v, C, beta, f, P, m = laid(q, k, v, C, beta, f, P, m)
    opens_document, opens_chunk, W, S, anchor, initial = laid(opens_document, opens_chunk, W, S, anchor, initial)
    sizes = _sizes(q, v, blocks)
    out, squares, last, errors, kept = _room(q, v, W, S, keep, sizes)
    memory_forward(
        _programs(sizes),
        {},
        **{"q": q, "k": k, "v": v, "C": C, "beta": beta, "f": f, "P": P, "m": m},
        **{"opens_document": opens_document, "opens_chunk": opens_chunk, "W": W, "S": S, "anchor": anchor},
        **{"initial": initial, "out": out, "errors": errors, "squares": squares},
        **dict(zip(("last_W", "last_anchor", "last_S"), last, strict=True)),
        **dict(zip(("kept_W", "kept_anchor", "kept_S"), kept, strict=True)),
        **sizes,
    )
    present = [x for x in (*last, errors, *kept) if x is not None]
    return [out, squares.sum(0), *present]


def _room(q: Tensor, v: Tensor, W: Tensor, S: Tensor | None, keep: bool, sizes: dict[str, Any]) -> tuple[Any, ...]:
    tiles = cdiv(sizes["V"], sizes["BV"])
    squares = q.new_empty(tiles, *q.shape[:3], dtype=torch.float32)
    last = [torch.empty_like(W), torch.empty_like(W), None if S is None else torch.empty_like(W)]
    kept: list[Tensor | None] = [None] * 3
    if keep:
        shape = (cdiv(sizes["N"], GROUP), *W.shape)
        kept = [W.new_empty(shape), W.new_empty(shape), None if S is None else W.new_empty(shape)]
    return torch.empty_like(v), squares, last, torch.empty_like(v), kept


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


@torch.library.custom_op("memlm::neural_memory_backward", mutates_args=())
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
    initial: Tensor | None,
    errors: Tensor,
    kept: list[Tensor],
    d_out: Tensor,
    d_last: list[Tensor],
    blocks: int,
) -> list[Tensor]:
    """Gradients of q, k, v, C, beta, W; with momentum of f, P, m, S; with documents of anchor, initial."""
    q, k, C, beta, f, P, m = laid(q, k, C, beta, f, P, m)
    opens_document, opens_chunk, initial, d_out = laid(opens_document, opens_chunk, initial, d_out)
    sizes = _sizes(q, errors, blocks)
    # More columns would not fit into registers, next to what they learned from.
    of_tokens = sizes | {"BV": 16}
    tiles = cdiv(sizes["V"], of_tokens["BV"])
    # Each tile of values has its own share in the gradients of what they have in common.
    shared = [q, k, C, beta, *((f, P, m) if f is not None else ())]
    d_shared = [x.new_empty(tiles, *x.shape, dtype=torch.float32) for x in shared]
    d_c = beta.new_empty(tiles, *beta.shape)
    d_errors, state = torch.empty_like(errors), kept[0][0]
    names = ["W", "anchor", *(["S"] if f is not None else []), *(["initial"] if initial is not None else [])]
    carried = dict(zip(names, [x.contiguous() for x in d_last], strict=False))
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
    given |= {"opens_document": opens_document, "opens_chunk": opens_chunk}
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
            **span,
            **without_group,
        )
        groups = cdiv(span["end"] - begin, GROUP)
        tokens_backward(
            _programs(of_tokens, groups),
            {},
            **given,
            **{"errors": errors, "initial": initial, "d_c": d_c},
            **dict.fromkeys(_SHARED) | dict(zip(_SHARED, d_shared, strict=False)),
            **{"kept_W": kept[0], "kept_anchor": kept[1], "kept_S": kept[2] if f is not None else None},
            **span,
            **of_tokens,
        )
        carried = before
    d_q, d_k, d_C, d_beta, *d_momentum = (d.sum(0).to(x.dtype) for d, x in zip(d_shared, shared, strict=True))
    # The last row of C writes to the memory too.
    d_C[:, :, -1] += d_c.sum(0)
    present = [
        carried[name]
        for name in ("S", "anchor", "initial")
        if name in names and (name != "anchor" or initial is not None)
    ]
    return [d_q, d_k, -d_errors, d_C, d_beta, carried["W"], *d_momentum, *present]


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
    initial: Tensor | None,
    errors: Tensor,
    kept: list[Tensor],
    d_out: Tensor,
    d_last: list[Tensor],
    blocks: int,
) -> list[Tensor]:
    like = [q, k, errors, C, beta, kept[0][0], *(x for x in (f, P, m) if x is not None)]
    like += [kept[0][0]] * ((f is not None) + 2 * (initial is not None))
    return [x.new_empty(x.shape) for x in like]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, _, *gates, W, S, _anchor, initial, ctx.blocks, _keep = inputs
    ctx.set_materialize_grads(False)
    ctx.last = 2 if S is None else 3
    ctx.state = W.shape
    ctx.save_for_backward(q, k, *gates, initial, *output[2 + ctx.last :])


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, C, beta, f, P, m, opens_document, opens_chunk, initial, errors, *kept = ctx.saved_tensors
    d_out, _, *d_last = gradients[: 2 + ctx.last]
    d_out = torch.zeros_like(errors) if d_out is None else d_out
    d_last = [kept[0].new_zeros(ctx.state) if x is None else x for x in d_last]
    rest = (opens_document, opens_chunk, initial, errors, kept, d_out, d_last, ctx.blocks)
    d_q, d_k, d_v, d_C, d_beta, d_W, *more = backward(q, k, C, beta, f, P, m, *rest)
    d_f, d_P, d_m = more[:3] if f is not None else [None] * 3
    d_S = more[3] if f is not None else None
    d_anchor, d_initial = more[-2:] if initial is not None else (None, None)
    return d_q, d_k, d_v, d_C, d_beta, d_f, d_P, d_m, None, None, d_W, d_S, d_anchor, d_initial, None, None


forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.memlm.neural_memory)
def _forward_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """The products of ``kernels``, with momentum."""
    count, rows, width, keys = q
    return 2 * count * rows * width * (5 * keys * v[-1] + width * (keys + v[-1]))


@register_flop_formula(torch.ops.memlm.neural_memory_backward)
def _backward_flops(q: tuple[int, ...], *arguments: Any, **__: Any) -> int:
    count, rows, width, keys = q
    values = arguments[9][-1]
    return 2 * count * rows * width * (13 * keys * values + width * (3 * keys + 2 * values))


def scan_triton(plan: Plan, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """As ``scan.Scan.apply`` for a plan of one layer; without anchor and initial the anchor is W."""
    C, beta, f, P, m, _, _, opens_document, opens_chunk, W, *weights = rest
    S = weights.pop(0) if f is not None else None
    anchor, initial = weights or (None, None)
    flags = [None if x is None else x.flatten(1).to(torch.int32) for x in (opens_document, opens_chunk)]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    tokens = [x.to(dtype) for x in (q, k, v)]
    tensors = (*tokens, C, beta, f, P, m, *flags, W, S, anchor, initial)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out, squares, last_W, last_anchor, *more = forward(*tensors, plan.blocks, keep)
    surprise = torch.linalg.vector_norm(k.detach().float(), dim=-1) * squares.detach().sqrt()
    return out, surprise, last_W, *(more[:1] if S is not None else ()), last_anchor
