"""Building blocks against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from memlm.layers import ExactLinear, ShortConv, rotary, rotary_angles, unit
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
    y, history = conv.over_rows(x, torch.zeros(2, width - 1, 3, dtype=torch.float64), None, None)
    expected = torch.zeros_like(x)
    for t in range(9):
        for back in range(min(width, t + 1)):
            expected[:, t] += conv.weight[:, width - 1 - back] * x[:, t - back]
    assert_close("y", expected, y, 1e-12)
    assert torch.equal(history, x[:, 9 - (width - 1) :])


@pytest.mark.parametrize("cu_seqlens", [None, [[0, 0, 4, 9], [0, 5, 5, 7]]], ids=str)
def test_short_conv_with_silu_is_silu_of_it_and_keeps_its_input_alone(cu_seqlens):
    torch.manual_seed(0)
    plain, conv = ShortConv(3, 4).double(), ShortConv(3, 4, silu=True).double()
    conv.load_state_dict(plain.state_dict())
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    history = torch.randn(2, 1 if cu is None else 3, 3, 3, dtype=torch.float64)
    x, d_y = (torch.randn(2, 9, 3, dtype=torch.float64) for _ in "xd")
    kept = set()

    def keep(t):
        if t.is_floating_point() and t.numel() >= x.numel():
            kept.add(t.data_ptr())
        return t

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ours, after = conv.over_segments(x, history, cu)
    y, expected = plain.over_segments(x, history, cu)
    theirs = F.silu(y)
    assert torch.equal(theirs, ours) and torch.equal(expected, after)
    assert len(kept) == 1
    expected = torch.autograd.grad(theirs, [x, plain.weight], d_y)
    for e, g in zip(expected, torch.autograd.grad(ours, [x, conv.weight], d_y), strict=True):
        assert_close("gradient", e, g, 1e-15)


@pytest.mark.parametrize("silu", [False, True])
def test_a_long_short_conv_is_made_in_pieces_that_see_what_stands_before(silu, monkeypatch):
    """Documents start at a piece's end and close to it."""
    torch.manual_seed(0)
    conv = ShortConv(6, 4, silu).double()
    history, x, d_y = (torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True) for length in (3, 50, 50))
    positions = torch.stack([torch.arange(5, 55), torch.cat([torch.arange(7, 25), torch.arange(32)])])
    inputs, results = [x, history, conv.weight], []
    for at_once in (2**18, 12 * 18, 12 * 7, 1):
        monkeypatch.setattr("memlm.layers._AT_ONCE", at_once)
        y, after = conv.over_rows(x, history, positions, None)
        results.append([y, after, *torch.autograd.grad(y, inputs, d_y)])
    for parts in results[1:]:
        for e, part in zip(results[0], parts, strict=True):
            assert_close("in pieces", e, part, 1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_an_exact_linear_is_in_fp32_whatever_the_model_and_autocast(bias):
    linear, x = ExactLinear(64, 3, bias=bias), torch.randn(2, 64)
    low, low_x = ExactLinear(64, 3, bias=bias).bfloat16(), x.bfloat16()
    low.load_state_dict(linear.state_dict())
    expected = F.linear(low_x.float(), low.weight.float(), low.bias.float() if bias else None)
    assert torch.equal(low(low_x), expected) and expected.dtype == torch.float32
    within = F.linear(x, linear.weight, linear.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), within)
    assert linear.double()(x.double()).dtype == torch.float64


def test_unit_vectors_and_their_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit(x), F.normalize(x, dim=-1), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(unit, x)
    assert not unit(torch.zeros(1, 4)).any()
