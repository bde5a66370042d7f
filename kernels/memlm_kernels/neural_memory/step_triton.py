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
# The arguments of the kernels for a memory of each number of layers: a name for each part of each layer.
_NAMES = {1: _PARTS, 2: tuple(f"{part}_{layer}" for part in _PARTS for layer in (1, 2))}
_NO_LIMITS: dict[str, int] = {}


@kernel_op("neural_memory_step")
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    position: Tensor,
    real: Tensor | None,
    W: Tensors,
    S: Tensors,
    A: Tensors,
    initial: Tensors,
    tail: Tensors,
    chunk_size: int,
    told: bool,
    silu: bool,
    surprise: bool,
) -> Tensors:
    """q, k: [B, 1, H, K]; v: [B, 1, H, V]; lr, momentum, decay: [B, 1, H]; W, S, A: [B, H, in, out] of each layer;
    initial: [H, in, out]; tail: gain and bias [H, V]; S and tail may be empty.

    position: [B] int64, the tokens before this one in its document; at 0 the memory is ``initial``
    real: [B] int64, 0 for a row whose token is padding; None: all are real
    told: each token continues a document, and opens a chunk if A is empty; initial is not used

    Returns the reads [B, 1, H, V], W, S and A after the token, the position after it, and with ``surprise`` the
    squares [B, 1, H, parts] of its gradient's norm.
    """
    found, layers = _results(q, v, W, S, position, surprise), len(W)
    none, of_S = [None] * layers, 1 + layers + len(S)
    last = [*found[1 : 1 + layers], *(found[1 + layers : of_S] or none), *found[of_S : of_S + layers]]
    parts = (*W, *(S or none), *(A or none), *(none if told else initial), *last)
    there: dict[str, Any] = dict(zip(_NAMES[layers], laid(*parts), strict=True))
    there["position"], there["real"] = laid(position, real)
    there["out"], there["after"], there["squares"] = found[0], found[of_S + layers], found[-1] if surprise else None
    hidden = 0
    if layers > 1:
        there["gain"], there["bias"] = laid(*tail) or (None, None)
        hidden = W[1].shape[-2]
    _launch((q, k, v), (lr, momentum, decay), there, q.shape[2], chunk_size, told, hidden, silu)
    return found


@step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    position: Tensor,
    real: Tensor | None,
    W: Tensors,
    S: Tensors,
    A: Tensors,
    initial: Tensors,
    tail: Tensors,
    chunk_size: int,
    told: bool,
    silu: bool,
    surprise: bool,
) -> Tensors:
    return _results(q, v, W, S, position, surprise)


def _results(q: Tensor, v: Tensor, W: Tensors, S: Tensors, position: Tensor, surprise: bool) -> Tensors:
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, *W, *S, *W, position)]
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
) -> tuple[Tensor, Tensor, Tensor]:
    """memory: [B, parts, H, K, V], M, the momentum if there is one, and the anchor; position: [B, 1]. Returns the
    reads, and the memory and the position after the token.
    """
    memory, position = laid(memory, position)
    out, last, after = _segmented_results(v, memory, position)
    names = ("W", "A") if momentum is None else ("W", "S", "A")
    there: dict[str, Any] = dict.fromkeys((*_PARTS, "squares", "real"))
    there |= dict(zip(names, memory.unbind(1), strict=True))
    there |= {f"last_{name}": x for name, x in zip(names, last.unbind(1), strict=True)}
    there |= {"out": out, "position": position, "after": after}
    _launch((q, k, v), (lr, momentum, decay), there, memory.shape[1] * memory.shape[2], chunk_size, False)
    return out, last, after


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
) -> tuple[Tensor, Tensor, Tensor]:
    return _segmented_results(v, memory, position)


def _segmented_results(v: Tensor, memory: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, last, after = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, memory, position))
    return out, last, after


def _launch(
    tokens: tuple[Tensor, Tensor, Tensor],
    gates: tuple[Tensor, Tensor | None, Tensor | None],
    there: dict[str, Any],
    of_memory: int,
    chunk_size: int,
    told: bool,
    hidden: int = 0,
    silu: bool = False,
) -> None:
    ((q, k), of_keys), ((v,), of_values) = _rows(*tokens[:2]), _rows(tokens[2])
    (lr, momentum, decay), of_gates = _rows(*gates)
    batch, _, heads, keys = q.shape
    values, count = v.shape[-1], batch * heads
    sizes: dict[str, Any] = {}
    if hidden:
        # A tile of either layer takes 16 registers of a thread.
        kernel, columns = deep_step, at_least_16(values)
        width = 2048 // max(64, at_least_16(keys), columns)
        sizes = {"BX": min(at_least_16(hidden), width), "X": hidden, "SILU": silu, "EPS": EPS}
    else:
        kernel, columns = memory_step, _columns(keys, values)
        count *= cdiv(values, columns)
    kernel(
        lambda _: count,
        _NO_LIMITS,
        **{"q": q, "k": k, "v": v, "lr": lr, "momentum": momentum, "decay": decay},
        **there,
        **{"H": heads, "of_keys": of_keys, "of_values": of_values, "of_gates": of_gates, "of_memory": of_memory},
        **{"chunk_size": chunk_size, "TOLD": told, "K": keys, "V": values, "BK": at_least_16(keys), "BV": columns},
        **sizes,
    )


def _rows(*tensors: Tensor | None) -> tuple[Sequence[Any], int]:
    """The tensors, [B, 1, ...], with contiguous rows, and the elements from a row of each to the next. Parts of one
    tensor are taken as they are.
    """
    given = [x for x in tensors if x is not None]
    step = given[0].stride(0)
    if all([x.is_contiguous() for x in given]) or all(
        [x.stride(0) == step and x.stride()[2:] == (*x.shape[3:], 1) for x in given]
    ):
        return tensors, step
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
    position, real = state.position, None
    if cu_seqlens is not None:
        real = cu_seqlens[:, -1]
        # The document that goes on ends before the token if another one starts with it.
        position = torch.where((cu_seqlens[:, 1] == 0) & (real > 0), 0, position)
    W, S, A = ([exact(x) for x in part] for part in state[:3])
    told = start is not None
    if start is not None and start % chunk_size == 0:
        A = []
    lr = lr if weight is None else lr * weight
    given = (position, real, W, S, A, [*weights], [*(norm or ())], chunk_size, told, silu, with_surprise)
    o, *found = step(q, k, v, lr, momentum, decay, *given)
    surprise = found.pop().sum(-1).sqrt() if with_surprise else None
    layers, after = len(weights), found.pop()
    parts = [tuple(found[i : i + layers]) for i in range(0, len(found), layers)]
    return o, NeuralMemoryState(parts[0], parts[1] if S else (), parts[-1], after), surprise
