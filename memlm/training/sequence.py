"""Sequence parallelism of a run: ``hardware.sequence_parallel`` processes share each row."""

from collections.abc import Sequence

import torch.distributed as dist
from transformers import PreTrainedModel

from memlm.memory.stretches import Stretches
from memlm.modeling import MemLMPreTrainedModel
from memlm.settings import require


def rows_of(size: int, processes: int) -> int:
    """The number of groups of processes, each of which has rows of its own."""
    key = f"hardware.sequence_parallel={size}"
    require(
        processes % size == 0, f"{key} does not divide the {processes} processes of the run; start a multiple of it"
    )
    return processes // size


def cut_rows(
    model: PreTrainedModel, size: int, lengths: Sequence[int], compiled: bool, sharded: bool
) -> Stretches | None:
    """Let a model take stretches of rows, if ``size`` processes share each row; all processes call this.

    lengths: of rows, at any step

    Returns None, and changes nothing, if a process has whole rows. Raises ValueError if this cannot be.
    """
    if size == 1:
        return None
    key = f"hardware.sequence_parallel={size}"
    for length in lengths:
        fix = "make data.seq_len and the lengths of train.lengths multiples of it"
        require(length % size == 0, f"{key} does not divide rows of {length} tokens; {fix}")
    require(isinstance(model, MemLMPreTrainedModel), f"{key} is for models of memlm; a backbone needs 1")
    require(not compiled, f"{key} exchanges states within a forward; set hardware.compile=false")
    mixers = (layer.mixer for layer in model.base_model.layers)
    waiting = [type(mixer).__module__.rpartition(".")[2] for mixer in mixers if not mixer.at_once]
    # A process that waits for a layer's state does not gather its parameters, and the sender waits for these.
    at_once = not (sharded and waiting)
    require(
        at_once, f"{key} hands on states of {waiting[:1]}, whose parameters must be whole; set hardware.shard=null"
    )
    group, _ = dist.new_subgroups(size)
    model.base_model.stretches = Stretches(group)
    return model.base_model.stretches
