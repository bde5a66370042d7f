"""Print the machine's hardware and software, and the backend that each op uses here, with the reason.

python scripts/doctor.py
"""

import argparse
import importlib.metadata
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
from memlm_kernels.backend import against_triton, architecture, exact_products, missing_triton, with_triton  # noqa: E402
from memlm_kernels.grouped_linear.reference import takes_grouped_mm  # noqa: E402
from memlm_kernels.recurrence.fla import with_fla  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "accelerate", "flash-attn", "flash-linear-attention")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLA = ("linear_attention", "delta_rule")
REFERENCE = (
    "large_chunk_memory",
    "read_memory",
    "nominate_documents",
)


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
    return getattr(ops, op)(x(1, 1, heads, keys), k, k, **given, backend="triton")


def documents(**options: Any) -> Any:
    given = {"top_k": 1, "num_documents": 1, "backend": "triton", **options}
    return ops.route_documents(x(1, 1, 1, 16), x(1, 1, 1, 16), x(1, 1).long(), **given)


ATTENTIONS = ("chunk_sparse_attention", "chunk_mean_attention", "prefix_window_attention")
# For each op with Triton's kernels, calls beyond its limits; the op's error states the limit.
TOO_MUCH: dict[str, list[Callable[[], Any]]] = {
    "linear_attention": [lambda: ops.linear_attention(*[x(1, 1, 1, 999)] * 4, backend="triton")],
    "delta_rule": [lambda: ops.delta_rule(*[x(1, 1, 1, 999)] * 3, x(1, 1, 1), backend="triton")],
    "neural_memory": [
        lambda: memory(16, layers=3),
        lambda: memory(999),
        lambda: memory(128, layers=2),
        lambda: memory(64, chunk_size=997),
    ],
    "segmented_neural_memory": [lambda: memories(999)],
    "chunk_topk": [lambda: ops.chunk_topk(x(1, 1, 1, 16), x(1, 1, 1, 16), top_k=999, backend="triton")],
    "invert_chunks": [],
    **{op: [partial(attention, op, 1, 999), partial(attention, op, 99, 16)] for op in ATTENTIONS},
    "route_documents": [lambda: documents(chunk_reduce="mean"), lambda: documents(top_k=999)],
    "merge_topk": [lambda: ops.merge_topk([(x(1, 1).long(), x(1, 1))], top_k=999, backend="triton")],
    "segment_mean_pool": [],
    "dispatch_tokens": [],
    "combine_reads": [],
}


def limits(op: str) -> list[str]:
    """The limits of Triton's kernels, from the op's own errors."""
    said = []
    for call in TOO_MUCH[op]:
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
    arch = architecture(torch.device("cuda", 0))
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    # torch warns if a GPU has no driver.
    warnings.simplefilter("ignore")
    say("python", f"{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        say(package, version(package))
    say("CUDA or ROCm", torch.version.cuda or torch.version.hip or "none: torch is built for CPUs")
    say("device", device())
    say("float32 in Triton", float32())
    for op in TOO_MUCH:
        known = with_triton(x(1, 1), None)
        available, refused = with_fla(known, "fla", x(1, 1), None) if op in FLA else known
        first, because = available[0], None if "triton" in refused else against_triton(x(1, 1), products=True)
        if op == "prefix_window_attention" and first == "reference":
            first = "sdpa"
        said = [f"{first}, because {because}" if because else first]
        said += [f"{name} can run on request" for name in available[1:] if name != "reference"]
        if "triton" not in refused:
            said += [f"triton's kernels {limit}" for limit in limits(op)]
        say(op, "; ".join([*said, *(f"{name} cannot: {reason}" for name, reason in refused.items())]))
    for op in REFERENCE:
        say(op, "reference, its only one")
    rows = x(16, 16)
    fast = "by_group"
    if DEVICE.type != "cpu":
        fast = "grouped_mm for bfloat16" if takes_grouped_mm(rows, rows[None]) else "reference"
    say("grouped_linear", fast)


def say(name: str, what: str) -> None:
    print(f"{name:24}{what}")


if __name__ == "__main__":
    main()
