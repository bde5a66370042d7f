"""Time and memory of a bank of documents, from 1M to 100M tokens: one JSON line for each size.

    python scripts/benchmark_bank.py --tokens 1e6 1e7 1e8

The bank holds seeded vectors in place of a model's: two layers that route, 2 heads of keys and values of 32, chunks of
64 tokens, documents of 512. One process fills and saves it, another, with one thread, loads and uses it. Times are
seconds, the best and the median of --repeats: ``load`` maps the bank; ``route`` is one query of 32 tokens, from their
router queries to the chunks fetched for them, in both layers, every token with its own choice of 16 documents, and
``route_query`` with one choice for all; ``ask`` is the whole model on that query, ``decode`` a token after it;
``add`` (one document, read), ``delete`` and ``save`` (of that addition and deletion). Memory is in MB (2**20 bytes):
``bank_mb`` is keys and content of all chunks, ``peak_rss_mb`` the highest of the process that uses them, and
``base_rss_mb`` its highest before it loads them.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_memory import ROOT, commit, cpu_name, rss_mb

CHUNK, LENGTH, QUERY = 64, 512, 32


def model() -> Any:
    import torch

    from memlm import MemLMConfig, MemLMForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MemLMConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mixers={"memory": {"kind": "msa", "chunk_size": CHUNK, "top_k": 16}},
    )
    return MemLMForCausalLM(config).eval()


def fill(tokens: int, folder: Path) -> None:
    import torch

    from memlm import MemoryBank
    from memlm.bank import SHARD_BYTES
    from memlm.bank.shard import Shard
    from memlm_kernels.route_documents import bank_keys

    bank = MemoryBank(model())
    generator, shape = torch.Generator().manual_seed(0), (2, 32)
    documents = tokens // LENGTH
    seconds = 0.0
    per_shard = SHARD_BYTES // (2 * 3 * 2 * 32 * 4) // (LENGTH // CHUNK)
    for first in range(0, documents, per_shard):
        n = min(per_shard, documents - first)
        chunks = n * LENGTH // CHUNK
        router = bank_keys(torch.randn(2, chunks, *shape, generator=generator), "cosine")
        content = torch.randn(2, chunks, 2, *shape, generator=generator)
        names = [f"document {i}" for i in range(first, first + n)]
        alive = torch.ones(n, dtype=torch.bool)
        bank._append(
            Shard(router, content, names, [f"{i:032x}" for i in range(n)], [LENGTH] * n, CHUNK, alive, alive.clone())
        )
        # As a build does: what is saved needs no memory.
        start = time.perf_counter()
        bank.save(folder)
        seconds += time.perf_counter() - start
    print(json.dumps({"first_save_s": round(seconds, 3), "fill_peak_rss_mb": round(rss_mb())}))


def use(folder: Path, repeats: int) -> None:
    import torch

    from memlm import MemoryBank, MemoryCache

    it = model()
    question = torch.randint(259, (1, QUERY), generator=torch.Generator().manual_seed(1))
    it(question)
    record: dict[str, Any] = {"base_rss_mb": round(rss_mb())}
    bank, record["load_s"] = timed(lambda: MemoryBank.load(folder, it), repeats)
    stats = bank.stats()
    record |= stats
    record["bank_mb"] = round((stats["device_bytes"] + stats["host_bytes"] + stats["disk_bytes"]) / 2**20)
    q = torch.randn(1, QUERY, 4, 32, generator=torch.Generator().manual_seed(2))
    asks, held = torch.ones(1, QUERY, dtype=torch.bool), torch.full((1, 0), -1)

    def route() -> None:
        for layer in bank.layers:
            bank.candidates(layer, q, asks, held)

    _, record["route_s"] = timed(route, repeats)
    for settings in bank.settings:
        settings["routing"] = "query"
    _, record["route_query_s"] = timed(route, repeats)
    for settings in bank.settings:
        settings["routing"] = "causal"
    with torch.no_grad():
        _, record["ask_s"] = timed(lambda: it(question, memory_bank=bank), repeats)
        cache = MemoryCache()
        it(question, memory_bank=bank, past_key_values=cache)
        _, record["decode_s"] = timed(lambda: it(question[:, :1], past_key_values=cache, write=False), repeats)
    document = torch.randint(259, (LENGTH,), generator=torch.Generator().manual_seed(3))
    numbers = iter(range(repeats))
    _, record["add_s"] = timed(lambda: bank.add({f"new {next(numbers)}": document}), repeats)
    names = iter(bank.documents()[:: max(1, len(bank) // repeats)])
    _, record["delete_s"] = timed(lambda: bank.delete(next(names)), repeats)
    _, record["save_s"] = timed(lambda: bank.save(folder), 1)
    print(json.dumps(record | {"peak_rss_mb": round(rss_mb()), "torch": torch.__version__, "hardware": cpu_name()}))


def timed(function: Any, repeats: int) -> tuple[Any, dict[str, float]]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, {"best": round(min(seconds), 4), "median": round(statistics.median(seconds), 4)}


def process(*arguments: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: a measurement ended with status {done.returncode}: {' '.join(arguments)}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="sizes of the bank")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/bank.jsonl", help="where lines are appended")
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(int(args.tokens[0]), args.fill)
    elif args.use:
        use(args.use, args.repeats)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for tokens in args.tokens:
            with tempfile.TemporaryDirectory() as folder:
                record = process("--tokens", str(tokens), "--fill", folder)
                record |= process("--use", folder, "--repeats", str(args.repeats))
            command = f"python scripts/benchmark_bank.py --tokens {tokens:g} --repeats {args.repeats}"
            about = {"commit": commit(), "date": datetime.date.today().isoformat(), "command": command}
            line = json.dumps(record | about)
            print(line, flush=True)
            with args.out.open("a") as file:
                file.write(f"{line}\n")
