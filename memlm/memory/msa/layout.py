"""The positions of a call's tokens among documents: integer bookkeeping, without synchronising with the device.

A row holds one or several (packed) samples. A sample holds ``[template | document 1 | document 2 | ... | query,
response]``, in any order that the tokens' roles give. Tokens within documents and tokens outside documents form two
streams; each is compacted to the front of its row.

B batch, T tokens, A tokens outside documents, N tokens within, O documents.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.roles import QUERY, RESPONSE, TEMPLATE, RoleCounts, Roles
from memlm_kernels.grid import pick

# Counters of each row, 0 before its first token. In the sample: tokens outside documents (outside), those of the
# leading template (head), tokens that are no template (begun). In the row: tokens of the open document (place), the
# last role, documents, chunks, and documents before the sample (first).
COUNTERS = ("outside", "head", "begun", "place", "role", "documents", "chunks", "first")


class Stream(NamedTuple):
    """The tokens of each row that are within documents, or those outside, in order.

    index_BA: their indices in the row; None: the stream is the row itself
    lengths_B: number of real tokens; None: all
    place_BA: number of tokens before each token in its sample, or in its document
    """

    index_BA: Tensor | None
    lengths_B: Tensor | None
    place_BA: Tensor

    def take(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, A, ...]"""
        return x if self.index_BA is None else pick(x, self.index_BA)


class Group(NamedTuple):
    """At most ``rows`` documents, of all rows together, have more than ``least`` and at most ``most`` tokens in this
    call.
    """

    least: int
    most: int
    rows: int


class Within(NamedTuple):
    """The tokens within documents.

    chunk_BN, number_BN: each token's chunk and document, counted in the row
    first_chunk_B: the first chunk that gets a token
    chunks: the most chunks that get a token
    groups: documents grouped by length, short ones first
    """

    stream: Stream
    chunk_BN: Tensor
    number_BN: Tensor
    first_chunk_B: Tensor
    chunks: int
    groups: list["Group"]
    counts: RoleCounts

    def on_rows(self) -> tuple[Tensor, int]:
        """The slot of each token, [1, B N], if every document gets its own row; and the number of slots. The rows of a
        group are as long as its ``most``; groups follow each other. Padding gets one slot after all others.
        """
        lengths_B, local_BN = self.stream.lengths_B, self.number_BN - self.number_BN[:, :1]
        sizes_BO = sizes_of(local_BN, lengths_B, self.counts.documents)
        first_BO, slots = torch.zeros_like(sizes_BO), 0
        for least, most, rows in self.groups:
            here_BO = (sizes_BO > least) & (sizes_BO <= most)
            rank_BO = here_BO.flatten().cumsum(0).view_as(here_BO) - 1
            first_BO = torch.where(here_BO, slots + rank_BO * most, first_BO)
            slots += most * rows
        slot_BN = first_BO.gather(1, local_BN.clamp(0, self.counts.documents - 1)) + self.stream.place_BA
        if lengths_B is not None:
            real_BN = torch.arange(slot_BN.shape[1], device=slot_BN.device) < lengths_B[:, None]
            slot_BN = torch.where(real_BN, slot_BN, slots)
        return slot_BN.view(1, -1), slots


class Layout(NamedTuple):
    """rotary_BT: the rotary position of each token in its segment
    outside, within: None if the call has no such token
    behind_BA: whether a token outside documents comes after the leading template
    first_BA, end_BA: a token outside documents may choose documents ``first`` to ``end`` - 1, counted in the row
    asks_BA: which of these tokens belong to a query; None: none
    source_BT: the index of each token in the outputs of both streams, concatenated; None if there is one stream
    after: the counters after this call
    """

    rotary_BT: Tensor
    outside: Stream | None
    within: Within | None
    behind_BA: Tensor
    first_BA: Tensor
    end_BA: Tensor
    asks_BA: Tensor | None
    source_BT: Tensor | None
    after: State

    @staticmethod
    def of(rows: Rows, state: State, chunk_size: int, offset: int, count_template: bool = True) -> "Layout":
        """offset: rotary positions skipped between the leading template and later tokens; count_template: whether the
        positions of later tokens also count the template's tokens.
        """

        def make() -> "Layout":
            if rows.roles is None:
                return _outside_only(rows, state, offset, count_template)
            return _with_documents(rows, state, rows.roles, chunk_size, offset, count_template)

        # Layers with the same counter tensors share one layout.
        counters = tuple(state[name] for name in COUNTERS)
        return rows.once_for(counters, ("layout", chunk_size, offset, count_template), make)


