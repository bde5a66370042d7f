"""Members of a Hydra sweep (``-m``). Each is a process with its own folder; a failed member stops no other."""

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from memlm import files
from memlm.cli import TRACED
from memlm.training.interrupt import Stopped

FAILED = "failed.txt"
# These are part of the default run_dir.
_NAMED = {"name", "seed", "memory"}
_failed: list[str] = []
# Submitit's signal before a job ends.
_PREEMPTED = signal.SIGUSR2


def is_member() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def run_member(cfg: DictConfig, sweep: list[str]) -> None:
    """Run the member that ``cfg`` describes as a separate command; under torchrun, if its launcher has several GPUs.

    sweep: the sweep's own command, its script first

    A failure is recorded in its folder. Raises ``Stopped`` if a signal ends the member, and with it the sweep.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError("a sweep starts its members one after another; call torchrun for each, without -m")
    overrides = [*HydraConfig.get().overrides.task]
    run_dir = member_dir(str(cfg.run_dir), overrides, sweep[1:])
    print(f"sweep: {run_dir}", flush=True)
    quoted = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    launcher = HydraConfig.get().launcher
    # Another process than the sweep's, which it tells of errors alone.
    elsewhere = not launcher._target_.endswith(".BasicLauncher")
    script = [*_several(launcher), sweep[0]]
    command = [sys.executable, *script, *(o for o in overrides if _key(o) != "run_dir"), f"run_dir='{quoted}'"]
    code, told = _passed_on(command, traced=TRACED and not elsewhere)
    record = Path(run_dir, FAILED)
    if code in (128 + s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        raise Stopped(code - 128)
    if code == 0:
        record.unlink(missing_ok=True)
    else:
        files.write(record, f"exit code {code}\n{shlex.join(command)}\n{told}")
        _failed.append(run_dir)
        if elsewhere:
            raise ValueError(f"{run_dir}: exit code {code}, see {FAILED} there")


def end_sweep() -> None:
    """Raise ValueError if members failed."""
    if _failed:
        raise ValueError(f"{len(_failed)} of the sweep's runs failed, see {FAILED} in each: {', '.join(_failed)}")


def member_dir(run_dir: str, overrides: list[str], arguments: list[str]) -> str:
    """``run_dir`` plus the overrides that differ between members, unless they already appear in it."""
    plain = [a for a in arguments if not a.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(plain)
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
    told = set() if any(_key(a) == "run_dir" for a in plain) else _NAMED
    chosen = ",".join(o.lstrip("+~") for o in overrides if _key(o) in swept - told)
    if not chosen:
        return run_dir
    name = re.sub(r"[^\w.,=+-]", "_", chosen)
    if name != chosen or len(name) > 100:
        name = f"{name[:100]}-{hashlib.sha256(chosen.encode()).hexdigest()[:8]}"
    return f"{run_dir},{name}"


def _several(launcher: DictConfig) -> list[str]:
    gpus = launcher.get("gpus_per_node") or 1
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _passed_on(command: list[str], traced: bool) -> tuple[int, str]:
    """The exit code of a command, and the last lines of its errors, which are also printed.

    Signals of this process are passed on once: the child has its own session, so a terminal does not send them again.
    Those that a launcher handles are its own, but the child saves before the launcher queues a preempted job again.
    """
    # user_errors makes Hydra raise here; the child prints its own errors.
    environment = {name: value for name, value in os.environ.items() if traced or name != "HYDRA_FULL_ERROR"}
    # Seconds that torchrun gives its processes to save; its own 30 are too few for a large model.
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )

    preempted = False

    def send(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    def save(number: int, frame: FrameType | None) -> None:
        nonlocal preempted
        preempted = True
        process.send_signal(signal.SIGTERM)

    free = (signal.SIG_DFL, signal.default_int_handler)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {s: signal.signal(s, send) for s in signals if signal.getsignal(s) in free}
    if callable(signal.getsignal(_PREEMPTED)):
        before[_PREEMPTED] = signal.signal(_PREEMPTED, save)
    try:
        tail = deque[str](maxlen=100)
        for line in process.stderr or ():
            sys.stderr.write(line)
            tail.append(line)
        code = process.wait()
    finally:
        if process.stderr:
            process.stderr.close()
        for s, handler in before.items():
            signal.signal(s, handler)
    if preempted:
        signal.raise_signal(_PREEMPTED)
    # A child killed by a signal has a negative exit code; shells use 128 + its number.
    return (128 - code if code < 0 else code), "".join(tail)
