"""Speed and memory of memory layers, with Titans' beside titans-pytorch: one JSON line per measurement.

    python scripts/benchmark_memory.py --suite wide --peer-python ../peer/bin/python
    python scripts/benchmark_memory.py --table

Suites:

- ``wide``, ``heads``, ``linear``, ``length`` and ``decode`` measure ``memory=titans_lmm``. The peer is
  ``titans_pytorch.NeuralMemory``, in its own environment (torch as in constraints.txt, then titans-pytorch).
- ``mom``, ``mom_length`` and ``mom_decode`` measure a mixture of memories beside a single one.
- ``attention_decode`` measures attention that keeps all keys.
- ``train``, for a GPU, measures training steps of a language model of Titans' 340M with ``memory=titans_mag`` beside
  the same decoder with full attention (``memory=attention``).

Both layers map [B, T, width] to the same shape, have their own projections and gates, and have a residual and a
LayerNorm around their MLP. In ``linear`` the memory is one layer, and ours has nothing around it. The peer keeps its
defaults: no convolution, no output gate, and momentum and decay shared by all tokens of a chunk, where ours has one
per token. Its gradients are taken at the ``anchor``: the weights at the start of the call (its default), or at the
start of the chunk, as in the paper and here (its ``batch_size=chunk_size``).

A measurement is a process with one thread. It builds its layer and input, runs one pass to warm up, and then one pass
per request, so the runs of a group alternate and share the noise of the machine. A pass is forward and backward, to
the input and all parameters. For ``decode`` it is a chunk of one-token calls without gradients; for ``train`` a step
of AdamW on one row, in bf16 with gradient checkpointing, as in ``experiment=titans_paper``.

Rates are tokens per second of the process's CPU time (``user`` excludes the operating system, which maps memory), of
wall time, and of CUDA time on a GPU. Memory is in MB (2**20 bytes): ``base_rss_mb`` is the peak before the first pass,
``peak_rss_mb`` the peak after the last. glibc returns freed tensors of more than 32 MB to the operating system, which
clears their pages again for later ones; ``--keep-memory`` avoids that work.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The peer keeps whole weights for every chunk: 4096 tokens in chunks of 4 would need 18 GB. So it reads fewer tokens.
PEER_CHUNKS = 128
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**35), "MALLOC_TRIM_THRESHOLD_": str(2**35)}

WIDE = {"width": 384, "heads": 1, "head_dim": 384, "expansion": 4, "depth": 2, "batch": 1, "dtype": "float32"}
HEADS = WIDE | {"heads": 6, "head_dim": 64}
TINY = WIDE | {"width": 32, "heads": 2, "head_dim": 16}
ATTENTION = ("attention", "chunk_sparse")

PAPER = ["experiment=titans_paper", "model=titans_340m"]
TINY_MODEL = ["model=tiny", "train.gradient_checkpointing=true"]

Setting = dict[str, Any]


def ours(shape: Setting, chunk_size: int, tokens: int, **more: int) -> Setting:
    return {"what": "memlm", "anchor": "chunk", **shape, "chunk_size": chunk_size, "tokens": tokens, **more}


def beside_peer(shape: Setting, chunk_size: int) -> list[Setting]:
    our, fewer = ours(shape, chunk_size, 4096), min(4096, PEER_CHUNKS * chunk_size)
    return [our, *(our | {"what": "titans-pytorch", "anchor": a, "tokens": fewer} for a in ("call", "chunk"))]


def linear(tokens: int, **more: Any) -> Setting:
    """A gated delta rule, or with ``num_memories`` a mixture of several."""
    kind = "mom" if "num_memories" in more else "gated_delta_net"
    return {"what": "memlm", "kind": kind, **HEADS, "tokens": tokens, **more}


def model_of(overrides: list[str], memory: str, tokens: int, dtype: str) -> Setting:
    setting = {"what": "memlm", "overrides": [*overrides, f"memory={memory}"], "memory": memory}
    return setting | {"batch": 1, "tokens": tokens, "dtype": dtype}


def attending(kind: str, seen: int) -> Setting:
    """Attention that keeps all keys, with its kind's default settings."""
    return {"what": "memlm", "kind": kind, **HEADS, "tokens": 64, "seen": seen}


