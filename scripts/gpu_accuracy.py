"""Compare the kernels with their references over 4,096 tokens: errors beside fp64, and the bits of ten repeated runs.

    python scripts/gpu_accuracy.py --out benchmarks/gpu/results.jsonl [--dry-run]

Each kind of call is one record. ``error`` is the largest error as a share of its tolerance (memlm_kernels.trial).
"""

import argparse
import contextlib
import io
import time
from pathlib import Path
from typing import Any

import gpu_records
import torch

from memlm_kernels import trial
from memlm_kernels.calls import CALLS

REPEATS = 10


def compare(name: str, sizes: dict[str, int], dtype: str, repeats: int) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high")
    begin, kind = time.monotonic(), getattr(torch, dtype)
    call, device = CALLS[name].of(**sizes), torch.device(gpu_records.DEVICE)
    tensors, unit = trial.tensors_of(call, kind, device), trial.unit_of(call, kind, device)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = trial.compared(call, tensors, True, unit, repeats)
        result = {"error": round(found.error, 3), "fault": found.fault}
    # A failure is a result too, and the other calls must still run.
    except Exception as error:
        result = {"fault": f"{type(error).__name__}: {error}"[:300]}
    return result | {"seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="one call of a few tokens, on a CPU in the interpreter")
    args = parser.parse_args()
    sizes, dtype, repeats = {"T": 4096, "H": 4, "K": 64, "V": 64, "C": 16, "N": 256}, "bfloat16", REPEATS
    names = [name for name, call in CALLS.items() if call.triton]
    if args.dry_run:
        sizes, dtype, names = {"T": 9, "H": 1, "K": 4, "V": 4, "C": 4, "N": 3}, "float32", ["merge_topk"]
    elsewhere = gpu_records.Elsewhere(compare)
    for name in names:
        given = (name, sizes, dtype, repeats)
        found, reason = (compare(*given), None) if args.dry_run else elsewhere(*given)
        record = {"part": "accuracy", "op": name, "dtype": dtype, **sizes, "repeats": repeats}
        gpu_records.write(args.out, record | (found or {"fault": reason}))
    elsewhere.end()


if __name__ == "__main__":
    main()
