"""Keys and values that grow with each call, without a copy of their past each time.

B batch, S entries so far, T entries of this call.
"""

import weakref

import torch
from torch import Tensor

from memlm_kernels.grid import keep_last

# Room after S entries is S / _SPARE, so each entry is copied about 1 + _SPARE times over time; at least _LEAST.
_SPARE, _LEAST = 4, 64


class _Room:
    """A longer buffer; tensors that others hold are its first entries. ``end`` is the next free entry, taken once."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.end = buffer, dict[int, bool]()

    def take(self, end: int, new: Tensor) -> bool:
        """Whether ``new`` was written after the first ``end`` entries: it must fit, and nobody else may have taken
        them.
        """
        fits = end + new.shape[1] <= self.buffer.shape[1] and new.dtype == self.buffer.dtype
        # Tensors of inference mode can only be written in inference mode.
        writable = torch.is_inference_mode_enabled() or not self.buffer.is_inference()
        # One step, so that it is safe for threads.
        return fits and writable and self.end.pop(end, False)


# The buffer whose first entries a tensor is, by the tensor's id: torch's own dictionary of tensors is slow.
_rooms: dict[int, tuple[weakref.ref, _Room]] = {}


def join(past: Tensor, new: Tensor) -> Tensor:
    """``past`` [B, S, ...] followed by ``new`` [B, T, ...], in new's dtype."""
    return torch.cat([past.to(new.dtype), new], 1) if past.shape[1] else new


def append(past: Tensor, new: Tensor, lengths: Tensor | None = None, by_head: bool = False) -> tuple[Tensor, Tensor]:
    """Returns ``past`` [B, S, ...] followed by ``new`` [B, T, ...]; and the entries to keep, real ones aligned right.

    lengths: [B], number of real entries of ``new``, which come first (None: all); see ``keep_last``
    by_head: whether the entries of a head [B, S, G, K] lie side by side in memory if there is room after them, as a
        CPU reads them fastest

    Neither input changes. Without gradients, the kept tensor has room after it, and the next call writes only its own
    entries. If several calls continue one past, the first one does so, and the others copy.
    """
    if not past.shape[1]:
        joined = new.contiguous()
    elif lengths is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        joined = join(past, new)
    else:
        joined = _grown(past, new, by_head)
    return joined, joined if lengths is None else keep_last(joined, joined.shape[1], new.shape[1], lengths)


def _grown(past: Tensor, new: Tensor, by_head: bool) -> Tensor:
    end, total = past.shape[1], past.shape[1] + new.shape[1]
    of_past, room = _rooms.get(id(past), (None, None))
    if of_past is None or room is None or of_past() is not past or not room.take(end, new):
        rows, entries, rest = len(new), total + max(total // _SPARE, _LEAST), new.shape[2:]
        if by_head:
            buffer = new.new_empty(rows, rest[0], entries, *rest[1:]).transpose(1, 2)
        else:
            buffer = new.new_empty(rows, entries, *rest)
        buffer[:, :end] = past
        room = _Room(buffer)
    room.buffer.narrow(1, end, total - end).copy_(new)
    room.end[total] = True
    joined = room.buffer.narrow(1, 0, total)
    place = id(joined)
    _rooms[place] = weakref.ref(joined, lambda _: _rooms.pop(place, None)), room
    return joined