# A suite is a list of groups; the runs of a group alternate.
SUITES = {
    "wide": [beside_peer(WIDE, 64)],
    "heads": [beside_peer(HEADS, chunk_size) for chunk_size in (4, 8, 16, 32, 64, 128, 256)],
    "linear": [beside_peer(HEADS | {"depth": 1}, chunk_size) for chunk_size in (4, 16, 64, 256)],
    # One at a time: a waiting process keeps its memory.
    "length": [[ours(HEADS, 64, tokens=1024 * 2**i)] for i in range(6)],
    "decode": [[ours(HEADS, 64, tokens=64, seen=seen) for seen in (1024, 4096, 16384)]],
    "mom": [[linear(2048), *(linear(2048, num_memories=m, top_k=2) for m in (4, 16))]],
    "mom_length": [[linear(1024 * 2**i, num_memories=4, top_k=2)] for i in range(6)],
    "mom_decode": [
        [linear(64, seen=seen, num_memories=m, top_k=2) for m in (4, 16) for seen in (1024, 16384)],
    ],
    "attention_decode": [[attending(kind, seen) for seen in (1024, 4096, 16384)] for kind in ATTENTION],
    # One at a time, because of the GPU's memory.
    "train": [
        [model_of([*PAPER, f"hardware.kernels={kernels}"], memory, 4096 * 4**i, "bfloat16")]
        for i in range(3)
        # Full attention by torch's own kernels, the baseline.
        for memory, kernels in (("attention", "auto"), ("titans_mag", "triton"))
    ],
    "train_smoke": [[model_of(TINY_MODEL, memory, 64, "float32")] for memory in ("attention", "titans_mag")],
    "smoke": [[ours(TINY, 8, tokens=64), ours(TINY, 8, tokens=8, seen=64)]],
}


def build_memlm(s: Setting) -> Callable:
    from memlm.memory.base import Dims, build_mixer

    if s.get("kind") in ATTENTION:
        mixer = {"kind": s["kind"]}
    elif "kind" in s:
        mixer = {"kind": s["kind"], "num_heads": s["heads"], "head_dim": s["head_dim"]}
        mixer |= {name: s[name] for name in ("num_memories", "top_k") if name in s}
    else:
        mixer = {
            "kind": "titans_lmm",
            "memory_heads": s["heads"],
            "memory_head_dim": s["head_dim"],
            "memory_depth": s["depth"],
            "memory_expansion": s["expansion"],
            "chunk_size": s["chunk_size"],
        }
    dims = Dims(s["width"], s["heads"], s["heads"], s["head_dim"])
    return build_mixer(mixer, dims, 0, "benchmark")


