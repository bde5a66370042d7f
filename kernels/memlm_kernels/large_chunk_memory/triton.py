"""All of a chunk but its products by Triton kernels, as ops of torch without gradients. The loop that calls them, and
the letters, are in ``chunks_triton``.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.large_chunk_memory import kernels
from memlm_kernels.large_chunk_memory.chunks import EPS
from memlm_kernels.launch import Kernel, cdiv, laid, no_products
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import power_of_two

# Elements of a tile, which its threads hold in registers several times.
_TILE = 1024


def _of_slots(kernel: Kernel, width: int, ab: Tensor, **tensors: Tensor) -> None:
    """Launch a kernel of slots that have ``width`` channels a part."""
    slots = ab.numel() // (2 * width)
    limits = {"BF": power_of_two(width), "BN": max(8, _TILE // power_of_two(width))}
    kernel(lambda tiles: cdiv(slots, tiles["BN"]), limits, ab=ab, **tensors, N=slots, F=width)


def _of_lines(kernel: Kernel, keys: int, values: int, memories: Tensor, **tensors: Tensor | int | None) -> None:
    """Launch a kernel of lines of memories."""
    count, width, widest = len(memories), memories.shape[1] // 3, memories.shape[2]
    kernel(
        lambda tiles: count * (cdiv(2 * width, tiles["BL"]) + cdiv(widest, tiles["BL"])),
        {"BL": power_of_two(max(2 * width, widest)), "BI": power_of_two(max(width, widest))},
        **tensors,
        **{"F": width, "K": keys, "V": values, "P": widest, "EPS": EPS},
    )


def _empty(like: Tensor, parts: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(*like.shape[:-1], parts * width, dtype=dtype)


@kernel_op("large_chunk_hidden")
def hidden(ab: Tensor) -> Tensor:
    """silu(A) B, [..., F]; ab: A and B, [..., 2 F]"""
    (ab,), width = laid(ab), ab.shape[-1] // 2
    h = _empty(ab, 1, width)
    _of_slots(kernels.swiglu_forward, width, ab, h=h)
    return h


@hidden.register_fake
def _(ab: Tensor) -> Tensor:
    return _empty(ab, 1, ab.shape[-1] // 2)


@kernel_op("large_chunk_hidden_backward")
def hidden_backward(ab: Tensor, d_h: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of A and B, and silu(A) B."""
    (ab, d_h), width = laid(ab, d_h), ab.shape[-1] // 2
    d_ab, h = _empty(ab, 2, width), _empty(ab, 1, width)
    _of_slots(kernels.swiglu_backward, width, ab, d_h=d_h, d_ab=d_ab, h=h)
    return d_ab, h


@hidden_backward.register_fake
def _(ab: Tensor, d_h: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ab), torch.empty_like(d_h)


@kernel_op("large_chunk_slopes")
def slopes(ab: Tensor, e: Tensor, lr: Tensor) -> Tensor:
    """U, the gradient of phi times lr, [G, C, 3 F]; ab: [G, C, 2 F], e: [G, C, F], lr: [G, C, 3]"""
    (ab, e, lr), width = laid(ab, e, lr), e.shape[-1]
    u = _empty(e, 3, width)
    _of_slots(kernels.ascent_forward, width, ab, e=e, lr=lr, u=u)
    return u


@slopes.register_fake
def _(ab: Tensor, e: Tensor, lr: Tensor) -> Tensor:
    return _empty(e, 3, e.shape[-1])


