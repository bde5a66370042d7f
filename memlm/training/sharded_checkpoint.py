"""Checkpoints of parameters that processes share, by torch's Distributed Checkpoint.

They are as in ``checkpoint``, but weights and optimiser state are in a folder of parts, ``files.PARTS``. Each process
writes its part in a thread, while the run goes on. Any number of processes may read the parts. ``consolidate`` adds
the weights as ``from_pretrained`` reads them.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from memlm import card, files
from memlm.configuration import MemLMConfig
from memlm.hub.causal import load_any
from memlm.modeling import MemLMForCausalLM
from memlm.settings import require
from memlm.training import checkpoint
from memlm.training.ema import NAME as EMA
from memlm.training.ema import WeightAverage
from memlm.training.shards import divided


class State:
    """The tensors of a run by name: weights, optimiser state, and averages of weights.

    It is made before the first forward: after it, modules may hold other parameters than the optimisers.
    """

    def __init__(
        self, model: PreTrainedModel, optimizers: Sequence[Optimizer], ema: WeightAverage | None = None
    ) -> None:
        self.model, self._optimizers, self._ema = model, optimizers, ema
        self._names = {p: name for name, p in model.named_parameters()}
        self._averages = {f"ema.{name}": x for name, x in ema.averages.items()} if ema else {}

    def tensors(self) -> dict[str, Tensor]:
        state = {**_weights(self.model), **self._averages}
        for optimizer in self._optimizers:
            for p, values in optimizer.state.items():
                state |= {f"optimizer.{self._names[p]}.{key}": x for key, x in values.items()}
        return state

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Fill the tensors from a checkpoint, in parts or whole, however many processes wrote it."""
        if has_parts(folder):
            self._load_parts(folder)
            return
        held = _weights(load_any(folder))
        for name, x in _weights(self.model).items():
            x.copy_(divided(held[name], x))
        load_optimizers(self._optimizers, checkpoint.load_trainer(folder))
        if self._ema:
            self._ema.load(folder)

    def _load_parts(self, folder: Path) -> None:
        held = dcp.FileSystemReader(str(folder / files.PARTS)).read_metadata().state_dict_metadata
        for optimizer in self._optimizers:
            optimizer.state.clear()
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer.{self._names[p]}."
                for key in (name.removeprefix(prefix) for name in held if name.startswith(prefix)):
                    # AdamW counts steps on the host.
                    optimizer.state[p][key] = torch.zeros(()) if key == "step" else torch.zeros_like(p)
        _read(folder, self.tensors(), alone=not dist.is_initialized())


class Saver:
    """Writes checkpoints beside the steps of a run, one at a time. Leaving its block waits for the last one."""

    def __init__(self, state: State) -> None:
        self._state = state
        # Its own group, because the thread uses it while the steps use theirs.
        self._group, self._thread = dist.new_group(backend="gloo"), ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._running is not None:
            # Without the other processes, which may know of no error. The first error tells more than that of a save.
            self._running.exception()

    def save(self, run_dir: Path, step: int, beside: checkpoint.Beside, keep: int) -> None:
        """Copy the state, and begin to write checkpoint ``step``; every process calls it. See ``checkpoint.save``."""
        self.wait()
        with ExitStack() as stack:
            parts: list[str | None] = [None]
            try:
                if dist.get_rank() == 0:
                    partial = stack.enter_context(checkpoint.new(run_dir, step, keep))
                    self._write_config(partial)
                    checkpoint.describe(partial, beside)
                    parts = [str(partial / files.PARTS)]
            finally:
                dist.broadcast_object_list(parts, group=self._group)
            if parts[0] is None:
                raise OSError(f"{run_dir}: the main process could not begin a checkpoint; see its error")
            writer = dcp.FileSystemWriter(parts[0])
            written = dcp.async_save(self._state.tensors(), storage_writer=writer, process_group=self._group)
            self._running = self._thread.submit(self._complete, written, stack.pop_all())

    def _write_config(self, folder: Path) -> None:
        """As ``save_pretrained`` writes it."""
        model = self._state.model
        config = copy.deepcopy(model.config)
        config.architectures = [MemLMForCausalLM.__name__]
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)

    def _complete(self, written: Any, into: ExitStack) -> None:
        with into:
            try:
                written.result()
            except dcp.CheckpointException as error:
                # It is no Exception; the failures are those of the processes.
                reason, _ = next(iter(error.failures.values()))
                raise OSError(f"a process's part: {reason}") from error
            # DCP gives metadata to the first process when all have written.
            dist.barrier(self._group)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
            dist.barrier(self._group)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    # A tied parameter has one name here.
    kept = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
    return {f"model.{name}": x for name, x in model.state_dict().items() if name in kept}


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    with warnings.catch_warnings():
        # It warns that there are no other processes.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(str(folder / files.PARTS)), no_dist=alone)


def load_optimizers(optimizers: Sequence[Optimizer], trainer: Mapping[str, Any]) -> None:
    """Give optimisers their state of a whole checkpoint, divided as their parameters are."""
    for optimizer, state in zip(optimizers, trainer["optimizers"], strict=True):
        optimizer.load_state_dict(state)
        for p, values in optimizer.state.items():
            values |= {key: divided(x, p) for key, x in values.items() if x.shape == p.shape}


def has_parts(folder: Path) -> bool:
    return (folder / files.PARTS).is_dir()


def skeleton(folder: Path) -> MemLMForCausalLM:
    """The model of a checkpoint in parts, with other weights."""
    config = MemLMConfig.from_pretrained(folder)
    return MemLMForCausalLM(config).to(config.dtype)


def consolidate(folder: Path) -> None:
    """Add the weights to a checkpoint in parts, as ``from_pretrained`` reads them. Its digests then cover them too.

    Raises ValueError if it has no parts, or is damaged.
    """
    require(has_parts(folder), f"{folder}: has no parts; its weights are whole, or it is no checkpoint")
    checkpoint.check(folder)
    model, held = skeleton(folder), dcp.FileSystemReader(str(folder / files.PARTS)).read_metadata().state_dict_metadata
    weights = dict(model.named_parameters())
    averages = {f"ema.{name}": torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
    averages = {name: x for name, x in averages.items() if name in held}
    _read(folder, {**_weights(model), **averages}, alone=True)
    # Beside the checkpoint, where the next start of the run removes the remains of a killed process.
    with TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as made:
        model.save_pretrained(made)
        if averages:
            save_file({name.removeprefix("ema."): x for name, x in averages.items()}, Path(made) / EMA)
        # The index comes last.
        found = sorted(Path(made).glob("*.safetensors*"), key=lambda path: path.name == files.INDEX)
        files.add_to_seal(folder, found)
    card.write(folder, run=folder)
