"""The plan of a run: its sizes, memory and hours, without its model (``train.dry_run``).

Text is looked at if it is encoded, because rows of many documents need more memory; a plan encodes none.
"""

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memlm.configuration import MemLMConfig
from memlm.data import Batch, build_data, is_made_by_rule, load_tokenizer, only_built
from memlm.flops import count_active_parameters, count_flops, count_parameters, state_bytes
from memlm.modeling import MemLMForCausalLM
from memlm.settings import require
from memlm.training import sequence, trainable
from memlm.training.devices import DEVICES
from memlm.training.footprint import of_optimizers, of_step
from memlm.training.lengths import Lengths, Stages
from memlm.training.model import layers_of
from memlm.training.objective import model_inputs
from memlm.training.optim import build_optimizers
from memlm.training.settings import RunSettings
from memlm.training.sharding import check_divisible, in_bf16, matrices

# Steps whose rows are looked at.
_SEEN = 4
_MFUS = (0.2, 0.3, 0.4)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceMemory(NamedTuple):
    """Bytes of one device in a step; most: the most at once, in which not all parts coincide."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    most: float


class RunPlan(NamedTuple):
    """active, long_term, trained: parameters that a token uses, of layers with a long-term memory, that are trained
    flops: of a token's forward, in the mean of the run
    state: bytes of a stream after a row; steps, tokens: of the run
    forwards, rows: of a process in a step, and of a forward
    documents: the most in a row; known: whether the data has them, not the plan
    memory: of a device, without and with gradient checkpointing; checkpointed: which of them the run has
    weights, optimizer: bytes in a checkpoint, of which ``keep`` are kept; with the averages of ``train.ema``
    """

    processes: int
    precision: str
    parameters: int
    active: int
    long_term: int
    trained: int
    flops: float
    state: int
    steps: int
    tokens: int
    forwards: int
    rows: int
    documents: int
    known: bool
    memory: dict[bool, DeviceMemory]
    checkpointed: bool
    weights: int
    optimizer: int
    keep: int

    @property
    def total_flops(self) -> float:
        """FLOPs of the run; a backward costs two forwards. Repeated forwards of checkpointing do not count."""
        return 3 * self.flops * self.tokens

    def hours(self, flops: float, mfu: float) -> float:
        """Hours of the run on devices of this peak."""
        return self.total_flops / (self.processes * flops * mfu) / 3600

    def lines(self) -> list[str]:
        """The plan as text."""
        of = "" if self.trained == self.parameters else f", {self.trained:,} trained"
        long_term = f", {self.long_term:,} of layers' long-term memory" if self.long_term else ""
        less = ", or less, as not all is trained" if of else ""
        memory, other = self.memory[self.checkpointed], self.memory[not self.checkpointed]
        word = "without" if self.checkpointed else "with"
        told = {
            "run": f"{self.steps:,} steps x {self.tokens // self.steps:,} tokens = {self.tokens:,} tokens, by "
            f"{self.processes} process{'es' * (self.processes > 1)} in {self.precision}; a step of one has "
            f"{self.forwards} forward{'s' * (self.forwards > 1)} of {self.rows} rows",
            "parameters": f"{self.parameters:,}, {self.active:,} active for a token{long_term}{of}",
            "FLOPs": f"{self.flops / 1e6:,.1f} MFLOPs a token forward, three times that with its backward{less}; "
            f"{self.total_flops:.3g} in the run",
            "state": f"{_bytes(self.state)} of a stream after a row",
            "memory": f"{_bytes(memory.most)} of a device at once: weights {_bytes(memory.weights)}, gradients "
            f"{_bytes(memory.gradients)}, optimiser {_bytes(memory.optimizer)}, activations "
            f"{_bytes(memory.activations)}",
            "": f"{_bytes(other.most)} {word} gradient checkpointing, activations {_bytes(other.activations)}; "
            "by the reference ops, kernels of a GPU need less",
            " ": f"rows have up to {self.documents} document{'s' * (self.documents > 1)}"
            + ("" if self.known else ", a guess: prepare the data, and the plan looks at them"),
            "checkpoint": f"{_bytes(self.weights + self.optimizer)}, of which weights {_bytes(self.weights)}; "
            f"{self.keep} are kept",
            "hours": "".join(f"{f'MFU {mfu:g}':>10}" for mfu in _MFUS)
            + f"  of the dense bf16 peak of {self.processes} x",
        }
        lines = [f"{name:<11}{text}" for name, text in told.items()]
        for device, name in {device: name for name, device in reversed(DEVICES.items())}.items():
            hours = "".join(f"{self.hours(device.flops, mfu):>10,.2f}" for mfu in _MFUS)
            lines.append(f"{'':11}{hours}  {name}" + (": memory too small" if memory.most > device.memory else ""))
        return lines


def plan(settings: RunSettings, processes: int, precision: str) -> RunPlan:
    """Raises ValueError, one line, for a run that cannot be planned or begun."""
    train, data = settings.train, settings.config["data"]
    key = "train.dry_run"
    new = "backbone" not in settings.config["model"]
    require(new, f"{key}: only a new decoder is planned; leave backbone=... out, or train.dry_run")
    known = not isinstance(train.trainable, dict)
    require(known, f"{key}: train.trainable={train.trainable} depends on weights; plan with null, or patterns")
    # Processes that share rows have stretches of them; a truncated backward is of pieces.
    sharing = settings.hardware.sequence_parallel
    owners = sequence.rows_of(sharing, processes)
    forwards = train.forwards(owners)
    rows = train.batch_size // owners // forwards
    batch, entries, known_rows = _sample(settings, owners * forwards, train.truncate or data["seq_len"] // sharing)
    config = MemLMConfig.from_hydra({"vocab_size": entries, **_without_none(settings.config["model"])})
    with FakeTensorMode():
        model = MemLMForCausalLM(config)
        chosen = trainable.choose(model, train.trainable)
        trainable.train_only(model, chosen)
        optimizer, stepping = of_optimizers(build_optimizers(model, settings.optim))
        weights = sum(p.nbytes for p in model.parameters())
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        averages = 4 * count_parameters(model, trained=True) if train.ema else 0
    autocast = nullcontext() if precision == "no" else torch.autocast("cpu", _DTYPES[precision])
    length, sharers = data["seq_len"], settings.hardware.sharers(processes)
    lengths = [length, *(of for of, _ in train.lengths or [])]
    stages = Stages(train.lengths or [], length, train.batch_size * length)
    sequence.check_stretches(model, sharing, lengths, settings.hardware.compile, sharers > 1)
    pieces = sequence.pieces_of(train.truncate, model, lengths, sharing > 1)
    if train.carry:
        sequence.check_carry(model, lengths, sharing > 1)
    if sharers > 1:
        check_divisible(model)
    inputs = model_inputs(batch, "cpu")
    rounded = sharers > 1 and in_bf16(precision, settings.hardware.compile)
    step = of_step(config, train, inputs, autocast, rounded)
    names = config.layer_mixers()
    state = state_bytes(config, length)
    memories = rows * forwards if train.carry else rows if pieces > 1 else 0
    held = (weights + optimizer + averages) / sharers + _size(batch) + memories * state
    if sharers > 1:
        # Layers are gathered while they run, the next one ahead, and the gradients of the last one are still summed;
        # the parameters around them are whole all the time.
        held += weights
        gathered, summed = [], []
        for layer in model.model.layers:
            whole = sum(p.nbytes for p in layer.parameters())
            held -= whole
            gathered.append(whole - rounded * sum(p.nbytes // 2 for m in matrices(layer) for p in m.parameters()))
            summed.append(sum(p.nbytes for p in layer.parameters() if p.requires_grad))
        held += sum(sorted(gathered)[-2:]) + max(summed)
    elif processes > 1:
        # DDP copies gradients into its buckets, which it keeps.
        held += gradients
    memory = {}
    asked = train.gradient_checkpointing
    chosen_layers = layers_of(config, asked) if isinstance(asked, list) else range(len(names))
    for checkpointed in (False, True):
        layers = chosen_layers if checkpointed else ()
        activations = step.peak(names, layers)
        # Gradients of a first forward remain during a second one, whole.
        again = forwards * pieces > 1
        passes = activations + gradients if again else step.peak(names, layers, kept=1 / sharers)
        at_once = held + max(passes, (gradients + stepping - optimizer) / sharers)
        kept = (size / sharers for size in (weights, gradients, optimizer + averages))
        memory[checkpointed] = DeviceMemory(*kept, activations, at_once)
    return RunPlan(
        processes,
        {"no": "fp32"}.get(precision, precision),
        count_parameters(model),
        count_active_parameters(model),
        sum(p.numel() for name, p in model.named_parameters() if name in {*trainable.memory_names(model)}),
        count_parameters(model, trained=True),
        _mean_flops(config, stages.steps(train.steps)),
        state,
        train.steps,
        train.steps * train.batch_size * length,
        forwards,
        rows,
        batch.max_documents,
        known_rows,
        memory,
        bool(asked),
        weights,
        optimizer + averages,
        train.keep,
    )


def _mean_flops(config: MemLMConfig, stages: Mapping[int, int]) -> float:
    """FLOPs of a token's forward, in the mean of steps with rows of several lengths. stages: steps of each length"""
    counts = {length: count_flops(config, length) for length, steps in stages.items() if steps}
    if len(counts) == 1:
        return next(iter(counts.values()))
    return sum(stages[length] * count for length, count in counts.items()) / sum(stages.values())


