"""Time the ops on a GPU, Triton beside the reference: one JSON line for each measurement.

    python scripts/benchmark_kernels.py --out benchmarks/gpu/kernels.jsonl

The sizes are those of the roofline in kernels/README.md. A time is the median over repeats, in milliseconds.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels")]

from memlm_kernels import delta_rule, linear_attention, neural_memory  # noqa: E402

ROWS, TOKENS, HEADS = 8, 4096, 16
OPS = (
    "linear_attention",
    "linear_attention, decay",
    "linear_attention, channels",
    "delta_rule, decay",
    "neural_memory",
    "neural_memory, two layers",
)


def calls(op: str, dtype: torch.dtype, backend: str, tokens: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward, and forward with backward; of one token only a decode step."""
    size = 64 if op.startswith("neural_memory") else 128
    shape = (ROWS, tokens, HEADS)
    q, k, v = (F.normalize(torch.randn(*shape, size, device="cuda"), dim=-1).to(dtype) for _ in "qkv")
    gates = torch.rand(3, *shape, device="cuda") * 0.1
    channels = -0.1 * torch.rand(*shape, size, device="cuda")
    start = torch.zeros(HEADS, size, size, device="cuda")
    inputs = {
        "linear_attention": [q, k, v],
        "linear_attention, decay": [q, k, v, -gates[0]],
        "linear_attention, channels": [q, k, v, channels],
        "delta_rule, decay": [q, k, v, gates[0] * 10, -gates[1]],
        "neural_memory": [q, k, v, *gates],
        "neural_memory, two layers": [q, k, v, *gates],
    }[op]
    layers = 2 if op.endswith("two layers") else 1
    function, options = {
        "linear_attention": (linear_attention, {}),
        "delta_rule": (delta_rule, {}),
        "neural_memory": (neural_memory, {"weights": [start] * layers, "chunk_size": 16}),
    }[op.split(",")[0]]

    def run() -> torch.Tensor:
        return function(*inputs, **options, backend=backend)[0]

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        leaves = [x.requires_grad_() for x in inputs]
        torch.autograd.grad(run(), leaves, torch.ones_like(v), allow_unused=True)

    yield ("decode" if tokens == 1 else "forward"), forward
    if tokens > 1:
        yield "forward and backward", both


def measurements() -> Iterator[dict[str, Any]]:
    torch.set_float32_matmul_precision("high")
    for op in OPS:
        for dtype in (torch.bfloat16, torch.float32):
            for backend in ("triton", "reference"):
                for tokens in (TOKENS, 1):
                    for what, call in calls(op, dtype, backend, tokens):
                        record = {"op": op, "what": what, "backend": backend, "dtype": str(dtype).split(".")[1]}
                        record |= {"rows": ROWS, "tokens": tokens, "heads": HEADS}
                        torch.cuda.reset_peak_memory_stats()
                        try:
                            record["ms"] = round(triton.testing.do_bench(call, quantiles=[0.5]), 4)
                        # What does not run is a result too, and the others are still wanted.
                        except Exception as error:
                            record["error"] = f"{type(error).__name__}: {error}"[:300]
                        yield record | {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}


def main(out: Path) -> None:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    about = {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or os.environ.get("COMMIT", "unknown"),
        "date": datetime.date.today().isoformat(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for record in measurements():
        line = json.dumps(record | about)
        print(line, flush=True)
        with out.open("a") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/gpu/kernels.jsonl")
    main(parser.parse_args().out)
