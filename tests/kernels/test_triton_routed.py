"""Triton's kernels for routed tokens against the references; see ``test_triton``."""

import pytest
import torch

from memlm_kernels import combine_reads, dispatch_tokens
from memlm_kernels.testing import assert_close
from tests.kernels.test_triton import BFLOAT16, DEVICE, compare, poisoned  # noqa: F401

DTYPES = [torch.float32, torch.float16, BFLOAT16]
# Rows, tokens, choices, features: one of each, incomplete tiles and features, more choices than features.
SIZES = [(1, 1, 1, ()), (2, 11, 2, (3,)), (3, 8, 3, (2, 130)), (1, 3, 7, (5,)), (2, 19, 1, (300,))]


def places(rows, tokens, choices):
    g = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(tokens * choices, generator=g) for _ in range(rows)])
    return order.view(rows, tokens, choices).to(DEVICE)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dispatch(size, dtype):
    *sizes, features = size
    place = places(*sizes)
    compare(lambda x, backend: [dispatch_tokens(x[0], place, backend=backend)], [random(*size[:2], *features)], dtype)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_combination(size, dtype, shared):
    rows, tokens, choices, features = size
    place = places(rows, tokens, choices)
    tensors = [random(rows, tokens * choices, *features)] + [random(rows, tokens, *features)] * shared
    filler = [torch.zeros(1, dtype=torch.float64)] * (3 - len(tensors))
    weight = torch.rand(place.shape, dtype=torch.float64)

    def call(x, backend):
        return [combine_reads(x[0], place, x[3], x[1] if shared else None, backend=backend)]

    # The fourth is always in fp32, as a router's weights are.
    compare(call, [*tensors, *filler, weight], dtype)


@torch.no_grad()
def test_views_of_other_tensors():
    place = places(2, 5, 2).mT.contiguous().mT
    x, o = torch.randn(2, 6, 5, device=DEVICE).mT, torch.randn(2, 6, 10, device=DEVICE).mT
    weight = torch.rand(2, 2, 5, device=DEVICE).mT
    assert not any(t.is_contiguous() for t in (place, x, o, weight))
    assert torch.equal(*(dispatch_tokens(x, place, backend=b) for b in ("reference", "triton")))
    expected, got = (combine_reads(o, place, weight, x, backend=b) for b in ("reference", "triton"))
    assert_close("y", expected, got, 1e-6)


def test_no_tokens():
    place = torch.zeros(2, 0, 3, dtype=torch.long, device=DEVICE)
    rows = dispatch_tokens(torch.zeros(2, 0, 4, device=DEVICE), place, backend="triton")
    assert combine_reads(rows, place, torch.zeros(2, 0, 3, device=DEVICE), backend="triton").shape == (2, 0, 4)


def test_the_same_bits_again():
    """Every gradient has one owner. A token has 7 rows, whose sum depends on the order."""
    place, x = places(2, 40, 7), torch.randn(2, 40, 33, device=DEVICE)
    weight, given = torch.rand(place.shape, device=DEVICE), torch.randn(2, 280, 33, device=DEVICE)
    found = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        rows = dispatch_tokens(leaves[0], place, backend="triton")
        y = combine_reads(rows * given, place, leaves[1], backend="triton")
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(map(torch.equal, *found))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="8 GB, which the interpreter would walk through")
@torch.no_grad()
def test_more_elements_than_32_bits_count():
    tokens, features = (1 << 20) + 8, 1024
    place = torch.arange(2 * tokens, device=DEVICE).flip(0).view(1, tokens, 2)
    x = torch.ones(1, tokens, features, device=DEVICE, dtype=torch.float16)
    x[:, -4:] = 3
    rows = dispatch_tokens(x, place, backend="triton")
    assert (rows[:, :8] == 3).all() and (rows[:, 8:] == 1).all()
    y = combine_reads(rows, place, torch.full(place.shape, 0.5, device=DEVICE), backend="triton")
    assert torch.equal(y, x)


def test_ops_keep_the_rules_of_torch():
    """Schema, fake tensors, registration of gradients; and a compiled call is one graph."""
    import memlm_kernels.routed_memory.triton  # noqa: F401

    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    place = places(2, 5, 3)
    x, shared = (torch.randn(2, 5, 4, device=DEVICE, requires_grad=True) for _ in "xs")
    o = torch.randn(2, 15, 4, device=DEVICE, requires_grad=True)
    weight = torch.rand(place.shape, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.memlm.dispatch_tokens, (x, place), test_utils=tests)
    for given in ((o, place, weight, shared), (o, place, None, None)):
        torch.library.opcheck(torch.ops.memlm.combine_reads, given, test_utils=tests)
    torch.library.opcheck(torch.ops.memlm.combine_reads_backward, (x, o, place, weight), test_utils=tests)

    def call(x, weight, backend):
        rows = dispatch_tokens(x, place, backend=backend)
        return combine_reads(rows.square(), place, weight, x, backend=backend)

    compiled = torch.compile(lambda *x: call(*x, "triton"), fullgraph=True, backend="aot_eager")
    expected, got = call(x, weight, "reference"), compiled(x, weight)
    assert_close("y", expected, got, 1e-6)
    expected, got = (torch.autograd.grad(y.sum(), [x, weight]) for y in (expected, got))
    for e, g in zip(expected, got, strict=True):
        assert_close("gradient", e, g, 1e-6)


def test_what_the_kernels_do_not_take_is_named():
    x, place = torch.zeros(1, 3, 2, dtype=torch.float64, device=DEVICE), places(1, 3, 1)
    with pytest.raises(ValueError, match=r"dispatch_tokens: backend='triton' cannot run here: .*float64"):
        dispatch_tokens(x, place, backend="triton")
    with pytest.raises(ValueError, match=r"combine_reads: backend='triton' cannot run here: .*float64"):
        combine_reads(x, place, torch.zeros_like(x[..., :1]), backend="triton")
