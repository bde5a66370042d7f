"""Long rows: shared by ``hardware.sequence_parallel`` processes, or read in pieces of ``train.truncate`` tokens."""

from collections.abc import Sequence

import torch.distributed as dist
from transformers import PreTrainedModel

from memlm.memory.stretches import Stretches
from memlm.modeling import MemLMPreTrainedModel
from memlm.settings import require


def pieces_of(truncate: int | None, model: PreTrainedModel, lengths: Sequence[int], shared: bool) -> int:
    """The number of pieces in which a row is read. Raises ValueError if this cannot be.

    lengths: of rows, at any step; shared: whether processes share a row
    """
    if truncate is None:
        return 1
    key, row = f"train.truncate={truncate}", lengths[0]
    require(row % truncate == 0, f"{key} does not divide data.seq_len={row}; choose a divisor of it")
    require(len(lengths) == 1, f"{key} needs rows of one length; leave train.lengths out")
    require(not shared, f"{key} reads rows in order, which hardware.sequence_parallel cuts; leave one of them out")
    require(isinstance(model, MemLMPreTrainedModel), f"{key} is for models of memlm; leave it out for a backbone")
    return row // truncate


def check_carry(model: PreTrainedModel, lengths: Sequence[int], shared: bool) -> None:
    """Raise ValueError if memories cannot go on from step to step; arguments as in ``pieces_of``."""
    key = "train.carry=true"
    require(len(lengths) == 1, f"{key} needs rows of one length; leave train.lengths out")
    require(not shared, f"{key} reads rows in order, which hardware.sequence_parallel cuts; leave one of them out")
    require(isinstance(model, MemLMPreTrainedModel), f"{key} is for models of memlm; leave it out for a backbone")
    growing = [type(of.mixer).__module__.rpartition(".")[2] for of in model.base_model.every_layer if of.mixer.grows]
    require(not growing, f"{key} needs a state of constant size; {growing[:1]} keeps every token, so leave it out")


def rows_of(size: int, processes: int) -> int:
    """The number of groups of processes, each of which has rows of its own."""
    key = f"hardware.sequence_parallel={size}"
    require(
        processes % size == 0, f"{key} does not divide the {processes} processes of the run; start a multiple of it"
    )
    return processes // size


def check_stretches(model: PreTrainedModel, size: int, lengths: Sequence[int], compiled: bool, sharded: bool) -> None:
    """Raise ValueError if ``size`` processes cannot share each row. lengths: of rows, at any step"""
    if size == 1:
        return
    key = f"hardware.sequence_parallel={size}"
    for length in lengths:
        fix = "make data.seq_len and the lengths of train.lengths multiples of it"
        require(length % size == 0, f"{key} does not divide rows of {length} tokens; {fix}")
    require(isinstance(model, MemLMPreTrainedModel), f"{key} is for models of memlm; a backbone needs 1")
    require(model.config.side is None, f"{key}: a side network needs whole rows; set it to 1")
    require(not compiled, f"{key} exchanges states within a forward; set hardware.compile=false")
    mixers = (layer.mixer for layer in model.base_model.layers)
    waiting = [type(mixer).__module__.rpartition(".")[2] for mixer in mixers if not mixer.at_once]
    # A process that waits for a layer's state does not gather its parameters, and the sender waits for these.
    at_once = not (sharded and waiting)
    require(
        at_once, f"{key} hands on states of {waiting[:1]}, whose parameters must be whole; set hardware.shard=null"
    )


def cut_rows(
    model: PreTrainedModel, size: int, lengths: Sequence[int], compiled: bool, sharded: bool
) -> Stretches | None:
    """Let a model take stretches of rows, if ``size`` processes share each row; all processes call this.

    Returns None, and changes nothing, if a process has whole rows. Raises ValueError, as ``check_stretches``.
    """
    check_stretches(model, size, lengths, compiled, sharded)
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size)
    model.base_model.stretches = Stretches(group)
    return model.base_model.stretches
