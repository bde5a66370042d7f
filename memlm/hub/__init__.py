"""Loading checkpoints, with errors that name the file."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from memlm.configuration import MemLMConfig
from memlm.modeling import MemLMForCausalLM


def load_model(source: str | Path) -> MemLMForCausalLM:
    """A model from a checkpoint folder or a hub name, every weight accounted for.

    Raises ValueError naming the folder where the configuration, the weights, or their match is wrong.
    """
    try:
        config = MemLMConfig.from_pretrained(source)
        model, report = MemLMForCausalLM.from_pretrained(source, config=config, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: not a memlm checkpoint that can be loaded: {_first_line(error)}") from None
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names and kind != "error_msgs"}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise ValueError(
            f"{source}: {kind.replace('_', ' ')} {names[0]} and {len(names) - 1} more; config.json and "
            "model.safetensors are not of one model"
        )
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved beside a model."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no tokenizer there: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
