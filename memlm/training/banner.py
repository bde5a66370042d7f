"""The first lines of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

import memlm
from memlm.data import left_out
from memlm.flops import count_parameters
from memlm.hub.causal import kinds

if TYPE_CHECKING:
    from memlm.training.loop import Trainer


def lines(run: Trainer) -> Iterator[str]:
    """The model and its sizes, the device, the data and what is left out of them, the place of the run."""
    accelerator, settings, model = run.accelerator, run.settings, run.model
    device, precision = accelerator.device, accelerator.mixed_precision
    where = f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
    if accelerator.num_processes > 1:
        where = f"{accelerator.num_processes} processes, {where}"
    stages = run.feed.lengths.stages
    flops = "" if run.flops is None else f"{run.flops[stages.row] / 1e6:,.1f} MFLOPs a token forward, "
    whole, trained = (count_parameters(model, trained=of) for of in (False, True))
    some = f" ({trained:,} trained)" if trained < whole else ""
    about = f"{', '.join(kinds(model))}, {whole:,} parameters{some}"
    yield f"memlm {memlm.__version__}: {about}, {flops}on {where}, {'fp32' if precision == 'no' else precision}"
    if device.type == "cpu":
        yield "no GPU: the preset for CPUs, minutes long"
    mixture = ", ".join(f"{name} {count:g}" for name, count in run.mixture.counts.items())
    tokens = run.tokens_per_step()
    yield f"rows a batch: {mixture}; {settings.steps:,} steps x {tokens:,} tokens = {tokens * settings.steps:,}"
    if settings.lengths:
        yield f"tokens of a row: {stages}"
    for name, manifest in run.mixture.manifests.items():
        if reasons := left_out(manifest):
            yield f"data.sources.{name}: {len(manifest['files'])} files; not read: {reasons} (manifest-{name}.json)"
    for name, line in run.mixture.repeated(settings.steps).items():
        yield f"data.sources.{name}: {line}"
    yield f"run: {run.run_dir}" + (f", continuing from step {run.step}" if run.step else "")
