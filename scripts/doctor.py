"""Print what this machine has, and which backend each op takes here, and why.

python scripts/doctor.py
"""

import importlib.metadata
import platform
import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "kernels")]

from memlm_kernels.backend import architecture, with_triton  # noqa: E402
from memlm_kernels.grouped_linear.reference import takes_grouped_mm  # noqa: E402
from memlm_kernels.peer import with_fla  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "accelerate", "flash-attn", "flash-linear-attention")
# What Triton's kernels take of an op.
TRITON = {
    "linear_attention": "all, a decay by channel for keys up to 256",
    "delta_rule": "keys up to 256",
    "neural_memory": "one layer without a norm, or two, the squared error, window 1, keys up to 128, of two layers 64",
    "segmented_neural_memory": "keys up to 128",
    "chunk_topk": "top_k up to 128",
    "invert_chunks": "all",
    "chunk_sparse_attention": "heads up to 256, at most 32 of which share keys",
    "chunk_mean_attention": "heads up to 256, at most 32 of which share keys",
    "prefix_window_attention": "heads up to 256, at most 32 of which share keys",
    "route_documents": "chunk_reduce='max', top_k up to 128",
    "merge_topk": "top_k up to 128",
    "segment_mean_pool": "all",
    "dispatch_tokens": "all",
    "combine_reads": "all",
}
FLA = ("linear_attention", "delta_rule")
REFERENCE = (
    "large_chunk_memory",
    "read_memory",
    "nominate_documents",
)


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


def main() -> None:
    # Where a GPU is but its driver is not, torch says so by a warning.
    warnings.simplefilter("ignore")
    say("python", f"{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        say(package, version(package))
    say("CUDA or ROCm", torch.version.cuda or torch.version.hip or "none: torch is built for CPUs")
    say("device", device())
    x = torch.empty(1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    for op, takes in TRITON.items():
        available, refused = with_triton(x, None)
        if op in FLA:
            available, refused = with_fla((available, refused), x, None)
        others = [f"{name} can run when asked for" for name in available[1:] if name != "reference"]
        cannot = [f"{name} cannot: {reason}" for name, reason in refused.items()]
        limits = [] if "triton" in refused else [f"triton takes {takes}"]
        first = available[0]
        if op == "prefix_window_attention" and first == "reference":
            first = "sdpa"
        say(op, "; ".join([first, *others, *limits, *cannot]))
    for op in REFERENCE:
        say(op, "reference, its only one")
    rows = torch.empty(16, 16, device=x.device, dtype=torch.bfloat16)
    fast = "by_group"
    if x.device.type != "cpu":
        fast = "grouped_mm for bfloat16" if takes_grouped_mm(rows, rows[None]) else "reference"
    say("grouped_linear", fast)


def say(name: str, what: str) -> None:
    print(f"{name:24}{what}")


if __name__ == "__main__":
    main()
