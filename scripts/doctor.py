"""Print what this machine has, and which backend each op takes here, and why.

python scripts/doctor.py
"""

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "kernels")]

from memlm_kernels.backend import architecture, with_triton  # noqa: E402
from memlm_kernels.grouped_linear.reference import takes_grouped_mm  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "accelerate", "flash-attn", "flash-linear-attention")


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
    print(f"{'python':24}{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:24}{version(package)}")
    print(f"{'CUDA or ROCm':24}{torch.version.cuda or torch.version.hip or 'none: torch is built for CPUs'}")
    print(f"{'device':24}{device()}")
    x = torch.empty(1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    available, refused = with_triton(x, None)
    reason = f"triton cannot: {refused['triton']}" if refused else f"can run: {', '.join(available)}"
    choosing = ("chunk_topk", "invert_chunks", "chunk_sparse_attention", "chunk_mean_attention")
    for op in ("linear_attention", "delta_rule", *choosing):
        print(f"{op:24}{available[0]}; {reason}")
    window = available[0].replace("reference", "sdpa")
    print(f"{'prefix_window_attention':24}{window}; {reason}")
    some = "" if available[0] == "reference" else " for one layer with the squared error, else reference"
    print(f"{'neural_memory':24}{available[0]}{some}; {reason}")
    for op in ("large_chunk_memory", "segmented_neural_memory"):
        print(f"{op:24}reference, its only one")
    rows = torch.empty(16, 16, device=x.device, dtype=torch.bfloat16)
    fast = "by_group" if x.device.type == "cpu" else "grouped_mm for bfloat16" if fits(rows) else "reference"
    print(f"{'grouped_linear':24}{fast}")


def fits(rows: torch.Tensor) -> bool:
    return takes_grouped_mm(rows, rows[None])


if __name__ == "__main__":
    main()
