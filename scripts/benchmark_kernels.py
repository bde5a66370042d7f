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

from memlm_kernels import (  # noqa: E402
    chunk_mean_attention,
    chunk_sparse_attention,
    chunk_topk,
    delta_rule,
    invert_chunks,
    linear_attention,
    neural_memory,
    prefix_window_attention,
)

ROWS, TOKENS, HEADS = 8, 4096, 16
GROUPS, WINDOW, CHUNK, TOP_K, PREFIX = 4, 512, 64, 16, 16
OPS = (
    "linear_attention",
    "linear_attention, decay",
    "linear_attention, channels",
    "delta_rule, decay",
    "neural_memory",
)
ATTENTIONS = (
    "chunk_topk",
    "invert_chunks",
    "chunk_sparse_attention",
    "chunk_mean_attention",
    "prefix_window_attention",
)


def attention(op: str, dtype: torch.dtype, tokens: int) -> tuple[list[torch.Tensor], Callable[[str], torch.Tensor]]:
    """What has a gradient, and the call by a backend; a token chooses among the chunks before its window."""
    q = torch.randn(ROWS, tokens, HEADS, 128, device="cuda", dtype=dtype)
    k, v = (torch.randn(ROWS, TOKENS, GROUPS, 128, device="cuda", dtype=dtype) for _ in "kv")
    means = [x.unflatten(1, (-1, CHUNK)).mean(2) for x in (k, v)]
    here = torch.arange(TOKENS - tokens, TOKENS, device="cuda").expand(ROWS, -1)
    spans = (torch.zeros_like(here), (here - WINDOW + CHUNK).clamp(min=0) // CHUNK)
    starts = torch.arange(0, TOKENS, CHUNK, device="cuda").expand(ROWS, -1)
    index = chunk_topk(q, means[0], top_k=TOP_K, spans=spans, backend="reference")
    prefix = (torch.randn_like(q), k[:1, :PREFIX].clone(), v[:1, :PREFIX].clone())
    function, arguments, options = {
        "chunk_topk": (chunk_topk, [q, means[0]], {"top_k": TOP_K, "spans": spans}),
        "invert_chunks": (invert_chunks, [index, TOKENS // CHUNK], {}),
        "chunk_sparse_attention": (
            chunk_sparse_attention,
            [q, k, v, index, starts],
            {"chunk_size": CHUNK, "window": WINDOW},
        ),
        "chunk_mean_attention": (chunk_mean_attention, [q, *means], {"spans": spans}),
        "prefix_window_attention": (prefix_window_attention, [q, k, v], {"window": WINDOW, "prefix": prefix}),
    }[op]
    # A choice has no gradient.
    chosen = op in ("chunk_topk", "invert_chunks")
    learns = [] if chosen else [*arguments[:3], *(prefix if "prefix" in options else ())]
    # All but the choice itself return a tuple.
    first = (lambda x: x) if op == "chunk_topk" else (lambda x: x[0])
    return learns, lambda backend: first(function(*arguments, **options, backend=backend))


def calls(op: str, dtype: torch.dtype, backend: str, tokens: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward, and forward with backward; of one token only a decode step."""
    if op in ATTENTIONS:
        inputs, function = attention(op, dtype, tokens)
        yield from timed(inputs, lambda: function(backend), tokens)
        return
    size = 64 if op == "neural_memory" else 128
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
        "neural_memory": [q, k, v, gates[0], gates[1], gates[2]],
    }[op]
    function, options = {
        "linear_attention": (linear_attention, {}),
        "delta_rule": (delta_rule, {}),
        "neural_memory": (neural_memory, {"weights": [start], "chunk_size": 16}),
    }[op.split(",")[0]]

    yield from timed(inputs, lambda: function(*inputs, **options, backend=backend)[0], tokens)


def timed(
    inputs: list[torch.Tensor], run: Callable[[], torch.Tensor], tokens: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Without inputs, no backward."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        leaves, out = [x.requires_grad_() for x in inputs], run()
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    yield ("decode" if tokens == 1 else "forward"), forward
    if tokens > 1 and inputs:
        yield "forward and backward", both


def measurements() -> Iterator[dict[str, Any]]:
    torch.set_float32_matmul_precision("high")
    for op in (*OPS, *ATTENTIONS):
        for dtype in (torch.bfloat16, torch.float32):
            for backend in ("triton", "sdpa" if op == "prefix_window_attention" else "reference"):
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
