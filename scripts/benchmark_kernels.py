"""Time the ops on a GPU, each backend beside the others: one JSON line for each measurement.

    python scripts/benchmark_kernels.py --out benchmarks/gpu/kernels.jsonl

The sizes are those of the roofline in kernels/README.md. A time is the median over repeats, in milliseconds; what
cannot run says why. Causal attention stands beside the recurrences by torch's own kernels. What matters most is timed
first, for a caller may be short of time. Without a GPU, at sizes that only try the script, once by the clock.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels")]

from memlm_kernels import (  # noqa: E402
    MemoryRoutes,
    chunk_mean_attention,
    chunk_sparse_attention,
    chunk_topk,
    combine_reads,
    delta_rule,
    dispatch_tokens,
    invert_chunks,
    linear_attention,
    merge_topk,
    neural_memory,
    prefix_window_attention,
    route_documents,
    segment_mean_pool,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


class Size(NamedTuple):
    """chunks: of the bank that routing sees"""

    rows: int = 8
    tokens: int = 4096
    heads: int = 16
    chunks: int = 1 << 20


class Case(NamedTuple):
    """run(*inputs) -> a tensor; learns: whether a backward is timed too"""

    inputs: list[Tensor]
    run: Callable[..., Tensor]
    learns: bool = True


def recurrence(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    head_dim, shape = 64 if op.startswith("neural_memory") else 128, size[:3]
    q, k, v = (F.normalize(torch.randn(*shape, head_dim, device=DEVICE), dim=-1).to(dtype) for _ in "qkv")
    gates = torch.rand(3, *shape, device=DEVICE) * 0.1
    inputs = {
        "linear_attention": [q, k, v],
        "linear_attention, decay": [q, k, v, -gates[0]],
        "linear_attention, channels": [q, k, v, -0.1 * torch.rand(*shape, head_dim, device=DEVICE)],
        "delta_rule": [q, k, v, gates[0] * 10],
        "delta_rule, decay": [q, k, v, gates[0] * 10, -gates[1]],
        "neural_memory": [q, k, v, *gates.clone()],
        "neural_memory, two layers": [q, k, v, *gates.clone()],
    }[op]
    function: Callable[..., Any] = linear_attention if op.startswith("linear") else delta_rule
    if op.startswith("neural_memory"):
        start = torch.zeros(size.heads, head_dim, head_dim, device=DEVICE)
        layers = 2 if op.endswith("two layers") else 1
        function = functools.partial(neural_memory, weights=[start] * layers, chunk_size=16)
    return Case(inputs, lambda *x: function(*x, backend=backend)[0])


def attention(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    q, k, v = (torch.randn(size.rows, size.heads, size.tokens, 128, device=DEVICE, dtype=dtype) for _ in "qkv")
    if backend == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, size.tokens, size.tokens, device=DEVICE)
        return Case([q, k, v], functools.partial(torch.compile(flex_attention), block_mask=mask), learns=GPU)
    kind = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def run(*x: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*x, is_causal=True)

    return Case([q, k, v], run)


def near_and_far(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """A window of 512 tokens, a prefix of 16, and of the chunks of 64 before the window 16; four heads share keys."""
    chunk, window, groups = min(64, size.tokens), min(512, size.tokens), -(-size.heads // 4)
    q = torch.randn(size.rows, size.tokens, size.heads, 128, device=DEVICE, dtype=dtype)
    k, v = (torch.randn(size.rows, size.tokens, groups, 128, device=DEVICE, dtype=dtype) for _ in "kv")
    means = [x[:, : size.tokens // chunk * chunk].unflatten(1, (-1, chunk)).mean(2) for x in (k, v)]
    here = torch.arange(size.tokens, device=DEVICE).expand(size.rows, -1)
    spans = (torch.zeros_like(here), (here - window + chunk).clamp(min=0) // chunk)
    choose = functools.partial(chunk_topk, top_k=16, spans=spans)
    if op == "prefix_window_attention":
        prefix = (torch.randn_like(q), k[:1, :16].clone(), v[:1, :16].clone())
        run = functools.partial(prefix_window_attention, window=window, backend=backend)
        return Case([q, k, v, *prefix], lambda q, k, v, *prefix: run(q, k, v, prefix=prefix)[0])
    if op == "chunk_mean_attention":
        return Case([q, *means], lambda *x: chunk_mean_attention(*x, spans=spans, backend=backend)[0])
    if op == "chunk_topk":
        return Case([q, means[0]], lambda *x: choose(*x, backend=backend), learns=False)
    index = choose(q, means[0], backend="reference")
    if op == "invert_chunks":
        return Case([index], lambda x: invert_chunks(x, means[0].shape[1], backend=backend)[0], learns=False)
    starts = torch.arange(0, size.tokens, chunk, device=DEVICE).expand(size.rows, -1)
    run = functools.partial(chunk_sparse_attention, chunk_size=chunk, window=window, backend=backend)
    return Case([q, k, v], lambda *x: run(*x, index, starts)[0])


def routing(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """64 tokens of one query, 32 heads in 8 groups, documents of 8 chunks."""
    q, k = (torch.randn(1, *shape, 128, device=DEVICE, dtype=dtype) for shape in ((64, 32), (size.chunks, 8)))
    document = torch.arange(size.chunks, device=DEVICE)[None] // 8
    options = {"top_k": 16, "num_documents": -(-size.chunks // 8), "running": op.endswith("running")}
    return Case([q, k], lambda q, k: route_documents(q, k, document, **options, backend=backend).score, learns=False)


def merging(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """8 lists of 16 for each token."""
    lists = [torch.randn(size.tokens, 16, device=DEVICE) for _ in range(8)]
    index = torch.randperm(128, device=DEVICE).expand(size.tokens, -1).split(16, 1)
    return Case(lists, lambda *x: merge_topk(list(zip(index, x, strict=True)), 16, backend=backend)[1], learns=False)


def pooling(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    x = torch.randn(size.rows, size.tokens, 8, 128, device=DEVICE, dtype=dtype)
    cu = torch.arange(0, size.tokens + 64, 64, device=DEVICE).clamp(max=size.tokens).expand(size.rows, -1)
    return Case([x], lambda x: segment_mean_pool(x, cu, longest=64, backend=backend))


def routed(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """Heads of 128; two of four memories, and a shared one."""
    shape = (size.rows, size.tokens, size.heads, 128)
    weight = torch.rand(size.rows, size.tokens, 4, device=DEVICE).softmax(-1)
    weight, memory = weight.topk(2)
    if op == "MemoryRoutes":
        return Case([memory], lambda memory: MemoryRoutes.of(memory, 4).place, learns=False)
    place = MemoryRoutes.of(memory, 4).place
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    if op == "dispatch_tokens":
        return Case([x], lambda x: dispatch_tokens(x, place, backend=backend))
    reads = torch.randn(size.rows, 2 * size.tokens, *shape[2:], device=DEVICE, dtype=dtype)
    return Case([reads, weight, x], lambda o, w, x: combine_reads(o, place, w, x, backend=backend))


OPS: dict[str, tuple[Callable[..., Case], tuple[str, ...]]] = {
    "linear_attention, decay": (recurrence, ("triton", "fla", "reference")),
    "delta_rule, decay": (recurrence, ("triton", "fla", "reference")),
    "neural_memory": (recurrence, ("triton", "reference")),
    "neural_memory, two layers": (recurrence, ("triton", "reference")),
    "attention": (attention, ("flash", "cudnn", "flex")),
    "chunk_sparse_attention": (near_and_far, ("triton", "reference")),
    "chunk_topk": (near_and_far, ("triton", "reference")),
    "invert_chunks": (near_and_far, ("triton", "reference")),
    "chunk_mean_attention": (near_and_far, ("triton", "reference")),
    "prefix_window_attention": (near_and_far, ("triton", "sdpa")),
    "route_documents": (routing, ("triton", "reference")),
    "route_documents, running": (routing, ("triton", "reference")),
    "merge_topk": (merging, ("triton", "reference")),
    "segment_mean_pool": (pooling, ("triton", "reference")),
    "MemoryRoutes": (routed, ("reference",)),
    "dispatch_tokens": (routed, ("triton", "reference")),
    "combine_reads": (routed, ("triton", "reference")),
    "linear_attention, channels": (recurrence, ("triton", "fla", "reference")),
    "linear_attention": (recurrence, ("triton", "fla", "reference")),
    "delta_rule": (recurrence, ("triton", "fla", "reference")),
}


def calls(case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    def forward() -> None:
        with torch.no_grad():
            case.run(*case.inputs)

    def both() -> None:
        leaves = [x.requires_grad_() for x in case.inputs]
        out = case.run(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    yield "forward", forward
    if case.learns:
        yield "forward and backward", both


def milliseconds(call: Callable[[], Any]) -> float:
    if GPU:
        return triton.testing.do_bench(call, quantiles=[0.5])
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def measurements(size: Size, dtypes: list[torch.dtype], only: str) -> Iterator[dict[str, Any]]:
    torch.set_float32_matmul_precision("high")
    for dtype in dtypes:
        for op, (make, backends) in OPS.items():
            # One token is a decode step.
            sizes = [size, size._replace(tokens=1)] if make is recurrence else [size]
            for of, backend in ((x, y) for y in backends for x in sizes if only in op):
                record = {"op": op, "backend": backend, "dtype": str(dtype).split(".")[1], **of._asdict()}
                try:
                    for what, call in calls(make(op, backend, dtype, of)):
                        if of.tokens == 1 < size.tokens and what != "forward":
                            continue
                        if GPU:
                            torch.cuda.reset_peak_memory_stats()
                        found: dict[str, Any] = {"what": what, "ms": round(milliseconds(call), 4)}
                        if GPU:
                            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
                        yield record | found
                # What does not run is a result too, and the others are still wanted.
                except Exception as error:
                    yield record | {"error": f"{type(error).__name__}: {error}"[:300]}


def commit() -> str:
    """Of the checkout; a copy without its history is told by COMMIT."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        said = ""
    return said or os.environ.get("COMMIT", "unknown")


def main(args: argparse.Namespace) -> None:
    about = {
        "hardware": torch.cuda.get_device_name() if GPU else f"{platform.machine()}, no GPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda_or_rocm": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    size = Size(args.rows, args.tokens, args.heads, args.chunks)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for record in measurements(size, [getattr(torch, name) for name in args.dtypes], args.op):
        line = json.dumps(record | about)
        print(line, flush=True)
        with args.out.open("a") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/gpu/kernels.jsonl")
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    for name, value in Size()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
