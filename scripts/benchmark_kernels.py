"""Time the ops on a GPU with each backend: one JSON line per measurement.

    python scripts/benchmark_kernels.py --out benchmarks/gpu/kernels.jsonl
    python scripts/benchmark_kernels.py --part goals   only the goals' comparisons, or the rest; --plan prints a plan

Sizes are those of the roofline in kernels/README.md. A time is the median over repeats, in milliseconds. A case that
cannot run records its reason. Goals come first, with a line each. MEMLM_AUTOTUNE=1 times the best of a kernel's tiles.
--processes first compiles all cases, for Triton's cache. Without a GPU this only tests the script.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "scripts")]

import gpu_records  # noqa: E402
from gpu_records import DEVICE, GPU  # noqa: E402

from memlm_kernels import (  # noqa: E402
    MemoryRoutes,
    NeuralMemoryState,
    SegmentedMemoryState,
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
    segmented_neural_memory,
)

# Bandwidths of GPU memories, by a part of the GPU's name.
TB_A_SECOND = {"H200": 4.8, "H100": 3.35, "A100": 2.04, "MI300X": 5.3, "MI250X": 1.64}


class Size(NamedTuple):
    """chunks: number of chunks in the bank that routing reads"""

    rows: int = 8
    tokens: int = 4096
    heads: int = 16
    chunks: int = 1 << 20


class Case(NamedTuple):
    """run(*inputs) -> a tensor; learns: whether it has a backward; gb: 10^9 bytes that a forward must move"""

    inputs: list[Tensor]
    run: Callable[..., Tensor]
    learns: bool = True
    gb: float = 0.0


def recurrence(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    name, _, heads_of = op.partition(", heads of ")
    head_dim, shape = int(heads_of or (64 if "memory" in op else 128)), size[:3]
    q, k, v = (F.normalize(torch.randn(*shape, head_dim, device=DEVICE), dim=-1).to(dtype) for _ in "qkv")
    gates = torch.rand(3, *shape, device=DEVICE) * 0.1
    inputs = {
        "linear_attention": [q, k, v],
        "linear_attention, decay": [q, k, v, -gates[0]],
        "linear_attention, channels": [q, k, v, -0.1 * torch.rand(*shape, head_dim, device=DEVICE)],
        "delta_rule": [q, k, v, gates[0] * 10],
        "delta_rule, decay": [q, k, v, gates[0] * 10, -gates[1]],
        "delta_rule, channels": [q, k, v, gates[0] * 10, -0.1 * torch.rand(*shape, head_dim, device=DEVICE)],
        "neural_memory": [q, k, v, *gates.clone()],
        "neural_memory, two layers": [q, k, v, *gates.clone()],
        "segmented_neural_memory": [q, k, v, *gates.clone()],
    }[name]
    function: Callable[..., Any] = linear_attention if op.startswith("linear") else delta_rule
    if op.startswith("neural_memory"):
        # Two layers of zeros would never learn, and products of zeros are faster.
        start = torch.randn(size.heads, head_dim, head_dim, device=DEVICE) / head_dim**0.5
        layers = 2 if op.endswith("two layers") else 1
        function = functools.partial(neural_memory, weights=[start] * layers, chunk_size=16)
        if size.tokens == 1:
            # A decoded token continues a document.
            memory = (start.expand(size.rows, *start.shape),) * layers
            position = torch.full((size.rows,), 999, device=DEVICE)
            function = functools.partial(function, state=NeuralMemoryState(memory, memory, memory, position))
    elif op == "segmented_neural_memory":
        cu = torch.linspace(0, size.tokens, 5, device=DEVICE).long().expand(size.rows, -1)
        memory = torch.zeros(size.rows, 4, 3, size.heads, head_dim, head_dim, device=DEVICE)
        state = SegmentedMemoryState(memory, torch.zeros(size.rows, 4, dtype=torch.int64, device=DEVICE))
        function = functools.partial(segmented_neural_memory, chunk_size=16, state=state, cu_seqlens=cu)
    return Case(inputs, lambda *x: function(*x, backend=backend)[0])


def attention(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """Causal attention by torch's kernels, over all keys or a window of 512; four heads share a key."""
    q, k, v = (
        torch.randn(size.rows, heads, size.tokens, 128, device=DEVICE, dtype=dtype)
        for heads in (size.heads, *[-(-size.heads // 4)] * 2)
    )
    if backend == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        reach = 512 if op.endswith("window") else size.tokens
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < reach), None, None, size.tokens, size.tokens, device=DEVICE
        )
        return Case(
            [q, k, v], functools.partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True), learns=GPU
        )
    kind = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def run(*x: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)

    return Case([q, k, v], run)


