#!/usr/bin/env python
"""Measure the training loop around the model: its overhead, the stall of a save, the start of a run; and a step of one
run beside that of another.

    python scripts/benchmark_training.py loop [--rounds 5] [key=value ...]
    python scripts/benchmark_training.py beside --than key=value [--than ...] [--rounds 5] [key=value ...]
    python scripts/benchmark_training.py start [key=value ...]
    torchrun --nproc_per_node 2 scripts/benchmark_training.py save hardware=fsdp2 [key=value ...]

``loop``: steps of the loop beside forward, backward, clipping and update on batches that are ready, step by step in
turns. Times are those of the process's threads (``time.process_time``). A round takes the median of what a step of the
loop costs more, of 40 plain steps and of 10 logged ones, and weighs them as 19 to 1. The figure is the median of the
rounds and their range.
``beside``: forward, backward, clipping and update with the settings, beside those with the settings of ``--than`` too,
in turns: the ratio of a round's 10 steps, the median of the rounds and their range.
``save``: seconds that a save and the three steps beside its writing take longer than three steps, in steps.
``start``: seconds from the end of the imports to the end of the first step, of a new run with its data in the cache.

The settings are those of ``train.py``; runs go to a temporary folder.
"""

import argparse
import itertools
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


def bare_step(made: Any) -> Callable[[], None]:
    """A step on the next of some batches that are ready."""
    batches = itertools.cycle([list(made.feed.inputs(step)) for step in range(STEPS)])

    def bare() -> None:
        given = next(batches)
        for _, inputs in given:
            with made.accelerator.autocast():
                loss, *_ = made.objective(**inputs, output_metrics=False)
            (loss / len(given)).backward()
        made.accelerator.clip_grad_norm_(made.objective.parameters(), made.optim.clip)
        for optimizer in made.optimizers:
            optimizer.optimizer.step()
            optimizer.optimizer.zero_grad()

    return bare


def measure_beside(folder: str, overrides: list[str], than: list[str], rounds: int) -> None:
    given = {"one": [*overrides, *than], "other": overrides}
    steps = [bare_step(trainer(f"{folder}/{name}", settings)) for name, settings in given.items()]
    ratios = []
    for _ in range(rounds + 1):
        took = [0.0, 0.0]
        for turn in range(10):
            for i in (0, 1) if turn % 2 else (1, 0):
                took[i] += cost(steps[i])
        ratios.append(took[1] / took[0])
    # The first round warms up.
    ratios = ratios[1:]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}, {rounds} rounds of 10 steps"
    print(f"a step costs {statistics.median(ratios):.3f} of one with {' '.join(than)} ({spread})")


def measure_loop(folder: str, overrides: list[str], rounds: int) -> None:
    made = trainer(folder, overrides)
    bare = bare_step(made)

    def whole(logged: bool) -> None:
        figures = made._one_step(logged)
        made.display.advance(made.step)
        if logged:
            made._read(figures) | made._speed(1.0, STEPS)

    def more(logged: bool, pairs: int) -> tuple[float, float]:
        """Seconds of a bare step, and how many more a step of the loop takes."""
        took = [(cost(bare), cost(lambda: whole(logged))) for _ in range(pairs)]
        return statistics.median(one for one, _ in took), statistics.median(two - one for one, two in took)

    made.display.begin(0)
    with made.display:
        more(True, 3)
        shares = []
        for _ in range(rounds):
            (plain, above), (_, above_logged) = more(False, 40), more(True, 10)
            shares.append(((STEPS - 1) * above + above_logged) / STEPS / plain)
    spread = f"{min(shares):.2%} to {max(shares):.2%}"
    print(f"loop over bare steps: {statistics.median(shares):.2%} ({spread}, {rounds} rounds of 50 steps)")


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
    parser.add_argument("figure", choices=("loop", "beside", "save", "start"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--than", action="append", metavar="key=value", help="a setting of the other run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of train.py")
    given = parser.parse_intermixed_args()
    if (given.figure == "beside") != bool(given.than):
        parser.error("--than key=value is of beside, which needs it")
    with tempfile.TemporaryDirectory() as folder:
        if given.figure == "loop":
            measure_loop(folder, given.overrides, given.rounds)
        elif given.figure == "beside":
            measure_beside(folder, given.overrides, given.than, given.rounds)
        elif given.figure == "save":
            measure_save(folder, given.overrides)
        else:
            measure_start(folder, given.overrides)


if __name__ == "__main__":
    main()
