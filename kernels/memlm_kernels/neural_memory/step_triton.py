"""One token of each row in Triton, without gradients: all of it is one launch.

B rows, H heads.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.launch import arguments_of, at_least_16, cdiv, laid
from memlm_kernels.neural_memory.network import EPS
from memlm_kernels.neural_memory.reference import NeuralMemoryState, Tokens
from memlm_kernels.neural_memory.step_kernels import deep_step, memory_step
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import exact

Tensors = list[Tensor]
_PARTS = ("W", "S", "A", "initial", "last_W", "last_S", "last_A")


@kernel_op("neural_memory_step")
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    position: Tensor | None,
    real: Tensor | None,
    W: Tensors,
    S: Tensors,
    A: Tensors,
    initial: Tensors,
    tail: Tensors,
    chunk_size: int,
    silu: bool,
    surprise: bool,
) -> Tensors:
    """q, k: [B, 1, H, K]; v: [B, 1, H, V]; lr, momentum, decay: [B, 1, H]; W, S, A: [B, H, in, out] of each layer;
    initial: [H, in, out]; tail: gain and bias [H, V]; S and tail may be empty.

    position: [B] int64, the tokens before this one in its document; at 0 the memory is ``initial``. None: each token
        continues a document, and opens a chunk if A is empty
    real: [B] int64, 0 for a row whose token is padding; None: all are real

    Returns the reads [B, 1, H, V], W, S and A after the token, and with ``surprise`` the squares [B, 1, H, parts] of
    its gradient's norm.
    """
    found = _results(q, v, W, S, surprise)
    layers = ("_1", "_2") if len(W) > 1 else ("",)
    names = [f"{part}{layer}" for part in _PARTS for layer in layers]
    none, after_W, after_S = [None] * len(W), 1 + len(W), 1 + len(W) + len(S)
    last = [*found[1:after_W], *(found[after_W:after_S] or none), *found[after_S:]]
    there = dict(zip(names, laid(*W, *(S or none), *(A or none), *(initial or none), *last), strict=False))
    there["position"], there["real"] = laid(position, real)
    if len(W) > 1:
        there["gain"], there["bias"] = laid(*tail) or (None, None)
    there["out"], there["squares"] = found[0], found[-1] if surprise else None
    hidden = W[1].shape[-2] if len(W) > 1 else 0
    _launch((q, k, v), (lr, momentum, decay), there, q.shape[2], chunk_size, hidden, silu)
    return found


@step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    position: Tensor | None,
    real: Tensor | None,
    W: Tensors,
    S: Tensors,
    A: Tensors,
    initial: Tensors,
    tail: Tensors,
    chunk_size: int,
    silu: bool,
    surprise: bool,
) -> Tensors:
    return _results(q, v, W, S, surprise)


def _results(q: Tensor, v: Tensor, W: Tensors, S: Tensors, surprise: bool) -> Tensors:
    found = [x.new_empty(x.shape) for x in (v, *W, *S, *W)]
    if surprise:
        tiles = 1 if len(W) > 1 else cdiv(v.shape[-1], _columns(q.shape[-1], v.shape[-1]))
        found.append(W[0].new_empty(*q.shape[:3], tiles))
    return found


def _columns(keys: int, values: int) -> int:
    """The columns of a linear memory that a program has."""
    return min(32 if keys <= 64 else 16, at_least_16(values))


@kernel_op("segmented_memory_step")
def of_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    position: Tensor,
    memory: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """memory: [B, parts, H, K, V], M, the momentum if there is one, and the anchor; position: [B, 1]. Returns the
    reads and the memory after the token.
    """
    memory, position = laid(memory, position)
    out, after = v.new_empty(v.shape), torch.empty_like(memory)
    names = ("W", "A") if momentum is None else ("W", "S", "A")
    there: dict[str, Any] = dict.fromkeys((*_PARTS, "squares", "real"))
    there |= dict(zip(names, memory.unbind(1), strict=True))
    there |= {f"last_{name}": x for name, x in zip(names, after.unbind(1), strict=True)}
    there |= {"out": out, "position": position}
    _launch((q, k, v), (lr, momentum, decay), there, memory.shape[1] * memory.shape[2], chunk_size)
    return out, after


@of_segments.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    position: Tensor,
    memory: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), memory.new_empty(memory.shape)


def _launch(
    tokens: tuple[Tensor, ...],
    gates: tuple[Tensor | None, ...],
    there: dict[str, Any],
    of_memory: int,
    chunk_size: int,
    hidden: int = 0,
    silu: bool = False,
) -> None:
    ((q, k), of_keys), ((v,), of_values) = _rows(*tokens[:2]), _rows(tokens[2])
    (lr, momentum, decay), of_gates = _rows(*gates)
    batch, _, heads, keys = q.shape
    values, count = v.shape[-1], batch * heads
    sizes = {"H": heads, "of_keys": of_keys, "of_values": of_values, "of_gates": of_gates, "of_memory": of_memory}
    sizes |= {"chunk_size": chunk_size, "K": keys, "V": values, "BK": at_least_16(keys)}
    if hidden:
        # A tile of either layer takes 16 registers of a thread.
        tiles = {"BX": min(at_least_16(hidden), 32), "BV": at_least_16(values)}
        kernel, sizes = deep_step, {**sizes, **tiles, "X": hidden, "SILU": silu, "EPS": EPS}
    else:
        kernel, columns = memory_step, _columns(keys, values)
        sizes["BV"], count = columns, count * cdiv(values, columns)
    tensors = {"q": q, "k": k, "v": v, "lr": lr, "momentum": momentum, "decay": decay}
    kernel(lambda _: count, {}, **tensors, **there, **sizes)


def _rows(*tensors: Tensor | None) -> tuple[list[Any], int]:
    """The tensors, [B, 1, ...], with contiguous rows, and the elements from a row of each to the next. Parts of one
    tensor are taken as they are.
    """
    given = [x for x in tensors if x is not None]
    step = given[0].stride(0)
    if all(x.stride(0) == step and x.stride()[2:] == (*x.shape[3:], 1) for x in given):
        return [*tensors], step
    return laid(*tensors), given[0].shape[2:].numel()


@register_flop_formula(torch.ops.memlm.neural_memory_step)
def _flops(*shapes: Any, **_: Any) -> int:
    """The inner forward and backward, the writes, and the reads."""
    given = arguments_of(torch.ops.memlm.neural_memory_step, shapes)
    return 2 * (5 if given["S"] else 3) * sum(math.prod(x) for x in given["W"])


@register_flop_formula(torch.ops.memlm.segmented_memory_step)
def _segmented_flops(*shapes: Any, **_: Any) -> int:
    given = arguments_of(torch.ops.memlm.segmented_memory_step, shapes)
    batch, parts, *one = given["memory"]
    return 2 * (5 if parts == 3 else 3) * batch * math.prod(one)


def step_triton(
    tokens: Tokens,
    state: NeuralMemoryState,
    weights: Sequence[Tensor],
    norm: tuple[Tensor, Tensor] | None,
    silu: bool,
    chunk_size: int,
    start: int | None,
    cu_seqlens: Tensor | None,
    with_surprise: bool,
) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
    """``reference._step``, also for a token that starts a document, or that is padding."""
    q, k, v, lr, momentum, decay, weight = tokens
    position, real, at = state.position, None, None
    if cu_seqlens is not None:
        real = cu_seqlens[:, -1]
        # The document that goes on ends before the token if another one starts with it.
        position = torch.where((cu_seqlens[:, 1] == 0) & (real > 0), 0, position)
    W, S, A, initial = ([exact(x) for x in part] for part in (*state[:3], weights))
    if start is None:
        at = position
    else:
        initial = []
        A = [] if start % chunk_size == 0 else A
    lr = lr if weight is None else lr * weight
    given = (at, real, W, S, A, initial, [*(norm or ())], chunk_size, silu, with_surprise)
    o, *found = step(q, k, v, lr, momentum, decay, *given)
    surprise = found.pop().sum(-1).sqrt() if with_surprise else None
    layers = len(weights)
    parts = [tuple(found[i : i + layers]) for i in range(0, len(found), layers)]
    after = position + (1 if real is None else real)
    return o, NeuralMemoryState(parts[0], parts[1] if S else (), parts[-1], after), surprise
