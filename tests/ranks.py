"""Tests of several processes: they meet by gloo, and save their results in files."""

import os
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

import memlm.training
from memlm.cli import leave_group
from memlm.training import tracking
from tests import processes


def run(work, size, folder, *arguments):
    """Results of ``work(rank, size, *arguments)``, a function of a module, on ``size`` processes."""
    processes.serve()
    mp.start_processes(_start, (size, folder, work, arguments), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


def _start(rank, size, folder, work, arguments):
    torch.set_num_threads(1)
    # As torchrun sets them; nothing listens at the port.
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    os.environ |= {"MASTER_ADDR": "localhost"} | {name: str(x) for name, x in places.items()}
    # A deadlock ends in time.
    limit = timedelta(minutes=4)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=limit)
    torch.save(work(rank, size, *arguments), folder / f"rank{rank}.pt")
    dist.barrier()
    leave_group()


def train(cfgs, size=1, prepare=None):
    """Train a run, or one after another of a list, on ``size`` processes, with all digits in ``metrics.jsonl``.

    prepare: a function of a module, called first on each of several processes
    """
    cfgs = cfgs if isinstance(cfgs, list) else [cfgs]
    if size == 1:
        _train(0, 1, cfgs, prepare)
        return
    with TemporaryDirectory() as folder:
        run(_train, size, Path(folder), cfgs, prepare)


def _train(rank, size, cfgs, prepare):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "_short", lambda value: value)
        if prepare:
            prepare(patch)
        for cfg in cfgs:
            memlm.training.run(cfg)
            AcceleratorState._reset_state(reset_partial_state=True)
