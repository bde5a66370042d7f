"""The choice of an op's implementation: ``auto``, ``reference`` (plain PyTorch, any device), ``triton``, or ``fla``
(see ``recurrence.fla``). ``set_backend`` sets it for all ops at once.
"""

import functools
import importlib
import logging
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memlm_kernels import proof
from memlm_kernels.checks import once_a_kind

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

ABLE = ("triton", "reference")
BACKENDS = ("auto", "reference", "triton", "fla")

# Kernels count within a row in 32 bits, with room to count a little further; offsets of elements have 64 bits.
MOST = 2**31 - 2**16

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()
# The backend of calls that name none, and its name in errors. No ContextVar: torch.compile guards globals.
_asked, _key = "auto", "backend"


class set_backend:
    """Set the backend of every call that names none: from now on, or as a context until its end.

    backend: ``reference``: torch's own operations alone. ``triton``, ``fla``: those kernels for each op that has them;
        such an op raises ValueError where they cannot run, and the other ops behave as with ``auto``
    key: the name of this setting in errors

    The setting holds for the whole process. Raises ValueError if the backend is unknown.
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
    """The backend that a call of ``op`` runs.

    backend: the name that the call gives; ``auto`` takes the one of ``set_backend``, or else the first available one,
        and then logs the choice once for each op
    available: backends that can run here, the one for ``auto`` first
    refused: for other backends, the reason why they cannot run

    Raises ValueError for a backend that cannot run: there is no silent fallback.
    """
    refused, key = refused or {}, "backend"
    if backend == "auto":
        if _asked == "reference":
            available = tuple(name for name in available if name not in ("triton", "fla"))
        elif _asked in available or _asked in refused:
            backend, key = _asked, _key
    if backend == "auto":
        backend = available[0]
        _announce(op, backend)
    elif backend not in available:
        because = f": {refused[backend]}" if backend in refused else ""
        raise ValueError(f"{op}: {key}={backend!r} cannot run here{because}; use one of auto, {', '.join(available)}")
    return backend


# Not traced by a compiler, which has no logger and would guard the set.
@torch.compiler.assume_constant_result
def _announce(op: str, backend: str) -> None:
    if (op, backend) not in _announced:
        _announced.add((op, backend))
        logger.info("%s: backend %s", op, backend)


def with_triton(
    call: str, backend: str, x: Tensor, limit: str | None, *others: Tensor | None, products: bool = True
) -> tuple[tuple[str, ...], dict[str, str]]:
    """``available`` and ``refused`` of ``choose``, for an op with the backends ``reference`` and ``triton``.

    call: the kind of call, a name of ``memlm_kernels.calls``
    backend: the name that the call gives
    x, others: tensors of the call; of ops with products first one with keys, then one with values
    limit: the reason why Triton's kernels do not take this call; None if they take it
    products: whether the kernels multiply matrices

    ``auto`` takes Triton's kernels unless ``against_triton`` gives a reason.
    """
    # A call that names its backend needs no trial.
    left = backend == "auto" and _asked in ("auto", "fla")
    if x.is_cpu and (against_triton(call, x, *others, products=products) if left else not asks_for("triton", backend)):
        # On a CPU nothing else need be asked for each token.
        return ("reference",), {}
    if reason := missing_triton(x.device.type) or limit or _against_kernels((x, *others), products):
        return ("reference",), {"triton": reason}
    return (("reference", "triton") if left and against_triton(call, x, *others, products=products) else ABLE), {}


def pick(call: str, backend: str, x: Tensor, limit: str | None, *others: Tensor | None, products: bool = True) -> str:
    """The backend that runs a call of an op with the backends ``reference`` and ``triton``; see ``with_triton``."""
    op = call.partition(", ")[0]
    if x.is_cpu and backend == _asked == "auto" and against_triton(call, x, *others, products=products):
        # A CPU asks this for each op of each token that it decodes.
        _announce(op, "reference")
        return "reference"
    return choose(op, backend, *with_triton(call, backend, x, limit, *others, products=products))


@once_a_kind
def _against_kernels(tensors: tuple[Tensor | None, ...], products: bool) -> str | None:
    """Why no kernel takes tensors of these types and sizes, None if they may."""
    given = [x for x in tensors if x is not None]
    x = given[0]
    if x.is_floating_point() and x.dtype not in DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if products and x.dtype == torch.float32:
        widest = max(tensor.shape[-1] for tensor in given if tensor.is_floating_point())
        if widest > 128:
            return f"its kernels take at most 128 channels of float32, 256 of 16 bits, not {widest}"
    if long := [size for tensor in given for size in tensor.shape if size > MOST]:
        return f"its kernels take at most {MOST} along a dimension, not {long[0]}"
    return None


def against_triton(call: str, x: Tensor, *others: Tensor | None, products: bool = True) -> str | None:
    """Why ``auto`` takes the reference where Triton's kernels can run, None if it takes them. Their first use starts a
    trial (``proof``).
    """
    if x.is_cpu or x.device.type != "cuda":
        return "Triton's interpreter is for tests"
    if products and not torch.version.hip and exact_products(x):
        return "torch's float32_matmul_precision is 'highest', and NVIDIA's matrix units take no float32 as it is"
    # A compiler with dynamic shapes makes a number of ``index`` alone.
    channels = [operator.index(y.shape[-1]) for y in (x, *others) if y is not None and y.is_floating_point()]
    return proof.against(call, x.dtype, tuple(channels[:2]) if products else (), x.device)


def exact_products(x: Tensor) -> bool:
    """Whether torch multiplies x without rounding its entries first, which is its default for fp32."""
    return x.dtype == torch.float32 and _precision() == "highest"


# A compiler cannot trace it.
@torch.compiler.assume_constant_result
def _precision() -> str:
    return torch.get_float32_matmul_precision()


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that fp32 becomes in torch's own products on x's device; None outside autocast."""
    # To ask a tensor for its device's name takes longer.
    device = "cpu" if x.is_cpu else x.device.type
    # Autocast knows no meta device.
    return None if device == "meta" or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that torch's own products take: under autocast, fp32 becomes autocast's type."""
    dtype = autocast_type(tensors[0])
    return tensors if dtype is None else tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def outside_autocast(backward: Callable[..., Any]) -> Any:
    """Wrap a ``backward(ctx, *gradients)`` so that it multiplies in the types that its forward kept. Without this,
    torch runs it in the autocast of the caller.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> Any:
        tensors = [x for d in gradients for x in (d if isinstance(d, list) else [d]) if x is not None]
        # Autocast knows no meta device.
        device = tensors[0].device.type if tensors else "meta"
        if device == "meta" or not torch.is_autocast_enabled(device):
            return backward(ctx, *gradients)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return wrapped


def asks_for(name: str, backend: str) -> bool:
    """Whether a call with ``backend``, or else the setting, asks for the backend ``name``."""
    return name == (_asked if backend == "auto" else backend)


@torch.compiler.assume_constant_result
def missing_triton(device_type: str) -> str | None:
    """Why Triton's kernels cannot run on a kind of device, None if they can."""
    if reason := missing("Triton", "triton.knobs", "pip install 'memlm[cpu-kernels]', or a torch that brings it"):
        return reason
    from triton import knobs

    if device_type == "cuda" or (knobs.runtime.interpret and device_type == "cpu"):
        return None
    return f"Triton compiles nothing for {device_type}; for tests TRITON_INTERPRET=1 interprets its kernels"


@functools.cache
def missing(name: str, module: str, fix: str) -> str | None:
    """Why a package cannot be used, None if it can. It is imported once to find out."""
    try:
        importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            return f"{name} is not installed ({fix})"
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"{name} is installed and does not import: {said}; install it again ({fix})"
    return None
