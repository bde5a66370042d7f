"""Building blocks against their definitions."""

import pytest
import torch

from memlm.layers import ShortConv, rotary, rotary_angles
from memlm_kernels.testing import assert_close


def test_rotary_scores_depend_on_distance_only_even_far_out():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, p: rotary(x, rotary_angles(torch.tensor([[p]]), 8, 10000.0)).flatten()  # noqa: E731
    near = at(q, 7) @ at(k, 3)
    far = at(q, 10**9 + 7) @ at(k, 10**9 + 3)
    assert abs(near - far) < 1e-6
    assert abs(near - at(q, 8) @ at(k, 3)) > 1e-3


@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_conv_is_a_causal_depthwise_convolution(width):
    conv = ShortConv(3, width).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    y, history = conv(x, torch.zeros(2, width - 1, 3, dtype=torch.float64), None, None)
    expected = torch.zeros_like(x)
    for t in range(9):
        for back in range(min(width, t + 1)):
            expected[:, t] += conv.weight[:, width - 1 - back] * x[:, t - back]
    assert_close("y", expected, y, 1e-12)
    assert torch.equal(history, x[:, 9 - (width - 1) :])
