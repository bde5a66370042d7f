"""Memory-augmented transformers: one decoder, one memory slot.

Importing memlm registers its model with transformers' Auto classes.
"""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memlm.bank import MemoryBank
from memlm.cache import MemoryCache
from memlm.configuration import MemLMConfig
from memlm.interleave import Interleave
from memlm.loss import auxiliary_loss
from memlm.modeling import MemLMForCausalLM, MemLMModel

try:
    __version__ = version("memlm")
except PackageNotFoundError:
    __version__ = "from source"

AutoConfig.register("memlm", MemLMConfig)
AutoModel.register(MemLMConfig, MemLMModel)
AutoModelForCausalLM.register(MemLMConfig, MemLMForCausalLM)

__all__ = [
    "Interleave",
    "MemLMConfig",
    "MemLMForCausalLM",
    "MemLMModel",
    "MemoryBank",
    "MemoryCache",
    "auxiliary_loss",
]
