"""Shared by the scripts that measure on a GPU: records with their versions, and calls that may end their process."""

import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PATIENCE = 60  # Seconds for a call, with compilation.


@functools.cache
def machine() -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    ptxas = ""
    if GPU:
        # It takes longer to import than the ceilings to measure.
        from memlm_kernels import proof

        ptxas = proof.surroundings(torch.device("cuda", 0))["ptxas"]
    version = next((found.version for found in importlib.metadata.distributions(name="triton")), "missing")
    return {
        "hardware": torch.cuda.get_device_name() if GPU else f"{platform.machine()}, no GPU",
        "torch": torch.__version__,
        "triton": version,
        "ptxas": ptxas,
        "cuda_or_rocm": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """The commit of the checkout; COMMIT names it in a copy without history."""
    if told := os.environ.get("COMMIT"):
        return told
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        said = ""
    return said or "unknown"


def write(out: Path, record: dict[str, Any]) -> None:
    """Print the record and add it to a file, at once, because the process may be stopped."""
    line = json.dumps(record | machine())
    print(line, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(f"{line}\n")


def works() -> bool:
    """Whether the GPU still works in this process; after a kernel's fault every call fails."""
    try:
        if GPU:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _serve(pipe: Connection, function: Callable[..., Any]) -> None:
    while True:
        answer = function(*pipe.recv())
        pipe.send((answer, works()))


class Elsewhere:
    """Calls a function of a module in another process, which is started again after a fault, or where a call never
    ends. The function returns a value, or raises nothing.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.running: multiprocessing.context.SpawnProcess | None = None

    def __call__(self, *arguments: Any) -> tuple[Any, str | None]:
        """The value, or else the reason why there is none."""
        if self.running is None:
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self.running = spawn.Process(target=_serve, args=(theirs, self.function), daemon=True)
            self.running.start()
            theirs.close()
        try:
            self.pipe.send(arguments)
            if not self.pipe.poll(PATIENCE):
                self.end()
                return None, f"no answer in {PATIENCE} seconds"
            value, well = self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            return None, "the process died"
        if not well:
            self.end()
        return value, None

    def end(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.join(5)
            self.running = None
