"""Compile every Triton kernel, with all its tiles, for GPUs that need not be present, and report the results.

    python scripts/compile_kernels.py --out kernels/compiled.md                all of it, an hour of CPU time and more
    python scripts/compile_kernels.py --out kernels/compiled.md --kernel pool  these rows once more, and so with --case
    python scripts/compile_kernels.py --sample                                 each kernel once, for one of two targets

Triton caches compiled code, so a run that was stopped continues when it is started again.

The ops are called on the CPU, and their launches are compiled instead of run. A compilation fails if it spills
registers, needs more shared memory than the target has or more than 1,024 threads, specialises on a size, or has a
product without matrix instructions.
"""

import argparse
import collections
import importlib.metadata
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from kernel_report.launches import recording  # noqa: E402

from memlm_kernels import launch  # noqa: E402
from memlm_kernels.attention.choice_triton import choose_chunks, invert  # noqa: E402
from memlm_kernels.attention.triton import attend_triton  # noqa: E402
from memlm_kernels.grouped_linear.triton import grouped_linear_triton, linears_triton  # noqa: E402
from memlm_kernels.large_chunk_memory.chunks_triton import write_triton  # noqa: E402
from memlm_kernels.large_chunk_memory.reference import (  # noqa: E402
    LargeChunkMemoryState,
    LargeChunkTokens,
    large_chunk_memory_reference,
)
from memlm_kernels.launch import Kernel  # noqa: E402
from memlm_kernels.neural_memory import squared_error  # noqa: E402
from memlm_kernels.neural_memory.deep import scan_deep  # noqa: E402
from memlm_kernels.neural_memory.reference import NeuralMemoryState, Tokens, neural_memory_reference  # noqa: E402
from memlm_kernels.neural_memory.segmented import SegmentedMemoryState, segmented_neural_memory  # noqa: E402
from memlm_kernels.neural_memory.step_triton import step_triton  # noqa: E402
from memlm_kernels.neural_memory.triton import memory_triton  # noqa: E402
from memlm_kernels.recurrence.delta_triton import delta_rule_triton  # noqa: E402
from memlm_kernels.recurrence.linear_triton import linear_attention_triton  # noqa: E402
from memlm_kernels.rms_norm.triton import rms_norm_triton  # noqa: E402
from memlm_kernels.rotary.triton import rotary_triton  # noqa: E402
from memlm_kernels.route_documents.reference import RoutingInputs, RoutingRule, Scored  # noqa: E402
from memlm_kernels.route_documents.triton import choose_triton, merge_topk_triton  # noqa: E402
from memlm_kernels.routed_memory.triton import combine_reads_triton, dispatch_tokens_triton  # noqa: E402
from memlm_kernels.segment_mean_pool.triton import segment_mean_pool_triton  # noqa: E402
from memlm_kernels.short_convolution.triton import short_convolution_triton  # noqa: E402

