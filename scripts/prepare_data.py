#!/usr/bin/env python
"""Encode the text of a run before it is trained, with the settings of ``train.py``:

    python scripts/prepare_data.py data=text 'data.sources.text.paths=[my/corpus]' 'data.tokenizer={bpe: 4096}'

Training then starts at once; without this step it prepares the data itself. Each of ``--workers`` processes encodes a
part of the text, by default one for each core that this process may use (``taskset``). After a stop, the same command
goes on. Prepare again after text was added: only parts that are new are encoded. Every finished shard is compared with
its SHA-256.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help="processes that encode")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of train.py")
    arguments = parser.parse_args()
    from memlm.cli import check_arguments, completed, composed, user_errors

    with user_errors(ROOT / "configs", "train"):
        overrides = completed(arguments.overrides)
        check_arguments(overrides, ROOT / "configs", "train")
        prepare(composed(ROOT / "configs", "train", overrides), arguments.workers)


def prepare(config, workers: int | None) -> None:
    from omegaconf import OmegaConf

    from memlm.data import TextSource, build_data
    from memlm.settings import require
    from memlm.training.budget import in_steps
    from memlm.training.display import Display
    from memlm.training.preparing import Preparing

    require(workers is None or workers > 0, f"--workers={workers} must be at least 1")
    data, train = (OmegaConf.to_container(config[group], resolve=True) for group in ("data", "train"))
    size, display = in_steps(train, data)["batch_size"], Display(0, shown=True)

    def build():
        with Preparing(display, workers) as preparing:
            _, mixture = build_data(data, seed=0, batch_size=size, preparation=preparing)
        return {name: source for name, source in mixture.sources.items() if isinstance(source, TextSource)}

    if not build():
        display.say(f"data.sources: no text among {', '.join(data['sources'])}; nothing to encode")
    if damaged := [path for source in build().values() for path in source.corpus.drop_damaged()]:
        display.say(f"{damaged[0].parent}: encoding {len(damaged)} damaged shards again, the first {damaged[0].name}")
    for name, source in build().items():
        splits = source.manifest["splits"].items()
        told = ", ".join(f"{split} {of['tokens']:,} tokens in {of['documents']:,} documents" for split, of in splits)
        display.say(f"data.sources.{name}: {told}; {source.corpus.folder}")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    main()
