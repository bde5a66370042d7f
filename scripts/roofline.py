"""The least time that each op can take on a GPU, from the bytes and products of its kernels, as Markdown.

    python scripts/roofline.py

Nothing runs on a GPU: the ops of benchmark_kernels.py are called on the CPU, and their launches are counted. Bytes are
those of every tensor argument, once per kernel, with intermediate results. Repeated reads by tiles count as cached,
and sums that torch makes afterwards are left out. Work is the result of torch's FLOP counter, see
tests/kernels/test_flops.py. The floor is the larger of the two times.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from benchmark_kernels import OPS, Case, Size
from kernel_report.launches import recording
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memlm_kernels.attention import gathering
from memlm_kernels.launch import Kernel
from memlm_kernels.neural_memory.deep import SPAN
from memlm_kernels.testing import import_triton_ops

# TB/s; TFLOP/s of bf16, and of fp32 tokens: NVIDIA's matrix units take them as tf32, AMD's as they are.
GPUS = {"H200": (4.8, 989, 494), "MI300X": (5.3, 1307, 163)}
WHOLE, BF16, FP32 = Size(), torch.bfloat16, torch.float32
# All rows, heads and chunks of a bank cost the same, so a few stand for all.
FEW = Size(rows=1, heads=4, chunks=1 << 16)
LONG = Size(rows=1, heads=4)
STEP = FEW._replace(tokens=1)
REFUSED = [("neural_memory, heads of 128", FP32)]
ROWS = [
    *[(op, dtype, FEW) for dtype in (BF16,) for op in OPS if op.startswith(("linear", "delta")) and "64" not in op],
    *[(op, dtype, FEW) for op in OPS if "neural_memory" in op for dtype in (BF16, FP32) if (op, dtype) not in REFUSED],
    *[(op, BF16, STEP) for op in ("linear_attention, decay", "linear_attention, channels", "delta_rule, decay")],
    *[(op, FP32, STEP) for op in ("neural_memory", "neural_memory, two layers")],
    *[(op, BF16, FEW) for op in ("route_documents", "route_documents, running", "merge_topk", "segment_mean_pool")],
    *[(op, BF16, FEW) for op in ("dispatch_tokens", "combine_reads", "routed delta_rule")],
    *[(op, BF16, FEW) for op in ("chunk_topk", "invert_chunks", "chunk_sparse_attention", "chunk_mean_attention")],
    ("prefix_window_attention", BF16, FEW),
    *[("chunk_sparse_attention, with selection", BF16, LONG._replace(tokens=1024 * n)) for n in (8, 32, 128)],
]


def scale(op: str, size: Size) -> float:
    """The factor from the reduced size to the whole."""
    if op.startswith("route_documents"):
        return WHOLE.chunks / size.chunks
    if op == "merge_topk":
        return 1
    if op.endswith("with selection"):
        return WHOLE.heads / size.heads
    return WHOLE.rows / size.rows * (1 if op == "segment_mean_pool" else WHOLE.heads / size.heads)


def moved(arguments: dict[str, Any]) -> float:
    """Bytes of a launch; a launch for a span of chunks counts only its share of tensors over all chunks."""
    share, counts = 1.0, set()
    if "begin" in arguments:
        end = arguments.get("end", min(arguments["begin"] + SPAN, arguments["N"]))
        share = (end - arguments["begin"]) / arguments["N"]
        counts = {arguments["N"]}
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    # Each tile of values has its own share of a gradient.
    return sum(x.nbytes * (share if x.ndim > 2 and {*x.shape[:2]} & counts else 1) for x in tensors)


def counted(call: Callable[[], Any]) -> tuple[float, float]:
    """Bytes and FLOPs of a call."""
    launches: list[float] = []

    def record(kernel: Kernel, programs: Any, limits: Any, **arguments: Any) -> None:
        launches.append(moved(arguments))

    with recording(record), FlopCounterMode(display=False) as counter:
        call()
    return sum(launches), counter.get_total_flops()


def parts(case: Case) -> dict[str, tuple[float, float]]:
    with torch.no_grad():
        found = {"forward": counted(lambda: case.run(*case.inputs))}
    if case.learns:
        out = []

        def forward() -> None:
            out.append(case.run(*(x.requires_grad_() for x in case.inputs)))

        # Tensors saved for backward count as forward.
        found["forward"] = counted(forward)
        found["backward"] = counted(lambda: out[0].sum().backward())
    return found


def main(only: str) -> None:
    import_triton_ops()
    # Neighbouring tokens choose the same chunks.
    gathering.WORTH = math.inf
    heads = "".join(f" {gpu}: bytes, work | floor |" for gpu in GPUS)
    print(f"| op | GB | GFLOP |{heads}\n|{'---|' * (3 + 2 * len(GPUS))}")
    for op, dtype, size in [row for row in ROWS if only in row[0]]:
        case = OPS[op][0](op, "triton", dtype, size)
        if size.tokens == 1:
            case = case._replace(learns=False)
        times = scale(op, size)
        for part, (moves, flops) in parts(case).items():
            gb, gflop = times * moves / 1e9, times * flops / 1e9
            work = f"{gflop:,.0f}" if gflop >= 100 else f"{gflop:.3g}"
            cells = [f"{name(op, dtype, size)}{part}", f"{gb:.3g}", work]
            for bandwidth, half, single in GPUS.values():
                by_bytes, by_work = 1e3 * gb / bandwidth, 1e3 * gflop / (single if dtype == FP32 else half)
                cells += [f"{by_bytes:.0f}, {by_work:.0f} us", f"{max(by_bytes, by_work) / 1000:.3g} ms"]
            print(f"| {' | '.join(cells)} |", flush=True)


def name(op: str, dtype: torch.dtype, size: Size) -> str:
    kernel, _, variant = op.partition(", ")
    details = [variant, "" if dtype == BF16 else "fp32", "a step of decoding" if size.tokens == 1 else ""]
    details.append(f"{size.tokens // 1024}K tokens" if op.endswith("with selection") else "")
    return ", ".join([f"`{kernel}`", *filter(None, details), ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    main(parser.parse_args().op)
