"""TNT's two levels (arXiv:2511.07343): a global memory with large chunks, and local memories with small chunks.

Local memories restart in every shard, so shards are independent of each other.

    o = global(q) + sum_i local_i(q'),   q' = p / max(1, |p|),   p = sum_{j <= t, same shard} k_j (k_j . q)

The query of a local memory is projected on the keys of its shard. These are unit vectors, and the projection's length,
which would grow with the shard, is limited to 1. The projection is itself a linear (Hebbian) memory of the keys. Local
memories start with a smaller lr, because their reads of other shards' keys are noise. The metric ``local_share`` is
their share of the output. A second stage may continue with smaller ``local_chunk_sizes``, because no weight depends on
them:

    python train.py memory=titans_tnt train.init_from=<run> model.mixers.memory.local_chunk_sizes=[4]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memlm.memory import titans
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.parts import memory_share
from memlm.memory.rows import Rows
from memlm.memory.state import State, mapped
from memlm.settings import require
from memlm_kernels import linear_attention


@dataclass(frozen=True)
class Config(titans.NeuralMemoryConfig):
    """chunk_size: chunk size of the global memory.
    local_chunk_sizes: chunk size of each local memory.
    shard_size: local memories restart after this many tokens, counted from the document's start.
    initial_local_lr: initial lr of the local memories; null for a quarter of initial_lr.
    """

    chunk_size: int = 64
    local_chunk_sizes: list[int] = field(default_factory=lambda: [8])
    shard_size: int = 64
    initial_local_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.initial_lr is not None  # Set from depth and chunk_size.
        if self.initial_local_lr is None:
            object.__setattr__(self, "initial_local_lr", self.initial_lr / 4)
        lr = self.initial_local_lr
        require(
            lr is not None and 0 < lr < self.max_lr,
            f"initial_local_lr={lr} must lie between 0 and max_lr={self.max_lr}",
        )
        require(self.shard_size >= 1, f"shard_size={self.shard_size} must be at least 1")
        require(bool(self.local_chunk_sizes), "local_chunk_sizes=[] must name one chunk size at least")
        for size in self.local_chunk_sizes:
            require(
                isinstance(size, int) and 1 <= size <= self.shard_size,
                f"local_chunk_sizes={self.local_chunk_sizes} must lie between 1 and shard_size={self.shard_size}",
            )
        require(self.omega_window == 1, f"omega_window={self.omega_window} must be 1: a shard starts with no past")


class Mixer(titans.NeuralMemory):
    """One set of queries, keys and values for all levels."""

    at_once = False

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(config, dims)
        self.shard_size = config.shard_size
        levels = [
            replace(config, chunk_size=size, initial_lr=config.initial_local_lr) for size in config.local_chunk_sizes
        ]
        self.local_stores = nn.ModuleList([titans.Store(level, dims) for level in levels])
        self.reset_parameters()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        parts = {"global": self.store.init_state(batch_size, device, dtype)}
        for i, store in enumerate(self.local_stores):
            assert isinstance(store, titans.Store)
            parts[f"local{i}"] = store.init_state(batch_size, device, dtype)
        known = parts["global"]["weights"]["0"]
        parts["keys"] = _keys(known.new_zeros(*known.shape[:-1], known.shape[-2]))
        conv = torch.zeros(batch_size, self.conv.width - 1, self.conv.channels, device=device, dtype=dtype)
        return {"conv": conv, **parts}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        q_BTHK, k_BTHK, v_BTHK, conv = self.project(x_BTD, state, rows)
        inputs, own = (x_BTD, q_BTHK, k_BTHK, v_BTHK), state["global"]
        known_BTHK, memory, metrics = self.store(*inputs, own, rows)
        pieces, reads, told = self._pieces(rows), [], []
        parts: dict[str, State] = {}
        cut = (
            [inputs] if len(pieces) == 1 else zip(*(x.split([n for n, *_ in pieces], 1) for x in inputs), strict=True)
        )
        for (_, count, here), part in zip(pieces, cut, strict=True):
            beside = [x.unflatten(1, (count, -1)).flatten(0, 1) if count > 1 else x for x in part]
            # Pieces after the first read no state.
            o_BTHK, parts, of_tokens = self._recall_locals(beside, state, here)
            if count > 1:
                o_BTHK = o_BTHK.unflatten(0, (-1, count)).flatten(1, 2)
                of_tokens = {name: x.unflatten(0, (-1, count)).flatten(1) for name, x in of_tokens.items()}
                parts = {name: _last(x, count) for name, x in parts.items()}
            reads.append(o_BTHK)
            told.append(of_tokens)
        o_BTHK = _joined_up(reads)
        parts["keys"] = _keys(parts["keys"]["weights"]["0"])
        gate_BTC = self.output_gate(x_BTD)
        y_BTD = self.output(known_BTHK + o_BTHK, gate_BTC)
        if rows.metrics:
            shares = {"memory_share": memory_share(y_BTD, x_BTD), "local_share": memory_share(o_BTHK, known_BTHK)}
            of_gate = {"output_gate": titans.mean_size(gate_BTC)}
            metrics |= {name: _joined_up([of_tokens[name] for of_tokens in told]) for name in told[0]}
            metrics |= of_gate | shares | self.store.norms(own, memory, rows)
            for i, store in enumerate(self.local_stores):
                assert isinstance(store, titans.Store)
                norms = store.norms(state[f"local{i}"], parts[f"local{i}"], rows.within(self.shard_size))
                metrics |= {f"local{i}_{name}": x for name, x in norms.items()}
        return MixerOutput(y_BTD, {"conv": conv, "global": memory, **parts}, {}, metrics)

    def _pieces(self, rows: Rows) -> list[tuple[int, int, Rows]]:
        """Pieces of a row: the tokens of each, its number of shards, and the ``Rows`` of the shards side by side."""
        size, start, length = self.shard_size, rows.start, rows.length
        if not rows.goes_on or start is None or start % size + length <= size:
            return [(length, 1, rows.within(size))]
        first = -start % size
        whole, last = divmod(length - first, size)

        def fresh(length: int, count: int) -> tuple[int, int, Rows]:
            before_B = rows.before_B.new_zeros(len(rows.before_B) * count)
            return length * count, count, Rows(length, before_B, 0, metrics=rows.metrics)

        def make() -> list[tuple[int, int, Rows]]:
            opened = Rows(first, rows.before_B % size, start % size, metrics=rows.metrics)
            pieces = [(first, 1, opened), fresh(size, whole), fresh(last, 1)]
            return [piece for piece in pieces if piece[0]]

        return rows.once((Mixer, size), make)

    def _recall_locals(
        self, inputs: Sequence[Tensor], state: State, rows: Rows
    ) -> tuple[Tensor, dict[str, State], dict[str, Tensor]]:
        """Sum of the local memories' reads, states, and metrics [B, T]; positions of ``rows`` count from starts of
        shards.
        """
        x_BTD, q_BTHK, k_BTHK, v_BTHK = inputs
        projected_BTHK, keys = _projected(q_BTHK, k_BTHK, state["keys"], rows)
        q_BTHK = projected_BTHK / torch.linalg.vector_norm(projected_BTHK, dim=-1, keepdim=True).clamp(min=1.0)
        reads, parts = [], {"keys": keys}
        metrics: dict[str, Tensor] = {}
        for i, store in enumerate(self.local_stores):
            name = f"local{i}"
            read_BTHK, parts[name], of_store = store(x_BTD, q_BTHK, k_BTHK, v_BTHK, state[name], rows)
            reads.append(read_BTHK)
            metrics |= {f"{name}_{key}": value for key, value in of_store.items()}
        return sum(reads[1:], reads[0]), parts, metrics


def _projected(q_BTHK: Tensor, k_BTHK: Tensor, state: State, rows: Rows) -> tuple[Tensor, State]:
    """Queries times the sum of the outer products k_j k_j of their shard."""
    memory_BSHKK = None if rows.fresh else state["weights"]["0"][:, None]
    if (segments := rows.segments()) is None:
        o_BTHK, memory_BSHKK = linear_attention(q_BTHK, k_BTHK, k_BTHK, state=memory_BSHKK)
        return o_BTHK, {"weights": {"0": memory_BSHKK[:, 0]}}
    assert memory_BSHKK is not None
    memory_BSHKK = segments.spread({"": memory_BSHKK}, {"": torch.zeros_like(memory_BSHKK)})[""]
    o_BTHK, memory_BSHKK = linear_attention(q_BTHK, k_BTHK, k_BTHK, cu_seqlens=segments.cu_seqlens, state=memory_BSHKK)
    return o_BTHK, {"weights": {"0": segments.collect({"": memory_BSHKK})[""][:, 0]}}


def _keys(memory: Tensor) -> State:
    """The state of the keys' memory; its writes need no anchor, so the memory stands in for it."""
    return {"weights": {"0": memory}, "anchor": {"0": memory}}


def _joined_up(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _last(state: State, count: int) -> State:
    """The state of the last of ``count`` shards; a copy, because a view would keep all shards alive."""
    return mapped(lambda x: x.unflatten(0, (-1, count))[:, -1].clone(), state)