def _outside_only(rows: Rows, state: State, offset: int, count_template: bool) -> Layout:
    positions_BT = rows.positions_BT
    starts_BT, ones_BT = positions_BT == 0, torch.ones_like(positions_BT)
    outside_BT = running_count(ones_BT, starts_BT, state["outside"])
    head_BT = running_count(torch.zeros_like(ones_BT), starts_BT, state["head"])
    documents_BT = state["documents"][:, None].expand_as(positions_BT)
    first_BT = _latest(documents_BT, starts_BT, state["first"])
    after = {
        "outside": _last(outside_BT, rows, state["outside"]),
        "head": _last(head_BT, rows, state["head"]),
        "begun": _last(outside_BT, rows, state["begun"]),
        "place": torch.zeros_like(state["place"]),
        "role": _last(RESPONSE * ones_BT, rows, state["role"]),
        "documents": state["documents"],
        "chunks": state["chunks"],
        "first": _last(first_BT, rows, state["first"]),
    }
    if rows.lengths_B is not None:
        # A row without tokens keeps its place, perhaps in a document.
        after["place"] = torch.where(rows.lengths_B > 0, 0, state["place"])
    outside = Stream(None, rows.lengths_B, outside_BT - 1)
    rotary_BT = outside_BT - 1 + offset - (0 if count_template else head_BT)
    return Layout(rotary_BT, outside, None, ones_BT.bool(), first_BT, documents_BT, None, None, after)


