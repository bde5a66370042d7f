"""segment_mean_pool against a loop over segments."""

import pytest
import torch

from memlm_kernels import segment_mean_pool
from memlm_kernels.segment_mean_pool import naive
from memlm_kernels.testing import assert_close, grads_of


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [[0, 7, 8, 8, 15], [3, 4, 11, 18, 20]],
        [[0, 0, 0, 0, 0], [20, 20, 20, 20, 20]],
        [[0, 1, 2, 3, 4], [0, 7, 14, 15, 16]],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)
def test_means_and_gradients_of_ragged_segments(cu_seqlens, dtype, tolerance):
    torch.manual_seed(0)
    x, cu_seqlens = torch.randn(2, 20, 3, 5).to(dtype), torch.tensor(cu_seqlens)

    def pool(x):
        return segment_mean_pool(x, cu_seqlens, longest=7)

    assert pool(x).dtype == torch.promote_types(dtype, torch.float32)
    assert_close("means", naive.segment_mean_pool(x, cu_seqlens), pool(x), tolerance)
    expected, got = (grads_of(f, [x])[0] for f in (lambda x: naive.segment_mean_pool(x, cu_seqlens), pool))
    assert_close("gradient", expected, got, max(tolerance, 4e-3 if dtype == torch.bfloat16 else 0))


def test_far_from_zero_nothing_cancels():
    """Differences of running sums would lose precision: a long prefix is much larger than a segment."""
    x = 1000 + torch.randn(1, 5000, 1)
    cu_seqlens = torch.arange(0, 5001, 8).clamp(max=5000)[None]
    expected, got = naive.segment_mean_pool(x, cu_seqlens), segment_mean_pool(x, cu_seqlens, longest=8)
    assert_close("means", expected - 1000, got - 1000, 1e-3)


def test_no_tokens_and_no_segments():
    assert segment_mean_pool(torch.zeros(2, 0, 3), torch.zeros(2, 4, dtype=torch.long), longest=8).shape == (2, 3, 3)
    assert segment_mean_pool(torch.zeros(2, 5, 3), torch.zeros(2, 1, dtype=torch.long), longest=8).shape == (2, 0, 3)


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"cu_seqlens \[3, 2\] must be \[B, T, ...\] and \[B, S \+ 1\]"):
        segment_mean_pool(torch.zeros(2, 5), torch.zeros(3, 2, dtype=torch.long), longest=1)
    with pytest.raises(ValueError, match="longest=0"):
        segment_mean_pool(torch.zeros(2, 5), torch.zeros(2, 2, dtype=torch.long), longest=0)
