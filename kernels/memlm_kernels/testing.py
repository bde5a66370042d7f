"""Helpers that tests share: a comparison, gradients, and a watch on dispatched operations."""

import importlib
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def import_triton_ops() -> None:
    """Import all Triton ops, so that torch's FlopCounterMode counts them: it counts only ops known when it starts."""
    for path in Path(__file__).parent.glob("*/*.py"):
        if "register_flop_formula(" in path.read_text():
            importlib.import_module(f"memlm_kernels.{path.parent.name}.{path.stem}")


def relative_error(reference: Tensor, got: Tensor) -> float:
    """Root-mean-square difference relative to the root mean square of the reference (0 where both are 0)."""
    reference, got = reference.detach().double(), got.detach().double()
    assert reference.shape == got.shape, f"shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    assert torch.isfinite(got).all(), "not finite"
    difference = (reference - got).square().mean().sqrt().item() if reference.numel() else 0.0
    scale = reference.square().mean().sqrt().item() if reference.numel() else 0.0
    return difference / scale if scale > 0 else difference


def assert_close(name: str, reference: Tensor, got: Tensor, tolerance: float) -> None:
    """Assert that the relative RMS error of ``got`` is at most ``tolerance``; the message has ``name``."""
    error = relative_error(reference, got)
    assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.3g}"


def grads_of(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of ``(function(*inputs) * fixed random weights).sum()`` with respect to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


class Watch(TorchDispatchMode):
    """``with Watch() as watch``: counts dispatched operations, elements of the largest computed tensor, all elements
    written, and operations that read a number from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest, self.written, self.asked = 0, 0, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select"):
            self.asked.append(name)
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        views = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        self.written += 0 if views or "empty" in name else sum(sizes)
        return out


class Held(TorchDispatchMode):
    """``with Held() as held``: the peak, in elements of 4 bytes, of tensors that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self._known = 0, 0, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(size := storage.nbytes() // 4)
                weakref.finalize(storage, self._add, -size)
        self.most = max(self.most, self.now)
        return out

    def _add(self, size: int) -> None:
        self.now += size
