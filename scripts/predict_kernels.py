"""Predict the time of each goal's kernels on an H200 from their compiled code, as Markdown. Nothing runs on a GPU.

    python scripts/predict_kernels.py --out kernels/predicted.md    all goals, some minutes
    python scripts/predict_kernels.py --goal delta --tiles          one goal, with all tiles of its kernels

The ops are called on the CPU at the sizes of the goals. Their launches are compiled for sm_90 instead of run. A
program waits for loads, barriers and products; its instructions share the schedulers of a multiprocessor with those of
other programs. A launch takes the time of its waves of programs, or that of its bytes and FLOPs if it is longer. The
costs are estimates, and the result is inference, good to about a factor of two. It is for comparing changes.

The script fails if a kernel spills, if warps of a product have no rows of their own, or if a pass of less than two
waves has one program per multiprocessor.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from benchmark_kernels import OPS, Size
from compile_kernels import TARGETS, VERSION, Launch, build, resources_cuda
from kernel_report.launches import recording
from kernel_report.loops import Unknown, bounds_of, flops, loops_of, trips
from roofline import moved
from torch import Tensor

from memlm_kernels import pieces
from memlm_kernels.attention.gathering import WORTH
from memlm_kernels.launch import Kernel, cdiv, fitting

# Cycles of a round of loads, of a barrier and of a wait for wgmma, and cycles a microsecond.
LOAD, BARRIER, PRODUCT, CYCLES = 600, 45, 130, 1750
# Multiprocessors, and what each has: registers, bytes of shared memory, threads, and schedulers.
UNITS, REGISTERS, SHARED, THREADS, SCHEDULERS = 132, 65_536, 233_472, 2048, 4
TB_A_SECOND, TFLOPS = 4.8, 989


Arguments = dict[str, Any]


class Goal(NamedTuple):
    """ours: an op of benchmark_kernels and its size; peer: its expected time in ms; least: the required ratio.

    union: the chunks that the tokens of a tile choose together
    """

    name: str
    op: str
    size: Size
    peer: str
    ms: float
    least: float
    learns: bool = True
    union: int = 0


def sparse(tokens: int, ms: float, least: float, union: int) -> Goal:
    size = Size(rows=1, tokens=1024 * tokens)
    return Goal(f"sparse, {tokens}K", "chunk_sparse_attention, with selection", size, "flash", ms, least, union=union)


GOALS = [
    Goal("delta rule", "delta_rule, decay", Size(), "fla", 2.3, 1.0),
    Goal("GLA", "linear_attention, channels", Size(), "fla", 3.3, 1.0),
    Goal("one layer", "neural_memory", Size(), "fla's delta rule", 1.5, 0.55),
    Goal("one layer, one head", "neural_memory", Size(heads=1), "fla's delta rule", 0.3, 0.55),
    Goal("one layer, long row", "neural_memory", Size(1, 131_072, 1), "fla's delta rule", 2.5, 0.55),
    Goal("two layers", "neural_memory, two layers", Size(), "reference", 120, 10),
    # Independent choices of 16 tokens.
    sparse(8, 2.9, 1.0, 66),
    sparse(32, 44, 2.0, 145),
    sparse(128, 706, 4.6, 207),
    Goal("window", "prefix_window_attention", Size(), "FlashAttention", 1.75, 0.9),
    Goal("routing", "route_documents", Size(), "its bytes", 0.45, 1 / 1.5, learns=False),
]


def window(a: Arguments, goal: Goal) -> float:
    """Tiles of keys in the windows of a tile's tokens."""
    size = 64 if goal.union else 512
    return cdiv(size + a["BM"] // a["RP"], a["BN"])


def readers(a: Arguments, goal: Goal) -> float:
    """Tiles of queries whose windows have a tile's keys."""
    return (64 if goal.union else 512) * a["RP"] / a["BM"] + a["BN"] * a["RP"] / a["BM"]


def union(a: Arguments, goal: Goal) -> float:
    """Tiles of the chosen chunks that a tile of queries goes through; long unions are gathered by the chunks."""
    return 0 if goal.union > WORTH * a["J"] else cdiv(64, a["BC"]) * goal.union


def gathered(a: Arguments, goal: Goal) -> list[float]:
    """Tiles of the readers of a part of a chunk."""
    return [a.get("S", a["T"]) * a["J"] / a["PARTS"] * a["RP"] / a["BM"]]


# Trip counts that depend on data, in the order of the loops.
DATA: dict[str, Callable[[Arguments, Goal], list[float]]] = {
    "attend_forward": lambda a, goal: [window(a, goal), union(a, goal)],
    "queries_backward": lambda a, goal: [window(a, goal), union(a, goal)],
    "attended_keys_backward": lambda a, goal: [readers(a, goal)],
    **dict.fromkeys(("chunks_forward", "chunk_queries_backward", "chunks_backward"), gathered),
    "add_parts": lambda a, goal: [1],
    "unite_chunks": lambda a, goal: [goal.union],
    # Half of the chunks are before a token; few of a tile's chunks take a place.
    "best_chunks": lambda a, goal: [a["N"] / 2 / a["BN"], 2],
    "choose_best": lambda a, goal: [2],
    # Rows are one segment, or pieces of equal length.
    "block_table": lambda a, goal: [cdiv(a["N"], a["BS"])],
    "block_states": lambda a, goal: [a["N"] / a["S"]],
    "block_states_backward": lambda a, goal: [a["N"] / a["S"]],
    "pool": lambda a, goal: [cdiv(64, a["BT"])],
}


class Recorded(NamedTuple):
    """A launch at a goal's size; programs: for each choice of tiles"""

    launch: Launch
    tiles: list[dict[str, int]]
    programs: list[int]
    nbytes: float


class Predicted(NamedTuple):
    """A kernel's launches in a goal; loops: each with its iterations, barriers, load rounds and waits for products.

    apiece: programs that a multiprocessor holds; of_registers: products by wgmma with a factor in registers; us: a
        program's time alone; ms, floor: of all launches
    """

    kernel: str
    tiles: dict[str, int]
    launches: int
    programs: int
    apiece: int
    waves: float
    registers: int
    loops: list[tuple[float, int, int, int]]
    of_registers: int
    us: float
    ms: float
    floor: float
    problems: list[str]


def light(x: Any) -> Any:
    """A tensor without its memory."""
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x


def recorded(goal: Goal) -> list[list[Recorded]]:
    """The launches of a goal, those of the same code together."""
    found: dict[tuple, list[Recorded]] = {}

    def record(kernel: Kernel, programs: Any, limits: dict[str, int], **arguments: Any) -> None:
        tiles = fitting(kernel.tiles_on("sm_90"), limits)
        one = Launch(goal.name, kernel, limits, {name: light(x) for name, x in arguments.items()}, True)
        fixed = {p.name for p in kernel.function.params if p.is_constexpr}
        given = ((n, x.dtype if isinstance(x, Tensor) else x) for n, x in arguments.items())
        key = (kernel.function.__name__, *(x for n, x in given if n in fixed or not isinstance(x, (int, float))))
        found.setdefault(key, []).append(Recorded(one, tiles, [programs(x) for x in tiles], moved(arguments)))

    # Long rows are cut for this GPU's multiprocessors.
    with recording(record), patch.object(pieces, "slots", lambda device: UNITS):
        case = OPS[goal.op][0](goal.op, "triton", torch.bfloat16, goal.size)
        if goal.learns:
            case.run(*(x.requires_grad_() for x in case.inputs)).sum().backward()
        else:
            with torch.no_grad():
                case.run(*case.inputs)
    return list(found.values())


def redundancy(ttgir: str) -> int:
    """The most warps of a product that compute the same elements."""
    covered = {}
    for name, fields in re.findall(r"^(#\w+) = #ttg\.(?:nvidia|amd)_\w+<\{(.*)\}>", ttgir, re.MULTILINE):
        lists = {
            key: [int(x) for x in numbers.split(",")] for key, numbers in re.findall(r"(\w+) = \[([^\]]*)\]", fields)
        }
        covered[name] = [x * y for x, y in zip(lists["warpsPerCTA"], lists["instrShape"], strict=False)]
    most = 1
    for shape, layout in re.findall(r"(?:warp_group_dot|tt\.dot) .*-> tensor<([\dx]+)xf32, (#\w+)>", ttgir):
        sizes = [int(x) for x in shape.split("x")]
        most = max(most, math.prod(max(1, x // size) for x, size in zip(covered.get(layout, []), sizes, strict=False)))
    return most


def apiece(registers: int, shared: int, warps: int) -> int:
    """The programs that a multiprocessor holds at once; it gives registers in units of eight a thread."""
    threads = 32 * warps
    by_registers = REGISTERS // (cdiv(max(registers, 1), 8) * 8 * threads)
    return max(1, min(by_registers, SHARED // (shared + 1024), THREADS // threads, 32))


def predict(group: list[Recorded], choice: int, counts_of_data: list[float]) -> Predicted:
    """counts_of_data: the trip counts that depend on data"""
    one, tiles = group[0], group[0].tiles[choice]
    compiled = build(one.launch, tiles, TARGETS["sm_90"][0])
    ttgir, ptx, shared = compiled.asm["ttgir"], compiled.asm["ptx"], compiled.metadata.shared
    registers, spills = resources_cuda(compiled.asm)
    programs, warps = one.programs[choice], tiles["num_warps"]
    counts = trips(ttgir, one.launch.arguments | tiles, programs, counts_of_data)
    found = loops_of(ptx, bounds_of(ttgir))
    times: list[float] = []
    for loop in found:
        times.append(1.0 if loop.bounds is None else counts[loop.bounds] * times[loop.parent])
    loops = list(zip(times, found, strict=True))
    latency = sum(n * (LOAD * x.rounds + BARRIER * x.barriers + PRODUCT * x.waits) for n, x in loops)
    issued = sum(n * x.instructions for n, x in loops) * warps / SCHEDULERS
    at_once = apiece(registers, shared, warps)
    waves = programs / (UNITS * at_once)
    together = min(at_once, cdiv(programs, UNITS))
    ms = len(group) * max(1.0, waves) * max(latency + issued, together * issued) / CYCLES / 1000
    work = sum(x.programs[choice] for x in group) * flops(ttgir, counts)
    floor = 1e-9 * max(sum(x.nbytes for x in group) / TB_A_SECOND, work / TFLOPS)
    same = redundancy(ttgir)
    problems = [
        *([f"spills {spills} bytes"] if spills else []),
        *([f"{same} warps compute the same"] if same > 1 else []),
        *(["one program per multiprocessor"] if at_once == 1 and waves < 2 else []),
    ]
    return Predicted(
        kernel=one.launch.kernel.function.__name__,
        tiles=tiles,
        launches=len(group),
        programs=programs,
        apiece=at_once,
        waves=waves,
        registers=registers,
        loops=[(n, x.barriers, x.rounds, x.waits) for n, x in loops if x.bounds is not None],
        of_registers=len(re.findall(r"wgmma\.mma_async[^;]*\}\s*,\s*\{", ptx)),
        us=(latency + issued) / CYCLES,
        ms=max(floor, ms),
        floor=floor,
        problems=problems,
    )


HEAD = ["goal", "kernel", "tiles", "launches x programs", "per SM", "waves", "registers", "loops", "register-A"]
HEAD += ["program, us", "all, ms", "floor, ms", ""]


def row(goal: Goal, x: Predicted) -> list[str]:
    loops = "; ".join(f"{n:,.4g} x ({b}, {r}, {w})" for n, b, r, w in x.loops if b + r + w) or "-"
    tiles = " ".join(f"{name}={size}" for name, size in x.tiles.items())
    cells = [f"{x.launches} x {x.programs:,}", str(x.apiece), f"{x.waves:.2g}", str(x.registers), loops]
    cells += [str(x.of_registers), f"{x.us:,.3g}", f"{x.ms:.3g}", f"{x.floor:.2g}", "; ".join(x.problems) or "ok"]
    return [goal.name, f"`{x.kernel}`", tiles, *cells]


def main(args: argparse.Namespace) -> int:
    rows, sums = [], []
    for goal in [x for x in GOALS if args.goal in x.name]:
        total = 0.0
        for group in recorded(goal):
            name = group[0].launch.kernel.function.__name__
            if args.kernel not in name:
                continue
            for choice, tiles in enumerate(group[0].tiles[: None if args.tiles else 1]):
                given = DATA[name](group[0].launch.arguments | tiles, goal) if name in DATA else []
                try:
                    found = predict(group, choice, given)
                except Unknown as error:
                    raise SystemExit(f"{name}: {error}; give it in DATA of scripts/predict_kernels.py") from None
                total += found.ms if choice == 0 else 0.0
                rows.append(row(goal, found))
                print(" | ".join(rows[-1]), flush=True)
        sums.append([goal.name, f"{total:.3g}", f"{goal.ms:g} ({goal.peer})", f"{goal.ms / max(total, 1e-9):.2g}"])
        sums[-1].append(f"{goal.least:.2g}")
        print(" | ".join(sums[-1]), flush=True)
    if args.out:
        made = {x[0] for x in sums}
        cells = [x[2:-2].split(" | ") for x in args.out.read_text().splitlines()] if args.out.exists() else []
        kept = [x for x in cells if x[0] in {goal.name for goal in GOALS} - made]
        order = [goal.name for goal in GOALS]
        rows, sums = (
            sorted([*new, *(x for x in kept if len(x) == size)], key=lambda x: order.index(x[0]))
            for new, size in ((rows, len(HEAD)), (sums, 5))
        )
        args.out.write_text(table(rows, sums))
    return int(any(x[-1] != "ok" for x in rows))


def table(rows: list[list[str]], sums: list[list[str]]) -> str:
    def lines(head: list[str], body: list[list[str]]) -> list[str]:
        return [f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *body)]

    text = [
        "# Predicted times of the goals' kernels on an H200",
        "",
        f"By `python scripts/predict_kernels.py` with Triton {VERSION} for sm_90. **Nothing ran.** This is inference",
        "from compiled code, good to about a factor of two, for comparing changes. The peers' times are expectations.",
        f"A round of loads costs {LOAD} cycles, a barrier {BARRIER}, a wait for wgmma {PRODUCT}, at {CYCLES} MHz. The",
        f"GPU has {UNITS} multiprocessors, {TB_A_SECOND} TB/s and {TFLOPS} TFLOP/s. Torch's own kernels are left out.",
        "",
        *lines(["goal", "ms", "peer, ms", "ratio", "wanted"], sums),
        "",
        "Loops: iterations of a program x (barriers, rounds of loads that nothing hides, waits for products).",
        "Register-A: products by wgmma with a factor in registers. The last column has the reasons to fail.",
        "",
        *lines(HEAD, rows),
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goal", default="", help="only goals whose name contains this")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--tiles", action="store_true", help="all tiles of each kernel, not only the first")
    parser.add_argument("--out", type=Path, help="the table, as Markdown; rows of other goals stay")
    sys.exit(main(parser.parse_args()))
