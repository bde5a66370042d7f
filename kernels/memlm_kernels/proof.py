"""Whether Triton's kernels are right on the GPU at hand. ``auto`` asks, and the first time a trial gives the answer.

A trial (``memlm_kernels.trial``) compares one kind of call with its reference. It runs in a process of its own, so a
kernel that faults or never ends costs only that process, and the caller's streams, graphs, modes and random numbers
stay as they are. The verdict is a file in $XDG_CACHE_HOME/memlm or ~/.cache/memlm, for all later processes.
"""

import functools
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Architecture, version of Triton, version of ptxas (on HIP ""): all tests have passed there, and no trial is needed.
PROVEN: frozenset[tuple[str, str, str]] = frozenset()

# How a kernel is compiled, the fastest way first: with the tiles of its launcher, or with fewer instructions at once,
# where compilers are known to be wrong. The environment is read at each compilation.
FIRST, SAFE, PLAIN = "first tiles", "4 warps and 1 stage", "4 warps, 1 stage and mma.sync"
WAYS: dict[str, dict[str, str]] = {FIRST: {}, SAFE: {}, PLAIN: {"DISABLE_MMA_V3": "1", "DISABLE_MMA_V5": "1"}}
# The way of each kernel, by its name.
ways: defaultdict[str, str] = defaultdict(lambda: FIRST)

PATIENCE = 240  # Seconds for a trial, with compilation.

logger = logging.getLogger(__name__)


class Claim(NamedTuple):
    """The scope of a verdict. call: a name of ``memlm_kernels.calls``; channels: key and value dim, () for any"""

    call: str
    dtype: torch.dtype
    channels: tuple[int, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([self.call, dtype, *(["x".join(map(str, self.channels))] if self.channels else [])])


class Verdict(NamedTuple):
    """way: how the kernels passed, None if they did not; tried: why the ways before it failed; error: the largest, as
    a share of the tolerance; kernels: those that ran; lasting: whether it holds for later processes
    """

    way: str | None
    tried: dict[str, str]
    error: float = 0.0
    seconds: float = 0.0
    kernels: tuple[str, ...] = ()
    lasting: bool = True

    @property
    def reason(self) -> str | None:
        """Why the kernels must not run, None if they may."""
        failures = "; ".join(f"{way}: {fault}" for way, fault in self.tried.items())
        return None if self.way else f"Triton's kernels are not proven ({failures})"


_found: dict[tuple[Claim, int | None], Verdict] = {}
_lock = threading.Lock()


@torch.compiler.assume_constant_result
def against(call: str, dtype: torch.dtype, channels: tuple[int, ...], device: torch.device) -> str | None:
    """Why ``auto`` must not take Triton's kernels on a GPU, None if it may. The first time it tries them."""
    kind = Claim(call, dtype, channels)
    found = _found.get((kind, device.index))
    if found is None:
        # The calls import the ops, which import this.
        from memlm_kernels.calls import CALLS

        if call not in CALLS:
            return f"there is no trial of {call}; ask for its kernels by backend='triton'"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is captured; call the op once before"
        found = verdict(kind, device)
    return found.reason


def verdict(kind: Claim, device: torch.device) -> Verdict:
    """The verdict from memory, from its file, or from a trial."""
    with _lock:
        found = _found.get((kind, device.index)) or known(kind, device) or prove(kind, device)
        _found[kind, device.index] = found
        if found.way:
            for kernel in found.kernels:
                # Kinds that share a kernel may need different ways.
                ways[kernel] = max(ways[kernel], found.way, key=list(WAYS).index)
    return found


def known(kind: Claim, device: torch.device) -> Verdict | None:
    """The verdict of an earlier trial with the same GPU, packages and kernels, None if there is none."""
    here = surroundings(device)
    if (here["architecture"], here["triton"], here["ptxas"]) in PROVEN:
        return Verdict(FIRST, {})
    return _read(_file(kind, here), here).get(str(kind))


def prove(kind: Claim, device: torch.device) -> Verdict:
    """Hold a trial, log a line and keep the verdict."""
    begin, tried, found = time.monotonic(), dict[str, str](), None
    for way in WAYS:
        # Only NVIDIA's GPUs since Hopper have other instructions for products.
        if way == PLAIN and not re.match("sm_(9|1)", architecture(device)):
            continue
        result = _tried(kind, device, way)
        seconds = round(time.monotonic() - begin, 1)
        if "unable" in result:
            found = Verdict(None, tried | {way: result["unable"]}, 0.0, seconds, (), lasting=False)
        elif result["fault"] is None:
            found = Verdict(way, tried, result["error"], seconds, tuple(result["kernels"]))
        else:
            tried[way] = result["fault"]
            continue
        break
    found = found or Verdict(None, tried, seconds=seconds)
    _tell(kind, device, found)
    if found.lasting:
        _write(kind, device, found)
    return found


def kept(device: torch.device) -> dict[str, Verdict]:
    """All verdicts of earlier trials that hold here, by kind."""
    here = surroundings(device)
    return {kind: x for path in _file(None, here).parent.glob("*.json") for kind, x in _read(path, here).items()}


def _read(path: Path, here: dict[str, Any]) -> dict[str, Verdict]:
    """The verdict of a file, by its kind; nothing where there is no file, or one that something else wrote."""
    try:
        found = json.loads(path.read_text())
        if found.pop("surroundings") == here and found["way"] in (*WAYS, None):
            return {found.pop("kind"): Verdict(**{**found, "kernels": tuple(found["kernels"])})}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def _tried(kind: Claim, device: torch.device, way: str) -> dict[str, Any]:
    """The result of a trial in another process; ``unable``: why there is none."""
    request = {**kind._asdict(), "dtype": str(kind.dtype).removeprefix("torch."), "device": str(device), "way": way}
    environment = {name: x for name, x in os.environ.items() if name != "MEMLM_AUTOTUNE"} | WAYS[way]
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    command = [sys.executable, "-m", "memlm_kernels.trial", json.dumps(request)]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return {"unable": f"no answer in {PATIENCE} seconds"}
    except OSError as error:
        return {"unable": f"no process for a trial: {error}"}
    lines: list[dict[str, Any]] = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"trial"')]
    if lines and lines[-1].keys() & {"fault", "unable"}:
        return lines[-1]
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]
    died = f"the process ended with {done.returncode}: {last}"
    return {"fault": died} if lines else {"unable": died}


