#!/usr/bin/env python
"""Convert a checkpoint folder from another format to memlm's, or back.

    python scripts/convert_checkpoint.py --from-format fla-mom --source DIR --target DIR
    python scripts/convert_checkpoint.py --to-format fla-mom --source DIR --target DIR

fla-mom: flash-linear-attention's MoM. msa: the released Memory Sparse Attention. qwen3: transformers' Qwen3;
``--memory`` selects its memory: msa, with fresh routers; chunk_sparse; or attention, for none. Tokenizer files are
copied.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import memlm
from memlm import files
from memlm.hub import fla_mom, load_model, msa

# Conversions of configurations and weights, from and to the foreign format.
READERS = {
    "fla-mom": (lambda theirs, _: fla_mom.config_from_fla(theirs), fla_mom.weights_from_fla),
    "msa": (msa.config_from_msa, msa.weights_from_msa),
    "qwen3": (msa.config_from_qwen3, msa.weights_from_qwen3),
}
WRITERS = {
    "fla-mom": (lambda ours, _: fla_mom.config_to_fla(ours), fla_mom.weights_to_fla),
    "msa": (msa.config_to_msa, msa.weights_to_msa),
}
# A copy of the foreign config.json, beside the converted checkpoint.
THEIRS = "config.{}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-format", choices=READERS)
    direction.add_argument("--to-format", choices=WRITERS)
    parser.add_argument("--memory", choices=msa.RETROFITS, help="the memory of a converted Qwen3; default: msa")
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
    try:
        config = read_config(files.read_json(source / "config.json"), theirs)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json: a value is of another type than the format's ({error})") from None
    weights = read_weights(theirs, config)
    with _new(target) as folder:
        config.architectures = [memlm.MemLMForCausalLM.__name__]
        config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        load_model(folder)
        if form in WRITERS:
            # Used on the way back, for settings that memlm lacks.
            shutil.copy(source / "config.json", folder / THEIRS.format(form))
        _copy_tokenizer(source, folder)


def write(form: str, source: Path, target: Path) -> None:
    write_config, write_weights = WRITERS[form]
    model, before = load_model(source), source / THEIRS.format(form)
    theirs = write_config(model.config, files.read_json(before) if before.exists() else {})
    weights = write_weights(model.state_dict(), model.config)
    with _new(target) as folder:
        (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _copy_tokenizer(source, folder)


def _load(source: Path) -> dict:
    """The weights of one or several files."""
    parts = sorted(source.glob("*.safetensors"))
    if not parts:
        raise ValueError("no *.safetensors there")
    weights = {}
    for file in parts:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file.name} cannot be read ({error}); copy it again") from None
    return weights


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """A folder that gets the name ``target`` once it is complete. Raises ValueError if ``target`` already has
    files.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} holds files already; name another --target")
    if target.exists():
        target.rmdir()
    try:
        with files.new_folder(target) as folder:
            yield folder
    except SafetensorError as error:
        raise OSError(f"{target} could not be written ({error}); make room and start again") from None


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in sorted([*source.glob("*token*"), *source.glob("chat_template*")]):
        shutil.copy(file, target)


if __name__ == "__main__":
    main()
