"""The entries of a cache whose keys and values grow with every token, and nothing else: all other caches are refused.

B streams, S entries, S' entries that are kept, G key heads, K head dim.
"""

import inspect
from collections.abc import Sequence

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from memlm import attached
from memlm.attached.cache import own
from memlm.cache import MemoryCache
from memlm.memory import attention
from memlm.modeling import MemLMPreTrainedModel
from memlm.settings import require
from memlm_kernels.grid import pick


def check(model: PreTrainedModel, cache: Cache) -> None:
    """Raise ValueError if a policy cannot take entries out of the model's cache, once it has read a token."""
    fix = "a policy needs full attention in every layer"
    if isinstance(model, MemLMPreTrainedModel):
        require(model.config.side is None, f"policy: a side network has states of its own; {fix}, and no side network")
        for name, layer in zip(model.config.layer_mixers(), model.base_model.layers, strict=True):
            kind = model.config.mixers[name]["kind"]
            require(type(layer.mixer) is attention.Mixer, f"policy: no entries can go from kind {kind!r}; {fix}")
            window = layer.mixer.config.window_size
            require(window is None, f"policy: window_size={window} of mixer {name!r} is a policy already; {fix}")
        return
    config, family = model.config, model.config.model_type
    require(attached.of(model) is None, f"policy: a memory stands beside the cache of this {family}; detach it first")
    wrong = next((x for x in own(cache).layers if type(x) is not DynamicLayer), None)
    require(wrong is None, f"policy: no entries can go from a {type(wrong).__name__} of {family}; {fix}")
    # ALiBi measures distances between the entries that are left.
    placed = "position_ids" in inspect.signature(model.forward).parameters and not getattr(config, "alibi", False)
    require(placed, f"policy: {family} counts positions by the entries that are left; {fix}, and position_ids")


def keys_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, S, G, K] of each layer."""
    if isinstance(cache, MemoryCache):
        return [(state["k"], state["v"]) for state in cache.states]
    return [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in own(cache).layers]


def keep(cache: Cache, indices: Sequence[Tensor]) -> None:
    """Keep these entries of each layer, [B, S'] in rising order. Positions of later tokens stay as they are."""
    kept = [(pick(k, i), pick(v, i)) for (k, v), i in zip(keys_values(cache), indices, strict=True)]
    if isinstance(cache, MemoryCache):
        cache.states = [{**state, "k": k, "v": v} for state, (k, v) in zip(cache.states, kept, strict=True)]
        return
    for layer, (k, v) in zip(own(cache).layers, kept, strict=True):
        layer.keys, layer.values = k.transpose(1, 2), v.transpose(1, 2)
