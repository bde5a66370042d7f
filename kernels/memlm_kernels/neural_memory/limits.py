"""Which memories the Triton kernels take."""

from collections.abc import Sequence

from torch import Tensor

from memlm_kernels.neural_memory.losses import InnerLoss, squared_error
from memlm_kernels.neural_memory.reference import block_size


def memory_limit(
    q: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    norm: tuple[Tensor, Tensor] | None,
    loss: InnerLoss,
    window: int,
    chunk_size: int,
) -> str | None:
    """The reason why the kernels do not take a call of ``neural_memory``, None if they take it."""
    taken = len(weights) == 2 or (len(weights) == 1 and norm is None)
    if not taken or loss is not squared_error or window > 1:
        return "its kernels take two layers, or one without a norm, the squared error and window=1"
    if reason := keys_limit(q):
        return reason
    if len(weights) == 2 and max(q.shape[-1], v.shape[-1]) > 64:
        sizes = f"K={q.shape[-1]} and V={v.shape[-1]}"
        return f"its kernels of two layers take keys and values of at most 64 channels, not {sizes}"
    return blocks_limit(chunk_size, most_slots(q, len(weights)))


def blocks_limit(chunk_size: int, widest: int) -> str | None:
    if block_size(chunk_size, widest) <= widest:
        return None
    divisor = "16" if widest == 16 else f"a number from 16 to {widest}"
    return f"its kernels take a chunk_size up to {widest} or one that {divisor} divides, not {chunk_size}"


def keys_limit(q: Tensor) -> str | None:
    keys = q.shape[-1]
    if keys * q.element_size() <= 256:
        return None
    return f"its kernels take keys of at most 128 channels of 16 bits or 64 of float32, not K={keys}"


def most_slots(q: Tensor, depth: int) -> int:
    """The most slots that Triton's kernels take at once: more would not fit into registers beside the memory."""
    return 32 if depth == 1 and q.shape[-1] * q.element_size() <= 128 else 16
