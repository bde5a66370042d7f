"""TNT's two levels (arXiv:2511.07343): a global memory of large chunks, and local memories of small ones that start
afresh in every shard, so that shards are independent of each other.

    o = global(q) + sum_i local_i(q'),   q' = p / max(1, |p|),   p = sum_{j <= t, same shard} k_j (k_j . q)

The query of a local memory is projected on the keys that its shard has written. Those are unit vectors; the length of
the projection, which would grow with the shard, is cut to 1. The projection is itself a linear memory, Hebbian, of its
own keys. Local memories start with smaller steps: what they read of other shards is noise, and drowns the global one's
voice; the metric ``local_share`` is their part of it all. A second stage may go on with smaller ``local_chunk_sizes``,
for no weight depends on them:

    python train.py memory=titans_tnt train.init_from=<run> model.mixers.memory.local_chunk_sizes=[4]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memlm.memory import titans
from memlm.memory.base import Dims, MixerOutput, joined, substate
from memlm.memory.parts import memory_share
from memlm.memory.rows import Rows, State
from memlm.settings import require
from memlm_kernels import neural_memory
from memlm_kernels.neural_memory import dot_product


@dataclass(frozen=True)
class Config(titans.NeuralMemoryConfig):
    """chunk_size: of the global memory; local_chunk_sizes: of each local one; shard_size: tokens after which local
        memories start afresh, counted from the document's start.
    initial_local_lr: where the lr of local memories starts; null for a quarter of initial_lr.
    """

    chunk_size: int = 64
    local_chunk_sizes: list[int] = field(default_factory=lambda: [8])
    shard_size: int = 64
    initial_local_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.initial_lr is not None  # It is by depth and chunk_size now.
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
        known = parts["global"]["weights.0"]
        keys = known.new_zeros(*known.shape[:-1], known.shape[-2])
        parts["keys"] = {"weights.0": keys, "anchor.0": keys}
        conv = torch.zeros(batch_size, self.conv.width - 1, self.conv.channels, device=device, dtype=dtype)
        return {"conv": conv, **joined(parts)}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        batch, length, _ = x_BTD.shape
        size = self.shard_size
        q_BTHK, k_BTHK, v_BTHK, conv = self.project(x_BTD, state, rows)
        inputs, own = (x_BTD, q_BTHK, k_BTHK, v_BTHK), substate(state, "global")
        known_BTHK, memory, metrics = self.store(*inputs, own, rows)
        shards = rows.within(size)
        if rows.fresh and length > size:
            # Shards side by side, and the rest of the last one.
            whole = length - length % size
            pieces = [t[:, :whole].unflatten(1, (-1, size)).flatten(0, 1) for t in inputs]
            o_BTHK, parts, of_locals = self._recall_locals(pieces, {}, Rows.of(pieces[0], metrics=rows.metrics))
            o_BTHK = o_BTHK.unflatten(0, (batch, -1)).flatten(1, 2)
            of_locals = {name: x.unflatten(0, (batch, -1)).flatten(1) for name, x in of_locals.items()}
            if whole < length:
                pieces = [t[:, whole:] for t in inputs]
                rest_BTHK, parts, of_rest = self._recall_locals(pieces, {}, Rows.of(pieces[0], metrics=rows.metrics))
                o_BTHK = torch.cat([o_BTHK, rest_BTHK], 1)
                of_locals = {name: torch.cat([x, of_rest[name]], 1) for name, x in of_locals.items()}
            else:
                parts = {name: _last(part, batch) for name, part in parts.items()}
        else:
            o_BTHK, parts, of_locals = self._recall_locals(inputs, state, shards)
        y_BTD, of_gates = self.output(known_BTHK + o_BTHK, x_BTD, rows.metrics)
        if rows.metrics:
            shares = {"memory_share": memory_share(y_BTD, x_BTD), "local_share": memory_share(o_BTHK, known_BTHK)}
            metrics |= of_locals | of_gates | shares | self.store.norms(own, memory, rows)
            for i, store in enumerate(self.local_stores):
                assert isinstance(store, titans.Store)
                norms = store.norms(substate(state, f"local{i}"), parts[f"local{i}"], shards)
                metrics |= {f"local{i}_{name}": x for name, x in norms.items()}
        return MixerOutput(y_BTD, {"conv": conv, **joined({"global": memory, **parts})}, {}, metrics)

    def _recall_locals(
        self, inputs: Sequence[Tensor], state: State, rows: Rows
    ) -> tuple[Tensor, dict[str, State], dict[str, Tensor]]:
        """Sum of the local memories' reads, states, metrics of tokens; ``rows`` counts from starts of shards."""
        x_BTD, q_BTHK, k_BTHK, v_BTHK = inputs
        heads, width = k_BTHK.shape[-2:]
        projected_BTHK, keys, _ = neural_memory(
            q_BTHK,
            k_BTHK,
            k_BTHK,
            k_BTHK.new_ones(k_BTHK.shape[:-1]),
            None,
            None,
            weights=[k_BTHK.new_zeros(heads, width, width)],
            # Hebbian writes do not depend on the chunk.
            chunk_size=min(self.shard_size, 64),
            loss=dot_product,
            state=None if rows.fresh else titans.unpack(substate(state, "keys"), rows.before_B),
            positions=rows.given_BT,
            lengths=rows.lengths_B,
            max_documents=rows.max_documents,
        )
        q_BTHK = projected_BTHK / torch.linalg.vector_norm(projected_BTHK, dim=-1, keepdim=True).clamp(min=1.0)
        o_BTHK, parts = torch.zeros_like(v_BTHK), {"keys": titans.pack(keys)}
        metrics: dict[str, Tensor] = {}
        for i, store in enumerate(self.local_stores):
            name = f"local{i}"
            read_BTHK, parts[name], of_store = store(x_BTD, q_BTHK, k_BTHK, v_BTHK, substate(state, name), rows)
            o_BTHK = o_BTHK + read_BTHK
            metrics |= {f"{name}_{key}": value for key, value in of_store.items()}
        return o_BTHK, parts, metrics


def _last(state: State, batch: int) -> State:
    """Of rows that were cut into shards, the last shard's."""
    return {name: x.unflatten(0, (batch, -1))[:, -1].clone() for name, x in state.items()}
