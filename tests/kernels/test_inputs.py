"""Every op on unusual tensors, which a kernel alone would not survive: it takes them, or its error names the fault."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import memlm_kernels
from memlm_kernels import (
    RouterShard,
    backend,
    grouped_linear,
    merge_topk,
    nominate_documents,
    read_memory,
    route_documents,
)
from memlm_kernels.calls import CALLS, DEVICE
from memlm_kernels.grouped_linear import linear_of_group
from memlm_kernels.testing import Watch, assert_close
from tests.kernels.test_triton import poisoned  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")

TOKENS = 6
# Kernels would count with narrow integers, which overflow.
NO_INTEGERS = [torch.float32, torch.bool, torch.int16, torch.int8, torch.uint8]


# An op has one kind of call here, because kinds share their checks. Memories of two layers have their own kernels.
KINDS = ("linear_attention", "linear_attention, channels", "delta_rule, decay", "delta_rule, channels")
OPS = {name.removesuffix(", decay"): call for name, call in CALLS.items() if name not in KINDS}


def of_group(x: Tensor, weight: Tensor, group: Tensor, backend: str | None = None) -> Tensor:
    return linear_of_group(x, weight, group)


# It is not public.
OPS["linear_of_group"] = OPS["grouped_linear"]._replace(
    call=of_group, integers={"group": lambda n: torch.arange(n.T) % 2}, triton=False
)


def rows(*numbers: int) -> Tensor:
    return torch.tensor([numbers] * 2)


BOTH = [(name, b) for name, op in OPS.items() for b in ("reference", "triton") if op.triton or b == "reference"]
both, every = pytest.mark.parametrize(("name", "by"), BOTH), pytest.mark.parametrize("name", OPS)
by_triton = pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.triton])


def test_every_op_is_here():
    """``MemoryRoutes`` and the choice of a backend take no floats."""
    ops = {name for name in memlm_kernels.__all__ if name.islower()} - {"choose", "set_backend"}
    assert ops <= OPS.keys()


@pytest.fixture
def unread(monkeypatch):
    """Values of indices are not checked, as on a GPU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@every
def test_types_that_no_op_takes(name):
    op = OPS[name]
    for changed, shape in op.make().items():
        wrong = [torch.int32, torch.bool, torch.complex64] if changed in op.floats else NO_INTEGERS
        for dtype in wrong:
            # Errors name the type in one of three ways.
            with pytest.raises(ValueError, match=f"is {str(dtype)[6:]}; give|of torch.{str(dtype)[6:]} must|is torch"):
                op.run(op.make() | {changed: torch.zeros(shape.shape, device=DEVICE, dtype=dtype)})


@every
def test_types_that_do_not_mix(name):
    op = OPS[name]
    if len(op.floats) < 2:
        return
    for changed in op.floats:
        tensors = op.make()
        with pytest.raises(ValueError, match="float64"):
            op.run(tensors | {changed: tensors[changed].double()})


