"""Time training steps of a 340M model with a Titans memory beside a decoder with plain attention, and profile one.

    python scripts/gpu_step.py --out benchmarks/gpu/results.jsonl [--dry-run]

The models are ``model=titans_340m memory=...`` of train.py, made without Hydra: titans_mag with memories of one layer
in chunks of 16 tokens, attention with as many parameters, and titans_mag as shipped, with two layers. A step is
forward with the loss, backward and a fused AdamW, in bf16 autocast; a profile lists the kernels that take most time.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import gpu_records
import torch
import yaml
from gpu_records import DEVICE, GPU, ROOT

from memlm import MemLMConfig, MemLMForCausalLM
from memlm_kernels import proof

ONE_LAYER = {"memory_depth": 1, "chunk_size": 16}
# The decoder beside has the parameters of titans_mag in its MLPs.
CONTROL = {"intermediate_size": 3200}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"head_dim": 16, "intermediate_size": 32, "vocab_size": 64}


def settings(memory: str, **changed: Any) -> dict[str, Any]:
    """The composed group ``model`` of ``model=titans_340m memory=<memory>``, with settings of the memory changed."""

    def read(path: str) -> dict[str, Any]:
        return yaml.safe_load((ROOT / "configs" / path).read_text()) or {}

    model = read("model/titans_340m.yaml")["model"]
    mixer = read(f"memory/{memory}.yaml") | read(f"memory/of_model/titans/{memory}.yaml")
    for name, value in mixer.items():
        if isinstance(value, str) and value.startswith("${model."):
            mixer[name] = model[value.removeprefix("${model.").removesuffix("}")]
    return model | {"mixers": {"memory": mixer | changed}}


class Step:
    def __init__(self, model: dict[str, Any], rows: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = MemLMForCausalLM(MemLMConfig.from_hydra(model)).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, model["vocab_size"], (rows, tokens), device=DEVICE)

    def __call__(self) -> None:
        with torch.autocast(DEVICE, torch.bfloat16 if GPU else torch.float16, enabled=GPU):
            loss = self.model(self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(step: Step, times: int) -> float:
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        step()
        if GPU:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def profile(step: Step) -> list[dict[str, Any]]:
    """The kernels that take most time: name, launches, milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        step()
        if GPU:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if GPU else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, time_of))
    return [
        {"kernel": event.key[:100], "launches": event.count, "ms": round(getattr(event, time_of) / 1e3, 3)}
        for event in events[:25]
    ]


def measured(memory: str, changed: dict[str, Any], rows: int, tokens: int, tiny: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"part": "step", "memory": memory, **changed, "rows": rows, "tokens": tokens}
    try:
        control = CONTROL if memory == "attention" else {}
        step = Step(settings(memory, **changed) | control | (TINY if tiny else {}), rows, tokens)
        # The first step proves the kernels, compiles, and makes the optimiser's state.
        record["first_s"] = round(seconds(step, 1), 2)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        record["ms"] = round(1000 * seconds(step, 1 if tiny else 5), 2)
        record["tokens_s"] = round(rows * tokens / record["ms"] * 1000)
        if GPU:
            record["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        record["profile"] = profile(step)
    # A failure is a result too.
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:300]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and a few tokens, on a CPU")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if GPU:
        # The tests of the suite are the trial.
        here = proof.surroundings(torch.device("cuda", 0))
        proof.PROVEN = frozenset({(here["architecture"], here["triton"], here["ptxas"])})
    shapes = [(1, 16)] if args.dry_run else [(8, 4096), (1, 32768)]
    chosen: list[tuple[str, dict[str, Any]]] = [("attention", {}), ("titans_mag", ONE_LAYER), ("titans_mag", {})]
    for memory, changed in chosen[:2] if args.dry_run else chosen:
        for rows, tokens in shapes:
            gpu_records.write(args.out, measured(memory, changed, rows, tokens, args.dry_run))
            if GPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
