"""What a folder says of the bank in it, and which model a bank is of."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from memlm.bank.shard import sync
from memlm.modeling import MemLMModel

INDEX = "index.json"


def fingerprint(model: MemLMModel) -> str:
    """Of a decoder's configuration and of values of every weight, spread evenly over it; any device has the same."""
    digest = hashlib.sha256(model.memory_signature.encode())
    samples = []
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        flat = weight.detach().flatten()
        place = torch.linspace(0, len(flat) - 1, min(len(flat), 256), dtype=torch.float64).long()
        samples.append(flat[place.to(flat.device)].double())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    if not path.exists():
        raise ValueError(f"{path}: no such file; a bank is written by MemoryBank.save")
    try:
        index = json.loads(path.read_text())
        for name in ("fingerprint", "complete", "read", "shards"):
            index[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged or not a bank's ({error!r}); build the bank in another folder") from None
    return index


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Replaced at once; what it does not name goes."""
    partial = directory / f"{INDEX}.tmp"
    partial.write_text(json.dumps(index))
    sync(partial)
    sync(directory)
    partial.replace(directory / INDEX)
    sync(directory)
    kept = {entry["file"] for entry in index["shards"]}
    for path in directory.glob("shard-*.safetensors"):
        if path.name not in kept:
            path.unlink()
