"""The inputs of each step: this process's rows, whole, in pieces or in stretches, with the memory they go on from."""

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from memlm.cache import MemoryCache
from memlm.data import Batch, Mixture
from memlm.training import sequence
from memlm.training.carried import Carried
from memlm.training.lengths import Lengths
from memlm.training.objective import model_inputs
from memlm.training.settings import RunSettings


class Feed:
    """A pure function of the step, but for the memories that ``train.carry`` takes along.

    owners: groups of processes with rows of their own; forwards: of a process in a step
    pieces: of a row, each with its own backward; stretches: the processes that share rows; None: rows are whole
    carried: memories that go on from step to step; None: each row begins with an empty one
    """

    def __init__(
        self,
        settings: RunSettings,
        mixture: Mixture,
        model: PreTrainedModel,
        accelerator: Accelerator,
        saved: dict[str, Any] | None = None,
    ) -> None:
        """Prepare model and rows for each other. saved: the result of ``Carried.saved``

        Raises ValueError if the model cannot take rows in this way, or if so many processes cannot share them.
        """
        train, hardware, row = settings.train, settings.hardware, settings.config["data"]["seq_len"]
        processes, size = accelerator.num_processes, hardware.sequence_parallel
        self._mixture, self._device = mixture, accelerator.device
        self.owners = sequence.rows_of(size, processes)
        self.forwards = train.forwards(self.owners)
        self._parts = range(accelerator.process_index // size, self.forwards * self.owners, self.owners)
        self.lengths = Lengths(train.lengths or [], mixture, row)
        rows = [row, *(length for length, _ in train.lengths or [])]
        sharded = hardware.sharers(processes) > 1
        self.stretches = sequence.cut_rows(model, size, rows, hardware.compile, sharded)
        self.pieces = sequence.pieces_of(train.truncate, model, rows, size > 1)
        mixture.inject(train.steps)
        self.carried: Carried | None = None
        if train.carry:
            sequence.check_carry(model, rows, size > 1)
            mixture.carry()
            self.carried = Carried(self._parts, self.owners * self.forwards, accelerator.device, saved)

    def batches(self, step: int, split: str) -> Iterator[Batch]:
        """This process's parts of a step's batch."""
        parts = self.forwards * self.owners
        batches = (self._mixture.batch(step, split, part, parts) for part in self._parts)
        return (self.lengths.cut(batch, step) for batch in batches) if split == "train" else batches

    def inputs(self, step: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """The batches of each forward and backward of a step, with their inputs."""
        for number, batch in enumerate(self.batches(step, "train")):
            if self.carried:
                memory = self.carried.memories[number]
            elif self.pieces > 1:
                memory = MemoryCache()
            else:
                yield batch, model_inputs(batch, self._device, self.stretches)
                continue
            for place in range(self.pieces):
                piece = batch.stretch(place, self.pieces)
                given = model_inputs(piece, self._device) | {"past_key_values": memory}
                if self.carried:
                    # Without positions every row would continue its document.
                    given["position_ids"] = piece.position_ids.to(self._device)
                yield piece, given
                memory.detach()
