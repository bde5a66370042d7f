"""Where the chunks of a call are, their means, and the keys that its tokens see.

B batch, T tokens, L keys, H query heads in G groups, K head dim, N chunks of the row, E of them new, C chunk_size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.memory.chunk_sparse.config import Config
from memlm.memory.kv import join
from memlm.memory.rows import Rows
from memlm.memory.state import State, mapped
from memlm_kernels import chunk_sparse_attention
from memlm_kernels.grid import keep_last, pick, place
from memlm_kernels.segments import exact

# In a softmax over chosen tokens alone, the token itself gets the score -_FAR^2 sqrt(K), so no weight.
_FAR = 100.0


class Chunks(NamedTuple):
    """The chunks of a row: first the kept ones of the open document, then those that end in this call. All indices are
    among the row's L keys.

    starts_BN: the start of each chunk; None: the keys are cut into chunks from the first key on
    first_BT, end_BT: a token may choose chunks first to end - 1, which begin (joint) or lie before its window
    document_BT: the start of each token's document
    new: the chunks that end in this call: their number; or, for a fixed number of slots, the last token [B, E] of
        each, and the number [B] in use
    """

    starts_BN: Tensor | None
    first_BT: Tensor
    end_BT: Tensor
    document_BT: Tensor
    new: int | tuple[Tensor, Tensor]

    @staticmethod
    def of(rows: Rows, past: int, kept: int, config: Config) -> "Chunks":
        """past, kept: keys and chunks in the state."""
        positions_BT, size, length = rows.positions_BT, config.chunk_size, rows.length
        known_BT = (positions_BT - config.behind).clamp(min=0) // size

        def bounded(first_BT: Tensor) -> tuple[Tensor, Tensor]:
            end_BT = first_BT + known_BT
            return torch.maximum(first_BT, end_BT - config.max_chunks) if config.max_chunks else first_BT, end_BT

        if rows.goes_on and rows.start == past and kept == past // size:
            none_BT = torch.zeros_like(positions_BT)
            return Chunks(None, *bounded(none_BT), none_BT, (past + length) // size - kept)
        token_T = torch.arange(length, device=positions_BT.device)
        ends_BT = (positions_BT + 1) % size == 0
        if rows.real_BT is not None:
            ends_BT = ends_BT & rows.real_BT
        so_far_BT = ends_BT.long().cumsum(1)
        most = (length + size - 1) // size
        # One more slot, for tokens that end no chunk.
        slot_BT = torch.where(ends_BT, so_far_BT - 1, most)
        new_BE = place(token_T.expand(len(ends_BT), -1)[..., None], slot_BT, most + 1)[:, :-1, 0]
        back_N = torch.arange(kept, 0, -1, device=positions_BT.device) * size
        old_BN = past - (rows.before_B % size)[:, None] - back_N
        first_BT, end_BT = bounded(kept + so_far_BT - (positions_BT + 1) // size)
        return Chunks(
            starts_BN=torch.cat([old_BN, past + new_BE - size + 1], 1),
            first_BT=first_BT,
            end_BT=end_BT,
            document_BT=past + token_T - positions_BT,
            new=(new_BE, so_far_BT[:, -1]),
        )

    def means(self, x_BLGK: Tensor, kept_BNGK: Tensor, past: int, size: int) -> tuple[Tensor, Tensor]:
        """Means of each chunk's x, [B, N, G, K], and those of them to keep; x ends with the call's tokens.

        kept: of the chunks before the call; past: keys in the state; size: tokens of a chunk
        """
        length = self.first_BT.shape[1]
        if isinstance(self.new, int):
            if not self.new:
                return kept_BNGK, kept_BNGK
            start = x_BLGK.shape[1] - length - past % size
            new_BEGK = exact(x_BLGK[:, start : start + self.new * size]).unflatten(1, (-1, size)).mean(2)
            pooled_BNGK = join(kept_BNGK, new_BEGK)
            return pooled_BNGK, pooled_BNGK
        new_BE, count_B = self.new
        # All tokens of chunks that end in this call.
        x_BLGK = x_BLGK[:, max(0, x_BLGK.shape[1] - length - size + 1) :]
        token_C = torch.arange(x_BLGK.shape[1] - length - size + 1, x_BLGK.shape[1] - length + 1, device=x_BLGK.device)
        # Unused slots get any valid index.
        index_BEC = (new_BE[..., None] + token_C).clamp(min=0)
        new_BEGK = exact(pick(x_BLGK, index_BEC.flatten(1))).unflatten(1, index_BEC.shape[1:]).mean(2)
        pooled_BNGK = torch.cat([kept_BNGK.to(new_BEGK.dtype), new_BEGK], 1)
        most = (past + length) // size
        return pooled_BNGK, keep_last(pooled_BNGK, most, new_BEGK.shape[1], count_B)

    def read_alone(
        self, far: tuple[Tensor, Tensor], v_BLGK: Tensor, index_BTGJ: Tensor, rows: Rows, size: int
    ) -> tuple[Tensor, Tensor]:
        """Attention to the tokens of the chosen chunks alone, zeros for a token without; and which have some, [B, T,
        H].

        far: queries and keys that score them; index: the chosen chunks, -1 for none; size: tokens of a chunk
        """
        q_BTHK, k_BLGK = far
        own_BTGK = k_BLGK.new_full((*q_BTHK.shape[:2], *k_BLGK.shape[2:]), _FAR)
        low_BTHK = torch.full_like(q_BTHK, -_FAR, requires_grad=False)
        read_BTHK = chunk_sparse_attention(
            low_BTHK,
            own_BTGK,
            v_BLGK,
            index_BTGJ,
            self.starts_BN,
            chunk_size=size,
            window=1,
            positions=None if self.starts_BN is None else rows.positions_BT,
            far=far,
        ).o
        knows_BTH = (index_BTGJ >= 0).any(-1).repeat_interleave(q_BTHK.shape[2] // k_BLGK.shape[2], 2)
        return torch.where(knows_BTH[..., None], read_BTHK, 0.0), knows_BTH


class SeenKeys(NamedTuple):
    """Keys of the state and the call; each ends with those of the call.

    plain: not rotated, at least of the call and the open chunk
    far: queries and keys that score chosen chunks; None: the rotated ones, and ``near`` has all keys
    near: rotated, at least of the window
    """

    plain: Tensor
    far: tuple[Tensor, Tensor] | None
    near: Tensor


def bounded(state: State, config: Config) -> State:
    """The state of a fixed size, with ``max_chunks``: the last entries, after zeros where there are fewer."""
    tokens = {"near": config.window_size - 1, "router": config.chunk_size - 1}
    tokens |= dict.fromkeys(("k", "v"), config.tokens_kept)

    def fixed(x: Tensor, size: int) -> Tensor:
        missing = size - x.shape[1]
        # A row of training would pay for many zeros. A memory whose sizes must be fixed reads without gradients.
        if missing > 0 and not torch.is_grad_enabled():
            return F.pad(x, (0, 0, 0, 0, missing, 0))
        return last(x, size)

    sized = {name: fixed(state[name], size) for name, size in tokens.items() if name in state}
    return state | sized | {"pooled": mapped(lambda x: fixed(x, config.chunks_kept), state["pooled"])}


def filled(state: State, config: Config, seen: int) -> State:
    """The entries of a state of a fixed size that hold tokens, after ``seen`` tokens."""

    def some(x: Tensor, count: int) -> Tensor:
        return x if x.shape[1] <= count else x[:, x.shape[1] - count :]

    sized = {name: some(state[name], seen) for name in ("k", "v", "near", "router") if name in state}
    return state | sized | {"pooled": mapped(lambda x: some(x, seen // config.chunk_size), state["pooled"])}


def last(x: Tensor, count: int) -> Tensor:
    """The last entries of [B, L, ...], copied if there are more, so that these can be freed."""
    return x if x.shape[1] <= count else x[:, x.shape[1] - count :].clone()
