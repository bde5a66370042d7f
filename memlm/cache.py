"""What a model remembers, as a user's object: keep it, copy it, save it, go on from it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache

from memlm.memory.base import State

_FILE = "memory.safetensors"


class MemoryCache(Cache):
    """The states of all layers of one model for a batch of streams.

    What states say never changes in place, so ``fork`` is free and a failed call leaves the memory as it
    was. Pass it as ``past_key_values``; once filled, it refuses models of another configuration or dtype.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State] = []
        self.signature: str | None = None
        self.seen = 0

    def __len__(self) -> int:
        return len(self.states)

    def __bool__(self) -> bool:
        return True

    def state(self, layer_idx: int) -> State | None:
        """The state of a layer, or None before the first call."""
        return self.states[layer_idx] if self.states else None

    def check(self, signature: str, batch_size: int) -> None:
        """Raise ValueError if this memory belongs to another model or another batch size."""
        if not self.states:
            return
        if signature != self.signature:
            raise ValueError(
                f"past_key_values: this memory was made by a model of signature {self.signature}, "
                f"not {signature}; load the model that made it, or start a new MemoryCache"
            )
        if batch_size != self.batch_size:
            raise ValueError(
                f"past_key_values: this memory holds {self.batch_size} rows, the input {batch_size}; "
                "use batch_repeat_interleave or batch_select_indices, or start a new MemoryCache"
            )

    def replace(self, states: list[State], signature: str, new_tokens: int) -> None:
        """Store what a call returned."""
        self.states, self.signature, self.seen = states, signature, self.seen + new_tokens

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.states[0].values()))) if self.states else -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens given so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    def nbytes(self) -> int:
        """Bytes of state for the whole batch, without the room in which keys grow (``memlm.memory.growing``)."""
        return sum(x.numel() * x.element_size() for state in self.states for x in state.values())

    def _map(self, function: Any) -> None:
        self.states = [{name: function(x) for name, x in state.items()} for state in self.states]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Forget everything, or what the given rows (indices, or a mask) remember.

        A row at position 0 is a new document to every mixer, whatever else its state holds.
        """
        if rows is None:
            self.states, self.signature, self.seen = [], None, 0
        else:
            rows = torch.as_tensor(rows)
            zero = torch.zeros(())
            self._map(lambda x: x.clone().index_put_((rows.to(x.device),), zero.to(x)))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a recurrent memory cannot be cropped; fork() it before the tokens you may take back")

    def fork(self) -> "MemoryCache":
        """An independent copy; costs nothing until one of the two goes on."""
        other = MemoryCache()
        other.states, other.signature, other.seen = [dict(s) for s in self.states], self.signature, self.seen
        return other

    def detach(self) -> "MemoryCache":
        """The same memory without its gradient history, for truncated backpropagation."""
        self._map(Tensor.detach)
        return self

    def to(self, device: torch.device | str) -> "MemoryCache":
        self._map(lambda x: x.to(device))
        return self

    def save(self, directory: str | Path) -> None:
        """Write ``directory/memory.safetensors``, whole or not at all."""
        if not self.states or self.signature is None:
            raise ValueError("an empty memory cannot be saved; run the model with it first")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{i}.{name}": x.detach().contiguous().clone() for i, s in enumerate(self.states) for name, x in s.items()
        }
        metadata = {"signature": self.signature, "seen": str(self.seen), "layers": str(len(self.states))}
        partial = directory / f"{_FILE}.tmp"
        save_file(tensors, partial, metadata)
        partial.replace(directory / _FILE)

    @classmethod
    def load(cls, directory: str | Path, device: torch.device | str = "cpu") -> "MemoryCache":
        """What ``save`` wrote. Raises ValueError for a file that is damaged or not a memory."""
        path = Path(directory) / _FILE
        if not path.exists():
            raise ValueError(f"{path}: no such file; a memory is written by MemoryCache.save")
        cache = cls()
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata()
                cache.states = [{} for _ in range(int(metadata["layers"]))]
                for key in file.keys():  # noqa: SIM118
                    layer, name = key.split(".", 1)
                    cache.states[int(layer)][name] = file.get_tensor(key)
                cache.signature, cache.seen = metadata["signature"], int(metadata["seen"])
        except Exception as error:
            raise ValueError(f"{path}: damaged or not a memory file ({error}); save it again") from None
        return cache
