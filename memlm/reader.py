"""A reader: any causal language model reads streams of any length into its memory, and answers from copies of it.

B streams, T tokens, S tokens whose logits are kept, V vocabulary.
"""

import inspect
from typing import Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from memlm.attached.cache import fork, own, state_layer
from memlm.cache import MemoryCache
from memlm.hub.causal import new_memory, of_model
from memlm.memory.state import leaves
from memlm.versions import CACHE


class Reader:
    """Streams of equal length that a model reads into one memory.

    >>> reader = Reader(model)
    >>> reader(book_ids)
    >>> logits = reader.fork()(question_ids, keep=1)

    model: any causal language model of transformers or of memlm, in evaluation mode; segment: tokens of a forward
    cache: its memory; tokens: those that each stream has read

    Raises ValueError if the model takes no cache of transformers' usual kind.
    """

    def __init__(self, model: PreTrainedModel, segment: int = 2048) -> None:
        self.model, self.segment = model, segment
        self.cache, self.tokens = new_memory(model), 0
        self._options = of_model(model, output_metrics=False)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, keep: int = 1) -> Tensor:
        """Read on. Returns the logits [B, S, V] of the last ``keep`` tokens, all if there are fewer."""
        found, left = [], ids_BT.shape[1]
        while left:
            piece_BT = ids_BT[:, ids_BT.shape[1] - left :][:, : self._next()]
            left -= piece_BT.shape[1]
            wanted = min(piece_BT.shape[1], keep - left)
            logits_BSV = self._read(piece_BT, max(wanted, 1))
            if wanted > 0:
                found.append(logits_BSV[:, -wanted:])
        return torch.cat(found, 1)

    def _next(self) -> int:
        """The most tokens of the next forward."""
        return self.segment

    def _read(self, ids_BT: Tensor, keep: int) -> Tensor:
        kept = {"logits_to_keep": keep} if self._keeps else {}
        out = self.model(ids_BT, use_cache=True, **{CACHE: self.cache}, **kept, **self._options)
        self.tokens += ids_BT.shape[1]
        return out.logits

    def fork(self, rows: Tensor | None = None) -> Self:
        """A copy with the streams of the given indices, which may repeat; its reading leaves this one unchanged."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.cache = fork(self.cache)
        if rows is not None:
            other.cache.batch_select_indices(rows)
        return other

    def nbytes(self) -> int:
        """Bytes of the memory of all streams."""
        return nbytes(self.cache)


def nbytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds for later tokens."""
    if isinstance(cache, MemoryCache):
        return cache.nbytes()
    held = state_layer(cache)
    tensors = [] if held is None else list(leaves(held.states))
    for layer in own(cache).layers:
        tensors += [x for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)
