"""The backbone's full attention cut to the last tokens and the first ones ("sinks", arXiv:2309.17453).

A token's place is its number among the real tokens of its row; padding has none (-1). So the window and the sinks do
not count padding. Keys keep the rotation of their positions.

B batch, T tokens, S keys kept from earlier calls, N = S + T keys, H heads, K head dim.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from memlm.attached.cache import own
from memlm.settings import require
from memlm.versions import CACHE, DummyLayer

# Implementations of attention that take a mask of any form.
MASKED = ("eager", "sdpa")
# Kinds of layers that do not grow with the text.
_BOUNDED = ("sliding_attention", "chunked_attention", "linear_attention")


class WindowLayer(DynamicLayer):
    """The keys and values that later tokens can see.

    kept: [B, S], indices of those to keep among the old ones and the call's, set before each call; None: all
    """

    # So that transformers makes the masks of other layers by other elements of the cache.
    is_sliding = True
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.kept: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        k_BHNK, v_BHNK = (
            torch.cat([old, new], -2) if old.numel() else new
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        self.seen += key_states.shape[-2]
        self.keys, self.values = k_BHNK, v_BHNK
        if self.kept is not None:
            index = self.kept.to(k_BHNK.device)[:, None, :, None]
            self.keys, self.values = (
                x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k_BHNK, v_BHNK)
            )
        return k_BHNK, v_BHNK

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.keys.shape[-2] if self.is_initialized else 0
        return held + query_length, self.seen - held

    def reset(self) -> None:
        super().reset()
        self.seen, self.kept = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a window cannot be cropped; memlm.fork the cache before tokens you may take back")


def begin(call: Any, decoder: nn.Module, settings: Any, kwargs: dict[str, Any]) -> None:
    """Before the decoder: window layers in its cache, and the mask of this call."""
    config = decoder.config
    check_implementation(config)
    layers = full_layers(config)
    use_cache = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    checkpointed = decoder.training and getattr(decoder, "gradient_checkpointing", False)
    if call.cache is None and use_cache and not checkpointed:
        call.cache = kwargs[CACHE] = DynamicCache(config=config)
    rows, padding = call.rows, call.padding
    new_BT = rows.positions_BT
    if padding is not None:
        new_BT = torch.where(padding.mask_BT, rows.before_B[:, None] + padding.mask_BT.cumsum(1) - 1, -1)
    old_BS = call.before.get("places", new_BT[:, :0])
    place_BN = torch.cat([old_BS.to(new_BT.device), new_BT], 1)
    call.mask = _mask(new_BT, place_BN, settings.window, settings.sinks, call)
    if config._attn_implementation == "eager":
        lowest = torch.finfo(decoder.dtype).min
        call.mask = torch.zeros_like(call.mask, dtype=decoder.dtype).masked_fill(~call.mask, lowest)
    if call.cache is None:
        return
    call.places, kept_BS = _keep(place_BN, rows.after_B, settings.window, settings.sinks)
    cache = own(call.cache)
    if not cache.layers:
        # Made without the configuration: then its sliding layers would look like full ones.
        cache.layers.extend(DynamicCache(config=config).layers)
    for i in layers:
        # It attends to the keys of an earlier layer.
        if i >= len(cache.layers) or isinstance(cache.layers[i], DummyLayer):
            continue
        if type(cache.layers[i]) in (DynamicLayer, DynamicSlidingWindowLayer) and not cache.layers[i].is_initialized:
            cache.layers[i] = WindowLayer()
        require(
            isinstance(cache.layers[i], WindowLayer),
            f"past_key_values: layer {i} is a {type(cache.layers[i]).__name__}, and the attention has a window; begin "
            "a new cache",
        )
        cache.layers[i].kept = kept_BS


def _mask(query_BT: Tensor, place_BN: Tensor, size: int, sinks: int, call: Any) -> Tensor:
    """[B, 1, T, N], true where a token attends."""
    q_BT1, k_B1N = query_BT[:, :, None], place_BN[:, None]
    allowed = (k_B1N >= 0) & (k_B1N <= q_BT1) & ((k_B1N > q_BT1 - size) | (k_B1N < sinks))
    length, total = query_BT.shape[1], place_BN.shape[1]
    if call.rows.given_BT is not None:
        document_BT = (query_BT == 0).cumsum(1)
        allowed &= document_BT[:, :, None] == document_BT[:, None]
    if call.padding is not None:
        # A row of no allowed key has no softmax.
        itself_TN = torch.eye(length, total, dtype=torch.bool, device=query_BT.device).roll(total - length, 1)
        allowed |= itself_TN & (query_BT < 0)[..., None]
    return allowed[:, None]


def _keep(place_BN: Tensor, next_B: Tensor, size: int, sinks: int) -> tuple[Tensor, Tensor | None]:
    """The places that the next token may see, -1 for free ones, and their indices; None: all."""
    most = sinks + size - 1
    if place_BN.shape[1] <= most:
        return place_BN, None
    useful_BN = (place_BN >= 0) & ((place_BN > next_B[:, None] - size) | (place_BN < sinks))
    kept_BS = (~useful_BN).long().argsort(dim=1, stable=True)[:, :most]
    return torch.where(useful_BN, place_BN, -1).gather(1, kept_BS), kept_BS


def full_layers(config: Any) -> list[int]:
    """The layers whose attention sees all tokens; sliding layers keep their own window."""
    return [i for i, kind in enumerate(_kinds(config)) if kind == "full_attention"]


def check_implementation(config: Any) -> None:
    """Raise ValueError if the implementation of attention, which a model may change, takes no mask."""
    require(
        config._attn_implementation in MASKED,
        f"attn_implementation={config._attn_implementation!r} cannot cut attention to a window; use "
        f"{' or '.join(MASKED)}",
    )


def check_layers(config: Any, layers: Iterable[int]) -> None:
    """Raise ValueError if a layer's attention can neither be cut nor has its own window."""
    kinds = _kinds(config)
    for i in layers:
        require(
            kinds[i] in ("full_attention", *_BOUNDED),
            f"window: layer {i} has {kinds[i]!r}, which cannot be cut; leave window out",
        )


def _kinds(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        # In a family without this field it has no effect on the attention.
        slides = hasattr(type(config), "sliding_window") and config.sliding_window
        kind = "sliding_attention" if slides else "full_attention"
        kinds = [kind] * config.num_hidden_layers
    return kinds