def _with_documents(
    rows: Rows, state: State, roles: Roles, chunk_size: int, offset: int, count_template: bool
) -> Layout:
    role_BT, starts_BT = roles.doc_ids, rows.positions_BT == 0
    real_BT = torch.ones_like(starts_BT) if rows.real_BT is None else rows.real_BT
    within_BT = (role_BT > 0) & real_BT
    outside_BT = ~(role_BT > 0) & real_BT
    opens_BT = within_BT & (starts_BT | (role_BT != torch.cat([state["role"][:, None], role_BT[:, :-1]], 1)))

    begun_BT = running_count((role_BT != TEMPLATE) & real_BT, starts_BT, state["begun"])
    outside_so_far_BT = running_count(outside_BT, starts_BT, state["outside"])
    head_BT = running_count(outside_BT & (begun_BT == 0), starts_BT, state["head"])
    place_BT = running_count(within_BT, opens_BT | outside_BT, state["place"])
    documents_BT = opens_BT.long().cumsum(1) + state["documents"][:, None]
    first_BT = _latest(documents_BT - opens_BT.long(), starts_BT, state["first"])
    chunks_BT = (within_BT & (place_BT % chunk_size == 1 % chunk_size)).long().cumsum(1) + state["chunks"][:, None]
    counters = {
        "outside": outside_so_far_BT,
        "head": head_BT,
        "begun": begun_BT,
        "place": place_BT,
        "role": role_BT,
        "documents": documents_BT,
        "chunks": chunks_BT,
        "first": first_BT,
    }
    after = {name: _last(x_BT, rows, state[name]) for name, x_BT in counters.items()}

    # Positions of the leading template start at 0; later tokens are shifted by ``offset``.
    behind_BT = begun_BT > 0
    skipped_BT = torch.where(behind_BT, offset - (0 if count_template else head_BT), 0)
    rotary_BT = torch.where(within_BT, place_BT, outside_so_far_BT + skipped_BT) - 1
    outside, documents, source_BT = None, None, None
    counts = rows.role_counts
    if counts.outside:
        outside = _compacted(outside_BT, counts.outside, outside_so_far_BT - 1, rows, alone=not counts.within)
    if counts.within:
        stream = _compacted(within_BT, counts.within, place_BT - 1, rows, alone=not counts.outside)
        chunk_BN = stream.take(chunks_BT) - 1
        # The last chunk of a document may be short; so may the first of the first document, which an earlier call
        # began.
        most = min(counts.within, (counts.within + (counts.documents + 1) * (chunk_size - 1)) // chunk_size)
        number_BN = stream.take(documents_BT) - 1
        groups = _groups(counts, counts.within * len(role_BT))
        documents = Within(stream, chunk_BN, number_BN, chunk_BN[:, 0], most, groups, counts)
    if counts.outside and counts.within:
        ranks = [x.long().cumsum(1) - 1 for x in (outside_BT, within_BT)]
        source_BT = torch.where(within_BT, ranks[1] + counts.outside, ranks[0]).clamp(min=0)
    take = outside.take if outside is not None else lambda x: x[:, :0]
    asks_BA = take((role_BT == QUERY) & real_BT)
    known = take(behind_BT), take(first_BT), take(documents_BT)
    return Layout(rotary_BT, outside, documents, *known, asks_BA, source_BT, after)


def _groups(counts: RoleCounts, tokens: int) -> list[Group]:
    """One group if padding to the longest document at most doubles the tokens; else groups by powers of two."""
    if sum(counts.sizes) * counts.longest <= 2 * tokens:
        return [Group(0, counts.longest, sum(counts.sizes))]
    return [Group(2**i // 2, min(2**i, counts.longest), count) for i, count in enumerate(counts.sizes) if count]


def _compacted(flags_BT: Tensor, size: int, place_BT: Tensor, rows: Rows, alone: bool) -> Stream:
    if alone:
        return Stream(None, rows.lengths_B, place_BT)
    index_BA = (~flags_BT).long().argsort(dim=1, stable=True)[:, :size]
    return Stream(index_BA, flags_BT.sum(1), pick(place_BT, index_BA))


def running_count(flags_BT: Tensor, restart_BT: Tensor, before_B: Tensor) -> Tensor:
    """[B, T]: flagged tokens so far, itself included, since the last restart (itself included); before any restart,
    the count continues from ``before``.
    """
    total_BT = flags_BT.long().cumsum(1)
    base_BT = torch.where(restart_BT, total_BT - flags_BT.long(), -1).cummax(1).values
    return torch.where(base_BT < 0, total_BT + before_B[:, None], total_BT - base_BT)


def _latest(x_BT: Tensor, at_BT: Tensor, before_B: Tensor) -> Tensor:
    """The value of x, which never falls, at the last flagged token; ``before`` if there is none yet."""
    latest_BT = torch.where(at_BT, x_BT, -1).cummax(1).values
    return torch.where(latest_BT < 0, before_B[:, None], latest_BT)


def _last(x_BT: Tensor, rows: Rows, before_B: Tensor) -> Tensor:
    """The value at a row's last real token; ``before`` if the row has none."""
    if x_BT.shape[1] == 0:
        return before_B
    if rows.lengths_B is None:
        return x_BT[:, -1].clone()
    last_B = x_BT.gather(1, (rows.lengths_B - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(rows.lengths_B > 0, last_B, before_B)


def sizes_of(owner_BN: Tensor, lengths_B: Tensor | None, count: int) -> Tensor:
    """[B, count]: the number of real tokens with owner 0, 1, ... count - 1."""
    if lengths_B is not None:
        real_BN = torch.arange(owner_BN.shape[1], device=owner_BN.device) < lengths_B[:, None]
        owner_BN = torch.where(real_BN, owner_BN, count)
    zeros_BC = torch.zeros(len(owner_BN), count + 1, dtype=torch.int64, device=owner_BN.device)
    return zeros_BC.scatter_add(1, owner_BN, torch.ones_like(owner_BN))[:, :count]


def boundaries(sizes_BC: Tensor) -> Tensor:
    return F.pad(sizes_BC.cumsum(1), (1, 0))
