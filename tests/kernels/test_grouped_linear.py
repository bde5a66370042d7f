"""grouped_linear against one product for each group."""

import pytest
import torch

from memlm_kernels import grouped_linear
from memlm_kernels.grouped_linear import linear_of_group, naive
from memlm_kernels.testing import assert_close, grads_of

SIZES = [[3, 0, 50, 7], [0, 0, 0, 60], [15, 15, 15, 15], [60, 0, 0, 0]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-14),
        ("reference", torch.float32, 1e-6),
        ("by_group", torch.float64, 1e-14),
        ("by_group", torch.float32, 1e-6),
    ],
)
def test_each_row_meets_the_matrix_of_its_group(sizes, backend, dtype, tolerance):
    torch.manual_seed(0)
    x, weight = torch.randn(60, 16, dtype=dtype), torch.randn(4, 8, 16, dtype=dtype)

    def one_by_one(x, weight):
        return naive.grouped_linear(x, weight, sizes)

    def grouped(x, weight):
        return grouped_linear(x, weight, torch.tensor(sizes), backend=backend)

    assert_close("y", one_by_one(x, weight), grouped(x, weight), tolerance)
    for name, expected, got in zip(
        "xw", grads_of(one_by_one, [x, weight]), grads_of(grouped, [x, weight]), strict=True
    ):
        assert_close(f"gradient of {name}", expected, got, tolerance)


def test_one_row_and_odd_sizes():
    weight = torch.randn(5, 3, 7)
    for group in range(5):
        x, sizes = torch.randn(1, 7), torch.nn.functional.one_hot(torch.tensor(group), 5)
        assert_close("y", x @ weight[group].T, grouped_linear(x, weight, sizes), 1e-6)
    assert grouped_linear(torch.zeros(0, 7), weight, torch.zeros(5, dtype=torch.long)).shape == (0, 3)


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 40])
def test_rows_in_any_order_meet_the_matrix_of_their_group(rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 7, dtype=torch.float64), torch.randn(4, 3, 7, dtype=torch.float64)
    group = torch.randint(0, 4, (rows,))

    def one_by_one(x, weight):
        return torch.einsum("nd,nod->no", x, weight[group])

    def together(x, weight):
        return linear_of_group(x, weight, group)

    assert_close("y", one_by_one(x, weight), together(x, weight), 1e-14)
    for expected, got in zip(grads_of(one_by_one, [x, weight]), grads_of(together, [x, weight]), strict=True):
        assert_close("gradient", expected, got, 1e-14)


@pytest.mark.parametrize("backend", ["reference", "by_group", "any order"])
@pytest.mark.parametrize("wide", ["x", "weight"])
def test_types_mix_and_follow_autocast(backend, wide):
    """As in torch's own products, fp32 becomes autocast's type. Otherwise the wider type counts."""
    torch.manual_seed(0)
    x, weight, sizes = torch.randn(60, 16), torch.randn(4, 8, 16), torch.tensor([3, 0, 50, 7])
    x, weight = (t if name == wide else t.bfloat16() for name, t in (("x", x), ("weight", weight)))

    def product(x, weight):
        if backend == "any order":
            return linear_of_group(x, weight, torch.arange(4).repeat_interleave(sizes))
        return grouped_linear(x, weight, sizes, backend=backend)

    expected = naive.grouped_linear(x.float(), weight.float(), sizes.tolist())
    got = product(x, weight)
    assert got.dtype == torch.float32
    assert_close("y", expected, got, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = product(x, weight)
    assert narrow.dtype == torch.bfloat16
    assert_close("y", expected, narrow, 1e-2)
    for of, grad in zip((x, weight), grads_of(product, [x, weight]), strict=True):
        assert grad.dtype == of.dtype


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"x \[2, 6\], weight \[5, 3, 7\], sizes \[5\] must be"):
        grouped_linear(torch.zeros(2, 6), torch.zeros(5, 3, 7), torch.zeros(5, dtype=torch.long))
