"""The queries of a forward, as they meet the keys.

B streams, T tokens, H heads, K head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm.modeling import MemLMPreTrainedModel
from memlm.settings import require


def check(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's queries cannot be seen."""
    name = model.config._attn_implementation
    seen = isinstance(model, MemLMPreTrainedModel) or name in ALL_ATTENTION_FUNCTIONS
    require(seen, f"policy: the queries of attn_implementation={name!r} cannot be seen; load the model with 'sdpa'")


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Inside, a forward fills the dict: layer -> its queries [B, T, H, K], times the scale of the scores."""
    found: dict[int, Tensor] = {}
    if isinstance(model, MemLMPreTrainedModel):
        mixers = [layer.mixer for layer in model.base_model.layers]
        for i, mixer in enumerate(mixers):
            mixer._attend = _of_mixer(mixer._attend, found, i)
        try:
            yield found
        finally:
            for mixer in mixers:
                del mixer._attend
        return
    name = model.config._attn_implementation
    function, before = ALL_ATTENTION_FUNCTIONS[name], ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)

    def attend(module: Any, q_BHTK: Tensor, *args: Any, **words: Any) -> Any:
        scale = words.get("scaling")
        found[module.layer_idx] = q_BHTK.transpose(1, 2) * (q_BHTK.shape[-1] ** -0.5 if scale is None else scale)
        return function(module, q_BHTK, *args, **words)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if before is not None:
            ALL_ATTENTION_FUNCTIONS[name] = before


def _of_mixer(attend: Callable[..., Tensor], found: dict[int, Tensor], layer: int) -> Callable[..., Tensor]:
    def seen(q_BTHK: Tensor, *args: Any) -> Tensor:
        found[layer] = q_BTHK * q_BTHK.shape[-1] ** -0.5
        return attend(q_BTHK, *args)

    return seen
