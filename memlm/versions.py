"""Names of transformers that differ between its versions."""

from transformers.modeling_outputs import BaseModelOutputWithPast

# A cache among the arguments and outputs of models: "past_key_values" until transformers 5.23, "cache" since.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
