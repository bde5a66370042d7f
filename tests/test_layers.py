"""Building blocks against their definitions."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memlm.layers import ExactLinear, RMSNorm, Rope, ShortConv, SwiGLU, products, rotary, rotary_angles
from memlm_kernels import set_backend
from memlm_kernels.short_convolution import unit_length
from memlm_kernels.testing import assert_close


def test_rotary_scores_depend_on_distance_only_even_far_out():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, p: rotary(x, rotary_angles(torch.tensor([[p]]), Rope(8))).flatten()  # noqa: E731
    near = at(q, 7) @ at(k, 3)
    far = at(q, 10**9 + 7) @ at(k, 10**9 + 3)
    assert abs(near - far) < 1e-6
    assert abs(near - at(q, 8) @ at(k, 3)) > 1e-3


def test_rotary_turns_as_in_llama():
    """Scores depend on distances only, so they hide the direction of the rotation; weights of other models need it."""
    q, k = torch.randn(2, 1, 5, 2, 8, dtype=torch.float64)
    angles_TK = torch.arange(3, 8)[:, None] * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4).repeat(2)
    cos, sin = angles_TK.cos()[None], angles_TK.sin()[None]
    mine = [rotary(x, rotary_angles(torch.arange(3, 8)[None], Rope(8))) for x in (q, k)]
    for one, other in zip(mine, apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2), strict=True):
        torch.testing.assert_close(one, other)


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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_short_conv_compiles_with_its_backward():
    conv, x = ShortConv(3, 4, silu=True), torch.randn(2, 9, 3, requires_grad=True)
    results = []
    for run in (conv, torch.compile(conv, backend="aot_eager", fullgraph=True)):
        (y,), _ = run([x], None, None, None)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, conv.weight])])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


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
        monkeypatch.setattr(importlib.import_module("memlm_kernels.short_convolution.reference"), "_AT_ONCE", at_once)
        y, after = conv.over_rows(x, history, positions, None)
        results.append([y, after, *torch.autograd.grad(y, inputs, d_y)])
    for parts in results[1:]:
        for e, part in zip(results[0], parts, strict=True):
            assert_close("in pieces", e, part, 1e-14)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_short_conv_gives_a_token_at_a_time_what_it_gives_at_once(width, silu):
    """With gradients, and over documents, whose first tokens see nothing of the history."""
    torch.manual_seed(0)
    conv = ShortConv(5, width, silu).double()
    history, x, d_y = (
        torch.randn(2, length, 5, dtype=torch.float64, requires_grad=True) for length in (width - 1, 9, 9)
    )
    packed = torch.tensor([[2, 3, 0, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    for positions in (None, packed):
        y, last = conv.over_rows(x, history, positions, None)
        kept, tokens = history, []
        for t in range(9):
            at = None if positions is None else positions[:, t : t + 1]
            token, kept = conv.over_rows(x[:, t : t + 1], kept, at, None)
            tokens.append(token)
        streamed = torch.cat(tokens, 1)
        assert_close("y", y, streamed, 1e-15)
        assert torch.equal(last, kept)
        inputs = [x, conv.weight] + [history] * (width > 1)
        both = (torch.autograd.grad(out, inputs, d_y) for out in (y, streamed))
        for e, g in zip(*both, strict=True):
            assert_close("gradient", e, g, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_rms_norm_is_torchs_with_and_without_a_gradient(dtype):
    torch.manual_seed(0)
    norm, x = RMSNorm(7, eps=1e-3).to(dtype), torch.randn(2, 3, 7).to(dtype).requires_grad_()
    torch.nn.init.normal_(norm.weight)
    expected = F.rms_norm(x, (7,), norm.weight, 1e-3)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    with torch.no_grad():
        assert_close("without", expected.detach(), norm(x), tolerance)
    y, d_y = norm(x), torch.randn(2, 3, 7).to(dtype)
    assert y.dtype == dtype
    assert_close("y", expected.detach(), y.detach(), tolerance)
    gradients = (torch.autograd.grad(out, [x, norm.weight], d_y) for out in (expected, y))
    for name, e, g in zip(("x", "weight"), *gradients, strict=True):
        assert_close(name, e, g, 2 * tolerance)


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (2, 0, 6)], ids=str)
def test_a_feed_forward_layer_takes_any_shape(shape):
    mlp, x = SwiGLU(6, 10), torch.randn(shape)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert mlp(x).shape == x.shape
    torch.testing.assert_close(mlp(x), expected)


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
    torch.testing.assert_close(unit_length(x), F.normalize(x, dim=-1), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(unit_length, x)
    assert not unit_length(torch.zeros(1, 4)).any()


def test_segments_without_history_stay_where_they_are():
    """As with histories of zeros, also for empty and short segments; padding's output is not used."""
    torch.manual_seed(0)
    conv, cu = ShortConv(5, 4, silu=True).double(), torch.tensor([[0, 0, 2, 9], [0, 5, 6, 7]])
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    real = torch.arange(9) < cu[:, -1:]
    expected, kept = conv.over_segments(x, torch.zeros(2, 3, 3, 5, dtype=torch.float64), cu)
    (got,), after = conv.over_fresh_segments(x, cu)
    assert_close("y", expected[real], got[real], 1e-15)
    assert torch.equal(kept, after)
    for e, g in zip(*(torch.autograd.grad(y[real].sum(), [x, conv.weight]) for y in (expected, got)), strict=True):
        assert_close("gradient", e, g, 1e-14)


