"""The states of an attached memory, as one more element of the cache that transformers gives the model.

B rows, T tokens.
"""

import copy
from typing import Any

from torch import Tensor
from transformers import Cache, cache_utils
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, QuantizedLayer, StaticLayer

from memlm.cache import MemoryCache
from memlm.memory.state import State, mapped
from memlm.settings import require
from memlm.versions import DummyLayer


class StateLayer(DummyLayer):
    """The last element of ``cache.layers``, so that the cache's own loops reach the states. Queries of length and
    masks never do.

    settings: those of the memory that wrote the states
    states: ``position`` [B], the position of each row's next token; the layers' states by their numbers, and with a
        window ``places`` (``memlm.attached.window``). Tensors are replaced, never changed in place
    start: the position as a Python int, if known
    length: the tokens of the cache, with padding, after the memory's last call
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.states: State = {}
        self.start: int | None = 0
        self.length = 0

    @property
    def max_batch_size(self) -> int:
        return len(self.states["position"])

    def _select(self, function: Any) -> None:
        self.states = mapped(function, self.states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        self.states, self.start, self.length = {}, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a memory cannot be cropped; memlm.fork the cache before tokens you may take back")


def own(cache: Cache) -> Cache:
    """The cache of the decoder's own tokens."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def state_layer(cache: Cache) -> StateLayer | None:
    return next((layer for layer in own(cache).layers if isinstance(layer, StateLayer)), None)


def check(cache: Any, settings: Any, batch: int) -> StateLayer | None:
    """The states in a cache; None if it is empty. Raises ValueError if the memory cannot use this cache."""
    require(
        isinstance(cache, Cache) and not isinstance(cache, MemoryCache),
        f"past_key_values is a {type(cache).__name__}; with an attached memory it must be a transformers.DynamicCache",
    )
    for layer in own(cache).layers:
        require(
            not isinstance(layer, StaticLayer | QuantizedLayer),
            f"past_key_values has a {type(layer).__name__}, which cannot carry a memory; use a DynamicCache, and leave"
            " cache_implementation out",
        )
    held = state_layer(cache)
    if held is None or not held.states:
        require(
            cache.get_seq_length() == 0,
            "past_key_values was filled without the memory; fill it by the model with its memory attached",
        )
        return held
    require(held.settings == settings, "past_key_values was filled by another memory; begin a new cache")
    length = cache.get_seq_length()
    if length != held.length:
        raise ValueError(
            f"past_key_values holds {length} tokens, and the memory has read {held.length} of them; fill it by the "
            "model with its memory attached"
        )
    rows = held.max_batch_size
    if rows != batch:
        raise ValueError(f"past_key_values holds a memory of {rows} rows, the input has {batch}; begin a new cache")
    return held


def fork(cache: Cache) -> Cache:
    """A copy of a cache, to go on from twice; reading with a copy leaves the cache unchanged.

    >>> memory = model(book_ids, use_cache=True).past_key_values
    >>> answer = model.generate(ids, past_key_values=memlm.fork(memory))

    cache: of any model with or without memory. Layers that replace their tensors are shared, at no cost; others, such
        as static ones, are copied
    """
    if isinstance(cache, MemoryCache):
        return cache.fork()
    require(isinstance(cache, Cache), f"cache is a {type(cache).__name__}; a transformers.Cache can be forked")
    if not _replaces(cache):
        return copy.deepcopy(cache)
    other = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        other.self_attention_cache, other.cross_attention_cache = map(
            fork, (cache.self_attention_cache, cache.cross_attention_cache)
        )
        other.is_updated = dict(cache.is_updated)
        return other
    other.layers = [_copied(layer) for layer in cache.layers]
    return other


def _copied(layer: Any) -> Any:
    shared = isinstance(layer, StateLayer | DynamicLayer) and not isinstance(layer, QuantizedLayer)
    # A linear-attention layer changes its states in place.
    return (
        copy.copy(layer)
        if shared and _replaces(layer) and not hasattr(layer, "recurrent_states")
        else copy.deepcopy(layer)
    )


def _replaces(x: Cache | Any) -> bool:
    """Whether a cache or a layer is known to replace its tensors. Some families' own (MiniMax, DeepSeek-V4) do not."""
    return type(x).__module__ in (cache_utils.__name__, "memlm.attached.cache", "memlm.attached.window")