@kernel_op("large_chunk_slopes_backward")
def slopes_backward(
    ab: Tensor, e: Tensor, lr: Tensor, d_gate_up: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of A, B and E, [G, C, 3 F]; U; the gradient of lr.

    d_gate_up, d_out: [G, C, 2 F] and [G, C, F], the gradient of U
    """
    (ab, e, lr, d_gate_up, d_out), width = laid(ab, e, lr, d_gate_up, d_out), e.shape[-1]
    d_z, u, d_lr = _empty(e, 3, width), _empty(e, 3, width), torch.empty_like(lr)
    given = {"e": e, "lr": lr, "d_gate_up": d_gate_up, "d_out": d_out}
    _of_slots(kernels.ascent_backward, width, ab, **given, d_z=d_z, u=u, d_lr=d_lr)
    return d_z, u, d_lr


@slopes_backward.register_fake
def _(ab: Tensor, e: Tensor, lr: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(e, 3, e.shape[-1]), _empty(e, 3, e.shape[-1]), lr.new_empty(lr.shape)


@kernel_op("large_chunk_write")
def write(
    weights: Tensor,
    gradient: Tensor | None,
    products: list[Tensor],
    momentum: Tensor | None,
    means: Tensor | None,
    moves: Tensor | None,
    initial: Tensor,
    norms: Tensor,
    border: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The memory behind a border, see ``Rule``: W, the norms of the moved lines [G, L]; W in ``dtype`` if that is
    another one; the gradient if there is a border; the momentum if there are ``means``.

    products: [G, 2 F, K] and [G, F, V], a part of the gradient that ``gradient`` lacks
    moves: the moves of the weights; None: the new momentum
    """
    weights, gradient, momentum, means, moves = laid(weights, gradient, momentum, means, moves)
    initial, norms, border, of_gate_up, of_out = laid(initial, norms, border, *products)
    found = _written(weights, means, norms, border, dtype)
    _of_lines(
        kernels.memory_write,
        of_gate_up.shape[-1],
        of_out.shape[-1],
        weights,
        **{"weights": weights, "gradient": gradient, "of_gate_up": of_gate_up, "of_out": of_out},
        **{"momentum": momentum, "means": means, "moves": moves, "initial": initial, "norms": norms, "border": border},
        **found,
    )
    return [x for x in found.values() if x is not None]


def _written(
    weights: Tensor, means: Tensor | None, norms: Tensor, border: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    return {
        "weights_after": torch.empty_like(weights),
        "sizes": torch.empty_like(norms),
        "narrow": None if dtype == weights.dtype else torch.empty_like(weights, dtype=dtype),
        "gradient_after": None if border is None else torch.empty_like(weights),
        "momentum_after": None if means is None else torch.empty_like(weights),
    }


@write.register_fake
def _(weights, gradient, products, momentum, means, moves, initial, norms, border, dtype):  # type: ignore[no-untyped-def]
    return [x for x in _written(weights, means, norms, border, dtype).values() if x is not None]


@kernel_op("large_chunk_write_backward")
def write_backward(
    weights_after: Tensor,
    sizes: Tensor,
    norms: Tensor,
    momentum: Tensor | None,
    means: Tensor | None,
    border: Tensor | None,
    d_weights: Tensor,
    products: list[Tensor],
    d_gradient: Tensor | None,
    d_momentum: Tensor | None,
    d_opened: Tensor | None,
    keys: int,
    values: int,
    dtype: torch.dtype,
    moved: bool,
) -> list[Tensor]:
    """Gradients of the memory before a border, from those of the memory behind it.

    Returns that of the weights; sums [2, G, L], over each line, of W' times its gradient, and of S times that of S';
    d_opened; that of the gradient, in ``dtype``; that of the momentum. The last two are left out with ``moved``: then
    ``write`` had moves, whose gradient is that of the weights.

    products: [G, 2 F, K] and [G, F, V], a part of d_weights that it lacks, or none
    d_opened: the gradient of the weights of documents that opened at later borders; None without a border
    """
    weights_after, sizes, norms, momentum, means, border = laid(weights_after, sizes, norms, momentum, means, border)
    d_weights, d_gradient, d_momentum, d_opened = laid(d_weights, d_gradient, d_momentum, d_opened)
    found = _gradients(weights_after, norms, momentum, d_opened, dtype, moved)
    of_gate_up, of_out = laid(*products) or (None, None)
    given = {"weights_after": weights_after, "sizes": sizes, "norms": norms, "momentum": momentum, "means": means}
    given |= {"d_gate_up_after": of_gate_up, "d_out_after": of_out, "d_gradient_after": d_gradient, "border": border}
    given |= {"d_weights_after": d_weights, "d_momentum_after": d_momentum, "d_opened_after": d_opened}
    _of_lines(kernels.memory_write_backward, keys, values, weights_after, **given, **found, G=len(norms))
    return [x for x in found.values() if x is not None]


def _gradients(
    weights: Tensor, norms: Tensor, momentum: Tensor | None, d_opened: Tensor | None, dtype: torch.dtype, moved: bool
) -> dict[str, Tensor | None]:
    return {
        "d_weights": torch.empty_like(weights),
        "sums": norms.new_empty(2, *norms.shape),
        "d_opened": None if d_opened is None else torch.empty_like(weights),
        "d_gradient": None if moved else torch.empty_like(weights, dtype=dtype),
        "d_momentum": None if moved or momentum is None else torch.empty_like(weights),
    }


@write_backward.register_fake
def _(weights_after, sizes, norms, momentum, means, border, *rest):  # type: ignore[no-untyped-def]
    d_opened, dtype, moved = rest[4], rest[7], rest[8]
    return [x for x in _gradients(weights_after, norms, momentum, d_opened, dtype, moved).values() if x is not None]


_OPS = torch.ops.memlm
register_flop_formula(
    [
        *(_OPS.large_chunk_hidden, _OPS.large_chunk_hidden_backward),
        *(_OPS.large_chunk_slopes, _OPS.large_chunk_slopes_backward),
        *(_OPS.large_chunk_write, _OPS.large_chunk_write_backward),
    ]
)(no_products)
