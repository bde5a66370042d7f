"""Roles of tokens: document, query, response, template. Data sources set them; memories of documents use them.

B rows, T tokens of a call.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# A token of a document has the document's number, above 0. A query chooses documents. A template comes before
# everything else in a sample.
QUERY, RESPONSE, TEMPLATE = 0, -1, -2


class RoleCounts(NamedTuple):
    """Upper bounds on roles. With them the host sizes buffers without waiting for the device.

    documents, longest: documents with tokens in one row, and tokens of one document, in this call
    within, outside: tokens of a row within documents, and outside
    whole: whether some row may have all its tokens, or none, in one document
    sizes: documents of 1 token, of 2, of 3 or 4, of 5 to 8, ..., of all rows together
    """

    documents: int
    longest: int
    within: int
    outside: int
    whole: bool
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, doc_ids: Tensor, positions: Tensor | None, lengths: Tensor | None = None) -> "RoleCounts":
        """Count doc_ids [B, T], which waits once for the device.

        positions: [B, T], positions in documents, for packed rows; lengths: [B], real tokens of each row, which come
            first
        """
        length = doc_ids.shape[1]
        if length == 0:
            return cls(0, 0, 0, 0, True, ())
        place_T = torch.arange(length, device=doc_ids.device)
        real_BT = torch.ones_like(doc_ids, dtype=torch.bool)
        if lengths is not None:
            real_BT = place_T < lengths[:, None]
        within_BT = (doc_ids > 0) & real_BT
        starts_BT = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
        if positions is not None:
            starts_BT = starts_BT | (positions == 0)
        ends_BT = within_BT & F.pad(starts_BT[:, 1:] | ~within_BT[:, 1:], (0, 1), value=True)
        size_BT = ends_BT * (place_T - (starts_BT * place_T).cummax(1).values + 1)
        documents_B, outside_B = ends_BT.sum(1), (real_BT & ~within_BT).sum(1)
        one_B = (documents_B <= 1) & (outside_B == 0)
        counts = [x.max() for x in (documents_B, size_BT, within_BT.sum(1), outside_B, one_B)]
        most = [2**i for i in range((length - 1).bit_length() + 1)]
        counts += [((size_BT > n // 2) & (size_BT <= n)).sum() for n in most]
        documents, longest, within, outside, one, *sizes = torch.stack([x.long() for x in counts]).tolist()
        return cls(documents, longest, within, outside, bool(one), tuple(sizes))


class BankLike(Protocol):
    """Documents outside the call, such as those of a ``memlm.MemoryBank``."""

    def check(self, model: Any) -> None:
        """Raise ValueError unless the bank belongs to the model."""

    def candidates(self, layer_idx: int, q_BAHK: Tensor, asks_BA: Tensor, held_BC: Tensor) -> dict[str, Tensor]:
        """A few documents, among them all that a layer's router can choose with these queries, as ``with_documents``
        of ``memlm.memory.msa`` takes them. Waits for the device.

        held_BC: numbers to leave out; -1: none
        """


@dataclass(frozen=True, eq=False)
class Roles:
    """The role of each token of a call.

    >>> roles = Roles(torch.tensor([[1, 1, 1, 2, 2, QUERY, QUERY, RESPONSE]]))  # two documents and a question
    >>> logits = model(input_ids, roles=roles).logits

    doc_ids: int [B, T], the number of a token's document, above 0, or QUERY, RESPONSE, TEMPLATE; a document continues
        as long as its number does
    positives: [B, T], nonzero for tokens of documents that the query should choose, to train the router; None: unknown
    counts: counts of rows without padding, made on the CPU with the batch; None: the decoder counts, and waits for the
        device
    bank: more documents that the query chooses among; their place is after the leading template. The memory keeps
        those that may be chosen
    """

    doc_ids: Tensor
    positives: Tensor | None = None
    counts: RoleCounts | None = None
    bank: BankLike | None = None

    @classmethod
    def query(cls, bank: BankLike, input_ids: Tensor) -> "Roles":
        """All tokens of input_ids [B, T] are a query to the bank."""
        return cls(torch.full_like(input_ids, QUERY), bank=bank)

    def check(self, batch: int, length: int) -> None:
        """Raise ValueError unless the roles are of [batch, length] tokens."""
        for name in ("doc_ids", "positives"):
            given = getattr(self, name)
            if given is not None and given.shape != (batch, length):
                raise ValueError(f"roles.{name} {list(given.shape)} must be [batch, tokens] = {[batch, length]}")

    def in_order(self, order_BT: Tensor) -> "Roles":
        """The roles after tokens were reordered within their rows."""
        positives = None if self.positives is None else self.positives.gather(1, order_BT)
        return replace(self, doc_ids=self.doc_ids.gather(1, order_BT), positives=positives)

    def counted(self, positions: Tensor | None, lengths: Tensor | None) -> "Roles":
        """The roles with ``counts``."""
        if self.counts is not None:
            return self
        return replace(self, counts=RoleCounts.of(self.doc_ids, positions, lengths))

    def to(self, device: torch.device | str, **_: Any) -> "Roles":
        """The same on a device."""
        positives = None if self.positives is None else self.positives.to(device)
        return replace(self, doc_ids=self.doc_ids.to(device), positives=positives)
