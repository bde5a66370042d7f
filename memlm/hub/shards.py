"""Weights of a checkpoint folder, one tensor at a time, so that a conversion never holds them all."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from memlm import files

# Bytes of a written file: a quarter of the weights, within these bounds. Writing a file takes twice its bytes.
_LEAST, _MOST = 2**27, 2**31


class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; each is read when it is asked for. Other *.safetensors in the folder, such
    as the same weights in another form, are left alone.

    Raises ValueError with the file's name if a file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Path] = {}
        self.total = 0
        if not folder.is_dir():
            raise ValueError("no such folder; `hf download` brings a model from the Hub into one")
        if not any(folder.glob("*.safetensors")):
            raise ValueError("no *.safetensors there")
        names = {files.WHOLE}
        if not (folder / files.WHOLE).exists() and (folder / files.INDEX).exists():
            names = set(files.weight_map(folder / files.INDEX).values())
        for path in (folder / name for name in sorted(names)):
            if not path.exists():
                raise ValueError(f"{path.name} is missing; copy the folder again")
            try:
                with safe_open(path, "pt") as file:
                    self.places |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ValueError(f"{path.name} cannot be read ({error}); copy it again") from None
            self.total += path.stat().st_size

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.places[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def write(folder: Path, weights: Iterable[tuple[str, Tensor]], total: int) -> None:
    """Write weights as they come, to model.safetensors or to several files with an index.

    total: their bytes, about
    """
    limit = min(max(total // 4, _LEAST), _MOST)
    part: dict[str, Tensor] = {}
    parts: list[list[str]] = []
    held = written = 0

    def flush() -> None:
        nonlocal held
        files.write_tensors(folder / f"{len(parts)}.safetensors", part, {"format": "pt"})
        parts.append(list(part))
        part.clear()
        held = 0

    for name, tensor in weights:
        if part and held + tensor.nbytes > limit:
            flush()
        part[name] = tensor.contiguous()
        held += tensor.nbytes
        written += tensor.nbytes
    flush()
    if len(parts) == 1:
        (folder / "0.safetensors").rename(folder / files.WHOLE)
        return
    places: dict[str, str] = {}
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / files.INDEX).write_text(json.dumps(index, indent=2) + "\n")
