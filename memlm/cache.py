"""``MemoryCache``: the memory of a model as a user's object. Keep it, copy it, save it, continue from it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from memlm import files
from memlm.fingerprint import Snapshot, digest_of, fingerprint, made_by
from memlm.memory.rows import Rows
from memlm.memory.state import State, leaves, mapped, named, nested

_FILE = "memory.safetensors"
# Odd, so that no id gets lost in the lower bits.
_FACTOR = 6364136223846793005
# Metadata of a file; "digest" covers everything in it except itself.
_WORDS = ("fingerprint", "signature", "seen", "start", "digest")


class MemoryCache(Cache):
    """The states of all layers of one model, for a batch of streams. Pass it as ``past_key_values``.

    >>> memory = memlm.MemoryCache()
    >>> model(book_ids, past_key_values=memory)
    >>> memory.save("memories/book")
    >>> answer = model.generate(question_ids, past_key_values=memory.fork())

    States are never changed in place, so ``fork`` is free, and a failed call leaves the memory as it was. A filled
    memory refuses models of another configuration, dtype or weights.

    A model object that continues its own memory is recognised by identity, at no cost. It may be trained meanwhile, as
    in truncated backpropagation. Weights are compared in two cases. ``save`` compares the model with its weights when
    the memory began or was loaded. The first call after ``load``, or with another model object, compares the model's
    fingerprint. A memory keeps its model alive. If compiled code begins a memory, the first ``save`` takes the weights
    of that moment as those of the beginning.

    fixed: later calls write into the tensors of the first one, without gradients. So a step of decoding is a graph of
        the device, by ``torch.compile(model, mode="reduce-overhead")``. A failed call may leave the memory half
        written, and ``fork`` copies it
    max_length: of a fixed memory, the most tokens of a row, for attention that keeps every token. Without it a layer
        that keeps every token raises ValueError, and so does any but attention
    read: [B], a hash of the ids that each stream has read; ``generate`` recognises these ids at the start of a prompt.
        None if some inputs were not ids
    """

    # transformers skips ids that a cache has read unless all its layers are linear.
    is_linear = (False,)

    def __init__(self, fixed: bool = False, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        if max_length is not None and not (fixed and max_length >= 1):
            raise ValueError(f"max_length={max_length} must be at least 1, with fixed=True")
        self.fixed, self.max_length = fixed, max_length
        self._forget()

    def _forget(self) -> None:
        self.states: list[State] = []
        # The position of each row's next token, and the same as a Python int if known (see ``Rows``).
        self.position: Tensor | None = None
        self.start: int | None = 0
        self.signature: str | None = None
        # A tensor in a fixed memory, so that compiled code holds no number that changes.
        self._seen: int | Tensor = 0
        self.read: Tensor | None = None
        # The model that continues it, and a snapshot of its weights.
        self.model: PreTrainedModel | None = None
        self.weights: Snapshot | None = None
        # The fingerprint in the file, until a model continues the memory; None accepts any weights.
        self.fingerprint: str | None = None

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` compiles its steps on a GPU."""
        return self.fixed

    @property
    def seen(self) -> int:
        """Tokens passed so far, with padding. A fixed memory waits for the device."""
        return int(self._seen)

    @seen.setter
    def seen(self, number: int) -> None:
        self._seen = number

    def __len__(self) -> int:
        return len(self.states)

    def __bool__(self) -> bool:
        return True

    def state(self, layer_idx: int) -> State | None:
        """The state of a layer, or None before the first call."""
        return self.states[layer_idx] if self.states else None

    def check(self, model: PreTrainedModel, dtype: torch.dtype, batch_size: int) -> None:
        """Raise ValueError if this memory belongs to another decoder, dtype or batch size."""
        if not self.states:
            return
        if model is not self.model or not (self.signature or "").endswith(f"-{_name(dtype)}"):
            self._recognise(model, dtype)
        if batch_size != self.batch_size:
            raise ValueError(
                f"past_key_values: this memory holds {self.batch_size} rows, the input {batch_size}; "
                "use batch_repeat_interleave or batch_select_indices, or start a new MemoryCache"
            )

    @torch.compiler.disable(reason="run the first call of a loaded memory, or of another model, without torch.compile")
    def _recognise(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        signature = _signature(model, dtype)
        if signature != self.signature:
            raise ValueError(
                f"past_key_values: this memory was made by a model of signature {self.signature}, "
                f"not {signature}; load the model that made it, or start a new MemoryCache"
            )
        made = self.made_of()
        if made is not None and not made_by(model, made):
            raise ValueError(
                f"past_key_values: this memory was made by weights of fingerprint {made}, not {fingerprint(model)}; "
                "load the model that made it, or the memory with strict=False, or start a new MemoryCache"
            )
        self.model, self.weights, self.fingerprint = model, Snapshot(model), None

    def made_of(self) -> str | None:
        """The fingerprint of the weights that made this memory; None if it was loaded with strict=False and not used
        yet.

        Raises ValueError if the model's weights have changed since the memory began.
        """
        if self.model is None:
            return self.fingerprint
        if self.weights is None:
            self.weights = Snapshot(self.model)
        if not self.weights.holds(self.model):
            raise ValueError(
                "the model was trained or changed since this memory began, so its present weights did not make the "
                "memory; read again with a new MemoryCache, or save with strict=False, under the present weights"
            )
        return fingerprint(self.model)

    def replace(
        self, states: list[State], rows: Rows, model: PreTrainedModel, dtype: torch.dtype, read: Tensor | None
    ) -> None:
        """Store the states after a call, the positions of its rows, and the hash of all ids read."""
        if self.model is not model:
            self.model, self.signature = model, _signature(model, dtype)
            # A compiler cannot inspect weights.
            self.weights = None if torch.compiler.is_compiling() else Snapshot(model)
        if self.fixed and self.states:
            self._write(states, rows, read)
            return
        if self.fixed:
            mixers = [layer.mixer for layer in model.base_model.every_layer]
            if kept := [x for x in mixers if x.grows and not (x.has_room and self.max_length)]:
                fix = "give max_length, or leave fixed=True out" if kept[0].has_room else "leave fixed=True out"
                kind = type(kept[0]).__module__.rpartition(".")[2]
                raise ValueError(f"past_key_values: a memory of kind {kind!r} keeps every token; {fix}")
            if torch.is_grad_enabled():
                raise ValueError("past_key_values: a fixed memory reads without gradients; use torch.no_grad()")
        self.states, self._seen, self.read = states, self._seen + rows.length, read
        self.position, self.start = rows.after_B, rows.next_start
        if self.fixed:
            self._fix()

    @torch.compiler.disable(reason="run the first call of a fixed memory without torch.compile")
    def _fix(self) -> None:
        """Give each state tensors of its own, whose addresses compiled code may keep."""
        assert self.position is not None
        # Positions on the device alone: code that knows a number would serve one token.
        self.start, self._seen = None, torch.full((), self.seen, device=self.position.device)
        self.states = [mapped(lambda x: x.detach().clone(), state) for state in self.states]
        self.position = self.position.clone()
        self.read = None if self.read is None else self.read.clone()
        for x in self._tensors():
            torch._dynamo.mark_static_address(x, guard=False)

    def _tensors(self) -> Iterator[Tensor]:
        """All tensors of a memory that is not empty."""
        for state in self.states:
            yield from leaves(state)
        yield from (x for x in (self.position, self.read, self._seen) if isinstance(x, Tensor))

    @torch.no_grad()
    def _write(self, states: list[State], rows: Rows, read: Tensor | None) -> None:
        """Write the states after a call into the tensors of a fixed memory."""
        assert self.position is not None and isinstance(self._seen, Tensor)
        into, new = [self.position], [rows.after_B]
        for before, after in zip(self.states, states, strict=True):
            old = [*leaves(before)]
            into += old
            # A tensor may take another's place, as an anchor does.
            in_order = leaves(mapped(lambda _, x: x, before, after))
            new += [x.clone() if any(x is y for y in old) else x for x in in_order]
        if self.read is not None:
            into.append(self.read)
            new.append(self.read if read is None else read)
        torch._foreach_copy_(into, new)
        if self.max_length is not None:
            full = f"a row has more than max_length={self.max_length} tokens; give the memory a larger one"
            torch._assert_async((self.position <= self.max_length).all(), full)
        self._seen.add_(rows.length)

    def reading(self, ids_BT: Tensor | None, mask_BT: Tensor | None = None) -> Tensor | None:
        """The hash [B] after these ids [B, T], without ids that the mask [B, T] excludes. Does not wait for the
        device.
        """
        if ids_BT is None or (self.states and self.read is None):
            return None
        read_B = ids_BT.new_zeros(len(ids_BT), dtype=torch.int64) if self.read is None else self.read
        return _hashed(read_B.to(ids_BT.device), ids_BT, mask_BT)

    def begins(self, ids_BT: Tensor, mask_BT: Tensor) -> bool:
        """Whether each row of a prompt begins with all ids that its stream, or each of its beams, has read. Waits once
        for the device.
        """
        if self.read is None or ids_BT.shape[1] < self.seen or not len(ids_BT) or len(self.read) % len(ids_BT):
            return False
        beams = len(self.read) // len(ids_BT)
        ids_BT, mask_BT = (
            x[:, : self.seen].to(self.read.device).repeat_interleave(beams, 0) for x in (ids_BT, mask_BT)
        )
        return torch.equal(_hashed(torch.zeros_like(self.read), ids_BT, mask_BT), self.read)

    @property
    def batch_size(self) -> int:
        """Rows of the states; -1 before the first call."""
        return -1 if self.position is None else len(self.position)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1 if self.max_length is None else self.max_length

    def nbytes(self) -> int:
        """Bytes of state for the whole batch, without spare room for growing keys (``memlm.memory.kv``)."""
        return sum(x.numel() * x.element_size() for state in self.states for x in leaves(state))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        # Layers that share a tensor also share its result.
        made: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:
            if id(x) not in made:
                new = function(x)
                if self.fixed and new.shape == x.shape and new.device == x.device:
                    new = x.copy_(new)
                made[id(x)] = new
            return made[id(x)]

        self.states = [mapped(once, state) for state in self.states]
        self.read = None if self.read is None else once(self.read)
        self.position = None if self.position is None else once(self.position)

    def _select(self, name: str, rows: Tensor | list[int]) -> None:
        rows = self._rows(name, rows)
        self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def _rows(self, name: str, rows: Tensor | list[int]) -> Tensor:
        """Indices of rows, from indices (negative ones count from the end) or a mask. Raises ValueError for others."""
        rows = torch.as_tensor(rows)
        # An empty list has dtype float in torch.
        rows = rows if rows.numel() else rows.long()
        size = max(self.batch_size, 0)
        if rows.dtype == torch.bool and rows.shape == (size,):
            return rows.nonzero()[:, 0]
        if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            shape = list(rows.shape)
            raise ValueError(f"{name}: {rows.dtype} {shape} must be indices of the memory's {size} rows, or a mask")
        # torch checks indices on a GPU, so the host does not wait.
        if rows.device.type == "cpu" and len(wrong := rows[(rows < -size) | (rows >= size)]):
            raise ValueError(
                f"{name}: there is no row {int(wrong[0])} in a memory of {size} rows; give 0 to {size - 1}"
            )
        return torch.where(rows < 0, rows + size, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the former row ``beam_idx[i]``."""
        self._select("beam_idx", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._select("indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if repeats < 0:
            raise ValueError(f"repeats={repeats} must be at least 0")
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Forget everything, or the content of the given rows (indices, or a mask).

        A row at position 0 begins a new document in every mixer; the rest of its state has no effect.
        """
        if rows is None:
            self._forget()
        else:
            rows, zero, self.start = self._rows("rows", rows), torch.zeros(()), None
            self._map(lambda x: x.clone().index_put_((rows.to(x.device),), zero.to(x)))

    def crop(self, tokens_to_remove: int) -> None:
        """Always raises ValueError: a state cannot forget its last tokens."""
        raise ValueError("a recurrent memory cannot be cropped; fork() it before the tokens you may take back")

    def fork(self) -> "MemoryCache":
        """An independent copy. It shares the tensors, so it costs nothing until one of the two continues."""
        other = MemoryCache()
        other.__dict__ |= self.__dict__ | {"fixed": False, "max_length": None}
        other.states = [mapped(lambda x: x, state) for state in self.states]
        if self.fixed:
            other.seen = self.seen
            other._map(Tensor.clone)
        return other

    __copy__ = fork

    def __deepcopy__(self, memo: Any) -> "MemoryCache":
        # The model is not copied, and tensors with a gradient history cannot be.
        other = self.fork()
        other._map(lambda x: x.detach().clone())
        return other

    def __getstate__(self) -> dict[str, Any]:
        # The process that unpickles it has its own model.
        return self.__dict__ | {"model": None, "weights": None, "fingerprint": self.made_of()}

    def detach(self) -> "MemoryCache":
        """Cut the gradient history, for truncated backpropagation; returns the memory itself."""
        self._map(Tensor.detach)
        return self

    def to(self, device: torch.device | str) -> "MemoryCache":
        """Move all states to a device; returns the memory itself."""
        self._map(lambda x: x.to(device))
        return self

    def save(self, directory: str | Path, strict: bool = True) -> None:
        """Write ``directory/memory.safetensors`` completely or not at all. If several write at once, one file remains.

        strict: if false, save even if the model was trained after the memory began, or if the memory was loaded with
            strict=False. The file then has the fingerprint of the present weights

        Raises ValueError for an empty memory.
        """
        if not self.states:
            raise ValueError("an empty memory cannot be saved; run the model with it first")
        made = self.made_of() if strict or self.model is None else fingerprint(self.model)
        if made is None:
            raise ValueError("a memory that was loaded with strict=False has no model yet; run one with it first")
        layers = {str(i): state for i, state in enumerate(self.states)}
        tensors = {name: x.detach().contiguous().clone() for name, x in named(layers).items()}
        assert self.position is not None
        tensors["position"] = self.position.clone()
        if self.read is not None:
            tensors["read"] = self.read.clone()
        start = "" if self.start is None else str(self.start)
        words = {"fingerprint": made, "signature": self.signature or "", "seen": str(self.seen), "start": start}
        words["digest"] = _digest(tensors, words)
        files.write_tensors(Path(directory) / _FILE, tensors, words)

    @classmethod
    def load(cls, directory: str | Path, device: torch.device | str = "cpu", strict: bool = True) -> "MemoryCache":
        """The memory that ``save`` wrote, for the model that made it.

        strict: if false, a model with other weights may continue it

        Raises ValueError if the file is damaged or not a memory.
        """
        path = Path(directory) / _FILE
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a memory is written by MemoryCache.save")
        while True:
            before = _identity(path)
            try:
                return cls._read(path, device, strict)
            except ValueError:
                # safetensors opens a file twice; another process may have replaced it in between.
                if _identity(path) == before:
                    raise

    @classmethod
    def _read(cls, path: Path, device: torch.device | str, strict: bool) -> "MemoryCache":
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                words = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: damaged or not a memory ({reason}); restore it, or save it again") from None
        if missing := [name for name in ("position", *_WORDS) if name not in words and name not in tensors]:
            raise ValueError(
                f"{path}: not a memory, or one of an earlier version (it has no {missing[0]}); read the text again"
            )
        if _digest(tensors, words) != words["digest"]:
            raise ValueError(f"{path}: damaged, its content is not what was saved; restore it, or save it again")
        cache = cls()
        cache.position, cache.read = tensors.pop("position"), tensors.pop("read", None)
        cache.start = _count(path, words["start"]) if words["start"] else None
        cache.states, cache.seen = _layers(path, tensors), _count(path, words["seen"])
        cache.signature, cache.fingerprint = words["signature"], words["fingerprint"] if strict else None
        rows = len(next(iter(tensors.values())))
        for x in (cache.position, cache.read):
            if x is not None and (x.shape, x.dtype) != ((rows,), torch.int64):
                raise ValueError(f"{path}: its position and its hashes must be one integer a row; read the text again")
        return cache


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.compiler.assume_constant_result
def _signature(model: PreTrainedModel, dtype: torch.dtype) -> str:
    return f"{model.config.memory_signature()}-{_name(dtype)}"


def _digest(tensors: dict[str, Tensor], words: dict[str, str]) -> str:
    said = (f"{name}={value}" for name, value in sorted(words.items()) if name != "digest")
    return digest_of(sorted(tensors.items()), *said)


def _layers(path: Path, tensors: dict[str, Tensor]) -> list[State]:
    """States by layer from tensors named ``layer.name``. All layers and equal numbers of rows are required."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        layer, _, name = key.partition(".")
        layers.setdefault(layer, {})[name] = x
    if layers.keys() != {str(i) for i in range(len(layers))} or not layers:
        found = ", ".join(sorted(layers)) or "none"
        raise ValueError(f"{path}: its layers are {found:.80}, not 0 to their number; read the text again")
    if len({x.shape[:1] for x in tensors.values()}) != 1 or not all(x.ndim for x in tensors.values()):
        raise ValueError(f"{path}: its states are of different numbers of rows; read the text again")
    try:
        return [nested(layers[str(i)]) for i in range(len(layers))]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; read the text again") from None


def _count(path: Path, seen: str) -> int:
    if not re.fullmatch(r"\d{1,18}", seen, re.ASCII):
        raise ValueError(f"{path}: seen={seen!r:.40} must be a number of tokens; read the text again")
    return int(seen)


def _hashed(before_B: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """A hash modulo 2 ** 64 that does not depend on how a text is divided into calls."""
    if ids_BT.shape[1] == 1 and mask_BT is None:
        return (before_B + ids_BT[:, 0].long() + 1) * _FACTOR
    value_BT, factor_BT = ids_BT.long() + 1, torch.full_like(ids_BT, _FACTOR, dtype=torch.int64)
    if mask_BT is not None:
        real_BT = mask_BT.to(ids_BT.device).bool()
        value_BT, factor_BT = value_BT * real_BT, factor_BT.where(real_BT, 1)
    # The product of the factors from each token to the last.
    after_BT = factor_BT.flip(1).cumprod(1).flip(1)
    whole_B = after_BT[:, 0] if ids_BT.shape[1] else 1
    return before_B * whole_B + (value_BT * after_BT).sum(1)
