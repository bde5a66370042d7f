"""The rotation against its definition, and Triton's kernel against the reference."""

import pytest
import torch

from memlm_kernels import rotary
from memlm_kernels.rotary import naive
from memlm_kernels.testing import assert_close, grads_of
from tests.kernels.test_triton import BFLOAT16, DEVICE, TOLERANCES, poisoned  # noqa: F401


def inputs(rows, length, heads, keys, size, of_rows):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(rows, length, h, size, generator=g, dtype=torch.float64) for h in (heads, keys))
    angle = 7 * torch.rand(of_rows, length, 1, size // 2, generator=g, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    return q, k, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def test_the_reference_is_the_definition():
    q, k, cos, sin = inputs(1, 5, 2, 1, 6, 1)

    def definition(q, k):
        angles = cos[0, :, 0, :3], sin[0, :, 0, 3:]
        heads = [naive.rotate(x[0, :, h], *angles) for x in (q, k) for h in range(x.shape[2])]
        return torch.stack(heads)

    def reference(q, k):
        return torch.cat(rotary(q, k, cos, sin, backend="reference"), 2)[0].transpose(0, 1)

    assert_close("y", definition(q, k), reference(q, k), 1e-12)
    for e, g in zip(*(grads_of(f, (q, k)) for f in (definition, reference)), strict=True):
        assert_close("gradient", e, g, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("of_rows", [1, 2])
@pytest.mark.parametrize(("length", "heads", "keys", "size"), [(37, 2, 1, 6), (1, 1, 3, 100)])
def test_the_kernel_is_the_reference(length, heads, keys, size, of_rows, dtype):
    q, k, *angles = (x.to(DEVICE, dtype) for x in inputs(2, length, heads, keys, size, of_rows))

    def call(backend):
        return lambda q, k: torch.cat(rotary(q, k, *(x.to(q.dtype) for x in angles), backend=backend), 2)

    given = [x.double() for x in (q, k)]
    for_outputs, for_gradients = TOLERANCES[dtype]
    assert_close("y", call("reference")(*given), call("triton")(q, k), for_outputs)
    for e, g in zip(grads_of(call("reference"), given), grads_of(call("triton"), (q, k)), strict=True):
        assert_close("gradient", e, g, for_gradients)


def test_the_op_keeps_the_rules_of_torch():
    """Schema, fake tensors, registration of gradients; and a compiled call is one graph."""
    import memlm_kernels.rotary.triton  # noqa: F401

    q, k, cos, sin = (x.float().to(DEVICE) for x in inputs(2, 5, 2, 1, 6, 1))
    q, k = q.requires_grad_(), k.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.memlm.rotary, (q, k, cos, sin, False), test_utils=tests)
    compiled = torch.compile(lambda *x: rotary(*x, backend="triton"), fullgraph=True, backend="aot_eager")
    for e, g in zip(rotary(q, k, cos, sin, backend="triton"), compiled(q, k, cos, sin), strict=True):
        assert torch.equal(e, g)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 1, 6)}, r"q \[2, 3, 2, 6\] and k \[2, 4, 1, 6\] must be"),
        ({"cos": torch.zeros(2, 3, 1, 3)}, r"cos \[2, 3, 1, 3\]"),
        ({"sin": torch.zeros(1, 3, 1, 6)}, r"sin \[1, 3, 1, 6\]"),
    ],
)
def test_faults_are_named(change, message):
    given = {"q": torch.zeros(2, 3, 2, 6), "k": torch.zeros(2, 3, 1, 6)}
    with pytest.raises(ValueError, match=message):
        rotary(**(given | dict.fromkeys(("cos", "sin"), torch.zeros(2, 3, 1, 6)) | change))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_angles_get_no_gradient(backend):
    """With either backend: a trial of the kernels compares all gradients."""
    q, k, cos, sin = (x.float().to(DEVICE).requires_grad_() for x in inputs(2, 5, 2, 1, 6, 1))
    found = torch.autograd.grad(rotary(q, k, cos, sin, backend=backend).q.sum(), [q, cos, sin], allow_unused=True)
    assert found[0].any() and found[1] is None and found[2] is None
