"""The short convolution against its definition, and Triton's kernels against the reference."""

import pytest
import torch

from memlm_kernels import short_convolution
from memlm_kernels.short_convolution import naive
from memlm_kernels.testing import assert_close, grads_of
from tests.kernels.test_triton import BFLOAT16, DEVICE, TOLERANCES, poisoned  # noqa: F401

PACKED = torch.tensor([[2, 3, 0, 0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])


def inputs(sizes, width, length=11):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, length, sum(sizes)), (sum(sizes), width), (2, width - 1, sum(sizes))]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("positions", [None, PACKED], ids=["one", "packed"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize(
    ("sizes", "silu", "unit", "head_dim", "eps"),
    [([5], False, 0, 1, 0.0), ([4, 3], True, 0, 1, 0.0), ([6, 6, 4], True, 2, 3, 0.0), ([6, 4], True, 1, 2, 1e-3)],
)
def test_the_reference_is_the_definition(sizes, silu, unit, head_dim, eps, width, positions):
    given = inputs(sizes, width)

    def reference(x, weight, state):
        o = short_convolution(
            x.split(sizes, -1), weight, silu=silu, unit=unit, head_dim=head_dim, eps=eps, positions=positions,
            state=state, backend="reference",
        ).o  # fmt: skip
        assert [part.ndim for part in o] == [4] * unit + [3] * (len(sizes) - unit)
        return torch.cat([part.flatten(2) for part in o], -1)

    def definition(x, weight, state):
        return naive.short_convolution(x, weight, silu, sum(sizes[:unit]), head_dim, eps, positions, state)

    assert_close("o", definition(*given), reference(*given), 1e-12)
    for name, e, g in zip("xws", *(grads_of(f, given) for f in (definition, reference)), strict=True):
        assert_close(name, e, g, 1e-12)


@pytest.mark.parametrize(
    ("length", "sizes", "given", "width", "unit", "head_dim", "packed", "dtype"),
    [
        (70, [6, 6, 5], None, 4, 2, 6, True, torch.float32),
        (9, [70, 3], None, 3, 0, 1, True, torch.float32),
        (9, [12, 12, 5], [29], 4, 2, 6, True, torch.float32),
        (9, [16, 5], [7, 14], 2, 1, 16, False, torch.float32),
        (5, [130], None, 1, 1, 65, True, torch.float32),
        (2, [6], None, 4, 0, 1, False, torch.float32),
        (1, [6, 6], None, 4, 1, 3, True, torch.float32),
        (18, [16, 16, 8], None, 4, 2, 8, True, torch.float16),
        pytest.param(18, [16, 16, 8], None, 4, 2, 8, True, *BFLOAT16.values, marks=BFLOAT16.marks),
    ],
)
def test_the_kernels_are_the_reference(length, sizes, given, width, unit, head_dim, packed, dtype):
    """``given``: other sizes of the inputs; for packed rows, documents that start at a tile's end and close to it."""
    x, weight, state = (part.to(DEVICE) for part in inputs(sizes, width, length))
    ends = [
        torch.arange(length) + 5,
        torch.cat([torch.arange(4, 4 + length // 2), torch.arange(length - length // 2)]),
    ]
    options = {
        "sizes": sizes,
        "silu": True,
        "unit": unit,
        "head_dim": head_dim,
        "dtype": torch.float32 if unit else None,
    }
    options |= {"positions": torch.stack(ends).to(DEVICE) if packed else None}
    found = {}

    def call(backend):
        def run(x, weight, state):
            o, state = short_convolution(x.split(given or sizes, -1), weight, **options, state=state, backend=backend)
            found[backend] = [*o, state]
            return torch.cat([part.double().flatten(2) for part in o], -1)

        return run

    rounded = [x.to(dtype), weight.float(), state.float()]
    expected = grads_of(call("reference"), [part.double() for part in rounded])
    gradients = grads_of(call("triton"), rounded)
    for_outputs, for_gradients = TOLERANCES[dtype]
    for i, (e, g) in enumerate(zip(*found.values(), strict=True)):
        assert g.dtype == (torch.float32 if unit and i < len(sizes) else dtype)
        assert_close(f"output {i}", e, g, for_outputs)
    for name, e, g in zip("xws", expected, gradients, strict=True):
        assert_close(f"gradient of {name}", e, g, for_gradients)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_the_state_holds_the_last_real_inputs(length, backend):
    x, weight, state = (part.float().to(DEVICE) for part in inputs([3, 2], 4, length))
    lengths = torch.tensor([length, length // 2], device=DEVICE)
    parts = x.split([3, 2], -1)
    for of_rows in (None, lengths):
        after = short_convolution(parts, weight, lengths=of_rows, state=state, backend=backend).state
        for row in range(2):
            real = length if of_rows is None else int(lengths[row])
            assert torch.equal(after[row], torch.cat([state[row], x[row, :real]])[-3:])
    y, whole = short_convolution(parts, weight, state=state, backend=backend)
    joined, same = short_convolution([torch.cat([state, x], 1)], weight, sizes=[3, 2], backend=backend)
    assert torch.equal(whole, same) and all(torch.equal(a, b) for a, b in zip(y, joined, strict=True))


def test_rows_in_pieces_are_rows_at_once():
    x, weight, state = (part.float().to(DEVICE) for part in inputs([6, 5], 4, 13))
    options = {"silu": True, "unit": 1, "head_dim": 3, "backend": "triton"}
    y, after = short_convolution(x.split([6, 5], -1), weight, state=state, **options)
    for cuts in ([13], [8, 5], [1, 2, 3, 7]):
        parts, kept = [], state
        for piece in x.split(cuts, 1):
            o, kept = short_convolution(piece.split([6, 5], -1), weight, state=kept, **options)
            parts.append(o)
        for i in range(2):
            assert_close(str(cuts), y[i], torch.cat([o[i] for o in parts], 1), 1e-6)
        assert torch.equal(kept, after)


def test_a_nan_stays_in_its_document_and_behind_its_token():
    x, weight, state = (part.float().to(DEVICE) for part in inputs([5], 4, 11))
    x[0, 3], x[1, 6] = float("nan"), float("nan")
    x.requires_grad_()
    (y,), _ = short_convolution([x], weight, silu=True, positions=PACKED.to(DEVICE), state=state, backend="triton")
    bad = y.isnan().any(-1)
    assert bad[0].nonzero().flatten().tolist() == [3, 4, 5, 6] and bad[1].nonzero().flatten().tolist() == [6, 7, 8, 9]
    y[0, 8:].sum().backward()
    assert not x.grad[0, 8:].isnan().any()


def test_the_op_keeps_the_rules_of_torch():
    """Schema, fake tensors, registration of gradients; and a compiled call is one graph."""
    import memlm_kernels.short_convolution.triton  # noqa: F401

    x, weight, state = (part.float().to(DEVICE).requires_grad_() for part in inputs([6, 5], 3))
    parts = [part.contiguous() for part in x.detach().split([6, 5], -1)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    x0, x1 = (part.requires_grad_() for part in parts)
    arguments = (x0, x1, None, weight, state, PACKED.to(DEVICE), True, 1, 3, 0.0, 0.5, torch.float32)
    torch.library.opcheck(torch.ops.memlm.short_convolution, arguments, test_utils=tests)
    arguments = [part.detach() if isinstance(part, torch.Tensor) else part for part in arguments]
    torch.library.opcheck(torch.ops.memlm.short_convolution_step, arguments, test_utils=tests[::2])

    def call(x, weight, state, backend):
        options = {"silu": True, "unit": 1, "head_dim": 3, "dtype": torch.float32, "backend": backend}
        return short_convolution(x.split([6, 5], -1), weight, state=state, **options).o[0]

    compiled = torch.compile(lambda *x: call(*x, "triton"), fullgraph=True, backend="aot_eager")
    assert_close("y", call(x, weight, state, "reference"), compiled(x, weight, state), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [3, 4]}, r"sizes=\[3, 4\] must be at least 1 and sum to the 6 channels"),
        ({"weight": torch.zeros(5, 3)}, r"weight \[5, 3\] must be \[C, W\] with C=6"),
        ({"unit": 1, "head_dim": 4}, "must be multiples of head_dim=4"),
        ({"state": torch.zeros(2, 3, 6)}, r"state \[2, 3, 6\] must be \[B, W - 1, C\]"),
        ({"positions": torch.zeros(2, 3).long()}, r"positions \[2, 3\] must be \[B, T\]"),
        ({"state": None, "positions": torch.zeros(2, 7).long()}, "without state"),
    ],
)
def test_faults_are_named(change, message):
    call = {"weight": torch.zeros(6, 3), "state": torch.zeros(2, 2, 6)} | change
    with pytest.raises(ValueError, match=message):
        short_convolution([torch.zeros(2, 7, 6)], call.pop("weight"), **call)
