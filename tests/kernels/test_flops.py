"""The FLOPs that torch counts for Triton's ops, against the products of their kernels in the interpreter."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from memlm_kernels import (
    MemoryRoutes,
    chunk_topk,
    combine_reads,
    delta_rule,
    dispatch_tokens,
    invert_chunks,
    large_chunk_memory,
    linear_attention,
    merge_topk,
    neural_memory,
    route_documents,
    segment_mean_pool,
)
from memlm_kernels.testing import import_triton_ops

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")
import_triton_ops()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter says what its products are")

# Keys, values, hidden channels; no larger than a tile, so that nothing is computed twice.
KEYS, VALUES, HIDDEN = 32, 16, 32


@pytest.fixture
def made(monkeypatch):
    """Twice the multiply-adds of all products so far."""
    from triton.runtime.interpreter import InterpreterBuilder

    products, create = [], InterpreterBuilder.create_dot

    def create_dot(builder, a, b, *rest):
        products.append(2 * a.data.size * b.data.shape[-1])
        return create(builder, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return products


def counted(counter):
    """The FLOPs of this package's ops; torch counts its own products too."""
    return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op).startswith("memlm."))


def heads(length, *sizes):
    return [F.normalize(torch.randn(1, length, 2, size), dim=-1).requires_grad_() for size in sizes]


def recurrence(op, gates, learns=True):
    q, k, v = heads(320 if learns else 1, KEYS, KEYS, VALUES)
    options = [-torch.rand(q.shape[:3], requires_grad=True) for _ in range(gates)]
    with torch.set_grad_enabled(learns):
        return op(q, k, v, *options, backend="triton")[0]


def memory(momentum, layers):
    q, k, v = heads(32, KEYS, KEYS, VALUES)
    gate = torch.rand(q.shape[:3], requires_grad=True)
    sizes = [KEYS, *[HIDDEN] * (layers - 1), VALUES]
    weights = [torch.randn(2, i, o, requires_grad=True) for i, o in itertools.pairwise(sizes)]
    given = (q, k, v, gate, gate if momentum else None, gate)
    return neural_memory(*given, weights=weights, chunk_size=16, backend="triton").o


def chunks():
    q, k = heads(32, KEYS)[0], heads(64, KEYS)[0]
    return chunk_topk(q, k, top_k=3, backend="triton")


def documents(running):
    q, k = heads(16, KEYS)[0].detach(), torch.randn(1, 64, 1, KEYS)
    document = torch.arange(64)[None] // 8
    return route_documents(q, k, document, top_k=2, num_documents=8, running=running, backend="triton").score


CALLS = {
    "linear attention": lambda: recurrence(linear_attention, 0),
    "linear attention, decay": lambda: recurrence(linear_attention, 1),
    "delta rule": lambda: recurrence(delta_rule, 1),
    "delta rule, decay": lambda: recurrence(delta_rule, 2),
    "memory": lambda: memory(True, 1),
    "memory without momentum": lambda: memory(False, 1),
    "memory of two layers": lambda: memory(True, 2),
    "choice of chunks": chunks,
    "documents of a row": lambda: documents(False),
    "documents of a token": lambda: documents(True),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_counted_is_what_the_kernels_multiply(call, made):
    with FlopCounterMode(display=False) as counter:
        out = CALLS[call]()
        forward = counted(counter)
        assert forward == sum(made) > 0
        if out.requires_grad:
            out.sum().backward()
            assert counted(counter) == sum(made) > forward


def test_a_step_counts_as_what_it_would_be_in_products(made):
    """It goes from token to token without products: a read, a correction and a write of each state."""
    for op, gates, times in ((linear_attention, 1, 2), (delta_rule, 2, 3)):
        with FlopCounterMode(display=False) as counter:
            recurrence(op, gates, learns=False)
        assert counter.get_total_flops() == times * 2 * 2 * KEYS * VALUES
    assert not made


def test_ops_without_products_count_nothing(made):
    x, cu = torch.randn(1, 8, 3, requires_grad=True), torch.tensor([[0, 5, 8]])
    weight, memory = torch.rand(1, 8, 4, requires_grad=True).topk(2)
    routes = MemoryRoutes.of(memory, 4)
    with FlopCounterMode(display=False) as counter:
        rows = dispatch_tokens(x, routes.place, backend="triton")
        combine_reads(rows, routes.place, weight, x, backend="triton").sum().backward()
        segment_mean_pool(x, cu, longest=5, backend="triton").sum().backward()
        invert_chunks(torch.zeros(1, 8, 1, 2, dtype=torch.int64), num_chunks=3, backend="triton")
        merge_topk([(torch.arange(4)[None], torch.rand(1, 4))] * 2, top_k=2, backend="triton")
    assert counter.get_total_flops() == 0 and not made


@pytest.mark.parametrize("op", [neural_memory, large_chunk_memory])
def test_a_loop_in_compiled_code_counts_as_outside(op, monkeypatch):
    def found():
        q, k, v = heads(32, KEYS, KEYS, KEYS)
        gate = torch.rand(q.shape[:3], requires_grad=True)
        if op is neural_memory:
            weights = [torch.randn(2, i, o, requires_grad=True) for i, o in ((KEYS, HIDDEN), (HIDDEN, KEYS))]
            given = (q, k, v, gate, gate, gate)
        else:
            weights = [
                torch.randn(2, i, o, requires_grad=True) for i, o in ((KEYS, HIDDEN), (HIDDEN, KEYS), (KEYS, HIDDEN))
            ]
            given = (q, k, v, torch.rand(*q.shape[:3], 3, requires_grad=True), gate)
        with FlopCounterMode(display=False) as counter:
            op(*given, weights=weights, chunk_size=16, backend="reference")[0].sum().backward()
        return counter.get_total_flops()

    outside = found()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert found() == outside > 0


def test_every_op_of_ours_is_counted():
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("memlm::")}
    counted = {str(op).replace(".", "::", 1) for op in flop_registry if str(op).startswith("memlm.")}
    assert {name.partition(".")[0] for name in ours} == {name.partition(".")[0] for name in counted}
