"""Triton's grouped product against one product for each group."""

import pytest
import torch

from memlm_kernels import grouped_linear
from memlm_kernels.grouped_linear import linears, naive
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("widths", [[40], [5, 33, 64, 1]], ids=str)
def test_maps_of_the_same_rows(widths, rows, dtype):
    """The last one is wide: its sums are not rounded."""
    torch.manual_seed(0)
    x, *weights = (torch.randn(n, 70).to(DEVICE, dtype) for n in (rows, *widths))
    biases = [None if i % 2 else torch.randn(n).to(DEVICE, dtype) for i, n in enumerate(widths)]
    wide = [n == widths[-1] for n in widths]

    def run(backend, x, *weights):
        return linears(x, weights, [None if b is None else b.to(x.dtype) for b in biases], wide, backend=backend).y

    exact = [t.double() for t in (x, *weights)]
    for_outputs, for_gradients = TOLERANCES[dtype]
    for i, (e, g) in enumerate(zip(run("reference", *exact), run("triton", x, *weights), strict=True)):
        assert g.dtype == (torch.float32 if wide[i] else dtype) and g.shape == (rows, widths[i])
        assert_close(f"y {i}", e, g, for_outputs if g.dtype == dtype else TOLERANCES[torch.float32][0])

    def joined(backend):
        return lambda *given: torch.cat([y.to(given[0].dtype) for y in run(backend, *given)], -1)

    found = grads_of(joined("reference"), exact), grads_of(joined("triton"), [x, *weights])
    for i, (e, g) in enumerate(zip(*found, strict=True)):
        assert_close(f"gradient {i}", e, g, for_gradients)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": []}, r"weights \[\] must be"),
        ({"weights": [torch.zeros(3, 5)]}, r"x \[2, 4\] and weights \[\[3, 5\]\] must be \[N, D\]"),
        ({"biases": []}, "1 weights, 0 biases, 1 wide"),
        ({"biases": [torch.zeros(4)]}, r"bias \[4\] must be \[O\] of its weight \[3, 4\]"),
        (
            {"weights": [torch.zeros(3, 4)] * 5, "biases": [None] * 5, "wide": [False] * 5, "backend": "triton"},
            "at most 4 matrices, not 5",
        ),
    ],
)
def test_maps_that_do_not_fit_are_named(changed, message):
    given = {"weights": [torch.zeros(3, 4)], "biases": [None], "wide": [False]} | changed
    with pytest.raises(ValueError, match=message):
        linears(torch.zeros(2, 4), **given)


def test_ops_keep_the_rules_of_torch():
    import_triton_ops()

    given = (torch.rand(3, 6), [torch.rand(5, 6), torch.rand(2, 6)], [torch.rand(5), None], [False, True])
    torch.library.opcheck(torch.ops.memlm.linears, given, test_utils=("test_schema", "test_faketensor"))

    x, weight = torch.rand(9, 6, device=DEVICE, requires_grad=True), torch.rand(3, 5, 6, device=DEVICE)
    sizes, tests = torch.tensor([4, 0, 5], device=DEVICE), ("test_schema", "test_autograd_registration")
    given = (x, weight.requires_grad_(), sizes, False)
    torch.library.opcheck(torch.ops.memlm.grouped_linear, given, test_utils=(*tests, "test_faketensor"))
    given = (torch.rand(9, 5, device=DEVICE), x.detach(), sizes)
    torch.library.opcheck(torch.ops.memlm.grouped_linear_weights, given, test_utils=("test_schema", "test_faketensor"))
