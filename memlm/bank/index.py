"""What a folder says of the bank in it, and which model a bank is of."""

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlm.bank.shard import sync
from memlm.modeling import MemLMModel

INDEX = "index.json"


# Of a model that has been asked for: its weights, where and in which version they were, and what was found.
_found: weakref.WeakKeyDictionary[MemLMModel, tuple[list[weakref.ref[Tensor]], list[Any], str]] = (
    weakref.WeakKeyDictionary()
)
# By the golden ratio, so that places near each other have factors that are far apart.
_FACTOR, _AT_ONCE = 0x9E3779B97F4A7C15 - (1 << 64), 1 << 22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: MemLMModel) -> str:
    """Of a decoder's configuration and of every bit of its weights; any device has the same.

    Made once, and again when a weight is another tensor or was changed, which torch counts (but not changes through
    ``.data``, nor those of tensors made under inference_mode).
    """
    weights = [*model.parameters(), *model.buffers()]
    versions = [(x.data_ptr(), x.dtype, None if x.is_inference() else x._version) for x in weights]
    refs, before, found = _found.get(model, ([], [], ""))
    if before == versions and all(ref() is x for ref, x in zip(refs, weights, strict=True)):
        return found
    digest = hashlib.sha256(model.memory_signature.encode())
    named = model.state_dict()
    for name, weight in named.items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
    sums = [_checksum(weight) for weight in named.values()]
    digest.update(torch.stack([x.cpu() for x in sums]).numpy().tobytes())
    found = digest.hexdigest()[:16]
    _found[model] = [weakref.ref(x) for x in weights], versions, found
    return found


def _checksum(weight: Tensor) -> Tensor:
    """The sum, modulo 2 ** 64, of a tensor's bits, element by element, times an odd factor of each place."""
    bits, total = weight.detach().flatten().view(_BITS[weight.element_size()]), 0
    for start in range(0, len(bits), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].long()
        place = torch.arange(start, start + len(part), device=bits.device)
        total = total + (part * (place * _FACTOR | 1)).sum()
    return torch.as_tensor(total, device=bits.device)


def read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    if not path.exists():
        raise ValueError(f"{path}: no such file; a bank is written by MemoryBank.save")
    try:
        index = json.loads(path.read_text())
        for name in ("fingerprint", "key_dtype", "complete", "read", "shards"):
            index[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged or not a bank's ({error!r}); build the bank in another folder") from None
    return index


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Replaced at once; what it does not name goes, also from who is about to load by the index that was there."""
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
