#!/usr/bin/env python
"""Compare the CPU time of this checkout with that of another one: training steps and decoded tokens, in turns.

    git worktree add ../before COMMIT
    python scripts/benchmark_checkouts.py ../before [--memories titans_mag none] [--overrides model=small]

Each checkout runs in a process of one thread that stays. A round takes the time of forward and backward of 4 rows of
256 tokens, or of 50 tokens after a row of 256, in both; which one is first alternates. The model is the tiny one of
configs/train.yaml, unless overrides change it. Prints, in Markdown, the shortest times of the other checkout and of
this one, and the median and quartiles of the rounds' ratios; above 1, this checkout is slower. Times of tokens are
noisy; the number of functions that a token calls, of Python and of C, is exact.

--instructions: instead, the CPU's instructions of a decoded token, as valgrind counts them (without AVX-512, which it
does not know). The other work of the machine does not change them.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEMORIES = sorted(path.stem for path in (ROOT / "configs/memory").glob("*.yaml"))
# Each measurement's name and its unit in seconds; counts have none.
KINDS = {"train": ("training step, ms", 1e-3), "decode": ("50 tokens, ms", 1e-3), "calls": ("a token, calls", 1)}
# Tokens whose instructions are counted.
COUNTED = 10


def started(root: Path, overrides: list[str], *under: str, **options: Any) -> subprocess.Popen:
    """The process of one checkout. All run this file; their packages are found by PYTHONPATH."""
    path = os.pathsep.join(map(str, (root, root / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [*under, sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker", str(root)]
    command += ["--overrides", *overrides] if overrides else []
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=root, **pipes, **options)


def instructions(root: Path, overrides: list[str], memory: str) -> float:
    """Instructions of a decoded token."""
    valgrind = ("valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null")
    process = started(root, overrides, *valgrind, stderr=subprocess.PIPE)
    said = process.communicate(f"{memory}\ninstructions\n")[1]
    if (found := re.search(r"Collected : (\d+)", said)) is None:
        raise SystemExit(f"{' '.join(map(str, process.args))}: valgrind counted nothing: {said[-500:]}")  # type: ignore[arg-type]
    return int(found[1]) / COUNTED


class Worker:
    """A process that times the package of one checkout."""

    def __init__(self, root: Path, overrides: list[str]) -> None:
        self.process = started(root, overrides)

    def ask(self, what: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"{' '.join(self.process.args)} ended at {what!r}; its error stands above")  # type: ignore[arg-type]


def work(root: Path, overrides: list[str]) -> None:
    """Answer each line of standard input with a time: the name of a memory, a key of ``KINDS`` or ``instructions``,
    which valgrind counts.
    """
    import torch
    from omegaconf import OmegaConf

    from memlm import MemLMConfig, MemLMForCausalLM, cli

    def made(memory: str) -> Any:
        torch.manual_seed(0)
        settings = cli.composed(root / "configs", "train", [f"memory={memory}", *overrides])
        given: Any = OmegaConf.to_container(settings.model, resolve=True)
        return MemLMForCausalLM(MemLMConfig.from_hydra(given))

    def train() -> float:
        model.train()
        begin = time.process_time()
        model(ids, labels=ids).loss.backward()
        took = time.process_time() - begin
        model.zero_grad()
        return took

    @torch.no_grad()
    def decode() -> float:
        memory = model.eval()(ids[:1], use_cache=True).past_key_values
        begin = time.process_time()
        for t in range(50):
            memory = model(ids[:1, t : t + 1], past_key_values=memory, use_cache=True).past_key_values
        return time.process_time() - begin

    @torch.no_grad()
    def calls() -> float:
        memory = model.eval()(ids[:1], use_cache=True).past_key_values
        # The first token may find a choice of backend that later ones know.
        memory = model(ids[:1, :1], past_key_values=memory, use_cache=True).past_key_values
        count = 0

        def called(frame: Any, event: str, of: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(called)
        model(ids[:1, 1:2], past_key_values=memory, use_cache=True)
        sys.setprofile(None)
        return count

    @torch.no_grad()
    def counted() -> None:
        memory = model.eval()(ids[:1], use_cache=True).past_key_values
        for t in range(4 + COUNTED):
            if t == 4:
                switch("on")
            memory = model(ids[:1, t : t + 1], past_key_values=memory, use_cache=True).past_key_values
        switch("off")

    def switch(to: str) -> None:
        """Valgrind counts while it is switched on."""
        subprocess.run(["callgrind_control", "-i", to, str(os.getpid())], stdout=subprocess.DEVNULL, check=True)

    for line in map(str.strip, sys.stdin):
        took = 0.0
        if line == "instructions":
            counted()
        elif line in KINDS:
            took = {"train": train, "decode": decode, "calls": calls}[line]()
        else:
            model = made(line)
            ids = torch.randint(model.config.vocab_size, (4, 256))
        print(f"seconds {took}", flush=True)


def compared(workers: tuple[Worker, Worker], kind: str, rounds: int) -> str:
    """Cells of a row: the least of both, and the ratio with its quartiles."""
    if kind == "calls":
        there, here = (worker.ask(kind) for worker in workers)
        return f"{there:.0f} | {here:.0f} | {here / there:.2f}"
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for j in (i % 2, 1 - i % 2):
            took = workers[j].ask(kind)
            # The first round warms up.
            if i:
                times[j].append(took)
    low, middle, high = statistics.quantiles([new / old for old, new in zip(*times, strict=True)], n=4)
    shortest = " | ".join(f"{min(of) / KINDS[kind][1]:.1f}" for of in times)
    return f"{shortest} | {middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--memories", nargs="+", help="of those in configs/memory of both; all by default")
    parser.add_argument("--overrides", nargs="+", default=[], help="of the configuration, such as model=small")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--instructions", action="store_true", help="of a decoded token, counted by valgrind")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.overrides)
        return
    if args.checkout is None or not (args.checkout / "configs/memory").is_dir():
        parser.error(f"{args.checkout} is no checkout of memlm; give a folder that has configs/memory")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: give at least 2")
    other = args.checkout.resolve()
    both = [memory for memory in MEMORIES if (other / f"configs/memory/{memory}.yaml").exists()]
    if unknown := [memory for memory in args.memories or [] if memory not in both]:
        parser.error(f"--memories {unknown[0]}: both checkouts have {', '.join(both)}")
    if args.instructions:
        if shutil.which("callgrind_control") is None:
            parser.error("--instructions: valgrind is not installed (apt install valgrind)")
        print("| memory | instructions of a token: there | here | ratio |\n|---|---|---|---|", flush=True)
        for memory in args.memories or both:
            there, here = (instructions(root, args.overrides, memory) for root in (other, ROOT))
            print(f"| {memory} | {there:,.0f} | {here:,.0f} | {here / there:.3f} |", flush=True)
        return
    workers = Worker(other, args.overrides), Worker(ROOT, args.overrides)
    print("| memory | what | there | here | ratio |\n|---|---|---|---|---|", flush=True)
    for memory in args.memories or both:
        for worker in workers:
            worker.ask(memory)
        for kind, (name, _) in KINDS.items():
            print(f"| {memory} | {name} | {compared(workers, kind, args.rounds)} |", flush=True)


if __name__ == "__main__":
    main()
