"""Indices out of range: an error on a CPU, and harmless where values are not checked."""

import pytest
import torch

from memlm_kernels import MemoryRoutes, segment_mean_pool
from memlm_kernels.calls import DEVICE, Sizes, choices, places
from memlm_kernels.testing import assert_close
from tests.kernels.test_inputs import OPS, TOKENS, rows, unread  # noqa: F401
from tests.kernels.test_triton import poisoned  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")

# Ops with one state per row.
BY_STATE = ("neural_memory", "neural_memory, two layers", "large_chunk_memory")
# The index out of range, the index that it counts as without checks, and the error with checks.
OUTSIDE = {
    **{
        (op, str(wrong[0].tolist())): ({"cu_seqlens": wrong}, {"cu_seqlens": right}, f"cu_seqlens.* {message}")
        for op in (*BY_STATE, "linear_attention", "delta_rule", "segmented_neural_memory", "segment_mean_pool")
        for wrong, right, message in (
            (rows(0, 3, 99), rows(0, 3, 6), "from 0 to 99; give numbers of 0 or more and less than 7"),
            (rows(-5, 3, 6), rows(0, 3, 6), "from -5 to 6"),
            (rows(0, 5, 2), rows(0, 5, 5), "decreases"),
            (rows(4, 99, 2), rows(4, 6, 6), "from 2 to 99"),
        )
        # Documents have no padding before them.
        if op not in BY_STATE or right[0, 0] == 0
    },
    ("dispatch_tokens", "outside"): ({"place": places(Sizes()) - 3}, None, "place has numbers from -3 to 8"),
    ("combine_reads", "outside"): ({"place": places(Sizes()) + 7}, None, "place has numbers from 7 to 18"),
    ("combine_reads", "twice"): ({"place": places(Sizes()) // 2}, None, "place has numbers more than once"),
    ("chunk_sparse_attention", "index"): (
        {"index": torch.where(choices(Sizes()) == 1, 2**32 + 1, choices(Sizes()))},
        {"index": torch.where(choices(Sizes()) == 1, -1, choices(Sizes()))},
        "index has numbers from -1 to 4294967297",
    ),
    ("chunk_sparse_attention", "positions"): (
        {"positions": rows(0, 1, -3, 0, 2**40, 2)},
        {"positions": rows(0, 1, 0, 0, 4, 2)},
        "positions has numbers from -3",
    ),
    ("prefix_window_attention", "positions"): (
        {"positions": rows(0, 1, -3, 0, 2**40, 2)},
        {"positions": rows(0, 1, 0, 0, 4, 2)},
        "positions has numbers from -3",
    ),
    ("invert_chunks", "index"): (
        {"index": torch.where(choices(Sizes()) == 1, 2**32 + 1, choices(Sizes()))},
        {"index": torch.where(choices(Sizes()) == 1, -1, choices(Sizes()))},
        "index has numbers from -1 to 4294967297",
    ),
    ("grouped_linear", "sizes"): ({"sizes": torch.tensor([4, 99])}, {"sizes": torch.tensor([4, 2])}, "sizes"),
}


@pytest.mark.parametrize("case", OUTSIDE, ids=" ".join)
def test_numbers_outside_are_named(case):
    op, (wrong, _, message) = OPS[case[0]], OUTSIDE[case]
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=message):
            op.run(op.make() | wrong)


@torch.no_grad()
@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", OUTSIDE, ids=" ".join)
def test_numbers_outside_touch_nothing_where_they_are_not_looked_at(case):
    """Both backends return the same result, that of the indices which the wrong ones count as."""
    op, (wrong, right, _) = OPS[case[0]], OUTSIDE[case]
    wrong, right = ({n: x.to(DEVICE) for n, x in given.items()} for given in (wrong, right or wrong))
    results = [op.run(op.make() | wrong, backend=b) for b in ("reference", "triton") if op.triton or b == "reference"]
    results.append(op.run(op.make() | right, backend="reference"))
    if case[0] == "dispatch_tokens":
        sent = torch.zeros(2, 2 * TOKENS, dtype=torch.bool, device=DEVICE)
        # Other rows are arbitrary.
        sent[:, : 2 * TOKENS - 3] = True
        results = [[x[sent] for x in result] for result in results]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(str(case), a, b, 1e-6)


@pytest.mark.usefixtures("unread")
def test_segments_longer_than_was_said():
    x, cu = torch.rand(1, 6, 2, device=DEVICE), torch.tensor([[0, 5, 6]], device=DEVICE)
    for by in ("reference", "triton"):
        leaf = x.clone().requires_grad_()
        means = segment_mean_pool(leaf, cu, longest=2, backend=by)
        assert_close("means", torch.stack([x[0, :2].mean(0), x[0, 5]])[None], means, 1e-6)
        means.sum().backward()
        assert leaf.grad[0, :, 0].tolist() == [0.5, 0.5, 0, 0, 0, 1]


def test_segments_longer_than_was_said_are_named():
    x = torch.rand(1, 6, 2)
    with pytest.raises(
        ValueError, match="longest=2, has numbers from 1 to 5; give numbers of 0 or more and less than 3"
    ):
        segment_mean_pool(x, torch.tensor([[0, 5, 6]]), longest=2)


@pytest.mark.usefixtures("unread")
def test_routes_outside():
    """Choices of memories and documents that do not exist count as padding."""
    memory = torch.tensor([[[0], [7], [1], [-1]]], device=DEVICE)
    assert MemoryRoutes.of(memory, 2).cu_seqlens.tolist() == [[0, 1, 2]]
    document = torch.tensor([[0, 0, 3, -2]], device=DEVICE)
    assert MemoryRoutes.of(memory % 2, 2, document, 2).cu_seqlens.tolist() == [[0, 1, 2, 2, 2]]


def test_routes_outside_are_named():
    with pytest.raises(ValueError, match="memory has numbers from 0 to 2; give numbers of 0 or more and less than 2"):
        MemoryRoutes.of(torch.tensor([[[0], [2]]]), 2)
    with pytest.raises(
        ValueError, match="document has numbers from 0 to 3; give numbers of 0 or more and less than 2"
    ):
        MemoryRoutes.of(torch.tensor([[[0], [1]]]), 2, torch.tensor([[0, 3]]))
