"""Count the operations that PyTorch dispatches for one layer of each memory. Unlike times, counts are exact on any
machine.

    python scripts/benchmark_dispatch.py [--memories titans_mag mom] [--write "label"]

A layer's count is the count of a model of two layers minus that of a model of one, at width 64, one row, in fp32 on a
CPU. Views count as operations, because each one is a call through the dispatcher. ``decode`` is one token after 257
others, without metrics, as in ``generate``. ``forward`` is 256 tokens without gradients; ``training`` is 256 tokens
forward and backward. Two layers of transformers are counted for comparison. ``--write`` adds the counts to
benchmarks/dispatch.jsonl, under a label.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "dispatch.jsonl"
CASES = ("decode", "forward", "training")
SIZES = {"vocab_size": 259, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 176}
PEERS = ("llama", "qwen3")


class Count(TorchDispatchMode):
    """Counts the operations dispatched inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def memories() -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / "memory").glob("*.yaml"))


def build(name: str, layers: int) -> torch.nn.Module:
    """A model of ``layers`` layers of a memory of configs/memory, or of a layer of transformers."""
    torch.manual_seed(0)
    if name in PEERS:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": layers}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    from memlm import MemLMConfig, MemLMForCausalLM

    mixer = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "memory" / f"{name}.yaml"))
    return MemLMForCausalLM(MemLMConfig(**SIZES, num_hidden_layers=layers, mixers={"memory": mixer}))


def cache(name: str) -> Any:
    if name in PEERS:
        from transformers import DynamicCache

        return DynamicCache()
    from memlm import MemoryCache

    return MemoryCache()


def counted(call: Callable[[], Any]) -> int:
    with Count() as count:
        call()
    return count.operations


def counts(name: str, layers: int) -> list[int]:
    """Operations of a whole model, for each of CASES."""
    model, ids, past = build(name, layers).eval(), torch.randint(0, 256, (1, 256)), cache(name)
    with torch.no_grad():
        model(ids, past_key_values=past)
        model(ids[:, :1], past_key_values=past)
        options = {} if name in PEERS else {"output_metrics": False}
        decode = counted(lambda: model(ids[:, :1], past_key_values=past, **options))
        forward = counted(lambda: model(ids, use_cache=False))
    model.train()
    return [decode, forward, counted(lambda: model(ids, labels=ids, use_cache=False).loss.backward())]


def measure(names: list[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields the operations of one layer of each."""
    for name in names:
        one, two = counts(name, 1), counts(name, 2)
        yield name, {case: b - a for case, a, b in zip(CASES, one, two, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", nargs="+", default=[*PEERS, *memories()], metavar="NAME")
    parser.add_argument("--write", metavar="LABEL", help="add the counts to benchmarks/dispatch.jsonl")
    given = parser.parse_args()
    if unknown := set(given.memories) - {*PEERS, *memories()}:
        parser.error(f"--memories {unknown.pop()}: not known; one of {', '.join([*PEERS, *memories()])}")
    found = {}
    print("| one layer, operations | " + " | ".join(CASES) + " |\n|---" + "|---" * len(CASES) + "|")
    for name, operations in measure(given.memories):
        found[name] = operations
        print(f"| {name} | " + " | ".join(f"{operations[case]:,}" for case in CASES) + " |", flush=True)
    if given.write:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        entry = {"label": given.write, "commit": commit.stdout.strip(), "torch": torch.__version__, "layers": found}
        with RESULTS.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