def _tell(kind: Claim, device: torch.device, found: Verdict) -> None:
    here = surroundings(device)
    place = f"{here['architecture']} (Triton {here['triton']}{here['ptxas'] and ', ptxas ' + here['ptxas']})"
    said = f"{kind}: Triton's kernels passed their trial on {place} in {found.seconds:.0f} s"
    if found.reason:
        said = f"{kind}: auto takes the reference on {place}: {found.reason}"
    elif found.tried:
        said += f" with {found.way}; {'; '.join(f'{way}: {fault}' for way, fault in found.tried.items())}"
    if found.tried and (faults := known_faults(here["architecture"], here["triton"], here["ptxas"])):
        said += f". {' '.join(faults)}"
    logger.log(logging.WARNING if found.tried else logging.INFO, said)


def _write(kind: Claim, device: torch.device, found: Verdict) -> None:
    """Atomic, and a file for each kind, so that several processes never lose one another's verdicts."""
    here = surroundings(device)
    path = _file(kind, here)
    kept = {name: x for name, x in found._asdict().items() if name != "lasting"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(kept | {"kind": str(kind), "surroundings": here}, file)
        os.replace(file.name, path)
    # The verdict then holds for this process.
    except OSError as error:
        logger.info("%s: the verdict is not kept: %s", kind, error)


def folder() -> Path:
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "memlm"


def _file(kind: Claim | None, here: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
    return folder() / f"{here['architecture']}-{digest}" / f"{re.sub('[^a-z0-9_]+', '-', str(kind))}.json"


@functools.cache
def surroundings(device: torch.device) -> dict[str, Any]:
    """All that a verdict depends on besides its claim."""
    from triton import __version__
    from triton._C.libtriton import get_cache_invalidating_env_vars

    here, source = Path(__file__).parent, hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        source.update(f"{path.relative_to(here)}\n".encode() + path.read_bytes())
    return {
        "architecture": architecture(device),
        "torch": torch.__version__,
        "triton": __version__,
        "ptxas": _ptxas(device),
        "settings": dict(get_cache_invalidating_env_vars()),
        "kernels": source.hexdigest()[:16],
    }


def _ptxas(device: torch.device) -> str:
    name = architecture(device)
    if not name.startswith("sm_"):
        return ""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(int(name.removeprefix("sm_"))).version)


@torch.compiler.assume_constant_result
def architecture(device: torch.device) -> str:
    """The name of a GPU's architecture, such as sm_90 or gfx942; a CPU has Triton's interpreter."""
    if device.type == "cpu":
        return "cpu"
    found = torch.cuda.get_device_properties(device)
    return found.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


def known_faults(architecture: str, triton: str, ptxas: str) -> list[str]:
    """Published faults of compilers in code like that of the kernels; a trial decides whether they matter."""
    faults = []
    if wrong_on_hopper(architecture, triton):
        faults.append(
            "Triton 3.4 to 3.7.0 is known to compile wrong products on Hopper: of an operand in registers behind "
            "asynchronous products, and with more than 4 warps and blocks of 16 or 32 "
            "(flash-linear-attention #640, #826; triton #11047, #11366)."
        )
    if architecture == "sm_90" and ptxas.startswith(("12.8", "12.9")):
        faults.append(
            f"ptxas {ptxas} is known to reuse registers of unfinished products "
            "(flash-linear-attention #1262; triton #11781); TRITON_PTXAS_PATH may name a newer one."
        )
    return faults


def wrong_on_hopper(architecture: str, triton: str) -> bool:
    version = tuple(int(x) for x in re.findall(r"\d+", triton)[:3])
    return architecture == "sm_90" and (3, 4, 0) <= version < (3, 7, 1)