# Targets, each with the shared memory of a block in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 65_536),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 163_840),
}
VERSION = importlib.metadata.version("triton")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
INSTRUCTIONS = {"cuda": r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", "hip": r"v_mfma"}
# Dtypes and head sizes compiled for all targets and tiles, and those only in a sample's calls and targets.
SIZES = [("bfloat16", 128), ("float32", 64)]
MORE = [("bfloat16", 256), ("bfloat16", 96), ("float16", 64), ("float32", 128)]
SAMPLE = ["sm_90", "gfx942"]
OPTIONS = ("num_warps", "num_stages", "waves_per_eu")


class Launch(NamedTuple):
    """whole: compiled for all targets with all tiles"""

    case: str
    kernel: Kernel
    limits: dict[str, int]
    arguments: dict[str, Any]
    whole: bool


class Compiled(NamedTuple):
    """registers: per thread; shared: bytes; spills: bytes on CUDA, registers on HIP; problems: reasons to fail."""

    registers: int
    spills: int
    shared: int
    instructions: str
    problems: list[str]


def cases(dtype: str, size: int, sample: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of the ops that together launch every kernel in every way that changes its code."""
    name, kind = f"{dtype} {size}", getattr(torch, dtype)
    q, k, v = (torch.empty(2, 1024, 2, size, dtype=kind, requires_grad=True) for _ in "qkv")
    gate, channel = (torch.empty(shape, requires_grad=True) for shape in (q.shape[:3], q.shape))
    cu, state = torch.tensor([[0, 500, 1024]] * 2), torch.zeros(2, 2, 2, size, size)
    yield f"{name} scalar", both(linear_attention_triton, q, k, v, gate, cu, state)
    yield f"{name} channel", both(linear_attention_triton, q, k, v, channel, None, None)
    yield f"{name} delta, decay", both(delta_rule_triton, q, k, v, gate, gate, cu, state, False)
    yield f"{name} delta, decay, step", once(delta_rule_triton, *first(q, k, v, gate, gate), None, None, True)
    if not sample:
        yield f"{name} channel, step", once(linear_attention_triton, *first(q, k, v, channel), cu, state)
        yield f"{name} linear", both(linear_attention_triton, q, k, v, None, None, None)
        yield f"{name} delta", both(delta_rule_triton, q, k, v, gate, None, None, None, False)
    yield f"{name} delta, channel", both(delta_rule_triton, q, k, v, gate, channel, None, None, False)
    if size * q.element_size() <= 256:
        yield f"{name} memory", both(memory, q, k, v, gate, 16)
        yield f"{name} memory, step", once(decoded, *first(q, k, v, gate))
        yield f"{name} memories of segments", both(segmented, q, k, v, gate, cu, torch.zeros(2, 2, 3, 2, size, size))
    narrow = [x[..., :64].detach().requires_grad_() for x in (q, k, v)]
    yield f"{dtype} 64 memory of two layers", both(memory, *narrow, gate, 16, 64)
    yield f"{dtype} 64 memory of two layers, step", once(decoded, *first(*narrow, gate), 64)
    if not sample:
        yield f"{dtype} 64 memory of two layers, 128 hidden", both(memory, *narrow, gate, 16, 128)
    yield f"{name} large chunks", both(large_chunks, q, k, v, gate, None, 0)
    if not sample:
        yield f"{name} large chunks, documents, Muon", both(large_chunks, q, k, v, gate, cu, 1)
    yield f"{name} convolution", both(convolution, q, k, v, True)
    yield f"{name} convolution, plain", both(convolution, q, k, v, False)
    yield f"{name} norm", both(rms_norm_triton, q, torch.ones(size), None, None, 1e-6, kind)
    yield f"{name} norm, gate", both(rms_norm_triton, q.float(), torch.ones(size), k, None, 1e-6, kind)
    yield f"{name} norm, mix", both(rms_norm_triton, q, torch.ones(size), k, v, 1e-6, kind)
    yield f"{name} rotary", both(rotary_triton, q, k, *(torch.ones(2, 1024, 1, size, dtype=kind) for _ in "cs"))
    yield f"{name} means", both(segment_mean_pool_triton, k.flatten(2), cu, 1024)
    yield f"{name} routed tokens", both(routed, q.flatten(2), torch.zeros(2, 1024, 2, dtype=torch.int64), gate)
    rows, matrices = (
        q.detach().flatten(0, 2).requires_grad_(),
        torch.empty(4, 192, size, dtype=kind, requires_grad=True),
    )
    yield f"{name} grouped product", both(lambda: [grouped_linear_triton(rows, matrices, torch.full((4,), 1024))])
    few = q.detach().flatten(0, 2)[:3]
    maps = [torch.empty(out, size, dtype=kind) for out in (192, 32, 32, 8)]
    biases, wide = [None, None, torch.zeros(32, dtype=kind), None], [False, False, False, True]
    yield f"{name} few rows by three matrices", once(linears_triton, few, maps[:3], biases[:3], wide[:3])
    if kind != torch.float32:
        # Gates multiply fp32 as it is, which no matrix unit does.
        yield f"{name} few rows, gates", once(linears_triton, few, maps, biases, wide)
    yield f"{name} routing", once(route, q, k, ("cosine", "mean", "max"), True, 16)
    yield f"{name} routing, row", once(route, q, k, ("cosine", "mean", "max"), False, 16)
    if not sample:
        yield f"{name} routing, 128 of", once(route, q, k, ("dot", "max", "mean"), True, 128)
        yield f"{name} routing, row, 128 of", once(route, q, k, ("dot", "max", "mean"), False, 128)
        if dtype == "bfloat16":
            yield f"{name} routing, exact query", once(route, q.float(), k, ("cosine", "mean", "max"), True, 16)
    yield from attentions(name, kind, size, sample)


def attentions(name: str, kind: torch.dtype, size: int, sample: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Four heads share keys; the window is 512 keys."""
    q = torch.empty(2, 1024, 8, size, dtype=kind, requires_grad=True)
    k, v = (torch.empty(2, 1024, 2, size, dtype=kind, requires_grad=True) for _ in "kv")
    spans = [torch.zeros(2, 1024, dtype=torch.int64)] * 2
    choice = (torch.zeros(2, 1024, 2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64), 64, 512)
    # So many chunks that tiles of queries may gather them.
    many = (choice[0], torch.zeros(2, 64, dtype=torch.int64), *choice[2:])

    def call(*given: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return attend_triton(*given, *spans, 512, None, **options)

    def step() -> tuple[Tensor, ...]:
        token, near = [x[:, :1] for x in (q.detach(), *spans)], (choice[0][:, :1], *choice[1:])
        return attend_triton(token[0], k.detach(), v.detach(), *token[1:], 512, None, choice=near)

    yield f"{name} choice", once(choose_chunks, q.detach(), k.detach().float(), *(x.int() for x in spans), 16)
    # Chunk numbers of two digits.
    yield f"{name} inverse", once(invert, choice[0], 300)
    yield f"{name} chunks", both(lambda: call(q, k, v, choice=choice))
    yield f"{name} chunks, gathered", both(lambda: call(q, k, v, choice=many))
    yield f"{name} chunks, step", step
    documents = (torch.zeros(1, 512, dtype=torch.int64), choice[0][:, :, 0])
    yield (
        f"{name} documents",
        both(lambda: call(q, k, v, prefix=(None, k[:1, :512], v[:1, :512]), documents=documents)),
    )
    yield f"{name} window, prefix", both(lambda: call(q, k, v, prefix=(q, k[:1, :16], v[:1, :16])))
    if not sample:
        yield f"{name} chunks, far", both(lambda: call(q, k, v, far=(q, k), choice=many))
        yield f"{name} window", both(lambda: call(q, k, v))


def first(*tensors: Tensor) -> list[Tensor]:
    """The first token of each."""
    return [x[:, :1].detach() for x in tensors]


def memory(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, chunk_size: int, hidden: int | None = None
) -> tuple[Tensor, ...]:
    """A memory over documents, with momentum and decay; with ``hidden`` channels, two layers and a norm."""
    tokens = Tokens(q, k, v, gate, gate, gate, None)
    weights, norm = network(q, v, hidden)
    cu_seqlens = torch.tensor([0, q.shape[1] // 2, q.shape[1]]).expand(len(q), -1)
    rest = (squared_error, 1, None, cu_seqlens, None, True, scan_deep, 16, memory_triton)
    o, state, _ = neural_memory_reference(tokens, weights, chunk_size, "gelu", norm, *rest)
    return o, *state.weights


def decoded(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, hidden: int | None = None) -> tuple[Tensor, ...]:
    """A token of such a memory."""
    weights, norm = network(q, v, hidden)
    held = tuple(w.expand(len(q), *w.shape).contiguous() for w in weights)
    state = NeuralMemoryState(held, held, held, torch.zeros(len(q), dtype=torch.int64))
    o, state, _ = step_triton(
        Tokens(q, k, v, gate, gate, gate, None), state, weights, norm, False, 16, None, None, True
    )
    return o, *state.weights


def network(q: Tensor, v: Tensor, hidden: int | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor] | None]:
    """The weights and the norm of a memory."""
    sizes = [q.shape[3], *([] if hidden is None else [hidden]), v.shape[3]]
    weights = tuple(
        torch.zeros(q.shape[2], *layer, requires_grad=q.requires_grad) for layer in itertools.pairwise(sizes)
    )
    return weights, None if hidden is None else (torch.ones(v.shape[2:]), torch.zeros(v.shape[2:]))


def convolution(q: Tensor, k: Tensor, v: Tensor, heads: bool) -> tuple[Tensor, ...]:
    """The short convolution, with queries and keys of unit length in packed rows, or without."""
    x = [part.flatten(2) for part in (q, k, v)]
    sizes, channels = [part.shape[2] for part in x], sum(part.shape[2] for part in x)
    positions = torch.zeros(q.shape[:2], dtype=torch.int64) if heads else None
    state, weight = torch.zeros(len(q), 3, channels), torch.zeros(channels, 4, requires_grad=True)
    options: Any = (sizes, True, 2 if heads else 0, q.shape[3], 0.0, 1.0, torch.float32 if heads else None)
    return short_convolution_triton(x, weight, *options, None, positions, state)[0]


def route(q: Tensor, k: Tensor, reductions: tuple[str, str, str], running: bool, top_k: int) -> tuple[Any, ...]:
    """Routing to documents of eight chunks, by queries and by 64 lists of other scores."""
    document = torch.arange(k.shape[1]).expand(len(k), -1) // 8
    rule = RoutingRule(*reductions, "max", top_k, 128, running, 1)
    asks, spans = torch.ones(q.shape[:2], dtype=torch.bool), (torch.zeros(q.shape[:2]), torch.ones(q.shape[:2]))
    before = Scored(torch.zeros(document.shape), torch.zeros(document.shape, dtype=torch.int64))
    lists = torch.zeros(len(q), q.shape[1], 64 * top_k)
    return (
        choose_triton(rule, RoutingInputs(q.detach(), k, document, asks, spans if running else None, before), q.dtype),
        choose_triton(rule, RoutingInputs(None, k, document, None, spans, before), q.dtype),
        merge_topk_triton(lists.long(), lists, top_k),
    )


def routed(x: Tensor, place: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens sent to two memories, and their reads of these and of a shared one."""
    rows = dispatch_tokens_triton(x, place)
    return rows, combine_reads_triton(rows, place, gate, x.float())


def segmented(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, cu: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Linear memories, one for each segment."""
    state = SegmentedMemoryState(memory, torch.zeros(memory.shape[:2], dtype=torch.int64))
    given = {"chunk_size": 16, "state": state, "cu_seqlens": cu, "backend": "triton"}
    # The op accepts CPU tensors only with the interpreter.
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        o, after = segmented_neural_memory(q, k, v, gate, gate, gate, **given)
    return o, after.memory


def large_chunks(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, cu: Tensor | None, muon_steps: int
) -> tuple[Tensor, ...]:
    """LaCT's memory with momentum; over documents it goes on from a state."""
    tokens, size = LargeChunkTokens(q, k, v, torch.stack([gate] * 3, -1), gate), q.shape[3]
    weights = tuple(torch.zeros(q.shape[2], size, size, requires_grad=True) for _ in range(3))
    state = None
    if cu is not None:
        held = tuple(torch.zeros(len(q), *w.shape, requires_grad=True) for w in weights)
        sums = (torch.zeros(*held[0].shape[:2], 1, 1),)
        state = LargeChunkMemoryState(held, held, held, sums, torch.zeros(len(q), dtype=torch.int64))
    o, after = large_chunk_memory_reference(tokens, weights, 256, muon_steps, state, cu, None, write_triton)
    return o, *after.weights


def once(op: Callable, *arguments: Any) -> Callable[[], Any]:
    return lambda: op(*arguments)


def both(op: Callable, *arguments: Any) -> Callable[[], None]:
    """Forward and backward."""

    def call() -> None:
        out = op(*arguments)
        sum(x.sum() for x in out if isinstance(x, Tensor) and x.requires_grad).backward()

    return call


def recorded(sample: bool) -> list[Launch]:
    """The launches of the ops, each once."""
    sizes = {("bfloat16", 64): False} if sample else dict.fromkeys(SIZES, True) | dict.fromkeys(MORE, False)
    launches: dict[tuple, Launch] = {}
    before = torch.get_float32_matmul_precision()

    def record(kernel: Kernel, programs: Any, limits: dict[str, int], **arguments: Any) -> None:
        key = (kernel.function.__name__, *signature(kernel, arguments).items(), *sorted(limits.items()))
        key += tuple((n, x) for n, x in arguments.items() if signature(kernel, arguments)[n] == "constexpr")
        launches.setdefault(key, Launch(name, kernel, limits, arguments, whole))

    try:
        # With "highest", auto does not choose Triton for fp32 on CUDA; for AMD see ``compile_one``.
        torch.set_float32_matmul_precision("high")
        with recording(record):
            for (dtype, size), whole in sizes.items():
                for case, call in cases(dtype, size, not whole):
                    name = case
                    call()
    finally:
        torch.set_float32_matmul_precision(before)
    return list(launches.values())


def signature(kernel: Kernel, arguments: dict[str, Any]) -> dict[str, str]:
    constant = {p.name for p in kernel.function.params if p.is_constexpr}
    types = {}
    for name in kernel.function.arg_names:
        x = arguments.get(name)
        if name in constant or x is None:
            types[name] = "constexpr"
        elif hasattr(x, "dtype"):
            types[name] = POINTERS[x.dtype]
        else:
            types[name] = "fp32" if isinstance(x, float) else "i32" if x < 2**31 else "i64"
    return types


def build(one: Launch, tiles: dict[str, int], target: GPUTarget) -> Any:
    """Triton's compiled kernel of a launch."""
    arguments = one.arguments | {n: x for n, x in tiles.items() if n not in OPTIONS}
    if target.backend == "hip" and "PRECISION" in arguments:
        # The launch was recorded for CUDA; see ``launch.precision``.
        arguments["PRECISION"] = "ieee"
    types = signature(one.kernel, arguments)
    constants = {name: arguments.get(name) for name, kind in types.items() if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(one.kernel.function, types, constants, aligned)
    return triton.compile(source, target=target, options={name: tiles[name] for name in OPTIONS if name in tiles})


def compile_one(one: Launch, tiles: dict[str, int], target: GPUTarget, most_shared: int) -> Compiled:
    compiled, types = build(one, tiles, target), signature(one.kernel, one.arguments | tiles)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    found = collections.Counter(re.findall(INSTRUCTIONS[target.backend], text))
    registers, spills = (resources_cuda if target.backend == "cuda" else resources_hip)(compiled.asm)
    shared = compiled.metadata.shared
    problems = []
    if spills:
        problems.append(f"spills {spills}")
    if shared > most_shared:
        problems.append(f"shared memory {shared} > {most_shared}")
    if tiles["num_warps"] * target.warp_size > 1024:
        problems.append(f"{tiles['num_warps']} warps")
    idle = re.search(r"tt\.dot .*-> tensor<[^#]*#blocked", compiled.asm["ttgir"])
    if idle or ("tt.dot " in compiled.asm["ttir"] and not found):
        problems.append("a product without matrix instructions")
    sizes = [n for n, kind in types.items() if kind == "i32" and n not in one.kernel.function.do_not_specialize]
    if sizes:
        problems.append(f"compiled again for other values of {', '.join(sizes)}")
    return Compiled(registers, spills, shared, ", ".join(f"{n} {x}" for x, n in found.items()), problems)


def resources_cuda(asm: dict[str, Any]) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    use = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return use["REG"], use["STACK"] + use["LOCAL"]


def resources_hip(asm: dict[str, Any]) -> tuple[int, int]:
    use = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", asm["amdgcn"])}
    # Scalar registers spill to lanes of vector registers, not to memory.
    return use["vgpr_count"], use["vgpr_spill_count"]


# Launches with tiles and the name of a target. Forked processes have them; they cannot be pickled.
_wanted: list[tuple[Launch, dict[str, int], str]] = []


def compiled(i: int) -> Compiled:
    one, tiles, target_name = _wanted[i]
    try:
        return compile_one(one, tiles, *TARGETS[target_name])
    # The compiler fails with many exceptions, and the other kernels must still be compiled.
    except Exception as error:
        return Compiled(0, 0, 0, "", [f"{type(error).__name__} in the compiler"])


def fullest(launches: list[Launch]) -> dict[str, Launch]:
    """Each kernel's launch with the most arguments, which compiles most of its code."""
    found: dict[str, Launch] = {}
    for one in sorted(launches, key=lambda one: sum(x is not None and x is not False for x in one.arguments.values())):
        found[one.kernel.function.__name__] = one
    return found


def main(args: argparse.Namespace) -> int:
    launches = recorded(args.sample)
    rows, begin = [], time.perf_counter()
    if args.sample:
        launches = [*fullest(launches).values()]
    for number, one in enumerate(launches):
        name, targets = one.kernel.function.__name__, args.targets or list(TARGETS)
        if args.kernel and not any(part in name for part in args.kernel):
            continue
        if not one.case.startswith(args.case):
            continue
        if args.sample and not args.targets:
            # Kernels take turns.
            targets = [SAMPLE[number % 2]]
        for target_name in targets:
            choices = launch.fitting(one.kernel.tiles_on(target_name), one.limits)
            if not one.whole:
                choices = choices[: target_name in SAMPLE]
            _wanted.extend((one, tiles, target_name) for tiles in choices)
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork"))
    for (one, tiles, target_name), done in zip(_wanted, pool.map(compiled, range(len(_wanted))), strict=True):
        name, cells = one.kernel.function.__name__, " ".join(f"{n}={x}" for n, x in tiles.items())
        rows.append([f"`{name}`", one.case, target_name, cells, *map(str, done[:-1])])
        rows[-1].append("; ".join(done.problems) or "ok")
        if done.problems or args.verbose:
            print(f"{name}, {one.case}, {target_name}, {cells}: {done}", flush=True)
    print(f"{summary(rows)}, {time.perf_counter() - begin:.0f} s")
    if args.out:
        there = {(f"`{one.kernel.function.__name__}`", one.case) for one in launches}
        made = {tuple(row[:3]) for row in rows}
        kept = [row for row in written(args.out) if tuple(row[:2]) in there and tuple(row[:3]) not in made]
        args.out.write_text(table(kept + rows, args.sample))
    return int(any(row[-1] != "ok" for row in rows))


def summary(rows: list[list[str]]) -> str:
    kernels, failures = {row[0] for row in rows}, sum(row[-1] != "ok" for row in rows)
    return f"{len(rows)} compilations of {len(kernels)} kernels, {failures} that fail"


def written(path: Path) -> list[list[str]]:
    """The rows of an earlier table."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line[2:-2].split(" | ") for line in lines if line.startswith("| `")]


def table(rows: list[list[str]], sample: bool) -> str:
    whole, more = (", ".join(f"{dtype} {size}" for dtype, size in sizes) for sizes in (SIZES, MORE))
    there = {row[2] for row in rows}
    targets = ", ".join(name for name in TARGETS if name in there)
    sampled = " and ".join(name for name in SAMPLE if name in there)
    covers = [
        f"{whole}: every call and tile, for {targets}. {more}: a sample of the calls, the first tiles, for {sampled}."
    ]
    lines = [
        "# Compilations of the Triton kernels",
        "",
        f"By `python scripts/compile_kernels.py{' --sample' * sample}` with Triton {VERSION}: {summary(rows)}.",
        *([] if sample else covers),
        "No kernel was run. Registers are per thread; shared memory and CUDA's spills are in bytes.",
        "",
        "| kernel | call | target | tiles | registers | spills | shared | matrix instructions | |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in sorted(rows, key=lambda row: row[:4])),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="bf16, heads of 64, the first tiles, one of two targets")
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--kernel", nargs="+", help="only kernels whose name contains one of these")
    parser.add_argument("--case", default="", help="only calls whose name begins with this")
    parser.add_argument("--verbose", action="store_true", help="print every compilation, not only those that fail")
    parser.add_argument(
        "--out", type=Path, help="the table, as Markdown; rows of other kernels, calls and targets stay"
    )
    sys.exit(main(parser.parse_args()))