def show(settings: RunSettings, precision: str) -> None:
    """Print the plan, once."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    made = plan(settings, world if settings.dry_run is True else settings.dry_run, precision)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(made.lines()))


def _sample(settings: RunSettings, parts: int, length: int) -> tuple[Batch, int, bool]:
    """A batch of one forward, with rows of this length; the entries of the tokenizer; whether the documents of a row
    are known. They are if text was encoded; otherwise it is not read, and rows of it have two.
    """
    data, size = settings.config["data"], settings.train.batch_size
    given = settings.config["model"].get("vocab_size")
    mixture, most = None, 2
    if is_made_by_rule(data):
        tokenizer, mixture = build_data(data, seed=settings.seed, batch_size=size)
    elif os.path.isdir(os.path.expanduser(str(data.get("cache_dir")))):
        # Mistakes in the data's settings are found by the run itself: its files may be on another machine.
        with suppress(ValueError), only_built():
            tokenizer, mixture = build_data(data, seed=settings.seed, batch_size=size)
    if mixture is not None:
        entries = given or len(tokenizer)
        mixture.inject(settings.train.steps)
        # The memory of a step follows the row with the most documents.
        most = max(mixture.batch(step).max_documents for step in range(_SEEN))
        Lengths(settings.train.lengths or [], mixture, data["seq_len"])
        row = mixture.batch(0, parts=parts)
        if settings.train.carry:
            mixture.carry()
        if length == data["seq_len"]:
            return replace(row, max_documents=most), entries, True
    shape = size // parts, length
    ids = torch.zeros(shape, dtype=torch.int64)
    positions = (torch.arange(length) % -(-length // 2)).expand(shape)
    batch = Batch(ids, ids, positions, most, ids[:, 0])
    if mixture is not None:
        return batch, entries, True
    tokenizer = data["tokenizer"]
    if given is None and isinstance(tokenizer, Mapping) and [*tokenizer] == ["bpe"]:
        given = tokenizer["bpe"]
    try:
        return batch, given or len(load_tokenizer(tokenizer)), False
    except ValueError as error:
        raise ValueError(f"{error}; or plan without it: +model.vocab_size=32000") from error


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _size(batch: Batch) -> int:
    return sum(x.nbytes for x in vars(batch).values() if isinstance(x, torch.Tensor))


def _bytes(count: float) -> str:
    # Rounded first, because 999.9 MB are 1 GB.
    count = float(f"{count:.3g}")
    power = min(5, int(math.log10(max(1, count))) // 3)
    return f"{count / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
