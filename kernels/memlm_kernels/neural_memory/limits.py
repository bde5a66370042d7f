"""Which memories the Triton kernels take."""

from collections.abc import Sequence

from torch import Tensor

from memlm_kernels.neural_memory.losses import InnerLoss, squared_error
from memlm_kernels.neural_memory.reference import block_size

# The most slots that the kernels of two layers take at once: more would not fit into registers beside the memory.
WIDTH = 16


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
    if len(weights) == 1:
        return keys_limit(q)
    if max(q.shape[-1], v.shape[-1]) > 128:
        sizes = f"K={q.shape[-1]} and V={v.shape[-1]}"
        return f"its kernels of two layers take keys and values of at most 128 channels, not {sizes}"
    if block_size(chunk_size, WIDTH) > WIDTH:
        return (
            f"its kernels of two layers take a chunk_size up to {WIDTH} or one that {WIDTH} divides, not {chunk_size}"
        )
    return None


def keys_limit(q: Tensor) -> str | None:
    keys = q.shape[-1]
    if keys * q.element_size() <= 256:
        return None
    return f"its kernels take keys of at most 128 channels of 16 bits or 64 of float32, not K={keys}"
