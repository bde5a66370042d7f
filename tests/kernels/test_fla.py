"""The backend ``fla`` against the references, if flash-linear-attention is installed. Its kernels run on a GPU, or
else in Triton's interpreter.
"""

import importlib.metadata
import importlib.util
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from memlm_kernels import delta_rule, linear_attention
from memlm_kernels.recurrence import fla as peer
from memlm_kernels.recurrence.fla import limit_of
from tests.kernels.test_linear_recurrences import OPS, inputs, run

INSTALLED = importlib.util.find_spec("fla") is not None
needs_fla = pytest.mark.skipif(
    not INSTALLED, reason="flash-linear-attention is not installed: pip install -e '.[fla]'"
)


@pytest.fixture
def fla(monkeypatch):
    """Its kernels without a GPU need no search for tiles, for which a driver is necessary, and loops over tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fla.ops  # noqa: F401
    if torch.cuda.is_available():
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import _implicit_cvt

    def take_the_first(tuner, *args, **kwargs):
        return tuner.fn.run(*args, **{**kwargs, **tuner.configs[0].all_kwargs()})

    monkeypatch.setattr(Autotuner, "run", take_the_first)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops.") and name.rpartition(".")[2].startswith(("chunk", "wy_fast", "cumsum")):
            monkeypatch.setattr(module, "range", lambda *x: map(_implicit_cvt, range(*x)), raising=False)


@needs_fla
@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("cu", [None, [[0, 0, 10, 10, 70], [0, 4, 5, 40, 75]]], ids=["rows", "segments"])
@pytest.mark.parametrize("op", OPS)
def test_the_same_numbers(op, cu):
    from memlm_kernels.testing import assert_close, grads_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if op == "delta" else torch.float32
    tensors = [x[:2].to(device) for x in inputs(op, heads=2, keys=16, values=16)]
    tensors[0] = F.normalize(tensors[0], dim=-1)
    tensors = [x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(tensors)]
    cu = None if cu is None else torch.tensor(cu, device=device)
    tensors.append(torch.randn(2, 1 if cu is None else 4, 2, 16, 16, device=device))

    def out(backend):
        def call(*x):
            return torch.cat([y.flatten() for y in run(op, x[:-1], cu_seqlens=cu, state=x[-1], backend=backend)])

        return call

    tolerances = (1e-3, 2e-3) if dtype == torch.float16 else (2e-6, 5e-6)
    exact = [x.double() for x in tensors]
    assert_close("o and states", out("reference")(*exact), out("fla")(*tensors), tolerances[0])
    pairs = zip(grads_of(out("reference"), exact), grads_of(out("fla"), tensors), strict=True)
    for i, (expected, got) in enumerate(pairs):
        assert_close(f"gradient {i}", expected, got, tolerances[1])


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("linear", dict(dtype=torch.float16, keys=5), "even heads in 16 bits, not K=5, V=5"),
        ("delta_decay", dict(keys=300, dtype=torch.float32), "at most 256 channels, not K=300"),
        ("delta", dict(dtype=torch.float32), "float16 and bfloat16, not float32"),
        ("linear_channel", dict(dtype=torch.float32), None),
    ],
)
def test_what_fla_does_not_take_is_named(op, changed, message):
    q, _, v, *gates = inputs(op, 5, **changed)
    beta = gates.pop(0) if op.startswith("delta") else None
    limit = limit_of(q, v, gates[0] if gates else None, beta)
    assert limit is None if message is None else message in limit


@pytest.mark.skipif(INSTALLED, reason="says why it cannot run where it is not installed")
def test_asking_for_what_is_not_installed_says_so():
    q = torch.zeros(1, 4, 1, 16)
    for call in (
        lambda: linear_attention(q, q, q, backend="fla"),
        lambda: delta_rule(q, q, q, q[..., 0], backend="fla"),
    ):
        with pytest.raises(ValueError, match=r"backend='fla' cannot run here: .* not installed \(pip install 'memlm"):
            call()


@pytest.mark.parametrize(
    ("version", "refused"), [("0.6.1", None), ("0.5.2", "0.5.2 has other"), (None, "of no version")]
)
def test_a_checkout_on_the_path_has_no_metadata(version, refused, monkeypatch):
    checkout = types.ModuleType("fla")
    if version:
        checkout.__version__ = version

    def no_metadata(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "fla", checkout)
    monkeypatch.setattr(peer, "missing", lambda *names: None)
    monkeypatch.setattr(peer, "missing_triton", lambda device: None)
    monkeypatch.setattr(importlib.metadata, "version", no_metadata)
    said = peer._missing("cuda")
    assert said is None if refused is None else refused in said
