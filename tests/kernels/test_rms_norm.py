"""The norm with its gates against its definition, and Triton's kernels against the reference."""

import pytest
import torch

from memlm_kernels import rms_norm
from memlm_kernels.rms_norm import naive
from memlm_kernels.testing import assert_close, grads_of
from tests.kernels.test_triton import BFLOAT16, DEVICE, TOLERANCES, poisoned  # noqa: F401

KINDS = ("norm", "gate", "mix")


def inputs(kind, *shape):
    g = torch.Generator().manual_seed(0)
    x, gate, other = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    weight = torch.rand(shape[-1], generator=g, dtype=torch.float64)
    return [x, weight, gate, other][: 2 + KINDS.index(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_definition(kind):
    given = inputs(kind, 7, 5)

    def definition(x, weight, gate=None, other=None):
        return naive.rms_norm(x, weight, gate, other, 1e-3)

    def reference(*tensors):
        return rms_norm(*tensors, eps=1e-3, backend="reference")

    assert_close("y", definition(*given), reference(*given), 1e-12)
    for i, (e, g) in enumerate(zip(*(grads_of(f, given) for f in (definition, reference)), strict=True)):
        assert_close(f"gradient {i}", e, g, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("shape", [(2, 37, 3, 6), (3, 130), (1, 2)], ids=str)
def test_the_kernels_are_the_reference(shape, dtype, kind):
    rounded = [part.to(DEVICE, torch.float32 if i == 1 else dtype) for i, part in enumerate(inputs(kind, *shape))]
    found = {}

    def call(backend):
        def run(*tensors):
            found[backend] = rms_norm(*tensors, eps=1e-6, backend=backend)
            return found[backend]

        return run

    expected = grads_of(call("reference"), [part.double() for part in rounded])
    gradients = grads_of(call("triton"), rounded)
    assert found["triton"].dtype == dtype
    for_outputs, for_gradients = TOLERANCES[dtype]
    assert_close("y", found["reference"], found["triton"], for_outputs)
    for i, (e, g) in enumerate(zip(expected, gradients, strict=True)):
        assert_close(f"gradient {i}", e, g, for_gradients)


def test_weights_of_many_programs_are_summed_once():
    x, weight, gate = (part.float().to(DEVICE) for part in inputs("gate", 70, 130))
    runs = [lambda *t, by=by: rms_norm(*t, eps=1e-6, backend=by) for by in ("reference", "triton")]
    expected, got = (grads_of(run, [x, weight, gate]) for run in runs)
    assert_close("weight", expected[1], got[1], 1e-5)


def test_the_gate_gives_shape_and_type():
    x, weight, gate = (part.float().to(DEVICE) for part in inputs("gate", 2, 3, 4))
    for backend in ("reference", "triton"):
        y = rms_norm(x, weight, gate.flatten(1).half(), eps=1e-6, backend=backend)
        assert y.shape == (2, 12) and y.dtype == torch.float16
        assert rms_norm(x, weight, eps=1e-6, dtype=torch.float16, backend=backend).dtype == torch.float16


def test_a_nan_stays_in_its_vector():
    x, weight, gate = (part.float().to(DEVICE) for part in inputs("gate", 6, 3))
    x[2, 1] = float("nan")
    y = rms_norm(x, weight, gate, eps=1e-6, backend="triton")
    assert y.isnan().any(-1).tolist() == [False, False, True, False, False, False]


def test_the_op_keeps_the_rules_of_torch():
    """Schema, fake tensors, registration of gradients; and a compiled call is one graph."""
    import memlm_kernels.rms_norm.triton  # noqa: F401

    given = [part.float().to(DEVICE).requires_grad_() for part in inputs("mix", 5, 3)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.memlm.rms_norm, (*given, 1e-6, torch.float32), test_utils=tests)

    def call(*tensors):
        return rms_norm(*tensors, eps=1e-6, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close("y", call(*given), compiled(*given), 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"x \[2, 3\] and weight \[4\]"),
        ({"gate": torch.zeros(2, 4)}, "must have the elements of x"),
        ({"other": torch.zeros(2, 3)}, "other is given and gate is not"),
        ({"dtype": torch.int64}, "is no type of floats"),
    ],
)
def test_faults_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.zeros(2, 3), "weight": torch.zeros(3), "eps": 1e-6} | change)
