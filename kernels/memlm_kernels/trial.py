"""Compare a kind of call by Triton's kernels with its reference: outputs, gradients, and the bits of repeated runs.

``memlm_kernels.proof`` starts it as ``python -m memlm_kernels.trial REQUEST``. REQUEST is JSON, and so is each line of
the answer. The first line comes once the reference has run: an end after it is a fault of the kernels.

An error may be that of the reference in the same types, twice, and some units of rounding. Errors are relative: of the
root mean square, and of the largest entry.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm_kernels import proof
from memlm_kernels.calls import CALLS, OpCall

# Tensors in the type of the call; the others, gates and states, are fp32.
TOKENS = (
    *("q", "k", "v", "x", "o", "shared", "gate", "other"),
    *("prefix_q", "prefix_k", "prefix_v", "pooled_k", "pooled_v"),
)
# Units of rounding that outputs and gradients may be off.
UNITS = {"output": 2.0, "gradient": 3.0}


class Compared(NamedTuple):
    """error: the largest, as a share of the tolerance; fault: the error, where it is beyond that"""

    error: float = 0.0
    fault: str | None = None


class Unable(Exception):
    """The trial cannot be held, whatever the kernels do."""


def sizes(channels: tuple[int, ...], device: torch.device) -> dict[str, int]:
    """Two chunks of 64 tokens and a part, odd everywhere but in channels, which kernels are compiled for. 64 channels
    fill the tiles of kernels whose code does not depend on them.
    """
    small = device.type == "cpu"
    tokens, chunk = (37, 8) if small else (139, 16)
    wide = 16 if small else 64
    keys, values = (*channels, *channels, wide, wide)[:2]
    return {"T": tokens, "H": 1 if small else 3, "K": keys, "V": values, "C": chunk, "N": -(-tokens // chunk)}


def tensors_of(call: OpCall, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(dtype) if name in TOKENS else x for name, x in call.make(device=device).items()}


def unit_of(call: OpCall, dtype: torch.dtype, device: torch.device) -> float:
    """The unit of rounding. 16-bit types are summed in fp32, so their sums add nothing. fp32 has 16 of its units,
    because sums of hundreds of terms have another order. Products of fp32 have that of tf32, which NVIDIA's matrix
    units take.
    """
    if dtype != torch.float32:
        return torch.finfo(dtype).eps
    matrix_units = call.products and device.type == "cuda" and not torch.version.hip
    return torch.finfo(torch.float16).eps if matrix_units else 16 * torch.finfo(dtype).eps


def cases(call: OpCall, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, dict[str, Tensor], bool]]:
    """Name, tensors, and whether gradients are compared."""
    made = tensors_of(call, dtype, device)
    yield "all tensors", made, True
    if call.optional:
        yield f"without {' and '.join(call.optional)}", {n: x for n, x in made.items() if n not in call.optional}, True
    if call.step:
        last = {name: made[name][:, -1:] for name in call.step}
        one = {name: x for name, x in call.make(1, device=device).items() if name == "cu_seqlens"}
        yield "one token", {n: x for n, x in made.items() if n != "positions"} | last | one, False


def results(call: OpCall, tensors: dict[str, Tensor], gradients: bool, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if x.is_floating_point() and gradients}
    with torch.set_grad_enabled(gradients):
        outputs = call.run(tensors | leaves, backend=backend)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if through := [x for x in outputs if x.requires_grad]:
        g = torch.Generator().manual_seed(1)
        given = [torch.randn(x.shape, generator=g).to(x) for x in through]
        wrt = torch.autograd.grad(through, list(leaves.values()), given, allow_unused=True)
        for (name, leaf), x in zip(leaves.items(), wrt, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(leaf) if x is None else x
    return found


def errors(exact: Tensor, got: Tensor) -> tuple[float, float]:
    """Root-mean-square and largest error, relative; of integers the share that differs, twice."""
    if not exact.numel():
        return 0.0, 0.0
    if not exact.is_floating_point():
        return ((exact != got).double().mean().item(),) * 2
    exact, got = exact.double(), got.double()
    if not got.isfinite().all():
        return float("inf"), float("inf")
    off, size = (exact - got).abs(), exact.abs()
    pairs = (off.square().mean().sqrt(), size.square().mean().sqrt()), (off.max(), size.max())
    rms, most = ((x / s if s > 0 else x).item() for x, s in pairs)
    return rms, most


def larger(one: Compared, other: Compared) -> Compared:
    return max(one, other, key=lambda x: x.error)


def compared(
    call: OpCall,
    tensors: dict[str, Tensor],
    gradients: bool,
    unit: float,
    runs: int = 3,
    more: Mapping[str, tuple[float, float]] | None = None,
) -> Compared:
    """unit: of rounding; runs: how often the kernels run; more: errors that are allowed besides, of each result"""
    exact = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    try:
        exact, rounded = (results(call, x, gradients, "reference") for x in (exact, tensors))
    except Exception as error:
        raise Unable(f"the reference does not run: {error}") from error
    if wrong := [name for name, x in (exact | rounded).items() if not x.isfinite().all()]:
        raise Unable(f"{wrong[0]} of the reference is not finite")
    print(json.dumps({"trial": "the reference has run"}), flush=True)
    got = results(call, tensors, gradients, "triton")
    worst = Compared()
    for name, x in exact.items():
        floor = UNITS[name.split()[0]] * unit
        off, rounding = errors(x, got[name]), errors(x, rounded[name])
        besides = (0.0, 0.0) if more is None else more[name]
        for of, mine, theirs, extra in zip(("", "an entry of "), off, rounding, besides, strict=True):
            allowed = 2 * theirs + floor + extra
            share = mine / allowed if mine else 0.0
            fault = f"{of}{name} is {mine:.2g} off, {allowed:.2g} is allowed" if share > 1 else None
            worst = larger(worst, Compared(share, fault))
    for _ in range(runs - 1 if worst.fault is None else 0):
        again = results(call, tensors, gradients, "triton")
        if other := [name for name, x in got.items() if not torch.equal(x, again[name])]:
            return Compared(float("inf"), f"{other[0]} differs between equal calls")
    return worst


def trial(kind: proof.Claim, device: torch.device) -> dict[str, Any]:
    """The result of all cases: the largest error, the first fault, and the kernels that ran."""
    from memlm_kernels.launch import Kernel

    launched, run = set[str](), Kernel.__call__

    def record(kernel: Kernel, *given: Any, **arguments: Any) -> None:
        launched.add(kernel.name)
        run(kernel, *given, **arguments)

    call = CALLS[kind.call].of(**sizes(kind.channels, device))
    dtype = kind.dtype if kind.dtype.is_floating_point else torch.float32
    unit, worst = unit_of(call, dtype, device), Compared()
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    # fp32 is for tf32 here, and memory that no kernel wrote is NaN.
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    Kernel.__call__ = record  # type: ignore[method-assign, assignment]
    try:
        for name, tensors, gradients in cases(call, dtype, device):
            found = compared(call, tensors, gradients, unit)
            worst = larger(worst, found._replace(fault=found.fault and f"{name}: {found.fault}"))
    finally:
        Kernel.__call__ = run  # type: ignore[method-assign]
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])
    fault = worst.fault if launched else "no kernel ran"
    return {"trial": str(kind), "fault": fault, "error": round(worst.error, 3), "kernels": sorted(launched)}


def main(request: dict[str, Any]) -> None:
    kind = proof.Claim(request["call"], getattr(torch, request["dtype"]), tuple(request["channels"]))
    proof.ways.default_factory = lambda: request["way"]
    try:
        result = trial(kind, torch.device(request["device"]))
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        unable = isinstance(error, Unable | torch.OutOfMemoryError) or "cannot run here" in said
        result = {"trial": str(kind), "unable" if unable else "fault": said}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
