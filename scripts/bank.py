#!/usr/bin/env python
"""A bank of your documents: files that a model of Memory Sparse Attention reads once, to answer questions about them.

    python scripts/bank.py build notes more/*.jsonl --checkpoint runs/mine/msa-seed0 --out banks/mine
    python scripts/bank.py ask banks/mine "Who wrote it?"
    python scripts/bank.py add banks/mine notes  # reads new and changed files
    python scripts/bank.py delete banks/mine notes/old.md
    python scripts/bank.py list banks/mine

Files are read as those of a corpus: txt, md, py, jsonl and parquet. Convert others first, such as PDF with pdftotext.
A stopped build goes on with the same command.
"""

import argparse
import sys
import time
from pathlib import Path
from textwrap import indent, shorten

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ("none", "plain", "chat")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(do, text: str, *words: str, model: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(do.__name__.rstrip("_"), help=text, description=text)
        added.set_defaults(do=do)
        for word in words:
            added.add_argument(word.lower(), metavar=word, nargs="+" if word in ("DOCS", "NAME") else None)
        if model:
            added.add_argument("--checkpoint", help="a run, a checkpoint or a hub name; default: the bank's own")
        return added

    command(build, "read documents into a new bank", "DOCS").add_argument("--out", required=True, help="a new folder")
    asked = command(ask, "answer a question, and show what was read", "BANK", "QUESTION")
    asked.add_argument("--max-new-tokens", type=int, default=64, help="the longest answer")
    asked.add_argument("--templates", choices=TEMPLATES, default="none", help="texts around the question in training")
    command(add, "read documents that are new or have changed", "BANK", "DOCS")
    command(delete, "delete documents", "BANK", "NAME")
    command(list_, "show the documents", "BANK", model=False)
    return parser.parse_args()


def loaded(source: str):
    import torch

    from memlm.evaluation.subject import load_subject

    subject = load_subject(source, torch.device("cuda" if torch.cuda.is_available() else "cpu"), "--checkpoint")
    for line in subject.lines:
        print(line)
    return subject


def opened(given: argparse.Namespace):
    from memlm.bank import MemoryBank, read_finished
    from memlm.settings import require

    source = given.checkpoint or read_finished(Path(given.bank)).get("model")
    require(source is not None, f"{given.bank} names no checkpoint; give it with --checkpoint")
    return MemoryBank.load(given.bank, loaded(source).model)


def texts_of(given: argparse.Namespace):
    """The documents, all of which can be read."""
    from memlm.data import Texts, counted

    texts = Texts(given.docs)
    print(f"documents: {len(texts):,}{'; left out: ' if texts.left_out else ''}{counted(texts.left_out.values())}")
    return texts


def build(given: argparse.Namespace) -> None:
    from memlm.bank import MemoryBank
    from memlm.settings import require

    require(given.checkpoint is not None, "--checkpoint names the model that reads; give a run or a checkpoint")
    texts, subject = texts_of(given), loaded(given.checkpoint)
    say(MemoryBank.build(subject.model, texts, given.out, tokenizer=subject.tokenizer), given.out)


def ask(given: argparse.Namespace) -> None:
    from memlm.bank.ask import BARE
    from memlm.data import Templates
    from memlm.settings import require

    require(given.max_new_tokens >= 1, f"--max-new-tokens={given.max_new_tokens} must be at least 1")
    bank = opened(given)
    chosen = {"none": lambda: BARE, "plain": Templates.plain, "chat": lambda: Templates.chat(bank.wording.tokenizer)}
    reply = bank.ask(given.question, given.max_new_tokens, chosen[given.templates]())
    print(reply.text)
    for layer, readings in reply.read.items():
        print(f"\nlayer {layer} read{'' if readings else ' nothing'}")
        for name, score, chunk in readings:
            passage = reply.passages[name, chunk]
            print(f"  {score:.3f}  {name}")
            print(indent("(no text)" if passage is None else shorten(passage, 400), " " * 9))
    print(f"\n{reply.seconds:.2f} s; {size(reply.read_bytes)} read of a bank of {size(reply.bank_bytes)}")


def add(given: argparse.Namespace) -> None:
    texts, bank = texts_of(given), opened(given)
    counts = bank.put(texts, progress=True)
    bank.save(given.bank)
    print(", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
    say(bank, given.bank)


def delete(given: argparse.Namespace) -> None:
    bank = opened(given)
    bank.delete(given.name)
    bank.save(given.bank)
    say(bank, given.bank)


def list_(given: argparse.Namespace) -> None:
    from memlm.bank import listed

    documents = listed(given.bank)
    print(f"{'tokens':>10}  {'added':16}  name, file")
    for name, tokens, source, added in documents:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(added)) if added else ""
        print(f"{tokens:10,}  {date:16}  {name}, {source}")


def say(bank, folder: str) -> None:
    stats = bank.stats()
    held = sum(stats[place] for place in ("device_bytes", "host_bytes", "disk_bytes"))
    print(f"{folder}: documents: {stats['documents']:,}, tokens: {stats['tokens']:,}, {size(held)}")


def size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def main() -> None:
    given = parsed()
    from memlm.cli import user_errors

    with user_errors(ROOT / "configs", "train"):
        try:
            given.do(given)
        except KeyboardInterrupt:
            print("stopped; the same command goes on, and the saved bank is as it was", file=sys.stderr)
            raise


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    main()
