"""Keys and values that grow by a token a call, without a copy of their past at each.

B batch, S entries so far, T of this call.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from memlm_kernels.grid import keep_last

# Room left behind S entries is S / _SPARE, so that over time each is copied 1 + _SPARE times; for few, _LEAST.
_SPARE, _LEAST = 4, 64


class _Room:
    """A longer tensor, whose first entries others see; ``end``, where the next one goes, can be taken once."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.end = buffer, dict[int, bool]()

    def take(self, end: int, new: Tensor) -> bool:
        """Whether ``new`` may go behind the first ``end`` entries: it fits, and nobody has gone on from there."""
        fits = end + new.shape[1] <= self.buffer.shape[1] and new.dtype == self.buffer.dtype
        # What inference mode made can be written there only.
        writable = torch.is_inference_mode_enabled() or not self.buffer.is_inference()
        # One step, for threads.
        return fits and writable and self.end.pop(end, False)


# What a tensor is the beginning of.
_rooms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def join(past: Tensor, new: Tensor) -> Tensor:
    """``past`` [B, S, ...] followed by ``new`` [B, T, ...], in new's dtype."""
    return torch.cat([past.to(new.dtype), new], 1) if past.shape[1] else new


def append(past: Tensor, new: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``past`` [B, S, ...] followed by ``new`` [B, T, ...]; and what to keep of them, each row's real ones last.

    lengths: [B], real entries of ``new``, which come first (None: all); see ``keep_last``

    Neither is changed. Without gradients what is kept has room behind it, and the next call writes only its own: of
    several calls that go on from one past the first does, the others copy.
    """
    if not past.shape[1]:
        joined = new.contiguous()
    elif lengths is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        joined = join(past, new)
    else:
        joined = _grown(past, new)
    return joined, joined if lengths is None else keep_last(joined, joined.shape[1], new.shape[1], lengths)


def _grown(past: Tensor, new: Tensor) -> Tensor:
    end, total = past.shape[1], past.shape[1] + new.shape[1]
    room = _rooms.get(past)
    if room is None or not room.take(end, new):
        buffer = new.new_empty(len(new), total + max(total // _SPARE, _LEAST), *new.shape[2:])
        buffer[:, :end] = past
        room = _Room(buffer)
    room.buffer[:, end:total] = new
    room.end[total] = True
    joined = room.buffer[:, :total]
    _rooms[joined] = room
    return joined
