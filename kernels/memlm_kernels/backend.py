"""Which implementation of an op runs: ``auto``, ``reference`` (plain PyTorch, any device), ``triton``; ``fla``, see
``peer``. ``set_backend`` says it for all ops at once.
"""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Compute capabilities and gfx names on which tests/kernels/test_triton*.py have passed. Elsewhere Triton's kernels run
# when asked for, and ``auto`` takes the reference: what never ran may be wrong without a word.
PROVEN: frozenset[str] = frozenset()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

BACKENDS = ("auto", "reference", "triton", "fla")

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()
# What a call without a backend of its own takes, and how errors call it. No ContextVar: torch.compile guards globals.
_asked, _key = "auto", "backend"


class set_backend:
    """What every op takes whose call names no backend: from now on, or as a context until its end.

    ``reference``: torch's own operations alone. ``triton``, ``fla``: those kernels for each op that has them, which
    raises ValueError where they cannot run; the other ops are as with ``auto``. Holds for the whole process.
    key: what errors call it. Raises ValueError for another name.
    """

    def __init__(self, backend: str, key: str = "backend") -> None:
        global _asked, _key
        if backend not in BACKENDS:
            raise ValueError(f"{key}={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
        self._before = _asked, _key
        _asked, _key = backend, key

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        global _asked, _key
        _asked, _key = self._before


def choose(op: str, backend: str, available: tuple[str, ...], refused: Mapping[str, str] | None = None) -> str:
    """Resolve ``backend`` for ``op``; ``available`` lists what can run here, the one for ``auto`` first, and
    ``refused`` says why others cannot.

    ``auto`` is what ``set_backend`` asks for; unless it asks for another it logs its choice once for each op. Raises
    ValueError for a backend that cannot run: there is no silent fallback.
    """
    refused, key = refused or {}, "backend"
    if backend == "auto":
        if _asked == "reference":
            available = tuple(name for name in available if name not in ("triton", "fla"))
        elif _asked in available or _asked in refused:
            backend, key = _asked, _key
    if backend == "auto":
        backend = available[0]
        if (op, backend) not in _announced:
            _announced.add((op, backend))
            logger.info("%s: backend %s", op, backend)
    elif backend not in available:
        because = f": {refused[backend]}" if backend in refused else ""
        raise ValueError(f"{op}: {key}={backend!r} cannot run here{because}; use one of auto, {', '.join(available)}")
    return backend


def with_triton(x: Tensor, limit: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """What ``choose`` takes, for an op that has the backends ``reference`` and ``triton``.

    limit: what of the call Triton's kernels do not take, None if they take it. ``auto`` takes them on a GPU where they
    are ``PROVEN``. On a CPU they run in Triton's interpreter, which is for tests.
    """
    reason = missing_triton(x.device.type) or limit
    if x.is_floating_point() and x.dtype not in DTYPES:
        reason = reason or f"its kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if reason:
        return ("reference",), {"triton": reason}
    return (("reference", "triton") if unproven(x.device) else ("triton", "reference")), {}


def unproven(device: torch.device) -> str | None:
    """Why ``auto`` takes the reference where Triton's kernels can run, None if it takes them."""
    if device.type != "cuda":
        return "Triton's interpreter is for tests"
    name = architecture(device)
    return None if name in PROVEN else f"not proven on {name}, where the tests of Triton's kernels have not passed yet"


@torch.compiler.assume_constant_result
def architecture(device: torch.device) -> str:
    """Of a GPU: sm_90, gfx942."""
    found = torch.cuda.get_device_properties(device)
    return found.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


@torch.compiler.assume_constant_result
def missing_triton(device_type: str) -> str | None:
    """Why Triton's kernels cannot run on a kind of device, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'memlm[cpu-kernels]', or a torch that brings it)"
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    if device_type == "cuda":
        return None
    return f"Triton compiles nothing for {device_type}; for tests TRITON_INTERPRET=1 interprets its kernels"
