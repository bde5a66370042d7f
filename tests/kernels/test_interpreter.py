"""The cheaper interpreter of conftest.py computes Triton's own bits."""

import os

import pytest
import torch

from memlm_kernels.calls import CALLS
from tests import processes

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")


FEW = ("delta_rule, decay", "merge_topk", "rotary")


def results(kinds):
    """Whether the interpreter is Triton's own, and results and gradients of a call of each kind."""
    from triton.runtime import interpreter

    found = {}
    for kind in kinds:
        call = CALLS[kind].of(T=18, C=16)
        for dtype in (torch.float32, torch.float16) if call.triton else ():
            inputs = call.make(dtype=dtype)
            floats = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
            out = call.run(inputs, backend="triton")
            # Sums of squares, so that gradients differ from element to element.
            loss = sum(x.float().square().sum() for x in out if x.requires_grad)
            grads = torch.autograd.grad(loss, floats, allow_unused=True) if torch.is_tensor(loss) else ()
            found[kind, dtype] = [x.detach() for x in (*out, *grads) if x is not None]
    return interpreter.InterpretedFunction.__call__.__module__ == interpreter.__name__, found


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU runs the kernels")
@pytest.mark.parametrize("kinds", [FEW, pytest.param(tuple(CALLS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_its_bits_are_tritons(tmp_path, kinds):
    code = f"import torch; from {__name__} import results; torch.save(results({kinds}), 'own')"
    done = processes.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (own, expected), (not_own, got) = torch.load(tmp_path / "own", weights_only=False), results(kinds)
    assert own and not not_own and expected.keys() == got.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, got[name], strict=True)), name
