"""Time and memory of a bank of 1M to 100M tokens, and the speed of reading documents: JSON lines.

    python scripts/benchmark_bank.py --tokens 1e6 1e7 1e8
    python scripts/benchmark_bank.py --encode 512

The bank holds random vectors in place of a model's: two layers that route, 2 heads of keys and values of 32, chunks of
64 tokens, documents of 512. One process fills and saves it; another, with --threads, loads and uses it. Times are in
seconds, the best and the median of --repeats:

- ``load`` maps the bank.
- ``route`` is one query of 32 tokens in both layers, from router queries to the fetched chunks; every token chooses
  its own 16 documents. In ``route_query``, all tokens share one choice.
- ``ask`` is the whole model on that query, ``decode`` one token after it.
- ``add`` reads one document; ``delete`` removes one; ``save`` saves both changes.
- ``add_most`` and ``delete_most`` are the slowest of --changes neighbouring documents, and include rewrites of shards,
  ``tidied`` times.

Memory is in MB (2**20 bytes). ``bank_mb`` is the size of keys and content of all chunks. ``peak_rss_mb`` is the peak
of the process that uses them, and ``base_rss_mb`` its peak before it loads them.

``--encode WIDTH`` instead builds banks with a model of that hidden size and four layers in Qwen3's proportions, two of
which route. Documents have 512 tokens, 128 to 896, or 16 to 128. ``plain`` is transformers' Qwen3 with the same
weights, without its head, on rows of 512 tokens without padding. Rates are tokens per second of CPU time, in
alternating passes; ``ratio`` compares the best pass with the best of ``plain``.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_memory import ROOT, commit, cpu_name, rss_mb

from memlm.roles import Roles

CHUNK, LENGTH, QUERY = 64, 512, 32


def model(threads: int = 1) -> Any:
    import torch

    from memlm import MemLMConfig, MemLMForCausalLM

    torch.set_num_threads(threads)
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
    from memlm.bank.shard import Shard, without_texts
    from memlm.bank.shelf import SHARD_BYTES
    from memlm_kernels.route_documents import bank_keys

    bank = MemoryBank(model())
    generator, shape = torch.Generator().manual_seed(0), (2, 32)
    documents = tokens // LENGTH
    seconds = 0.0
    per_shard = SHARD_BYTES // (2 * 3 * 2 * 32 * 4) // (LENGTH // CHUNK)
    bank.read = documents
    for first in range(0, documents, per_shard):
        n = min(per_shard, documents - first)
        chunks = n * LENGTH // CHUNK
        router, _ = bank_keys(torch.randn(2, chunks, *shape, generator=generator), "cosine")
        content = torch.randn(2, chunks, 2, *shape, generator=generator)
        names = [f"document {i}" for i in range(first, first + n)]
        alive = torch.ones(n, dtype=torch.bool)
        table = names, [f"{i:032x}" for i in range(n)], [LENGTH] * n, [i << 20 for i in range(first, first + n)]
        rest = dict(chunk_size=CHUNK, alive_N=alive, own_N=alive.clone(), **without_texts(n))
        bank.shelf.append(Shard(router, None, content, *table, **rest))
        # As in a build, saved shards need no memory.
        start = time.perf_counter()
        bank.save(folder)
        seconds += time.perf_counter() - start
    print(json.dumps({"first_save_s": round(seconds, 3), "fill_peak_rss_mb": round(rss_mb())}))


def use(folder: Path, repeats: int, changes: int, threads: int) -> None:
    import torch

    from memlm import MemoryBank, MemoryCache

    it = model(threads)
    question = torch.randint(259, (1, QUERY), generator=torch.Generator().manual_seed(1))
    it(question)
    record: dict[str, Any] = {"threads": threads, "base_rss_mb": round(rss_mb())}
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
    causal = bank.settings
    bank.settings = [settings | {"routing": "query"} for settings in causal]
    _, record["route_query_s"] = timed(route, repeats)
    bank.settings = causal
    with torch.no_grad():
        _, record["ask_s"] = timed(lambda: it(question, roles=Roles.query(bank, question)), repeats)
        cache = MemoryCache()
        it(question, roles=Roles.query(bank, question), past_key_values=cache)
        _, record["decode_s"] = timed(lambda: it(question[:, :1], past_key_values=cache, write=False), repeats)
    document = torch.randint(259, (LENGTH,), generator=torch.Generator().manual_seed(3))
    numbers = iter(range(repeats))
    _, record["add_s"] = timed(lambda: bank.add({f"new {next(numbers)}": document}), repeats)
    names = iter(bank.documents()[:: max(1, len(bank) // repeats)])
    _, record["delete_s"] = timed(lambda: bank.delete(next(names)), repeats)
    _, record["save_s"] = timed(lambda: bank.save(folder), 1)
    tidied, replace = [], bank.shelf._replace
    bank.shelf._replace = lambda start, end: tidied.append(end - start) or replace(start, end)
    record["add_most_s"] = slowest(lambda i: bank.add({f"more {i}": document}), changes)
    names = iter(bank.documents())
    record["delete_most_s"] = slowest(lambda i: bank.delete(next(names)), changes)
    record |= {"changes": changes, "tidied": len(tidied)}
    print(json.dumps(record | {"peak_rss_mb": round(rss_mb()), "torch": torch.__version__, "hardware": cpu_name()}))


def slowest(change: Callable[[int], None], count: int) -> float:
    seconds = []
    for i in range(count):
        start = time.perf_counter()
        change(i)
        seconds.append(time.perf_counter() - start)
    return round(max(seconds), 6)


def encode(width: int, repeats: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from memlm import MemLMForCausalLM, MemoryBank
    from memlm.hub import families

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=259,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 256),
            head_dim=64,
        )
    ).eval()
    config = families.config_from("qwen3", qwen3.config.to_dict())
    reader = MemLMForCausalLM(config).eval()
    reader.load_state_dict(dict(families.weights_from(qwen3.state_dict(), config)))
    rows = torch.randint(259, (16, LENGTH))

    @torch.no_grad()
    def plain() -> int:
        for batch in rows.split(8):
            qwen3.model(batch, use_cache=False)
        return rows.numel()

    def reading(documents: list[torch.Tensor]) -> Callable[[], int]:
        named = {str(i): tokens for i, tokens in enumerate(documents)}

        def read() -> int:
            return MemoryBank.build(reader, named, progress=False).stats()["tokens"]

        return read

    def ragged(low: int, high: int, count: int) -> list[torch.Tensor]:
        return [torch.randint(259, (int(length),)) for length in torch.randint(low, high + 1, (count,))]

    passes = {
        "plain": plain,
        "512": reading([*rows]),
        "128-896": reading(ragged(128, 896, 16)),
        "16-128": reading(ragged(16, 128, 114)),
    }
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for i in range(1 + repeats):
        for name, take in passes.items():
            start = time.process_time()
            tokens = take()
            # The first pass is a warm-up.
            rates[name] += [tokens / (time.process_time() - start)] if i else []
    told = {n: {"best": round(max(r), 1), "median": round(statistics.median(r), 1)} for n, r in rates.items()}
    ratios = {name: round(max(rates[name]) / max(rates["plain"]), 3) for name in passes if name != "plain"}
    about = {"torch": torch.__version__, "hardware": cpu_name()}
    print(json.dumps({"encode": width, "tokens_per_cpu_second": told, "ratio": ratios} | about))


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


def written(record: dict[str, Any], arguments: str, out: Path) -> None:
    command = f"python scripts/benchmark_bank.py {arguments}"
    about = {"commit": commit(), "date": datetime.date.today().isoformat(), "command": command}
    line = json.dumps(record | about)
    print(line, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="sizes of the bank")
    parser.add_argument("--changes", type=int, default=4000, help="additions and deletions, to find the slowest")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process that uses the bank")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/bank.jsonl", help="file to append lines to")
    parser.add_argument("--encode", type=int, metavar="WIDTH", help="measure reading instead, at this hidden size")
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(int(args.tokens[0]), args.fill)
    elif args.use:
        use(args.use, args.repeats, args.changes, args.threads)
    elif args.read:
        encode(args.read, args.repeats)
    elif args.encode:
        record = process("--read", str(args.encode), "--repeats", str(args.repeats))
        written(record, f"--encode {args.encode} --repeats {args.repeats}", args.out)
    else:
        for tokens in args.tokens:
            with tempfile.TemporaryDirectory() as folder:
                record = process("--tokens", str(tokens), "--fill", folder)
                options = [f"--{name}={getattr(args, name)}" for name in ("threads", "repeats", "changes")]
                record |= process("--use", folder, *options)
            written(record, f"--tokens {tokens:g} {' '.join(options)}", args.out)
