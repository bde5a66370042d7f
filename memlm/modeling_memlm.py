"""The code that ``auto_map`` in config.json names: the installed package memlm. A copy of it is in each checkpoint."""

try:
    from memlm import MemLMConfig, MemLMForCausalLM, MemLMModel
except ModuleNotFoundError as error:
    if error.name != "memlm":
        raise
    raise ImportError("this checkpoint needs the package memlm: pip install memlm") from None

__all__ = ["MemLMConfig", "MemLMForCausalLM", "MemLMModel"]
