"""One Markdown table from the results.json of several seeds: ``python scripts/summarize.py RESULTS.json ...``"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def main(paths: list[str]) -> None:
    """Print mean and worst seed of every model and task; for text, the mean and the range."""
    accuracy, rows, text = defaultdict(list), defaultdict(list), defaultdict(list)
    factors: dict[int, None] = {}
    for path in paths:
        for model, measured in json.loads(Path(path).read_text())["models"].items():
            for r in measured["recall"]:
                factors[r["factor"]] = None
                accuracy[model, r["task"], r["factor"]].append(r["accuracy"])
                rows[model, r["task"], r["factor"]].append(r["row_accuracy"])
            for how, t in measured["text"].items():
                text[model, how].append(t["bits_per_byte"])
    highest = {model: model.startswith("control") for model, *_ in accuracy}
    print("| tokens recalled: mean (worst seed), whole rows | " + " | ".join(f"{f}x" for f in factors) + " |")
    print("|---" * (len(factors) + 1) + "|")
    for model, task in dict.fromkeys(key[:2] for key in accuracy):
        # The worst seed of a control is the one that scores most.
        worst = max if highest[model] else min
        cells = [
            f"{mean(accuracy[model, task, f]):.3f} ({worst(accuracy[model, task, f]):.3f}), "
            f"{mean(rows[model, task, f]):.3f}"
            for f in factors
        ]
        print(f"| {model}, {task} | " + " | ".join(cells) + " |")
    if text:
        print(
            "\n| bits per byte of held-out text: mean (range) | memory carried | reset each segment |\n|---|---|---|"
        )
        for model in dict.fromkeys(key[0] for key in text):
            cells = [
                f"{mean(text[model, how]):.3f} ({min(text[model, how]):.3f}-{max(text[model, how]):.3f})"
                for how in ("carried", "reset")
            ]
            print(f"| {model} | " + " | ".join(cells) + " |")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python scripts/summarize.py runs/demo/titans_mag-seed*/evaluation/results.json")
    main(sys.argv[1:])
