"""Every backward that is written here gives the same products inside autocast as outside."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import memlm.memory
import memlm_kernels
from memlm.layers import RMSNorm, ShortConv
from memlm_kernels.ops import Op
from memlm_kernels.short_convolution import unit_length
from memlm_kernels.testing import assert_close
from tests.conftest import MEMORIES, build
from tests.kernels.test_inputs import BOTH, OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def written_here() -> set[str]:
    """Functions of autograd, and ops of torch with a gradient, of all modules but the one that passes tensors between
    processes as they are.
    """
    found, rooms = set(), (memlm_kernels, memlm.memory)
    names = [info.name for room in rooms for info in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")]
    names.remove("memlm.memory.stretches")
    for module in map(importlib.import_module, ("memlm.layers", *names)):
        for name, x in vars(module).items():
            if inspect.isclass(x) and issubclass(x, torch.autograd.Function):
                found.add(name)
            elif getattr(x, "_backward_fn", None) is not None:
                found.add(x._qualname.replace("::", "_"))
            elif isinstance(x, Op) and x.differentiable is not None:
                found.add(x.differentiable.__name__)
    return found


def name_of(node: Any) -> str | None:
    """The name in ``written_here``; None for a backward of torch's own."""
    cls = getattr(node, "_forward_cls", None)
    if cls is None or "memlm" not in f"{cls.__module__}.{cls.__name__}":
        return None
    return cls.__name__.removeprefix("GeneratedBackwardFor_").removesuffix("_default")


def nodes(outputs: list[Tensor]) -> Iterator[Any]:
    waiting, known = [x.grad_fn for x in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            waiting += [before for before, _ in node.next_functions]
            yield node


def of_op(name: str, by: str, **changed: Any) -> list[Tensor]:
    tensors = OPS[name].make()
    for x in OPS[name].floats:
        tensors[x].requires_grad_()
    return OPS[name].run(tensors, backend=by, **changed)


def short_conv() -> list[Tensor]:
    conv, x = ShortConv(4, 3, silu=True).to(DEVICE), torch.rand(2, 6, 4, device=DEVICE, requires_grad=True)
    return [conv([x], None, None, None).o[0]]


def in_compiled_code(name: str) -> list[Tensor]:
    """A loop as compiled code calls it, an op of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return of_op(name, "reference")


CALLS = {f"{name}-{by}": (lambda name=name, by=by: of_op(name, by)) for name, by in BOTH} | {
    "a mean over queries": lambda: of_op(
        "route_documents", "reference", query_reduce="mean", return_scores=True
    ),
    "grouped_linear-by_group": lambda: of_op("grouped_linear", "by_group"),
    "a loop in compiled code": lambda: in_compiled_code("large_chunk_memory"),
    "norm": lambda: [RMSNorm(4, eps=1e-6)(torch.rand(2, 6, 4, device=DEVICE, requires_grad=True))],
    "unit": lambda: [unit_length(torch.rand(2, 6, 4, device=DEVICE, requires_grad=True))],
    "short convolution": short_conv,
}  # fmt: skip


def test_gradients_inside_of_autocast_are_those_outside():
    seen = set()
    for call, run in CALLS.items():
        # The interpreter has no products of bfloat16.
        with torch.autocast(DEVICE, torch.float16):
            outputs = [x for x in run() if x.requires_grad]
        for node in nodes(outputs):
            if (name := name_of(node)) is None:
                continue
            seen.add(name)
            given = [torch.rand(x.shape, device=DEVICE).to(x.dtype) for x in node._input_metadata]
            expected = node.apply(*given)
            with torch.autocast(DEVICE, torch.float16):
                got = node.apply(*given)
            assert any(x is not None and x.any() for x in expected), (call, name)
            for e, g in zip(expected, got, strict=True):
                assert (e is None and g is None) or torch.equal(e, g), (call, name)
    assert seen == written_here()


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_model_learns_inside_of_autocast(memory):
    """Gradients equal those outside autocast, except for the rounding of torch's own backward."""
    model = build(memory, torch.float32).train()
    ids = torch.randint(0, 200, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    found = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward(retain_graph=not inside)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_close("gradients", *found, 1e-2)
