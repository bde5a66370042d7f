"""Names of transformers that differ between its versions."""

from typing import Any

from transformers import cache_utils
from transformers.modeling_outputs import BaseModelOutputWithPast

# A cache among the arguments and outputs of models: "past_key_values" until transformers 5.23, "cache" since.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
CACHES = ("past_key_values", "cache")


class _NoKeys:
    """An element of a cache that holds no keys, as in versions that have it."""

    supports_early_init, is_initialized, keys, values = False, True, None, None
    # Neither True nor False, so that no mask is made by it.
    is_sliding = None

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def get_max_length(self) -> int:
        return -1


# transformers 5.17 has none.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", _NoKeys)
