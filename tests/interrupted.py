"""Runs that random signals stop, started again until they are done.

    python -m tests.interrupted FOLDER SIGNALS SEED

Each attempt is a fork, so that nothing is imported twice. The script prints the number of signals of each kind, and
the number of runs whose files equal those of a run without signals. It exits with 1 at the first difference.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from memlm.training import checkpoint, run
from memlm.training.interrupt import Stopped
from tests.runs import SMALLEST, config

STEPS = 12
KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)


def attempt(folder: Path, number: int = 0, after: float = 0.0) -> int:
    """The exit code of the run in ``folder``, which gets a signal after so many seconds."""
    cfg = config(folder, f"train.steps={STEPS}", "tracker=none", small=SMALLEST)
    pid = os.fork()
    if pid == 0:
        code = 0
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        try:
            run(cfg)
        except Stopped as stopped:
            code = 128 + stopped.number
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    if number:
        time.sleep(after)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left(folder: Path) -> dict[str, object]:
    """The files of a finished run, without its speed and without earlier checkpoints, which depend on the signals."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    of_machine = ("tokens_per_second", "tflops", "mfu", "peak_memory", "seconds/")
    contents: dict[str, object] = {
        "metrics": [{k: v for k, v in line.items() if not k.startswith(of_machine)} for line in lines]
    }
    newest, damaged = checkpoint.newest_whole(folder / "run")
    assert newest and not damaged
    # Pickles of equal content may differ in the objects that they share.
    contents["trainer.pt"] = plain(checkpoint.load_trainer(newest))
    names = ("config.json", "model.safetensors", "run.json", "tokenizer.json")
    return contents | {f"{newest.name}/{name}": (newest / name).read_bytes() for name in names}


def plain(state: object) -> object:
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return (state.dtype, state.tolist()) if isinstance(state, torch.Tensor) else state


def main(folder: Path, signals: int, seed: int) -> None:
    random.seed(seed)
    disable_progress_bar()
    assert attempt(folder / "straight") == 0
    started = time.perf_counter()
    assert attempt(folder / "again") == 0
    seconds = time.perf_counter() - started
    expected = left(folder / "straight")
    assert left(folder / "again") == expected
    sent, codes, done = 0, Counter[str](), 0
    while sent < signals or not done:
        place, code = folder / f"run{done}", -1
        while code != 0:
            number = random.choice(KINDS) if sent < signals else 0
            code = attempt(place, number, random.uniform(0, seconds))
            if code not in (0, *(128 + n for n in KINDS), *(-n for n in KINDS)):
                sys.exit(f"attempt {sent} ended with {code}")
            sent += number != 0 and code != 0
            codes[str(code)] += 1
        if differ := [name for name, content in left(place).items() if content != expected.get(name)]:
            sys.exit(f"run {done} after {sent} signals differs from one that nobody disturbed: {differ}")
        done += 1
    print(json.dumps({"signals": sent, "runs": done, "exit_codes": codes, "seconds_of_a_run": round(seconds, 2)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
