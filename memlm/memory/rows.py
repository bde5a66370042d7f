"""The positions of the tokens of a call: the decoder computes them once per call, and every layer reads them.

B rows, T tokens of the call, D documents that a row may have.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from memlm.layers import Rope, rotary_angles
from memlm.memory.state import State, mapped
from memlm.memory.stretches import Stretches
from memlm.roles import RoleCounts, Roles
from memlm_kernels.segments import counts, next_position

Made = TypeVar("Made")


class Segments(NamedTuple):
    """The documents of packed or padded rows. The first of a row may continue one of an earlier call.

    most: the most documents that a row may have; index_BT: the index of each token's document, ``most`` for padding;
        cu_seqlens: [B, most + 1]
    fresh_B: true where the row's first document starts in this call; last_B: the document of a row's last token
    """

    most: int
    index_BT: Tensor
    cu_seqlens: Tensor
    fresh_B: Tensor
    last_B: Tensor

    def spread(self, before: State, start: State) -> State:
        """[B, M, ...] -> [B, most * M, ...]: the first document continues ``before``, others begin with ``start``."""
        fresh_BD = torch.ones(len(self.fresh_B), self.most, dtype=torch.bool, device=self.fresh_B.device)
        fresh_BD[:, 0] = self.fresh_B

        def one(x: Tensor, new: Tensor) -> Tensor:
            fresh = fresh_BD.reshape(*fresh_BD.shape, *[1] * (x.ndim - 1))
            return torch.where(fresh, new[:, None], x[:, None]).flatten(1, 2)

        return mapped(one, before, start)

    def collect(self, after: State) -> State:
        """[B, most * M, ...] -> [B, M, ...]: each row's state for the next call."""

        def one(x: Tensor) -> Tensor:
            return x.unflatten(1, (self.most, -1))[torch.arange(len(x), device=x.device), self.last_B]

        return mapped(one, after)


