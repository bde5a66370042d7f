"""Fingerprints of weights and checksums of tensors. They identify the model that made a memory or a bank, and detect
damaged files.

V rows of the vocabulary.
"""

import contextlib
import hashlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

# From the golden ratio, so that neighbouring indices have very different factors.
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
# As many as fit into a CPU's cache, which is ten times faster; a GPU takes more.
_AT_ONCE, _ON_GPU = 1 << 18, 1 << 25
# Eight bytes count as two times four: in sums modulo 2 ** 64 with odd factors, two changed sign bits would cancel.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}
_VOCABULARY = "embed_tokens."


class Snapshot:
    """The identity of a model's weight tensors and the number of changes to each. Cheap, without waiting for a device.

    torch does not count changes through ``.data`` or of tensors made under inference_mode. Offloaded weights count as
    unchanged.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows = model.config.vocab_size
        self._seen = {name: (weakref.ref(x), _version(x), _place(x)) for name, x in _weights(model)}

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether the weights are unchanged, apart from rows that ``resize_token_embeddings`` added or removed."""
        resized, now = model.config.vocab_size != self.rows, dict(_weights(model))
        if now.keys() != self._seen.keys():
            return False
        for name, x in now.items():
            ref, version, place = self._seen[name]
            moved = place != _place(x) and not (resized and name.startswith(_VOCABULARY))
            # An offloaded weight is a new tensor after each forward.
            if moved or not (x.is_meta or (ref() is x and version == _version(x))):
                return False
        return True


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _place(x: Tensor) -> tuple[int, torch.dtype]:
    has_none = is_traceable_wrapper_subclass(x) or is_fake(x)
    return 0 if has_none else x.data_ptr(), x.dtype


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """Count the changes of fused optimisers, which torch does not count."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused_step)

# For each model: a snapshot of its weights, and its fingerprints by rows of the vocabulary.
_found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Snapshot, dict[int, str]]] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel, rows: int | None = None) -> str:
    """A hash of a decoder's configuration and of every bit of its weights, the same on every device.

    Only the first ``rows`` of the embeddings count (None: all), and the head does not. So a model is recognised after
    its vocabulary has grown, see ``made_by``. The result is cached until a ``Snapshot`` no longer holds.
    """
    snapshot, found = _found.get(model, (None, {}))
    if snapshot is None or snapshot.rows != model.config.vocab_size or not snapshot.holds(model):
        snapshot, found = _found[model] = Snapshot(model), {}
    rows = snapshot.rows if rows is None else rows
    if rows not in found:
        found[rows] = f"{rows}-{digest_of(_stored(model, rows), model.config.memory_signature())}"
    return found[rows]


def made_by(model: PreTrainedModel, found: str) -> bool:
    """Whether ``found`` is this decoder's fingerprint, now or before its vocabulary grew."""
    rows = found.partition("-")[0]
    return (
        rows.isdecimal()
        and len(rows) < 10
        and int(rows) <= model.config.vocab_size
        and (fingerprint(model, int(rows)) == found)
    )


def _stored(model: PreTrainedModel, rows: int) -> Iterator[tuple[str, Any]]:
    for name, value in stored(model):
        of_tokens = isinstance(value, Tensor) and name.startswith(_VOCABULARY)
        yield name, value[:rows] if of_tokens else value


def stored(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """A model's checkpoint tensors, one module after the other, also if weights are offloaded."""
    for path, module in model.named_modules():
        with _at_hand(module):
            own: dict[str, Any] = {}
            module._save_to_state_dict(own, f"{path}." if path else "", keep_vars=False)
            yield from own.items()


@contextlib.contextmanager
def _at_hand(module: nn.Module) -> Iterator[None]:
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def digest_of(named: Iterable[tuple[str, Any]], *words: str) -> str:
    """A hash of words, and of the names, dtypes, shapes and all bits of tensors, on any device."""
    digest, sums = hashlib.sha256("\n".join(words).encode()), []
    for name, value in named:
        for leaf in _leaves(value):
            if isinstance(leaf, Tensor):
                digest.update(f"\n{name} {leaf.dtype} {list(leaf.shape)}".encode())
                sums.append(_checksum(leaf))
            else:
                digest.update(f"\n{name} {leaf}".encode())
    if sums:
        digest.update(torch.stack([x.cpu() for x in sums]).numpy().tobytes())
    return digest.hexdigest()[:16]


def _leaves(value: Any) -> Iterator[Any]:
    """A value of a state_dict as plain tensors and words; a quantised weight consists of several."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        names, rest = value.__tensor_flatten__()
        yield repr(rest)
        for name in names:
            yield from _leaves(getattr(value, name))
    elif isinstance(value, Tensor) and value.is_quantized:
        yield value.int_repr()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{value.q_scale()} {value.q_zero_point()}"
        else:
            yield from (value.q_per_channel_scales(), value.q_per_channel_zero_points())
    else:
        yield value


def _checksum(x: Tensor) -> Tensor:
    """The sum, modulo 2 ** 64, of a tensor's elements as integers, each times an odd factor of its index."""
    flat = x.detach().flatten()
    # A single element may have any stride, but a view as another dtype needs stride 1.
    flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
    bits, total, size = flat.view(_BITS[x.element_size()]), 0, _AT_ONCE if x.device.type == "cpu" else _ON_GPU
    for start in range(0, len(bits), size):
        part = bits[start : start + size].long()
        place = torch.arange(start, start + len(part), device=bits.device)
        total = total + (part * (place * _FACTOR | 1)).sum()
    return torch.as_tensor(total, device=bits.device)
