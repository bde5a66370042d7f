"""``Rows``: the facts of a call that are known on the host, and tensors made once for all layers."""

import pytest
import torch

from memlm import MemoryCache
from memlm.layers import Rope
from memlm.memory import rows as module
from memlm.memory.rows import Rows
from memlm.roles import RoleCounts, Roles
from tests.conftest import build

PACKED = torch.tensor([[3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]])
IDS = torch.randint(259, (2, 12), generator=torch.Generator().manual_seed(0))


def rows_of(length, before, **facts):
    return Rows(length, torch.tensor(before), **facts)


def test_pieces_of_documents_count_from_their_starts():
    """If the host knows the position, a call within one piece needs no positions; else each piece is a document."""
    inside = rows_of(3, [21, 21], start=21).within(8)
    assert (inside.start, inside.given_BT, inside.max_documents) == (5, None, 1)
    assert inside.positions_BT.tolist() == [[5, 6, 7]] * 2 and inside.after_B.tolist() == [8, 8]
    assert rows_of(8, [16], start=16).within(8).fresh
    across = rows_of(4, [21, 21], start=21).within(8)
    assert across.start is None and across.given_BT.tolist() == [[5, 6, 7, 0]] * 2
    packed = rows_of(6, [3, 9], given_BT=PACKED, max_documents=3).within(2)
    assert packed.positions_BT.tolist() == (PACKED % 2).tolist()
    for rows in (across, packed):
        opened = 1 + (rows.positions_BT[:, 1:] == 0).sum(1).max()
        assert rows.max_documents >= opened


def test_the_host_knows_where_rows_stand_until_they_differ():
    assert rows_of(5, [7, 7], start=7).next_start == 12
    padded = rows_of(5, [0, 0], start=0, lengths_B=torch.tensor([5, 2]))
    assert padded.next_start is None and padded.after_B.tolist() == [5, 2]
    packed = rows_of(6, [3, 0], start=None, given_BT=PACKED, max_documents=3)
    assert packed.next_start is None and packed.after_B.tolist() == [1, 2]
    for documents, known in ((torch.zeros(1, 4, dtype=torch.int64), 4), (torch.tensor([[1, 1, 0, 0]]), None)):
        roles = Roles(documents, None, RoleCounts.of(documents, None))
        assert rows_of(4, [0], start=0, roles=roles).next_start == known
    assert rows_of(4, [3]).next_start is None and rows_of(0, [3], start=3).next_start == 3


def test_segments_are_the_documents_of_packed_and_padded_rows():
    assert rows_of(6, [3, 3], start=3).segments() is None
    found = rows_of(6, [3, 9], given_BT=PACKED, lengths_B=torch.tensor([6, 5]), max_documents=3).segments()
    assert found.index_BT.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 3]]
    assert found.cu_seqlens.tolist() == [[0, 2, 5, 6], [0, 4, 5, 5]]
    assert found.fresh_B.tolist() == [False, True] and found.last_B.tolist() == [2, 1]


def test_real_tokens_stand_first():
    rows = rows_of(3, [0, 4], lengths_B=torch.tensor([1, 0]))
    assert rows.real_BT.tolist() == [[True, False, False], [False] * 3] and rows.after_B.tolist() == [1, 4]
    assert rows_of(3, [0]).real_BT is None


def test_another_device_gets_all_facts_once():
    documents = torch.tensor([[1, 1, 0, 0]])
    roles = Roles(documents, documents == 1, RoleCounts.of(documents, None))
    places = torch.arange(4)[None]
    rows = rows_of(4, [0], start=0, given_BT=places, lengths_B=torch.tensor([3]), max_documents=2, roles=roles)
    moved = rows.to("meta", non_blocking=True)
    assert moved is rows.to("meta") and rows.to("cpu") is rows
    tensors = (moved.before_B, moved.given_BT, moved.lengths_B, moved.roles.doc_ids, moved.roles.positives)
    assert all(x.is_meta for x in tensors) and moved.positions_BT.is_meta
    for name in ("length", "start", "max_documents", "metrics"):
        assert getattr(moved, name) == getattr(rows, name)


def test_what_is_made_for_a_tensor_is_of_that_tensor_alone():
    """Even if another tensor gets the same ``id`` after the first is freed."""
    rows, seen = Rows.of(torch.zeros(1, 2, 4)), set()
    for place in range(50):
        positions = torch.full((1, 2), place)
        seen.add(id(positions))
        cos, _ = rows.rotary(Rope(4), torch.float64, positions)
        assert cos[0, 0, 0, 0].item() == pytest.approx(torch.tensor(float(place)).cos().item(), abs=1e-6)
    assert len(seen) == 50


@pytest.mark.parametrize("memory", ["attention", "titans_mag", "chunk_sparse", "msa"])
def test_angles_are_made_once_for_all_layers(memory, monkeypatch):
    """In each call of a model of two layers: the first call, a continuation, and one token."""
    model, made, real = build(memory), [], module.rotary_angles

    def counted(positions, rope):
        made.append((tuple(positions.shape), rope.head_dim))
        return real(positions, rope)

    monkeypatch.setattr(module, "rotary_angles", counted)
    cache, calls = MemoryCache(), []
    with torch.no_grad():
        for piece in IDS.split([6, 5, 1], 1):
            model(piece, past_key_values=cache)
            calls.append(len(made))
            made.clear()
    # The keys of chosen chunks are rotated too, by their own angles.
    each = 2 if memory == "chunk_sparse" else 1
    assert calls == [each] * 3


def test_unasked_metrics_change_nothing_else():
    for memory in ("titans_mac", "titans_tnt", "mom", "lact", "chunk_sparse", "gated_delta_net"):
        model = build(memory).train()
        told, untold = (model(IDS, labels=IDS, output_metrics=asked) for asked in (True, False))
        assert told.metrics and not untold.metrics
        assert torch.equal(told.logits, untold.logits) and torch.equal(told.loss, untold.loss)
        assert told.aux_losses.keys() == untold.aux_losses.keys()
