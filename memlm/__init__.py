"""Memory-augmented transformers: one decoder, one memory slot.

Importing memlm registers its model with transformers' Auto classes. README.md beside this file shows how to use one.

Files:

    configuration       ``MemLMConfig``, the one schema of a model
    modeling            the decoder and its head; moves padding to the end of each row
    layer_calls         a forward through the decoder's layers
    side                a small network that is trained beside a frozen decoder
    modeling_memlm      the file beside each config.json, so that transformers loads it without ``import memlm``
    card                the model card that each save writes
    loss                the training loss: the cross-entropy, and the losses that mixers add
    generation          transformers' ``generate`` with a memory
    cache               ``MemoryCache``, the memory of one or many streams as an object
    layers              RMSNorm, rotary positions, SwiGLU, short convolution
    memory              the memory slot, and one file per memory
    attached            ``attach``, a memory beside the attention of any decoder of transformers
    memory_layer        ``layer``, one memory as a layer of any model
    bank                ``MemoryBank``, a library of documents that a model has read
    interleave          ``Interleave``, rounds of asking a bank and reading on
    data                training data: text, recall tasks, documents with questions
    training            ``train.py``: the loop, checkpoints, resumption
    evaluation          ``evaluate.py``: measures, tables, the report
    lm_eval             lm-eval's command line, with memories
    hub                 checkpoints: loading, and conversion of foreign ones
    cli                 the command line: one-line errors, the preset for a GPU
    fingerprint         fingerprints of weights, for memories and banks; checksums of tensors
    roles               the roles of tokens: query, response, template
    settings            checks of settings: types, ranges, the nearest name
    versions            names of transformers that differ between its versions
    editing             facts written into the weights of any model, in closed form
    reader              a model reads streams of any length and is asked on copies
    policies            key-value policies: full attention within a budget of bytes
    plugins             memories, data and measures of installed packages
    files               files and folders that appear completely or not at all; digests, a lock, JSON
    flops               parameters and FLOPs, counted
"""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memlm.attached import attach, detach, fork, from_pretrained, load_memory, save_memory
from memlm.bank import MemoryBank
from memlm.cache import MemoryCache
from memlm.configuration import MemLMConfig
from memlm.interleave import Interleave
from memlm.loss import auxiliary_loss
from memlm.memory_layer import MemoryLayer, layer
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
    "MemoryLayer",
    "attach",
    "auxiliary_loss",
    "detach",
    "fork",
    "from_pretrained",
    "layer",
    "load_memory",
    "save_memory",
]
