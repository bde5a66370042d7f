"""Which implementation of an op runs: ``auto``, ``reference`` (plain PyTorch, any device), ``triton``; ``fla``, see
``peer``.
"""

import importlib.util
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

# Compute capabilities and gfx names on which tests/kernels/test_triton*.py have passed. Elsewhere Triton's kernels run
# when asked for, and ``auto`` takes the reference: what never ran may be wrong without a word.
PROVEN: frozenset[str] = frozenset()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What kernels count within a row has 32 bits, with room to count a little further; places of elements have 64.
MOST = 2**31 - 2**16

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()


def choose(op: str, backend: str, available: tuple[str, ...], refused: Mapping[str, str] | None = None) -> str:
    """Resolve ``backend`` for ``op``; ``available`` lists what can run here, the one for ``auto`` first, and
    ``refused`` says why others cannot.

    ``auto`` logs its choice once for each op. Raises ValueError for a backend that cannot run: there is no silent
    fallback.
    """
    if backend == "auto":
        backend = available[0]
        if (op, backend) not in _announced:
            _announced.add((op, backend))
            logger.info("%s: backend %s", op, backend)
    elif backend not in available:
        reason = (refused or {}).get(backend)
        because = f": {reason}" if reason else ""
        raise ValueError(
            f"{op}: backend={backend!r} cannot run here{because}; use one of auto, {', '.join(available)}"
        )
    return backend


def with_triton(x: Tensor, limit: str | None, *others: Tensor | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """What ``choose`` takes, for an op that has the backends ``reference`` and ``triton``.

    limit: what of the call Triton's kernels do not take, None if they take it; others: more of its tensors. ``auto``
    takes them on a GPU where they are ``PROVEN``. On a CPU they run in Triton's interpreter, which is for tests.
    """
    reason = missing_triton(x.device.type) or limit
    if x.is_floating_point() and x.dtype not in DTYPES:
        reason = reason or f"its kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if long := [size for tensor in (x, *others) if tensor is not None for size in tensor.shape if size > MOST]:
        reason = reason or f"its kernels take at most {MOST} along a dimension, not {long[0]}"
    if reason:
        return ("reference",), {"triton": reason}
    proven = x.device.type == "cuda" and architecture(x.device) in PROVEN
    return (("triton", "reference") if proven else ("reference", "triton")), {}


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

    if device_type == "cuda" or (knobs.runtime.interpret and device_type == "cpu"):
        return None
    return f"Triton compiles nothing for {device_type}; for tests TRITON_INTERPRET=1 interprets its kernels"