@dataclass(frozen=True, eq=False)
class Rows:
    """The fields are shapes and facts that the host knows. All other values are computed when a layer first asks for
    them.

    length: tokens of the call, T
    before_B: int64 [B], the position of each row's first token of this call in its document
    start: the same as a Python int; None if the host does not know it, if rows differ, or if an earlier call read
        tokens within documents (``roles``)
    given_BT: int64 [B, T], positions of tokens in their documents, for packed rows; a 0 starts a document. None: every
        row continues its document
    lengths_B: real tokens of each row, which come first (the decoder moves padding to the end); None: all
    max_documents: an upper bound on the number of documents in a row
    roles: roles of the tokens, with counts, for memories of documents. The documents of the roles are then parts of
        one document in the sense of this class. None: all tokens are a response
    metrics: whether mixers return metrics
    room: places for tokens in states that keep every token (``MemoryCache.fixed``); None: they grow
    stretches: the processes that hold the rest of the rows, for mixers that exchange ``at_once``; None: rows are
        whole, or the decoder hands the states on
    """

    length: int
    before_B: Tensor
    start: int | None = None
    given_BT: Tensor | None = None
    lengths_B: Tensor | None = None
    max_documents: int = 1
    roles: Roles | None = None
    metrics: bool = True
    stretches: Stretches | None = None
    room: int | None = None
    # A constructor argument, because tools that rebuild dataclasses refuse other fields.
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, x_BTD: Tensor, **facts: Any) -> "Rows":
        """Rows for x, at the start of a document unless ``before_B`` is given."""
        if "before_B" not in facts:
            facts = {"start": 0, "before_B": torch.zeros(len(x_BTD), dtype=torch.int64, device=x_BTD.device), **facts}
        return cls(x_BTD.shape[1], **facts)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """The result of ``make``, computed once per call. It must not require a gradient."""
        if key not in self.made:
            self.made[key] = make()
        made: Made = self.made[key]
        return made

    def once_for(self, tensors: tuple[Tensor, ...], key: Any, make: Callable[[], Made]) -> Made:
        """Like ``once``, separately for each tuple of tensors, compared by identity."""
        # By ``is``: compiled code with an ``id`` in it would serve only the tensors of one call.
        known: list[tuple[tuple[Tensor, ...], Made]] = self.once(key, list)
        for others, made in known:
            if all(a is b for a, b in zip(others, tensors, strict=True)):
                return made
        known.append((tensors, make()))
        return known[-1][1]

    @property
    def device(self) -> torch.device:
        return self.before_B.device

    @property
    def goes_on(self) -> bool:
        """Whether every row continues its document, or starts its first one, without padding."""
        return self.given_BT is None and self.lengths_B is None

    @property
    def fresh(self) -> bool:
        """Whether every row starts a document, without padding: no state matters."""
        return self.start == 0 and self.goes_on

    @property
    def role_counts(self) -> RoleCounts:
        """The counts of ``roles``, which must be given."""
        assert self.roles is not None and self.roles.counts is not None, "the decoder counts roles"
        return self.roles.counts

    @property
    def positions_BT(self) -> Tensor:
        """The position of each token in its document."""
        if self.given_BT is not None:
            return self.given_BT
        return self.once("positions", lambda: self.before_B[:, None] + torch.arange(self.length, device=self.device))

    @property
    def history_BT(self) -> Tensor | None:
        """Positions for convolutions; None if their histories hold no tokens of other documents."""
        return None if self.goes_on and self.start is not None else self.positions_BT

    @property
    def real_BT(self) -> Tensor | None:
        """Whether each token is real, not padding; None: all are."""
        lengths_B = self.lengths_B
        if lengths_B is None:
            return None
        return self.once("real", lambda: torch.arange(self.length, device=self.device) < lengths_B[:, None])

    @property
    def after_B(self) -> Tensor:
        """The position of the token after each row's last real token."""
        if (cu_seqlens := self.cu_seqlens) is None:
            return self.once("after", lambda: self.before_B + self.length)
        return self.once("after", lambda: next_position(cu_seqlens, self.first_B))

    @property
    def first_B(self) -> Tensor:
        """The position of each row's first token in its document."""
        if (segments := self.segments()) is None:
            return self.before_B
        return self.once("first", lambda: self.before_B.masked_fill(segments.fresh_B, 0))

    @property
    def cu_seqlens(self) -> Tensor | None:
        """int64 [B, max_documents + 1]: the ends of documents, as ops take them; None if ``segments`` is None."""
        segments = self.segments()
        return None if segments is None else segments.cu_seqlens

    @property
    def next_start(self) -> int | None:
        """``start`` of the next call."""
        if self.start is None or not self.goes_on or (self.roles is not None and self.role_counts.within):
            return None
        return self.start + self.length

    def past(self, x: Tensor, given: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
        """x [B, T, ...], to be used from then on, and the entries [B, N, ...] before it in the row, real ones aligned
        right.

        given: those of the state, whose number N they have; whole: all of earlier stretches follow them
        """
        return (x, given) if self.stretches is None else self.stretches.past(x, given, self.lengths_B, whole)

    def rotary(self, rope: Rope, dtype: torch.dtype, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding, as ``memlm.layers.rotary`` takes them, rounded once to ``dtype``.

        positions: positions other than the tokens' own
        """
        places = self.positions_BT if positions is None else positions

        def make() -> tuple[Tensor, Tensor]:
            cos, sin = rotary_angles(places, rope)
            return cos.to(dtype), sin.to(dtype)

        key = ("rotary", rope, dtype)
        return self.once(key, make) if positions is None else self.once_for((places,), ("other", *key), make)

    def within(self, size: int) -> "Rows":
        """The same tokens, with each document cut into pieces of ``size`` tokens that count as documents."""

        def make() -> "Rows":
            before_B = self.before_B % size
            if self.goes_on and self.start is not None and self.start % size + self.length <= size:
                return Rows(self.length, before_B, self.start % size, metrics=self.metrics)
            most = min(self.length, self.max_documents + self.length // size + 1)
            places_BT = self.positions_BT % size
            return Rows(self.length, before_B, None, places_BT, self.lengths_B, most, metrics=self.metrics)

        return self.once(("within", size), make)

    def segments(self) -> Segments | None:
        """The documents of the rows; None if every row continues one document without padding."""
        if self.goes_on or self.length == 0:
            return None
        return self.once("segments", self._segments)

    def _segments(self) -> Segments:
        positions_BT, most = self.positions_BT, self.max_documents
        starts_BT = positions_BT == 0
        index_BT = starts_BT.cumsum(1) - starts_BT[:, :1].long()
        fresh_B = starts_BT[:, 0]
        if self.real_BT is not None and self.lengths_B is not None:
            index_BT, fresh_B = torch.where(self.real_BT, index_BT, most), fresh_B & (self.lengths_B > 0)
        sizes = counts(index_BT, most)
        last_B = ((sizes > 0) * torch.arange(most, device=self.device)).amax(1)
        return Segments(most, index_BT, F.pad(sizes.cumsum(1), (1, 0)), fresh_B, last_B)

    def to(self, device: torch.device | str, **_: Any) -> "Rows":
        """The same on another device, made once per device; for models on several devices."""
        if torch.device(device) == self.device:
            return self

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        def make() -> "Rows":
            roles = None if self.roles is None else self.roles.to(device)
            given, lengths, before = move(self.given_BT), move(self.lengths_B), self.before_B.to(device)
            facts = (given, lengths, self.max_documents, roles, self.metrics, self.stretches, self.room)
            return Rows(self.length, before, self.start, *facts)

        return self.once(("to", str(device)), make)


class Padding(NamedTuple):
    """Rows with padding anywhere. Mixers see each row's real tokens first, so they only need the lengths.

    mask_BT: bool, false for padding; lengths_B: real tokens; order_BT: the order that moves padding to the end; None
        for a single token
    """

    mask_BT: Tensor
    lengths_B: Tensor
    order_BT: Tensor | None

    @classmethod
    def of(cls, mask_BT: Tensor) -> "Padding":
        mask_BT = mask_BT.bool()
        order_BT = (~mask_BT).long().argsort(dim=1, stable=True) if mask_BT.shape[1] > 1 else None
        return cls(mask_BT, mask_BT.sum(1), order_BT)

    def to_end(self, x_BTD: Tensor) -> Tensor:
        """x with the real tokens first. Padding becomes 0: a NaN there would pass through a weight of 0."""
        x_BTD = x_BTD.masked_fill(~self.mask_BT[..., None], 0.0)
        return x_BTD if self.order_BT is None else _gather(x_BTD, self.order_BT)

    def back(self, x_BTD: Tensor) -> Tensor:
        """The inverse of ``to_end`` for [B, T, D] or [B, T]; padding is unspecified."""
        if self.order_BT is None:
            return x_BTD
        back_BT = self.order_BT.argsort(dim=1)
        return x_BTD.gather(1, back_BT) if x_BTD.ndim == 2 else _gather(x_BTD, back_BT)

    def to(self, device: torch.device) -> "Padding":
        order_BT = None if self.order_BT is None else self.order_BT.to(device)
        return Padding(self.mask_BT.to(device), self.lengths_B.to(device), order_BT)


def _gather(x_BTD: Tensor, index_BT: Tensor) -> Tensor:
    return x_BTD.gather(1, index_BT[..., None].expand(-1, -1, x_BTD.shape[-1]))


def most_documents(positions_BT: Tensor, lengths_B: Tensor | None, given: int | None, next_B: Tensor) -> int:
    """The most documents in a row: ``given``, or counted, which synchronises with the device.

    next_B: the position after each row's last token so far

    Raises ValueError if there are more documents than given, or if a position neither is 0 nor follows the one before
    it. If ``given`` is set on a GPU, or for tensors without data, the check runs there as a device assertion.
    """
    length = positions_BT.shape[1]
    if positions_BT.numel() == 0:
        return 1
    starts_BT = positions_BT == 0
    follows_BT = torch.cat([next_B[:, None], positions_BT[:, :-1] + 1], 1)
    astray_BT = (positions_BT != follows_BT) & ~starts_BT
    if lengths_B is not None:
        real_BT = torch.arange(length, device=positions_BT.device) < lengths_B[:, None]
        starts_BT, astray_BT = starts_BT & real_BT, astray_BT & real_BT
    counted, astray = 1 + starts_BT[:, 1:].sum(1).max(), astray_BT.sum()
    few = f"max_documents={given} is less than the documents that position_ids start in a row; count them"
    without_data = not torch.compiler.is_compiling() and is_fake(positions_BT)
    if given is not None and (positions_BT.device.type != "cpu" or without_data):
        torch._assert_async(astray == 0, "position_ids neither start a document at 0 nor go on from where it was")
        torch._assert_async(counted <= given, few)
        return min(given, length)
    most, strays = torch.stack([counted, astray]).tolist()
    if strays:
        row, t = astray_BT.nonzero()[0].tolist()
        found, follows = int(positions_BT[row, t]), int(follows_BT[row, t])
        raise ValueError(
            f"position_ids: {found} in row {row} must be {follows}, to continue, or 0, to start a document"
        )
    if given is not None and given < most:
        raise ValueError(few)
    return most
