"""A reader: any causal language model reads streams of any length into its memory, and answers from copies of it.

B streams, T tokens, S tokens whose logits are kept, V vocabulary.
"""

import copy
import inspect
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
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
    with_metrics: whether ``metrics`` holds those of the last forward's mixers

    Raises ValueError if the model takes no cache of transformers' usual kind.
    """

    def __init__(self, model: PreTrainedModel, segment: int = 2048, with_metrics: bool = False) -> None:
        self.model, self.segment = model, segment
        self.cache, self.tokens = new_memory(model), 0
        self._optimizer: torch.optim.Optimizer | None = None
        self.metrics: dict[str, Tensor] = {}
        self._options = of_model(model, output_metrics=with_metrics)
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
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _next(self) -> int:
        """The most tokens of the next forward."""
        return self.segment

    def _read(self, ids_BT: Tensor, keep: int, **words: Any) -> Tensor:
        """The logits of at least the last ``keep`` tokens of a forward; words: further ones of the model."""
        kept = {"logits_to_keep": keep} if self._keeps else {}
        out = self.model(ids_BT, use_cache=True, **{CACHE: self.cache}, **kept, **self._options, **words)
        self.tokens += ids_BT.shape[1]
        self.metrics = getattr(out, "metrics", None) or {}
        return out.logits

    def learn(self, ids_BT: Tensor, rate: float) -> None:
        """One step of AdamW on the loss of the tokens after the first, read with an empty memory.

        The first call copies the model: later reading uses the copy, and the given model keeps its weights.
        """
        if self._optimizer is None:
            self.model = copy.deepcopy(self.model)
            weights = [p.requires_grad_() for p in self.model.parameters() if p.is_floating_point()]
            self._optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)
        with torch.enable_grad():
            logits_BTV = self.model(ids_BT[:, :-1], use_cache=False, **self._options).logits
            cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def fork(self, rows: Tensor | None = None, question_BT: Tensor | None = None) -> Self:
        """A copy with the streams of the given indices, which may repeat; its reading leaves this one unchanged.

        question_BT: the question that each stream of the copy answers, for readers that choose what they recall
        """
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.cache = fork(self.cache)
        if rows is not None and self.tokens:
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