@by_triton
def test_what_the_kernels_do_not_take_names_what_does(name):
    op = OPS[name]
    if op.floats:
        with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .*float64; use one of auto, .*refer"):
            op.run(op.make(dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match=r"Triton compiles nothing for meta.*; use one of auto, .*reference"):
        op.run({name: x.to("meta") for name, x in op.make().items()}, backend="triton")


@by_triton
def test_rows_too_long_for_32_bits(name, unread):
    """They are refused by their shapes, before anything of that size is allocated."""
    op = OPS[name]
    if name == "merge_topk":
        return
    tensors = {
        n: x.flatten()[:1].expand([size * 2**31 // TOKENS if size % TOKENS == 0 else size for size in x.shape])
        for n, x in op.make().items()
    }
    tensors |= {n: x for n, x in op.make().items() if n == "cu_seqlens"}
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: its kernels take at most \d+ .*, not "):
        op.run(tensors, backend="triton")


@every
def test_another_device(name):
    op = OPS[name]
    for changed in {**op.floats, **op.integers}:
        tensors = op.make()
        if len(tensors) > 1:
            with pytest.raises(ValueError, match=r"is on .* on .*; move them to one device"):
                op.run(tensors | {changed: tensors[changed].to("meta")})


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "q" in op.floats])
def test_no_heads_and_no_channels(name):
    op = OPS[name]
    heads = op.make()["q"].shape[2]
    for size in (heads, 4):
        shapes = {n: [x.shape[0], *(0 if s == size else s for s in x.shape[1:])] for n, x in op.make().items()}
        tensors = {n: x.new_empty(shapes[n]) if n in op.floats else x for n, x in op.make().items()}
        with pytest.raises(ValueError, match="has no elements; give every size"):
            op.run(tensors)


@both
def test_layouts(name, by):
    """All kinds of strides, an offset by one element, rows that share memory."""
    op = OPS[name]
    tensors = op.make()
    strided = {n: torch.stack([x, x], -1)[..., 0] for n, x in tensors.items()}
    turned = {n: x.mT.contiguous().mT for n, x in tensors.items() if x.ndim > 1}
    offset = {n: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for n, x in tensors.items()}
    alike = {n: x[:1].expand_as(x) if len(x) == 2 else x for n, x in tensors.items()}
    assert not any(x.is_contiguous() for x in strided.values() if x.numel() > 1)
    with torch.no_grad():
        expected = op.run(tensors, backend=by)
        copied = op.run({n: x.contiguous() for n, x in alike.items()}, backend=by)
        for wanted, other in ((expected, strided), (expected, tensors | turned), (expected, offset), (copied, alike)):
            for a, b in zip(wanted, op.run(other, backend=by), strict=True):
                # torch's own products depend on strides.
                assert_close(name, a, b, 0.0 if by == "triton" else 1e-6)


@by_triton
def test_types_that_mix(name):
    """The first tensor has 16 bits, the others have 32."""
    op = OPS[name]
    if len(op.floats) < 2 or name in ("chunk_topk", "route_documents"):
        return
    tensors = op.make()
    first = next(iter(op.floats))
    tensors[first] = tensors[first].half()
    with torch.no_grad():
        for expected, got in zip(*(op.run(tensors, backend=b) for b in ("reference", "triton")), strict=True):
            assert expected.dtype == got.dtype
            assert_close(name, expected, got, 1e-3)


@every
@torch.no_grad()
def test_16_bits_beside_32_are_the_same_numbers_in_32(name):
    """Whichever tensor has 16 bits; an output may be rounded to them."""
    op = OPS[name]
    for narrow in op.floats if len(op.floats) > 1 else ():
        tensors = op.make()
        given = tensors[narrow].half()
        expected, got = (op.run(tensors | {narrow: x}, backend="reference") for x in (given.float(), given))
        for a, b in zip(expected, got, strict=True):
            assert_close(f"with {narrow}", a, b.to(a.dtype), 1e-3)


@both
@pytest.mark.parametrize(("length", "rows"), [(0, 2), (TOKENS, 0), (0, 0)])
def test_no_tokens_and_no_rows(name, by, length, rows):
    op = OPS[name]
    # Tensors that all rows share, and the groups of a product, have other sizes.
    shared = ("grouped_linear", "linear_of_group")
    tensors = {n: x[:rows] if len(x) == 2 and name not in shared else x for n, x in op.make(length).items()}
    for n in op.floats:
        tensors[n].requires_grad_()
    out = [x for x in op.run(tensors, backend=by) if x.requires_grad]
    if out:
        sum(x.sum() for x in out).backward()
    for n in op.floats:
        grad = tensors[n].grad
        assert grad is None or (grad.shape == tensors[n].shape and grad.isfinite().all())


@torch.no_grad()
def test_document_numbers_of_64_bits():
    index, score = torch.tensor([[2**33 + 5, 5, 2**62]], device=DEVICE), torch.tensor([[1.0, 3.0, 2.0]], device=DEVICE)
    for by in ("reference", "triton"):
        assert merge_topk([(index, score)], top_k=4, backend=by).number.tolist() == [[5, 2**62, 2**33 + 5, -1]]
    k, document = torch.rand(1, 3, 1, 4, device=DEVICE), torch.tensor([[1, 2**32 + 1, 2**40]], device=DEVICE)
    for by in ("reference", "triton"):
        settings = dict(top_k=2, num_documents=3, backend=by)
        assert route_documents(k, k, document, **settings).document.tolist() == [[[1, -1]]]


def memories(**changed: Any) -> Any:
    op = OPS["segmented_neural_memory"]
    return op.run(op.make() | changed)


def routing(x: Tensor, document: Tensor, **settings: Any) -> Any:
    return route_documents(x[..., None, None], x[..., None, None], document, top_k=1, **settings)


def reading(x: Tensor, *weights: Tensor, **settings: Any) -> Any:
    return read_memory(x[None, :, None], weights, **settings)


def nominating(x: Tensor, asks: Tensor | None = None, **changed: Any) -> Any:
    parts = {"k": x[:, None], "document": torch.tensor([0, 0]), "number": torch.tensor([7])}
    shard = RouterShard(**(parts | {name: changed.pop(name) for name in parts if name in changed}))
    return nominate_documents(x[None, :, None], [shard], asks=asks, **({"top_k": 1} | changed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: merge_topk([(x.long(), x)], top_k=0), "top_k=0"),
        (lambda x: merge_topk([], top_k=1), "number of parts, 0"),
        (lambda x: merge_topk([(x.long(), x[:, :1])], top_k=1), r"score \[2, 1\] must have equal shapes"),
        (lambda x: memories(chunk_size=0), "chunk_size=0"),
        (lambda x: memories(momentum=None), r"\[B, S, 2, H, K, V\], without"),
        (lambda x: memories(position=x.long()), r"state.position \[2, 3\] must be"),
        (lambda x: sparse(129), "at most 128 chunks of each token, not 129"),
        (lambda x: routing(x, x.long(), num_documents=2**31, backend="triton"), "num_documents=2147483648"),
        (lambda x: routing(x, torch.tensor([[0, 2, 1]] * 2), num_documents=3), "document decreases"),
        (lambda x: grouped_linear(x, x[None], torch.tensor([1])), "sizes add up to 1 rows, but x has 2"),
        (lambda x: linear_of_group(x, x[None], torch.tensor([1, 0])), "group has numbers from 0 to 1"),
        (lambda x: linear_of_group(x, x[None], torch.tensor([0])), r"group \[1\] must be"),
        (lambda x: reading(x, x[None, :, None]), r"weights \[\[1, 2, 1, 3\]\] must chain \[B, H, in, out\]"),
        (lambda x: reading(x, x[0].expand(3, 3)), r"weights \[\[3, 3\]\] must chain \[B, H, in, out\]"),
        (lambda x: reading(x), r"weights \[\] must chain"),
        (lambda x: reading(x, torch.eye(3)[None, None], activation="tanh"), "activation='tanh' must be one of gelu, "),
        (lambda x: reading(x, torch.eye(3)[None, None], norm=(x, x)), r"norm \[\[2, 3\], \[2, 3\]\] must be gain "),
        (lambda x: reading(x, x.mT[None, None], norm=(x[:1, :2],) * 2), "norm needs K=3 equal to V=2"),
        (lambda x: nominating(x, top_k=0), "top_k=0"),
        (lambda x: nominating(x, held=0), "held=0"),
        (lambda x: nominating(x, similarity="l2"), "similarity='l2' must be one of cosine, dot"),
        (lambda x: nominating(x, query_reduce="sum"), "query_reduce='sum' must be one of mean, max"),
        (lambda x: nominating(x, asks=torch.ones(1, 2)), "asks is torch.float32; give bool"),
        (lambda x: nominating(x, asks=torch.ones(2, 1) > 0), r"asks \[2, 1\] must be \[B, M\] = \[1, 2\]"),
        (lambda x: nominating(x, number=torch.zeros(0).long()), "document has numbers from 0 to 0; give numbers of"),
        (lambda x: nominating(x, document=torch.zeros(1).long()), r"shards\[0\].document \[1\] must be"),
        (lambda x: nominating(x, k=x[:, None].double()), r"shards\[0\].k is float64, q float32"),
        (
            lambda x: nominating(x, k=x[:, None].to(torch.float8_e4m3fn)),
            r"shards\[0\].k is float8_e4m3fn; .* has a scale",
        ),
    ],
)
def test_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def sparse(count: int) -> Any:
    index = torch.full((2, TOKENS, 1, count), -1, device=DEVICE)
    op = OPS["chunk_sparse_attention"]
    return op.run(op.make() | {"index": index}, backend="triton")


