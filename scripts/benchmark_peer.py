"""Compare a model of plain attention with transformers' Llama of the same shape: operations and CPU time.

    python scripts/benchmark_peer.py [--repeats 40] [--shape 4x256x4 8x512x8] [--tokens 256] [--threads 1]

A shape is layers x hidden size x heads, in fp32 on a CPU with torch's own attention; both models have equal weights.
``prefill`` reads the tokens into a new cache, ``decode`` is 16 tokens after them, one in each call, ``generate`` reads
them and decodes 16 tokens greedily, ``training`` is a forward and backward of them. Operations are those that PyTorch
dispatches for the whole model; they are exact. Times are the CPU's (``time.process_time``), of calls in turns. A ratio
is the median of the turns' ratios; other work on the machine disturbs the last column, the ratio of the minima, least.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark_dispatch import counted
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, MemoryCache

CASES = ("prefill", "decode", "generate", "training")
NEW = 16


def models(shape: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and Llama, with the same weights."""
    layers, hidden, heads = map(int, shape.split("x"))
    sizes = {
        "vocab_size": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
    }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-6, attn_implementation="sdpa")).eval()
    ours = MemLMForCausalLM(MemLMConfig(**sizes, mixers={"memory": {"kind": "attention"}})).eval()
    weights = {name.replace("self_attn", "mixer"): x for name, x in llama.state_dict().items()}
    ours.load_state_dict(weights)
    return ours, llama


def calls(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """For each case, a function that makes the cache of a turn, which is not measured, and the measured call."""
    new = MemoryCache if isinstance(model, MemLMForCausalLM) else DynamicCache
    options = {"output_metrics": False} if new is MemoryCache else {}

    def filled() -> Any:
        # Past the first token, after which a cache has room.
        cache = new()
        for part in (ids[:, :-1], ids[:, -1:]):
            model(part, past_key_values=cache, logits_to_keep=1, **options)
        return cache

    def read(cache: Any) -> Any:
        return model(ids, past_key_values=cache, logits_to_keep=1, **options).logits

    def decode(cache: Any) -> Any:
        for t in range(NEW):
            logits = model(ids[:, t : t + 1], past_key_values=cache, logits_to_keep=1, **options).logits
        return logits

    def generate(_: Any) -> Any:
        return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    def train(_: Any) -> Any:
        model.zero_grad()
        with torch.enable_grad():
            loss = model(ids, labels=ids, use_cache=False, **options).loss
            loss.backward()
        return loss.detach()

    return {"prefill": (new, read), "decode": (filled, decode), "generate": (new, generate), "training": (new, train)}


def prompt(tokens: int) -> torch.Tensor:
    """Random tokens. 0 is not among them: ``generate`` takes it for padding."""
    return torch.randint(1, 512, (1, tokens), generator=torch.Generator().manual_seed(0))


def behind(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Difference of the largest logit and that of each decoded token: of tokens a rounding apart, any is right."""
    logits = model(ids).logits[:, tokens - 1 : -1]
    return logits.amax(-1) - logits.gather(-1, ids[:, tokens:, None])[..., 0]


def operations(shape: str, tokens: int) -> dict[str, tuple[int, int]]:
    """Operations of ours and of Llama, for each of CASES. Raises AssertionError if the results differ."""
    ids = prompt(tokens)
    ours, llama = models(shape)
    found: dict[str, list[int]] = {case: [] for case in CASES}
    results: dict[str, list[torch.Tensor]] = {case: [] for case in CASES}
    with torch.no_grad():
        for model in (ours, llama):
            for case, (make, call) in calls(model, ids).items():
                result = call(make())
                results[case].append(behind(llama, result, tokens) if case == "generate" else result)
                given = make()
                found[case].append(counted(lambda call=call, given=given: call(given)))
    for a, b in results.values():
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return {case: (of_ours, of_llama) for case, (of_ours, of_llama) in found.items()}


def times(shape: str, tokens: int, case: str, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of the CPU for ours and for Llama, in turns."""
    ids, taken = prompt(tokens), ([], [])
    turns = [(*calls(model, ids)[case], seconds) for model, seconds in zip(models(shape), taken, strict=True)]
    with torch.no_grad():
        for i in range(repeats + 3):
            for make, call, seconds in turns if i % 2 else turns[::-1]:
                given = make()
                start = time.process_time()
                call(given)
                if i >= 3:
                    seconds.append(time.process_time() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4x256x4", "8x512x8"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.tokens} tokens, {given.repeats} repeats")
    print("| shape | case | operations: ours | Llama | ms (median): ours | Llama | ratio | of minima |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in given.shape:
        counts = operations(shape, given.tokens)
        for case in given.case:
            ours, llama = times(shape, given.tokens, case, given.repeats)
            ratio = statistics.median(a / b for a, b in zip(ours, llama, strict=True))
            ms = [f"{1000 * statistics.median(x):.2f}" for x in (ours, llama)]
            least = min(ours) / min(llama)
            print(f"| {shape} | {case} | {counts[case][0]:,} | {counts[case][1]:,} | {ms[0]} | {ms[1]} |", end="")
            print(f" {ratio:.3f} | {least:.3f} |", flush=True)


if __name__ == "__main__":
    main()
