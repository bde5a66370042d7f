"""Triton's grouped product against one product for each group."""

import pytest
import torch

from memlm_kernels import grouped_linear
from memlm_kernels.grouped_linear import naive
from memlm_kernels.testing import assert_close, grads_of, import_triton_ops
from tests.kernels.test_triton import BFLOAT16, DEVICE, TOLERANCES

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize(
    ("sizes", "given", "wide"),
    [([3, 0, 50, 7], 20, 40), ([0, 0, 0, 70], 40, 70), ([1, 1, 1], 7, 3), ([65, 64, 63], 16, 16)],
    ids=str,
)
def test_each_row_meets_the_matrix_of_its_group(sizes, given, wide, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(sum(sizes), given), torch.randn(len(sizes), wide, given)
    x, weight = (t.to(DEVICE, dtype) for t in (x, weight))

    def one_by_one(x, weight):
        return naive.grouped_linear(x, weight, sizes)

    def grouped(x, weight):
        return grouped_linear(x, weight, torch.tensor(sizes, device=DEVICE), backend="triton")

    exact = [t.double() for t in (x, weight)]
    for_outputs, for_gradients = TOLERANCES[dtype]
    assert_close("y", one_by_one(*exact), grouped(x, weight), for_outputs)
    gradients = zip("xw", grads_of(one_by_one, exact), grads_of(grouped, [x, weight]), strict=True)
    for name, expected, got in gradients:
        assert_close(f"gradient of {name}", expected, got, for_gradients)


def test_rows_of_no_group_read_no_matrix():
    """They give zeros, and no gradient, whatever they hold; the op's matrices are read as they are."""
    from memlm_kernels.grouped_linear.triton import grouped_linear_triton

    x, weight, sizes = torch.randn(20, 8, device=DEVICE), torch.randn(2, 8, 8, device=DEVICE).mT, [5, 9]
    x[14:] = float("nan")
    given = [t.detach().requires_grad_() for t in (x, weight)]
    y = grouped_linear_triton(*given, torch.tensor(sizes, device=DEVICE))
    assert_close("y", naive.grouped_linear(x[:14], weight, sizes), y[:14], 1e-6)
    y.sum().backward()
    assert not y[14:].any() and not given[0].grad[14:].any() and given[1].grad.isfinite().all()


def test_ops_keep_the_rules_of_torch():
    import_triton_ops()

    x, weight = torch.rand(9, 6, device=DEVICE, requires_grad=True), torch.rand(3, 5, 6, device=DEVICE)
    sizes, tests = torch.tensor([4, 0, 5], device=DEVICE), ("test_schema", "test_autograd_registration")
    given = (x, weight.requires_grad_(), sizes, False)
    torch.library.opcheck(torch.ops.memlm.grouped_linear, given, test_utils=(*tests, "test_faketensor"))
    given = (torch.rand(9, 5, device=DEVICE), x.detach(), sizes)
    torch.library.opcheck(torch.ops.memlm.grouped_linear_weights, given, test_utils=("test_schema", "test_faketensor"))
