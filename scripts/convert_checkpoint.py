#!/usr/bin/env python
"""Convert a checkpoint folder from another format to memlm's, or back.

    python scripts/convert_checkpoint.py --from-format qwen3 --memory attention --source DIR --target DIR
    python scripts/convert_checkpoint.py --to-format qwen3 --source DIR --target DIR

fla-mom: flash-linear-attention's MoM. msa: the released Memory Sparse Attention. llama, mistral, qwen2, qwen3,
smollm3, olmo2: decoders of transformers; ``--memory`` selects their memory: msa, with fresh routers; chunk_sparse; or
attention, for none, which can also go back. Tokenizer files and generation_config.json are copied.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

import memlm
from memlm import card, files
from memlm.hub import families, fla_mom, load_model, msa, shards


def whole(convert: Callable[[dict[str, Tensor], Any], dict[str, Tensor]]) -> Callable:
    """A conversion of all weights at once, in the form of one that yields them."""

    def pairs(weights: Mapping[str, Tensor], config: memlm.MemLMConfig) -> Iterable[tuple[str, Tensor]]:
        return convert(dict(weights), config).items()

    return pairs


def config_of_family(form: str) -> Callable:
    return lambda values, _, memory: families.config_from(form, values, memory)


# Conversions of configurations (config.json, weights, memory) and of weights, from and to the foreign format.
READERS: dict[str, Any] = {
    "fla-mom": (lambda values, *_: fla_mom.config_from_fla(values), whole(fla_mom.weights_from_fla)),
    "msa": (lambda values, weights, _: msa.config_from_msa(values, weights), whole(msa.weights_from_msa)),
    **{form: (config_of_family(form), families.weights_from) for form in families.FAMILIES},
}
WRITERS: dict[str, Any] = {
    "fla-mom": (lambda ours, _: fla_mom.config_to_fla(ours), whole(fla_mom.weights_to_fla)),
    "msa": (msa.config_to_msa, whole(msa.weights_to_msa)),
    **{form: (functools.partial(families.config_to, form), families.weights_to) for form in families.FAMILIES},
}
# A copy of the foreign config.json, beside the converted checkpoint.
THEIRS = "config.{}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-format", choices=READERS)
    direction.add_argument("--to-format", choices=WRITERS)
    parser.add_argument("--memory", help=f"the memory of a decoder: {', '.join(families.MEMORIES)}; default: msa")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    arguments = parser.parse_args()
    memory, decoders = arguments.memory, ", ".join(families.FAMILIES)
    if memory and arguments.from_format not in families.FAMILIES:
        parser.error(f"--memory {memory} is for --from-format {decoders} only; leave it out")
    if memory and memory not in families.MEMORIES:
        known = ", ".join(families.MEMORIES)
        parser.error(f"--memory {memory} does not take the weights of an attention, as {known} do; use memlm.attach")
    try:
        if arguments.from_format:
            read(arguments.from_format, arguments.source, arguments.target, memory or "msa")
        else:
            write(arguments.to_format, arguments.source, arguments.target)
    except (OSError, ValueError, SafetensorError) as error:
        prefix = f"{arguments.source}: "
        sys.exit(prefix + str(error).removeprefix(prefix))
    print(f"wrote {arguments.target}")


def read(form: str, source: Path, target: Path, memory: str) -> None:
    read_config, read_weights = READERS[form]
    theirs = shards.Stored(source)
    values = files.read_json(source / "config.json")
    try:
        config = read_config(values, theirs, memory)
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"config.json: a value is not of the format ({type(error).__name__}: {error})") from None
    with _new(target) as folder:
        config.architectures = [memlm.MemLMForCausalLM.__name__]
        config.save_pretrained(folder)
        shards.write(folder, read_weights(theirs, config), theirs.total)
        _copy_more(source, folder)
        load_model(folder)
        card.write(folder)
        # Used on the way back, for settings that memlm lacks.
        shutil.copy(source / "config.json", folder / THEIRS.format(form))


def write(form: str, source: Path, target: Path) -> None:
    write_config, write_weights = WRITERS[form]
    config, before = load_model(source).config, source / THEIRS.format(form)
    try:
        theirs = write_config(config, files.read_json(before) if before.exists() else {})
    except ValueError as error:
        own = next((name for name in WRITERS if (source / THEIRS.format(name)).exists()), form)
        fix = "" if own == form else f"; it was converted from {own}: use --to-format {own}"
        raise ValueError(f"{error}{fix}") from None
    ours = shards.Stored(source)
    with _new(target) as folder:
        (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        shards.write(folder, write_weights(ours, config), ours.total)
        _copy_more(source, folder)


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """A folder that gets the name ``target`` once it is complete. Raises ValueError if ``target`` already has
    files.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} holds files already; name another --target")
    if target.exists():
        target.rmdir()
    with files.new_folder(target) as folder:
        yield folder


def _copy_more(source: Path, target: Path) -> None:
    """Files of the tokenizer, and defaults of ``generate``."""
    for pattern in ("*token*", "chat_template*", "generation_config.json"):
        for file in sorted(source.glob(pattern)):
            shutil.copy(file, target)


if __name__ == "__main__":
    main()
