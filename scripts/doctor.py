"""Print the machine's hardware and software, and the backend that each op uses here, with the reason.

    python scripts/doctor.py
    python scripts/doctor.py --prove                compare Triton's kernels of all ops with their references
    python scripts/doctor.py --prove delta_rule     of these kinds of calls (memlm_kernels.calls)

``auto`` proves the kernels that it needs by itself. --prove does all at once, prints a table and keeps the verdicts.
"""

import argparse
import concurrent.futures
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

try:
    import triton  # noqa: F401
except ImportError:
    pass
except Exception as error:
    # torch's compiler, which the ops need, cannot be imported then.
    said = f"{type(error).__name__}: {error}"
    sys.exit(f"triton is installed and does not import: {said}; mend it, or pip uninstall triton")

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "kernels")]

import memlm_kernels as ops  # noqa: E402
from memlm_kernels import proof  # noqa: E402
from memlm_kernels.backend import exact_products, missing_triton, with_triton  # noqa: E402
from memlm_kernels.calls import CALLS  # noqa: E402
from memlm_kernels.grouped_linear.reference import takes_grouped_mm  # noqa: E402
from memlm_kernels.recurrence.fla import with_fla  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "accelerate", "flash-attn", "flash-linear-attention")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLACE = torch.device("cuda", 0) if DEVICE.type == "cuda" else DEVICE
FLA = ("linear_attention", "delta_rule")


def x(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=DEVICE, dtype=torch.bfloat16)


def memory(keys: int, layers: int = 1, chunk_size: int = 16) -> Any:
    gates, q = [x(1, 1, 1)] * 3, [x(1, 1, 1, keys)] * 3
    weights = [x(1, keys, keys).float()] * layers
    return ops.neural_memory(*q, *gates, weights=weights, chunk_size=chunk_size, backend="triton")


def memories(keys: int) -> Any:
    gates, q = [x(1, 1, 1)] * 3, [x(1, 1, 1, keys)] * 3
    state = ops.SegmentedMemoryState(x(1, 1, 3, 1, keys, keys).float(), x(1, 1).long())
    return ops.segmented_neural_memory(*q, *gates, chunk_size=16, state=state, backend="triton")


def attention(op: str, heads: int, keys: int) -> Any:
    given: dict[str, Any] = {"chunk_mean_attention": {}, "prefix_window_attention": {"window": 1}}.get(op, {})
    if op == "chunk_sparse_attention":
        given = {"index": x(1, 1, 1, 1).long(), "starts": x(1, 1).long(), "chunk_size": 1, "window": 1}
    k = x(1, 1, 1, keys)
    if op == "document_attention":
        given = {"pooled_k": k, "pooled_v": k, "document": x(1, 1).long(), "chosen": x(1, 1, 1).long()}
    return getattr(ops, op)(x(1, 1, heads, keys), k, k, **given, backend="triton")


def documents(**options: Any) -> Any:
    given = {"top_k": 1, "num_documents": 1, "backend": "triton", **options}
    return ops.route_documents(x(1, 1, 1, 16), x(1, 1, 1, 16), x(1, 1).long(), **given)


ATTENTIONS = ("chunk_sparse_attention", "chunk_mean_attention", "prefix_window_attention", "document_attention")
# Calls beyond the limits of Triton's kernels; the op's error states the limit.
TOO_MUCH: dict[str, list[Callable[[], Any]]] = {
    "linear_attention": [lambda: ops.linear_attention(*[x(1, 1, 1, 999)] * 4, backend="triton")],
    "delta_rule": [lambda: ops.delta_rule(*[x(1, 1, 1, 999)] * 3, x(1, 1, 1), backend="triton")],
    "neural_memory": [
        lambda: memory(16, layers=3),
        lambda: memory(999),
        lambda: memory(256, layers=2),
        lambda: memory(64, chunk_size=997),
    ],
    "segmented_neural_memory": [lambda: memories(999)],
    "chunk_topk": [lambda: ops.chunk_topk(x(1, 1, 1, 16), x(1, 1, 1, 16), top_k=999, backend="triton")],
    **{op: [partial(attention, op, 1, 999), partial(attention, op, 99, 16)] for op in ATTENTIONS},
    "route_documents": [lambda: documents(chunk_reduce="mean"), lambda: documents(top_k=999)],
    "merge_topk": [lambda: ops.merge_topk([(x(1, 1).long(), x(1, 1))], top_k=999, backend="triton")],
}


def limits(op: str) -> list[str]:
    """The limits of Triton's kernels, from the op's own errors."""
    said = []
    for call in TOO_MUCH.get(op, []):
        try:
            call()
        except ValueError as error:
            reason = str(error).partition("cannot run here: its kernels ")[2]
            said.append(reason.partition("; use one of")[0].partition(", not ")[0])
    return said


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device() -> str:
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    found = torch.cuda.get_device_properties(0)
    arch = proof.architecture(torch.device("cuda", 0))
    return f"{torch.cuda.device_count()} x {found.name}, {arch}, {found.total_memory / 2**30:.0f} GiB"