def near_and_far(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """16 chunks of 64 tokens before a window of 512, a prefix of 16; four heads share keys. With selection, the window
    is one chunk, and the choice is timed too.
    """
    chunk, groups, whole = min(64, size.tokens), -(-size.heads // 4), op.endswith("with selection")
    window = chunk if whole else min(512, size.tokens)
    q = torch.randn(size.rows, size.tokens, size.heads, 128, device=DEVICE, dtype=dtype)
    k, v = (torch.randn(size.rows, size.tokens, groups, 128, device=DEVICE, dtype=dtype) for _ in "kv")
    means = [x[:, : size.tokens // chunk * chunk].unflatten(1, (-1, chunk)).mean(2) for x in (k, v)]
    here = torch.arange(size.tokens, device=DEVICE).expand(size.rows, -1)
    spans = (torch.zeros_like(here), (here - window + chunk).clamp(min=0) // chunk)
    choose = functools.partial(chunk_topk, top_k=16, spans=spans)
    starts = torch.arange(0, size.tokens, chunk, device=DEVICE).expand(size.rows, -1)
    run = functools.partial(chunk_sparse_attention, chunk_size=chunk, window=window, backend=backend)
    if whole:
        ends = torch.cat([starts, starts[:, -1:] + chunk], 1)

        def choose_and_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pooled = segment_mean_pool(k.detach(), ends, longest=chunk, backend=backend)
            return run(q, k, v, choose(q, pooled, backend=backend), starts)[0]

        return Case([q, k, v], choose_and_read)
    if op == "prefix_window_attention":
        prefix = (torch.randn_like(q), k[:1, :16].clone(), v[:1, :16].clone())
        reads = functools.partial(prefix_window_attention, window=window, backend=backend)
        return Case([q, k, v, *prefix], lambda q, k, v, *prefix: reads(q, k, v, prefix=prefix)[0])
    if op == "chunk_mean_attention":
        return Case([q, *means], lambda *x: chunk_mean_attention(*x, spans=spans, backend=backend)[0])
    if op == "chunk_topk":
        return Case([q, means[0]], lambda *x: choose(*x, backend=backend), learns=False)
    index = choose(q, means[0], backend="reference")
    if op == "invert_chunks":
        return Case(
            [index], lambda x: invert_chunks(x, num_chunks=means[0].shape[1], backend=backend).token, learns=False
        )
    return Case([q, k, v], lambda *x: run(*x, index, starts)[0])


def routing(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """64 tokens of one query, 32 heads in 8 groups, documents of 8 chunks."""
    q, k = (torch.randn(1, *shape, 128, device=DEVICE, dtype=dtype) for shape in ((64, 32), (size.chunks, 8)))
    document = torch.arange(size.chunks, device=DEVICE)[None] // 8
    options = {"top_k": 16, "num_documents": -(-size.chunks // 8), "running": op.endswith("running")}
    run = functools.partial(route_documents, **options, backend=backend)
    gb = (k.nbytes + document.nbytes) * (2 if op.endswith("running") else 1) / 1e9
    return Case([q, k], lambda q, k: run(q, k, document).score, learns=False, gb=gb)


def merging(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """8 lists of 16 for each token."""
    lists = [torch.randn(size.tokens, 16, device=DEVICE) for _ in range(8)]
    index = torch.randperm(128, device=DEVICE).expand(size.tokens, -1).split(16, 1)
    return Case(
        lists, lambda *x: merge_topk(list(zip(index, x, strict=True)), top_k=16, backend=backend).score, learns=False
    )


def pooling(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    x = torch.randn(size.rows, size.tokens, 8, 128, device=DEVICE, dtype=dtype)
    cu = torch.arange(0, size.tokens + 64, 64, device=DEVICE).clamp(max=size.tokens).expand(size.rows, -1)
    return Case([x], lambda x: segment_mean_pool(x, cu, longest=64, backend=backend), gb=x.nbytes / 1e9)


def routed(op: str, backend: str, dtype: torch.dtype, size: Size) -> Case:
    """Heads of 128; two of four memories, and a shared one."""
    shape = (size.rows, size.tokens, size.heads, 128)
    weight = torch.rand(size.rows, size.tokens, 4, device=DEVICE).softmax(-1)
    weight, memory = weight.topk(2)
    if op == "MemoryRoutes":
        return Case([memory], lambda memory: MemoryRoutes.of(memory, 4).place, learns=False)
    routes = MemoryRoutes.of(memory, 4)
    place = routes.place
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    if op == "dispatch_tokens":
        return Case([x], lambda x: dispatch_tokens(x, place, backend=backend))
    if op == "combine_reads":
        reads = torch.randn(size.rows, 2 * size.tokens, *shape[2:], device=DEVICE, dtype=dtype)
        return Case([reads, weight, x], lambda o, w, x: combine_reads(o, place, w, x, backend=backend))
    tokens = recurrence("delta_rule, decay", backend, dtype, size).inputs
    scan = functools.partial(delta_rule, cu_seqlens=routes.cu_seqlens, backend=backend)
    if op.endswith("its scans alone"):
        return Case([dispatch_tokens(x, place, backend="reference") for x in tokens], lambda *x: scan(*x)[0])

    def run(weight: Tensor, *tokens: Tensor) -> Tensor:
        place = MemoryRoutes.of(memory, 4).place
        o = scan(*(dispatch_tokens(x, place, backend=backend) for x in tokens))[0]
        return combine_reads(o, place, weight, backend=backend)

    return Case([weight, *tokens], run)


BACKENDS = ("triton", "reference")
OPS: dict[str, tuple[Callable[..., Case], tuple[str, ...]]] = {
    "delta_rule, decay": (recurrence, ("triton", "fla", "reference")),
    "delta_rule": (recurrence, ("triton", "fla", "reference")),
    "delta_rule, channels": (recurrence, ("triton", "fla", "reference")),
    "linear_attention, channels": (recurrence, ("triton", "fla", "reference")),
    "linear_attention, decay": (recurrence, ("triton", "fla", "reference")),
    "linear_attention": (recurrence, ("triton", "fla", "reference")),
    "delta_rule, heads of 64": (recurrence, ("triton", "fla")),
    "neural_memory": (recurrence, BACKENDS),
    "neural_memory, heads of 128": (recurrence, ("triton",)),
    "neural_memory, two layers": (recurrence, BACKENDS),
    "segmented_neural_memory": (recurrence, BACKENDS),
    "routed delta_rule": (routed, BACKENDS),
    "routed delta_rule, its scans alone": (routed, BACKENDS),
    "chunk_sparse_attention, with selection": (near_and_far, BACKENDS),
    "attention": (attention, ("flash", "cudnn", "flex")),
    "attention, window": (attention, ("flex",)),
    "chunk_sparse_attention": (near_and_far, BACKENDS),
    "chunk_topk": (near_and_far, BACKENDS),
    "invert_chunks": (near_and_far, BACKENDS),
    "chunk_mean_attention": (near_and_far, BACKENDS),
    "prefix_window_attention": (near_and_far, ("triton", "sdpa")),
    "route_documents": (routing, BACKENDS),
    "route_documents, running": (routing, BACKENDS),
    "merge_topk": (merging, BACKENDS),
    "segment_mean_pool": (pooling, BACKENDS),
    "MemoryRoutes": (routed, ("reference",)),
    "dispatch_tokens": (routed, BACKENDS),
    "combine_reads": (routed, BACKENDS),
}


class Timed(NamedTuple):
    """One measurement."""

    op: str
    backend: str
    dtype: torch.dtype
    size: Size
    what: str = "forward and backward"


class Goal(NamedTuple):
    """ours takes at most 1 / least of theirs' time; None: of the time to move its bytes at the GPU's bandwidth."""

    ours: Timed
    theirs: Timed | None
    least: float


def goals(dtype: torch.dtype, size: Size) -> list[Goal]:
    def timed(op: str, backend: str = "triton", size: Size = size, **rest: Any) -> Timed:
        return Timed(op, backend, dtype, size, **rest)

    def sparse(times: int, least: float) -> Goal:
        long = size._replace(rows=1, tokens=times * size.tokens)
        ours = timed("chunk_sparse_attention, with selection", size=long)
        return Goal(ours, timed("attention", "flash", size=long), least)

    def beside_fla(op: str) -> Goal:
        return Goal(timed(op), timed(op, "fla"), 1.0)

    # By the predicted shares of the goals, the smallest first.
    return [
        Goal(timed("neural_memory"), timed("delta_rule, heads of 64", "fla"), 0.55),
        Goal(timed("route_documents", what="forward"), None, 1 / 1.5),
        Goal(timed("prefix_window_attention"), timed("attention, window", "flex"), 0.9),
        sparse(2, 1.0),
        sparse(8, 2.0),
        beside_fla("delta_rule, decay"),
        beside_fla("linear_attention, channels"),
        sparse(32, 4.6),
        beside_fla("delta_rule"),
        Goal(timed("routed delta_rule"), timed("routed delta_rule, its scans alone"), 1 / 1.15),
        Goal(timed("neural_memory, two layers"), timed("neural_memory, two layers", "reference"), 10.0),
    ]


def shipped(dtype: torch.dtype, size: Size) -> list[Timed]:
    """Shapes of configs/memory: a memory of one head, also over one long row, where few programs run."""
    one = Timed("neural_memory", "triton", dtype, size._replace(heads=1))
    return [one, one._replace(size=Size(1, 32 * size.tokens, 1, size.chunks))]


def plan(size: Size, dtypes: list[torch.dtype], only: str, part: str, by: str) -> list[Timed]:
    """All measurements, each once, or one part of them: the goals' comparisons first, references last.

    only: a part of the op's name; by: a backend, or "" for all
    """
    of_goals = dict.fromkeys(x for goal in goals(dtypes[0], size) for x in goal[:2] if x)
    of_goals |= dict.fromkeys(shipped(dtypes[0], size))
    rest = []
    for dtype in dtypes:
        for op, (make, backends) in OPS.items():
            for backend in backends:
                one = Timed(op, backend, dtype, size)
                rest += [one._replace(what="forward"), one]
                if make is recurrence:
                    # A decoding step.
                    rest.append(Timed(op, backend, dtype, size._replace(tokens=1), "forward"))
    rest.sort(key=lambda one: one.backend == "reference")
    parts = {"goals": list(of_goals), "rest": [x for x in dict.fromkeys(rest) if x not in of_goals]}
    chosen = [x for name in parts for x in parts[name] if part in (name, "all")]
    return [x for x in chosen if only in x.op and by in ("", x.backend)]


def about(one: Timed) -> dict[str, Any]:
    record = {"op": one.op, "backend": one.backend, "dtype": str(one.dtype).split(".")[1], **one.size._asdict()}
    return record | {"what": one.what, "tiles": "tuned" if os.environ.get("MEMLM_AUTOTUNE") == "1" else "first"}


def measured(one: Timed, once: bool = False) -> dict[str, Any] | None:
    """The result of one measurement, or None if there is no such call; once: call without timing."""
    torch.set_float32_matmul_precision("high")
    record = about(one)
    try:
        case = OPS[one.op][0](one.op, one.backend, one.dtype, one.size)

        def forward() -> None:
            with torch.no_grad():
                case.run(*case.inputs)

        def both() -> None:
            leaves = [x.requires_grad_() for x in case.inputs]
            out = case.run(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

        if one.what != "forward" and not case.learns:
            return None
        call = forward if one.what == "forward" else both
        if GPU or once:
            call()
        if once:
            return record
        if GPU:
            # Not measured: the first call, which tunes, and do_bench's buffer.
            torch.cuda.reset_peak_memory_stats()
            call()
            record["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        ms = milliseconds(call)
        record["ms"] = round(ms, 4)
        if case.gb and one.what == "forward":
            record |= {"gb": round(case.gb, 3)} | floor(case.gb, ms)
    # A failure is a result too, and the other cases must still run.
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:300]
    return record


def compile_all(chosen: list[Timed], processes: int) -> None:
    """Run each case once, in parallel processes."""
    ours = iter([one for one in chosen if one.backend == "triton"])

    def work(_: int) -> None:
        elsewhere = gpu_records.Elsewhere(measured)
        for one in ours:
            elsewhere(one, True)
        elsewhere.end()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, range(processes)))


def floor(gb: float, ms: float) -> dict[str, float]:
    """The time to move the bytes at the GPU's bandwidth, and the measured time as a multiple of it."""
    name = torch.cuda.get_device_name() if GPU else ""
    known = [bandwidth for part, bandwidth in TB_A_SECOND.items() if part in name]
    return {"floor_ms": round(gb / known[0], 4), "of_floor": round(ms * known[0] / gb, 3)} if known else {}


def milliseconds(call: Callable[[], Any]) -> float:
    if GPU:
        import triton

        return triton.testing.do_bench(call, quantiles=[0.5])
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def measurements(chosen: list[Timed], wanted: list[Goal], inline: bool) -> Iterator[dict[str, Any]]:
    """inline: in this process"""
    found: dict[Timed, dict[str, Any]] = {}
    # A kernel that faults or never ends costs only its own measurement.
    elsewhere = gpu_records.Elsewhere(measured)
    for one in chosen:
        record, reason = (measured(one), None) if inline else elsewhere(one)
        if reason:
            record = about(one) | {"error": reason}
        if record:
            yield record
            found[one] = record
        for goal in [x for x in wanted if one in x and x.ours in found and (x.theirs is None or x.theirs in found)]:
            wanted.remove(goal)
            yield judged(goal, found)
    elsewhere.end()


def judged(goal: Goal, found: dict[Timed, dict[str, Any]]) -> dict[str, Any]:
    """The goal's result; ratio: our speed over theirs, None if one of the two did not run."""
    ours = found[goal.ours]
    theirs = ours.get("floor_ms") if goal.theirs is None else found[goal.theirs].get("ms")
    ratio = round(theirs / ours["ms"], 3) if theirs and ours.get("ms") else None
    against = "its bandwidth" if goal.theirs is None else f"{goal.theirs.op} by {goal.theirs.backend}"
    record = {"goal": f"{goal.ours.op} against {against}", "tokens": goal.ours.size.tokens, "tiles": ours["tiles"]}
    return record | {"ratio": ratio, "least": round(goal.least, 3), "met": ratio is not None and ratio >= goal.least}


def main(args: argparse.Namespace) -> None:
    size = Size(args.rows, args.tokens, args.heads, args.chunks)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    chosen = plan(size, dtypes, args.op, args.part, args.backend)
    if args.plan:
        for x in chosen:
            print(f"{x.op}: {x.backend}, {x.dtype}, {x.size.tokens} tokens, {x.size.heads} heads, {x.what}")
        return
    if args.processes and not args.inline:
        compile_all(chosen, args.processes)
    for record in measurements(chosen, goals(dtypes[0], size), args.inline):
        gpu_records.write(args.out, record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/gpu/kernels.jsonl")
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--backend", default="", help="only this backend")
    parser.add_argument("--inline", action="store_true", help="measure in this process: faults end it")
    parser.add_argument("--part", default="all", choices=["all", "goals", "rest"], help="which part to run")
    parser.add_argument("--plan", action="store_true", help="print the measurements, without running them")
    parser.add_argument("--processes", type=int, default=0, help="processes that compile all cases first; 0: none")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    for name, value in Size()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
