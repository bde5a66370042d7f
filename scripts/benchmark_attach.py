"""Compare a Llama with an attached memory, its gate closed, with the plain Llama and the same memory beside it.

    python scripts/benchmark_attach.py [--memory titans_lmm gated_delta_net] [--shape 4x256x4 8x512x8] [--repeats 100]
        [--threads 1]

The Llama is one of transformers, of layers x hidden size x heads, in fp32 on a CPU; every layer has the memory.
``prefill`` reads 256 tokens into a new cache, ``decode`` is 16 tokens after them, one in each call. Apart, each memory
runs after its layer's attention, where the processor's caches are as they are in a model, but on an input of its own,
and nothing of it goes into the layer. Times are the CPU's (``time.process_time``), in turns; a ratio is the median of
the turns' ratios, and the last column is the ratio of the minima.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memlm
from memlm.attached.call import Attached
from memlm.memory.rows import Rows

TOKENS, NEW = 256, 16


def llama(layers: int, hidden: int, heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3 // 16 * 16, "num_attention_heads": heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=layers, **sizes)).eval()


def measured(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.process_time()
    found = call(*args)
    return time.process_time() - start, found


def times(memory: str, shape: str, repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of the CPU in each turn: the plain model and its memories alone, and the model with them."""
    layers, hidden, heads = map(int, shape.split("x"))
    plain, model = llama(layers, hidden, heads), memlm.attach(llama(layers, hidden, heads), memory)
    memories = [m for m in model.modules() if isinstance(m, Attached)]
    ids_BT = torch.randint(512, (1, TOKENS + NEW))
    inputs_NBTD = torch.randn(layers, 1, TOKENS + NEW, hidden)
    empty = memories[0].mixer.init_state(1, ids_BT.device, inputs_NBTD.dtype)

    now: dict[str, Any] = {}

    def beside(attention: torch.nn.Module, args: tuple, output: Any) -> None:
        i = attention.layer_idx
        x_BTD = inputs_NBTD[i, :, now["start"] : now["end"]]
        now["states"][i] = memories[i].mixer(memories[i].norm(x_BTD), now["states"][i], now["rows"]).state

    for layer in plain.model.layers:
        layer.self_attn.register_forward_hook(beside)

    def read(model: torch.nn.Module, start: int, end: int, cache: Any) -> Any:
        return model(ids_BT[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def apart(start: int, end: int, cache: Any) -> Any:
        if start == 0:
            now["states"] = [empty] * layers
        now.update(start=start, end=end, rows=Rows(end - start, torch.tensor([start]), start, metrics=False))
        return read(plain, start, end, cache)

    def together(start: int, end: int, cache: Any) -> Any:
        return read(model, start, end, cache)

    sides = (apart, together)
    taken: dict[str, tuple[list[float], list[float]]] = {"prefill": ([], []), "decode": ([], [])}
    with torch.no_grad():
        for turn in range(-3, repeats):
            held: list[Any] = [None, None]
            for i in (0, 1) if turn % 2 else (1, 0):
                spent, held[i] = measured(sides[i], 0, TOKENS, None)
                if turn >= 0:
                    taken["prefill"][i].append(spent)
            sums = [0.0, 0.0]
            for t in range(TOKENS, TOKENS + NEW):
                for i in (0, 1) if t % 2 else (1, 0):
                    spent, held[i] = measured(sides[i], t, t + 1, held[i])
                    sums[i] += spent
            if turn >= 0:
                for i in (0, 1):
                    taken["decode"][i].append(sums[i])
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs="+", default=["titans_lmm", "gated_delta_net"])
    parser.add_argument("--shape", nargs="+", default=["4x256x4", "8x512x8"])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, {TOKENS} tokens, {given.repeats} repeats")
    print("| memory | shape | case | ms (median): apart | attached | ratio | of minima |")
    print("|---|---|---|---|---|---|---|")
    for memory, shape in itertools.product(given.memory, given.shape):
        for case, (apart, together) in times(memory, shape, given.repeats).items():
            ratio = statistics.median(b / a for a, b in zip(apart, together, strict=True))
            ms = " | ".join(f"{1000 * statistics.median(x):.2f}" for x in (apart, together))
            least = min(together) / min(apart)
            print(f"| {memory} | {shape} | {case} | {ms} | {ratio:.3f} | {least:.3f} |", flush=True)


if __name__ == "__main__":
    main()