def float32() -> str:
    """How Triton's kernels multiply fp32 here."""
    if (missing := missing_triton(DEVICE.type)) or DEVICE.type != "cuda" or torch.version.hip:
        return missing or "multiplied as it is"
    if not exact_products(x(1).float()):
        return "multiplied as tf32, as torch's float32_matmul_precision allows"
    return (
        "not by auto; on request without matrix units, because torch's float32_matmul_precision "
        "is 'highest': use bfloat16, or torch.set_float32_matmul_precision('high') for tf32"
    )


def verdicts(op: str) -> list[str]:
    """The results of earlier trials of an op."""
    found = {kind: x for kind, x in proof.kept(PLACE).items() if kind.partition(", ")[0] == op}
    return [f"{kind}: {x.reason or f'proven, {x.way}'}" for kind, x in found.items()]


def kinds(names: list[str]) -> list[proof.Claim]:
    """The calls to prove, with heads of 64 and 128; the interpreter has no products of bfloat16."""
    gpu = DEVICE.type == "cuda"
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if gpu else [torch.float32, torch.float16]
    heads = [(64, 64), (128, 128)] if gpu else [(16, 16)]
    calls = {name: call for name, call in CALLS.items() if call.triton and (not names or name in names)}
    return [
        proof.Claim(name, dtype, channels)
        for name, call in calls.items()
        for dtype in (dtypes if call.floats else [torch.int64])
        for channels in (heads if call.products else [()])
    ]


def prove(names: list[str]) -> bool:
    """Print a line for each trial; returns whether none failed."""
    if unknown := [name for name in names if not (name in CALLS and CALLS[name].triton)]:
        known = "; ".join(name for name, call in CALLS.items() if call.triton)
        sys.exit(f"--prove {unknown[0]!r} is no call with Triton's kernels; use {known}")
    if missing := missing_triton(DEVICE.type):
        sys.exit(f"--prove: {missing}")
    here = proof.surroundings(PLACE)
    for fault in proof.known_faults(here["architecture"], here["triton"], here["ptxas"]):
        print(fault)
    print(
        f"{'op':28}{'dtype':10}{'channels':10}{'passed with':28}{'error':>6}{'seconds':>9}  (error: of the tolerance)"
    )
    chosen, passed = kinds(names), True
    with concurrent.futures.ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2))) as pool:
        for kind, found in zip(chosen, pool.map(partial(proof.prove, device=PLACE), chosen), strict=True):
            failed = "; ".join(f"{way}: {fault}" for way, fault in found.tried.items())
            passed &= found.way is not None or not found.lasting
            said = found.way or ("failed" if found.lasting else "not tried")
            size = f"{kind.call:28}{str(kind.dtype)[6:]:10}{'x'.join(map(str, kind.channels)):10}"
            print(f"{size}{said:28}{found.error:6.2f}{found.seconds:9.1f}  {failed}", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prove", nargs="*", metavar="CALL", help="prove Triton's kernels, of all calls or of these")
    args = parser.parse_args()
    # torch warns if a GPU has no driver.
    warnings.simplefilter("ignore")
    if args.prove is not None:
        sys.exit(not prove(args.prove))
    say("python", f"{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        say(package, version(package))
    say("CUDA or ROCm", torch.version.cuda or torch.version.hip or "none: torch is built for CPUs")
    say("device", device())
    say("float32 in Triton", float32())
    if DEVICE.type == "cuda" and not missing_triton("cuda"):
        here = proof.surroundings(PLACE)
        for fault in proof.known_faults(here["architecture"], here["triton"], here["ptxas"]):
            say("known faults", fault)
    with_kernels = dict.fromkeys(name.partition(", ")[0] for name, call in CALLS.items() if call.triton)
    for op in with_kernels:
        known = with_triton(op, "triton", x(1, 1), None)
        available, refused = with_fla(known, "fla", x(1, 1), None) if op in FLA else known
        first, because = available[0], None
        if DEVICE.type == "cpu" and "triton" not in refused:
            available = ("reference", *(name for name in available if name != "reference"))
            first, because = "reference", "Triton's interpreter is for tests"
        if op == "prefix_window_attention" and first == "reference":
            first = "sdpa"
        if op == "grouped_linear" and DEVICE.type == "cpu":
            first, because = "by_group", None
        said = [f"{first}, because {because}" if because else first]
        if first == "triton":
            said += verdicts(op) or ["auto proves it at its first use, or with --prove"]
        if op == "grouped_linear" and takes_grouped_mm(rows := x(16, 16), rows[None]):
            said += ["grouped_mm for bfloat16"]
        said += [f"{name} can run on request" for name in available[1:] if name != "reference"]
        if "triton" not in refused:
            said += [f"triton's kernels {limit}" for limit in limits(op)]
        say(op, "; ".join([*said, *(f"{name} cannot: {reason}" for name, reason in refused.items())]))
    for op in sorted(CALLS.keys() - with_kernels):
        if not CALLS[op].triton:
            say(op, "reference, its only one")


def say(name: str, what: str) -> None:
    print(f"{name:24}{what}")


if __name__ == "__main__":
    main()