def training_step(s: Setting) -> Callable:
    import torch
    from omegaconf import OmegaConf

    from memlm import MemLMConfig, MemLMForCausalLM
    from memlm.cli import composed
    from memlm.training.model import checkpoint_layers
    from memlm_kernels import set_backend

    cfg = composed(ROOT / "configs", "train", s["overrides"])
    set_backend(cfg.hardware.kernels, "hardware.kernels")
    model = MemLMForCausalLM(MemLMConfig.from_hydra(OmegaConf.to_container(cfg.model, resolve=True))).train()
    checkpoint_layers(model, OmegaConf.to_container(cfg.train)["gradient_checkpointing"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optim.lr)
    ids = torch.randint(model.config.vocab_size, (s["batch"], s["tokens"]))
    dtype = getattr(torch, s["dtype"])

    def step() -> None:
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_peer(s: Setting) -> Callable:
    from titans_pytorch import MemoryMLP, NeuralMemory

    return NeuralMemory(
        s["width"],
        heads=s["heads"],
        dim_head=s["head_dim"],
        chunk_size=s["chunk_size"],
        batch_size=s["chunk_size"] if s["anchor"] == "chunk" else None,
        model=MemoryMLP(s["head_dim"], depth=s["depth"], expansion_factor=s["expansion"]),
    )


def layer_step(s: Setting) -> Callable:
    """A pass over one layer; ``decode`` has no peer."""
    import torch

    torch.set_default_dtype(getattr(torch, s["dtype"]))
    layer = (build_memlm if s["what"] == "memlm" else build_peer)(s)
    x = torch.randn(s["batch"], s["tokens"], s["width"], requires_grad=True)
    gradient, state, start = torch.randn_like(x), None, 0

    def call(x: torch.Tensor) -> tuple:
        if s["what"] != "memlm":
            return layer(x)
        # Here, because the peer's environment lacks transformers.
        from memlm.memory.rows import Rows

        rows = Rows(x.shape[1], torch.full((len(x),), start), start, metrics=False)
        return layer(x, layer.init_state(len(x), x.device, x.dtype) if state is None else state, rows)

    def train() -> None:
        torch.autograd.grad(call(x)[0], [x, *layer.parameters()], gradient, allow_unused=True)

    @torch.no_grad()
    def decode() -> None:
        nonlocal state, start
        pieces = [x] * -(-s["seen"] // s["tokens"]) if state is None else []
        for piece in (*pieces, *x.split(1, 1)):
            state, start = call(piece)[1], start + piece.shape[1]

    return decode if "seen" in s else train


def measure(s: Setting) -> None:
    """The measuring process: prints a line on its software, then one line for each line read."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if gpu else "cpu")
    step = (training_step if "overrides" in s else layer_step)(s)
    base_rss_mb = rss_mb()
    step()
    say(
        version=None if s["what"] == "memlm" else importlib.metadata.version(s["what"]),
        device="cuda" if gpu else "cpu",
        base_rss_mb=base_rss_mb,
        hardware=torch.cuda.get_device_name() if gpu else cpu_name(),
        torch=torch.__version__,
    )
    for _ in sys.stdin:
        if gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
        cpu, user, wall = time.process_time(), user_time(), time.perf_counter()
        step()
        seconds = {"cpu": time.process_time() - cpu, "user": user_time() - user}
        if gpu:
            end.record()
            torch.cuda.synchronize()
            seconds["gpu"] = begin.elapsed_time(end) / 1000
        seconds["wall"] = time.perf_counter() - wall
        memory = {"peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20} if gpu else {}
        say(seconds=seconds, peak_rss_mb=rss_mb(), **memory)


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def rss_mb() -> float:
    # A process inherits the peak of its parent, so the parent must not import torch.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def user_time() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def cpu_name() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else os.uname().machine}, {os.cpu_count()} cores"


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_group(group: list[Setting], repeats: int, peer_python: str | None, keep_memory: bool = False) -> list[dict]:
    """Start a process for each run, let them take turns, and return their measurements."""
    environment = (
        os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        }
        | (KEEP_MEMORY if keep_memory else {})
    )
    runs = []
    for s in group:
        python = sys.executable if s["what"] == "memlm" else peer_python
        if python is None:
            continue
        process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--measure", json.dumps(s)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        runs.append((s, process, heard(process)))
    passes = [[told(process) for _, process, _ in runs] for _ in range(repeats)]
    records = []
    for (s, process, about), taken in zip(runs, zip(*passes, strict=True), strict=True):
        process.communicate()
        rates = {}
        for clock in taken[0]["seconds"]:
            of = [s["batch"] * s["tokens"] / one["seconds"][clock] for one in taken]
            rates[f"tokens_per_{clock}_second"] = {
                "best": round(max(of), 1),
                "median": round(statistics.median(of), 1),
                "passes": [round(x, 1) for x in of],
            }
        memory = {name: round(x, 1) for name, x in (about | taken[-1]).items() if name.endswith("_mb")}
        records.append(s | about | {"repeats": repeats, "keep_memory": keep_memory} | rates | memory)
    return records


def told(process: subprocess.Popen) -> dict:
    process.stdin.write("\n")
    process.stdin.flush()
    return heard(process)


def heard(process: subprocess.Popen) -> dict:
    line = process.stdout.readline()
    if not line:
        sys.exit(f"error: a measurement ended with status {process.wait()}: {process.args[-1]}")
    return json.loads(line)


def run_suite(suite: str, repeats: int, peer_python: str | None, keep_memory: bool, out: Path) -> None:
    command = f"python scripts/benchmark_memory.py --suite {suite} --repeats {repeats}"
    command += " --keep-memory" if keep_memory else ""
    about = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": f"{command} --peer-python PEER/bin/python" if peer_python else command,
    }
    for group in SUITES[suite]:
        for record in run_group(group, repeats, peer_python, keep_memory):
            # Our commit is asked for once, because the lines appended below change the tree.
            line = json.dumps({"suite": suite} | record | {"version": record["version"] or about["commit"]} | about)
            print(line, flush=True)
            with out.open("a") as file:
                file.write(f"{line}\n")


def table(path: Path) -> None:
    """Print the newest measurement of every setting: rates of the best pass, and MB added by a pass per 1K tokens."""
    newest: dict[tuple, dict] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        names = (
            "suite",
            "hardware",
            "what",
            "anchor",
            "kind",
            "width",
            "heads",
            "head_dim",
            "chunk_size",
            "num_memories",
            "memory",
        )
        sizes = [record.get(name) for name in ("tokens", "seen")] if record["what"] == "memlm" else []
        kept = record.get("keep_memory", False)
        newest[kept, *(record.get(name) for name in names), *sizes] = record
    for kept, suite, hardware in dict.fromkeys(key[:3] for key in newest):
        records = [r for key, r in newest.items() if key[:3] == (kept, suite, hardware)]
        print(f"\n{suite}, {hardware}{', memory kept' if kept else ''}\n")
        if suite in ("wide", "heads", "linear"):
            peers_table(records)
        elif suite.startswith("train"):
            training_table(records)
        else:
            lengths_table(records)


def peers_table(records: list[dict]) -> None:
    unit = "GPU" if records[0]["device"] == "cuda" else "CPU"
    print(f"| tokens per {unit} second, MB per 1K tokens | memlm | titans-pytorch, anchor: call | anchor: chunk |")
    print("|---|---|---|---|")
    for our in (r for r in records if r["what"] == "memlm"):
        cells = [f"{rate(our):,.0f}, {added_mb(our):,.1f}"]
        for anchor in ("call", "chunk"):
            for peer in records:
                alike = ("heads", "chunk_size")
                if peer["what"] == "memlm" or peer["anchor"] != anchor or any(peer[a] != our[a] for a in alike):
                    continue
                faster, less = rate(our) / rate(peer), added_mb(peer) / added_mb(our)
                cells.append(
                    f"{rate(peer):,.0f} ({faster:.1f}x{spread(our, peer)}), {added_mb(peer):,.1f} ({less:.1f}x)"
                )
        print(f"| {our['heads']} x {our['head_dim']}, chunk {our['chunk_size']} | " + " | ".join(cells) + " |")


def spread(our: dict, peer: dict) -> str:
    """The least and the greatest ratio of two passes in turn; older records do not keep their passes."""
    ours, peers = (rates(r).get("passes", []) for r in (our, peer))
    ratios = [a / b for a, b in zip(ours, peers, strict=True)] if ours and peers else []
    return f", {min(ratios):.1f} to {max(ratios):.1f}" if ratios else ""


def lengths_table(records: list[dict]) -> None:
    print("| layer | tokens | seen before | microseconds per token | over the first | MB added |")
    print("|---|---|---|---|---|---|")
    for r in records:
        layer = r.get("kind", "titans_lmm") + (f", {r['num_memories']} memories" if "num_memories" in r else "")
        relative = rate(records[0]) / rate(r)
        mb = added_mb(r) * r["tokens"] / 1024
        cells = (layer, r["tokens"], r.get("seen", 0), f"{1e6 / rate(r):.1f}", f"{relative:.2f}", f"{mb:,.0f}")
        print(f"| {' | '.join(map(str, cells))} |")


def training_table(records: list[dict]) -> None:
    print("| tokens | full attention, tokens per second | titans_mag | ratio | MB of each |")
    print("|---|---|---|---|---|")
    of = {(r["memory"], r["tokens"]): r for r in records}
    for tokens in dict.fromkeys(r["tokens"] for r in records):
        attention, memory = (of.get((name, tokens)) for name in ("attention", "titans_mag"))
        if attention and memory:
            rates = f"{rate(attention):,.0f} | {rate(memory):,.0f} | {rate(memory) / rate(attention):.2f}"
            print(f"| {tokens} | {rates} | {used_mb(attention):,.0f}, {used_mb(memory):,.0f} |")


def rate(record: dict) -> float:
    return rates(record)["best"]


def rates(record: dict) -> dict:
    return record[f"tokens_per_{'gpu' if record['device'] == 'cuda' else 'cpu'}_second"]


def added_mb(record: dict) -> float:
    return used_mb(record) / (record["batch"] * record["tokens"]) * 1024


def used_mb(record: dict) -> float:
    return record["peak_gpu_mb"] if record["device"] == "cuda" else record["peak_rss_mb"] - record["base_rss_mb"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="the measurements to run")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each measurement")
    parser.add_argument("--peer-python", help="an interpreter with titans-pytorch; without it, no peer is measured")
    parser.add_argument("--keep-memory", action="store_true", help="tell glibc to keep freed memory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/memory.jsonl", help="file to append lines to")
    parser.add_argument("--table", action="store_true", help="print the measurements in --out as Markdown")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
    elif args.table:
        table(args.out)
    elif args.suite:
        run_suite(args.suite, args.repeats, args.peer_python, args.keep_memory, args.out)
    else:
        parser.error("one of --suite and --table is needed")