@pytest.mark.parametrize("by", ["auto", "reference", "triton"])
def test_no_queries_of_a_window(by):
    op = OPS["prefix_window_attention"]
    tensors = op.make() | {n: x[:, :0].requires_grad_() for n, x in op.make().items() if n in ("q", "prefix_q")}
    out = op.run(tensors | {"positions": tensors["positions"][:, :0]}, backend=by)[0]
    out.sum().backward()
    assert out.shape == (2, 0, 2, 3) and tensors["q"].grad.shape == tensors["q"].shape


def test_an_empty_prefix():
    op = OPS["prefix_window_attention"]
    for by in ("reference", "triton"):
        tensors = op.make()
        tensors |= {name: tensors[name][:, :0].requires_grad_() for name in ("prefix_k", "prefix_v")}
        op.run(tensors, backend=by)[0].sum().backward()
        assert tensors["prefix_k"].grad.shape == (1, 0, 1, 4)


@every
def test_nothing_is_copied_to_the_device_nor_asked_of_it(name, monkeypatch):
    """Except for values that are read on a CPU, where reading costs nothing."""
    op = OPS[name]
    tensors = op.make()

    def copies(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a tensor from the host's numbers")

    monkeypatch.setattr(torch, "tensor", copies)
    monkeypatch.setattr(torch, "as_tensor", copies)
    monkeypatch.setattr(Tensor, "new_tensor", copies)
    settings = [{}] if "cu_seqlens" not in tensors or name != "segmented_neural_memory" else [{}, {"cu_seqlens": None}]
    for changed in settings:
        if changed:
            tensors |= {n: tensors[n][:, :1] for n in ("memory", "position")}
        with Watch() as watch:
            op.run(tensors | changed)
        assert not watch.asked


def test_auto_says_once_what_it_took(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_announced", set())
    op = OPS["linear_attention"]
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        for _ in range(3):
            op.run(op.make())
    assert caplog.messages == ["linear_attention: backend reference"]


@pytest.mark.parametrize("name", ["linear_attention", "delta_rule"])
def test_a_step_keeps_the_rules_of_torch(name):
    import memlm_kernels.recurrence.step  # noqa: F401

    x = OPS[name].make()
    gates = (x.get("beta"), x.get("log_decay"), x["cu_seqlens"], x["state"])
    tests = ("test_schema", "test_faketensor")
    for told in (False, True):
        arguments = (x["q"], x["k"], x["v"], *gates, told)
        torch.library.opcheck(torch.ops.memlm.recurrence_step, arguments, test_utils=tests)
