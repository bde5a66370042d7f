#!/usr/bin/env python
"""Convert a checkpoint folder from another format to ours, or back.

    python scripts/convert_checkpoint.py --from-format fla-mom --source DIR --target DIR
    python scripts/convert_checkpoint.py --to-format fla-mom --source DIR --target DIR

fla-mom: flash-linear-attention's MoM. msa: Memory Sparse Attention as released. qwen3: transformers' Qwen3, which
``--memory`` gives a memory: msa, its routers fresh; chunk_sparse; or none, attention. Files of a tokenizer are copied.
"""

import argparse
import functools
import json
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import memlm
from memlm.hub import fla_mom, load_model, msa

# Configurations and weights, from theirs and to theirs.
READERS = {
    "fla-mom": (lambda theirs, _: fla_mom.config_from_fla(theirs), fla_mom.weights_from_fla),
    "msa": (msa.config_from_msa, msa.weights_from_msa),
    "qwen3": (msa.config_from_qwen3, msa.weights_from_qwen3),
}
WRITERS = {
    "fla-mom": (lambda ours, _: fla_mom.config_to_fla(ours), fla_mom.weights_to_fla),
    "msa": (msa.config_to_msa, msa.weights_to_msa),
}
# A copy of their config.json, beside what was converted.
THEIRS = "config.{}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-format", choices=READERS)
    direction.add_argument("--to-format", choices=WRITERS)
    parser.add_argument("--memory", choices=msa.RETROFITS, help="what a Qwen3 becomes, msa if not given")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.memory and arguments.from_format != "qwen3":
        parser.error(f"--memory {arguments.memory} is for --from-format qwen3 only; leave it out")
    try:
        if arguments.from_format:
            read(arguments.from_format, arguments.source, arguments.target, arguments.memory)
        else:
            write(arguments.to_format, arguments.source, arguments.target)
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.source}: {error}")
    print(f"wrote {arguments.target}")


def read(form: str, source: Path, target: Path, memory: str | None = None) -> None:
    read_config, read_weights = READERS[form]
    if memory:
        read_config = functools.partial(read_config, memory=memory)
    theirs = _load(source)
    config = read_config(json.loads((source / "config.json").read_text()), theirs)
    weights = read_weights(theirs, config)
    _empty(target)
    config.architectures = [memlm.MemLMForCausalLM.__name__]
    config.save_pretrained(target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    load_model(target)
    if form in WRITERS:
        # For what ours has no setting for, on the way back.
        shutil.copy(source / "config.json", target / THEIRS.format(form))
    _copy_tokenizer(source, target)


def write(form: str, source: Path, target: Path) -> None:
    write_config, write_weights = WRITERS[form]
    model, before = load_model(source), source / THEIRS.format(form)
    theirs = write_config(model.config, json.loads(before.read_text()) if before.exists() else {})
    weights = write_weights(model.state_dict(), model.config)
    _empty(target)
    (target / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _copy_tokenizer(source, target)


def _load(source: Path) -> dict:
    """The weights of one file or of several."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError("no *.safetensors there")
    weights = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file.name} cannot be read ({error}); copy it again") from None
    return weights


def _empty(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} holds files already; name another --target")
    target.mkdir(parents=True, exist_ok=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in sorted([*source.glob("*token*"), *source.glob("chat_template*")]):
        shutil.copy(file, target)


if __name__ == "__main__":
    main()