@pytest.fixture
def decoding(monkeypatch):
    """Three maps, as of a mixer, the kernels of a decoded token, and the names of the launched ones."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")
    from memlm_kernels.launch import Kernel

    names, run = [], Kernel.__call__

    def record(kernel, *given, **arguments):
        names.append(kernel.function.__name__)
        return run(kernel, *given, **arguments)

    monkeypatch.setattr(Kernel, "__call__", record)
    maps = torch.nn.Linear(12, 20), torch.nn.Linear(12, 7, bias=False), ExactLinear(12, 3)
    with torch.no_grad(), set_backend("triton"):
        yield maps, names


def test_a_token_takes_plain_products_in_one_launch(decoding):
    maps, names = decoding
    x = torch.randn(2, 1, 12)
    found = products(x, *maps)
    assert names == ["maps_forward"]
    for linear, y in zip(maps, found, strict=True):
        assert_close("y", linear(x), y, 1e-6)
    with torch.enable_grad():
        assert products(x, *maps)[0].requires_grad
    products(torch.randn(2, 9, 12), *maps)
    with set_backend("reference"):
        products(x, *maps)
    with torch.autocast("cpu", torch.bfloat16):
        products(x, *maps)
    assert names == ["maps_forward"]
    assert products(x.half(), ExactLinear(12, 3).half())[0].dtype == torch.float32 and len(names) == 2


class Adapted(torch.nn.Module):
    """As an adapter wraps a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) + 1


def test_a_module_that_is_more_than_its_weight_is_called(decoding):
    """An adapter, hooks of one module and of all, a forward of its own, a weight of another type."""
    maps, names = decoding
    x = torch.randn(1, 1, 12)
    plain = maps[0](x)

    def plus_one(module, given, y):
        return y + 1

    def changed():
        return products(x, *maps)[0]

    adapted = products(x, Adapted(maps[0]), *maps[1:])[0]
    torch.testing.assert_close(adapted, plain + 1)
    for register in (maps[0].register_forward_hook, torch.nn.modules.module.register_module_forward_hook):
        hook = register(plus_one)
        torch.testing.assert_close(changed(), plain + 1)
        hook.remove()
    hook = maps[0].register_forward_pre_hook(lambda module, given: (given[0] * 0,))
    torch.testing.assert_close(changed(), maps[0].bias.expand_as(plain))
    hook.remove()
    forward = maps[0].forward
    maps[0].forward = lambda x: forward(x) + 1
    torch.testing.assert_close(changed(), plain + 1)
    del maps[0].forward
    torch.nn.utils.parametrizations.weight_norm(maps[0])
    maps[0].parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(changed() - maps[0].bias, 2 * (plain - maps[0].bias))
    assert names == []
