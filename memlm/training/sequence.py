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


def cut_rows(model: PreTrainedModel, size: int, lengths: Sequence[int], compiled: bool) -> Stretches | None:
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
    group, _ = dist.new_subgroups(size)
    model.base_model.stretches = Stretches(group)
    return model.base_model.stretches
