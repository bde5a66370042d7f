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
from collections.abc import Callable
from pathlib import Path

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
    "fla-mom": (fla_mom.config_to_fla, fla_mom.weights_to_fla),
    "msa": (msa.config_to_msa, msa.weights_to_msa),
}


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
            read_config, read_weights = READERS[arguments.from_format]
            if arguments.memory:
                read_config = functools.partial(read_config, memory=arguments.memory)
            read(read_config, read_weights, arguments.source, arguments.target)
        else:
            write(*WRITERS[arguments.to_format], arguments.source, arguments.target)
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.source}: {error}")
    print(f"wrote {arguments.target}")


def read(read_config: Callable, read_weights: Callable, source: Path, target: Path) -> None:
    theirs = _load(source)
    config = read_config(json.loads((source / "config.json").read_text()), theirs)
    weights = read_weights(theirs, config)
    _empty(target)
    config.architectures = [memlm.MemLMForCausalLM.__name__]
    config.save_pretrained(target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    load_model(target)
    _copy_tokenizer(source, target)


def write(write_config: Callable, write_weights: Callable, source: Path, target: Path) -> None:
    model = load_model(source)
    theirs = write_config(model.config)
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
    return {name: w for file in files for name, w in load_file(file).items()}


def _empty(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} holds files already; name another --target")
    target.mkdir(parents=True, exist_ok=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in sorted([*source.glob("*token*"), *source.glob("chat_template*")]):
        shutil.copy(file, target)


if __name__ == "__main__":
    main()
