"""Measure the ceilings of a GPU: a copy, a product of matrices, an empty launch.

python scripts/gpu_ceilings.py --out benchmarks/gpu/results.jsonl [--dry-run]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import gpu_records
import torch
import triton
from gpu_records import DEVICE, GPU


@triton.jit
def nothing(x):
    pass


def seconds(call: Callable[[], object], times: int) -> float:
    """The mean of many calls, one behind the other."""
    call()
    if GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    if GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU in Triton's interpreter")
    args = parser.parse_args()
    size, times = (64, 1) if args.dry_run else (8192, 50)
    x = torch.zeros(size * size * 4, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty_like(x)
    gb = 2 * x.nbytes / 1e9
    gpu_records.write(args.out, {"part": "ceilings", "what": "copy", "gb_s": gb / seconds(lambda: y.copy_(x), times)})
    torch.set_float32_matmul_precision("high")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(size, size, device=DEVICE).to(dtype)
        tflop_s = 2 * size**3 / 1e12 / seconds(lambda a=a: a @ a, times)  # type: ignore[misc]
        record = {"part": "ceilings", "what": f"product, {str(dtype)[6:]}", "tflop_s": tflop_s}
        gpu_records.write(args.out, record)
    for name, call in {
        "an empty launch by Triton": lambda: nothing[(1,)](x),
        "a launch by torch": lambda: x[:1].add_(1),
    }.items():
        us = 1e6 * seconds(call, 1 if args.dry_run else 1000)
        gpu_records.write(args.out, {"part": "ceilings", "what": name, "us": us})


if __name__ == "__main__":
    main()
