#!/usr/bin/env python
"""Measure the training loop around the model: its overhead, the stall of a save, the start of a run.

    python scripts/benchmark_training.py loop [--blocks 9] [key=value ...]
    python scripts/benchmark_training.py start [key=value ...]
    torchrun --nproc_per_node 2 scripts/benchmark_training.py save hardware=fsdp2 [key=value ...]

``loop``: 20 steps of the loop, the last one logged, beside 20 times forward, backward, clipping and update on batches
that are ready, in turns. Times are those of the process's threads (``time.process_time``). The figure is the median of
the blocks' ratios, and their range.
``save``: seconds that a save and the three steps beside its writing take longer than three steps, in steps.
``start``: seconds from the end of the imports to the end of the first step, of a new run with its data in the cache.

The settings are those of ``train.py``; runs go to a temporary folder.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20


def trainer(folder: str, overrides: list[str]) -> Any:
    from memlm.cli import composed
    from memlm.training import loop
    from memlm.training.settings import RunSettings

    settings = RunSettings.of(composed(ROOT / "configs", "train", [f"run_dir={folder}", *overrides]))
    return loop.Trainer(settings, loop.build_accelerator(settings.hardware))


def cost(call: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    begin = clock()
    call()
    return clock() - begin


def measure_loop(folder: str, overrides: list[str], blocks: int) -> None:
    made = trainer(folder, overrides)
    inputs = [given for step in range(STEPS) for _, given in made.feed.inputs(step)]
    forwards = len(inputs) // STEPS

    def bare() -> None:
        for i, given in enumerate(inputs):
            with made.accelerator.autocast():
                loss, *_ = made.objective(**given, output_metrics=False)
            (loss / forwards).backward()
            if (i + 1) % forwards == 0:
                made.accelerator.clip_grad_norm_(made.objective.parameters(), made.optim.clip)
                for optimizer in made.optimizers:
                    optimizer.optimizer.step()
                    optimizer.optimizer.zero_grad()

    def whole() -> None:
        for i in range(STEPS):
            figures = made._one_step(i == STEPS - 1)
            made.display.advance(made.step)
        made._read(figures) | made._speed(1.0, STEPS)

    made.display.begin(0)
    with made.display:
        bare(), whole()
        ratios = [cost(whole) / cost(bare) - 1 for _ in range(blocks)]
    spread = f"{min(ratios):.2%} to {max(ratios):.2%}"
    print(f"loop over bare steps: {statistics.median(ratios):.2%} ({spread}, {blocks} blocks of {STEPS} steps)")


def measure_save(folder: str, overrides: list[str]) -> None:
    made = trainer(folder, overrides)
    figures = made._one_step(True)

    def step() -> None:
        figures.update(made._one_step(True))
        made.accelerator.wait_for_everyone()

    with made.saver or tempfile.TemporaryDirectory():
        plain = statistics.median(cost(step, time.perf_counter) for _ in range(STEPS))
        saving = []
        for _ in range(5):
            stalled = cost(lambda: made._save(figures, None), time.perf_counter)
            # The writing goes on beside these steps.
            stalled += sum(cost(step, time.perf_counter) - plain for _ in range(3))
            saving.append(stalled / plain)
            for _ in range(3):
                step()
    if made.accelerator.is_main_process:
        spread = f"{min(saving):.2f} to {max(saving):.2f}, {len(saving)} saves"
        print(f"a step takes {plain:.3f} s; a save costs {statistics.median(saving):.2f} steps ({spread})")


def measure_start(folder: str, overrides: list[str]) -> None:
    import memlm.training.loop  # noqa: F401

    for name in ("first", "second"):
        begin = time.perf_counter()
        made = trainer(f"{folder}/{name}", overrides)
        built = time.perf_counter() - begin
        made._one_step(True)
        print(f"{name} run: {built:.1f} s to build, {time.perf_counter() - begin:.1f} s to the end of the first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("loop", "save", "start"))
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of train.py")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.figure == "loop":
            measure_loop(folder, given.overrides, given.blocks)
        elif given.figure == "save":
            measure_save(folder, given.overrides)
        else:
            measure_start(folder, given.overrides)


if __name__ == "__main__":
    main()
