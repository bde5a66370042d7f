"""Triton's kernels for documents against the references; see ``test_triton``."""

import itertools

import pytest
import torch

from memlm_kernels import merge_topk, route_documents, segment_mean_pool
from memlm_kernels.route_documents import triton as routing
from memlm_kernels.testing import assert_close
from tests.kernels.test_triton import BFLOAT16, DEVICE, compare, poisoned  # noqa: F401


def bank(sizes, rows=2, tokens=7, heads=4, groups=2, dim=5, shared=False):
    g = torch.Generator().manual_seed(0)
    document = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    q = torch.randn(rows, tokens, heads, dim, generator=g, dtype=torch.float64)
    k = torch.randn(1 if shared else rows, len(document), groups, dim, generator=g, dtype=torch.float64)
    return q, k, document.expand(len(k), -1).contiguous().to(DEVICE)


def agree(q, k, document, dtype=torch.float32, **settings):
    """Compare choices, scores, the scores for the next call, and gradients."""
    chosen = {}

    def call(x, backend):
        routes = route_documents(*x, document, return_scores=True, backend=backend, **settings)
        known = routes.scores.isfinite()
        chosen[backend] = routes.document, known, routes.score.isfinite()
        return routes.scores[known], routes.score[routes.score.isfinite()], *routes.scored

    compare(call, [q, k], dtype)
    assert all(map(torch.equal, chosen["reference"], chosen["triton"]))


RULES = list(itertools.product(["cosine", "dot"], ["mean", "max"], ["mean", "max"]))


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("rule", RULES, ids="-".join)
def test_routing(rule, running):
    """Two samples of a packed row; a row with few documents; tokens that do not route; scores of an earlier call."""
    q, k, document = bank([2, 1, 3, 1, 2])
    document[1, 7:] = 9
    first = torch.tensor([[0, 0, 0, 0, 3, 3, 3], [0] * 7], device=DEVICE)
    end = torch.tensor([[1, 1, 3, 3, 3, 5, 5], [0, 2, 2, 2, 5, 5, 5]], device=DEVICE)
    asks = torch.tensor([[1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1, 0]], device=DEVICE).bool()
    similarity, head, query = rule
    settings = dict(top_k=2, num_documents=5, running=running, similarity=similarity, head_reduce=head)
    agree(q, k, document, query_reduce=query, asks=asks, spans=(first, end), **settings)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "top_k", "shared"), [(1, 60, 1, False), (19, 100, 3, True)])
def test_routing_over_tiles_and_parts(tokens, dim, top_k, shared, running, monkeypatch):
    """Documents lie across tiles of chunks, tiles of 16 tokens, and the parts of programs."""
    monkeypatch.setattr(routing, "_split", lambda size, programs, least: (64, -(-size // 64)))
    monkeypatch.setattr(routing, "_PLACES", 64)
    inputs = bank([1, 30, 50, 1, 7, 2], 2, tokens, dim=dim, shared=shared)
    agree(*inputs, top_k=top_k, num_documents=6, running=running)


@pytest.mark.parametrize("head", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_routing_in_16_bits(dtype, head):
    agree(*bank([3, 1, 5, 1, 2], heads=6, dim=64), dtype, top_k=3, num_documents=5, running=True, head_reduce=head)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter counts what is read")
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("head", ["mean", "max"])
@torch.no_grad()
def test_a_tile_of_keys_is_read_once_for_all_heads(head, similarity, monkeypatch):
    """Two tiles of tokens read all keys twice."""
    from triton.runtime.interpreter import InterpreterBuilder

    q, k, document = (x.to(DEVICE) for x in bank([20, 1, 43], 1, 70, heads=8, dim=100))
    q, k = q.half(), k.half()
    low, high, read, load = k.data_ptr(), k.data_ptr() + k.nbytes, [], InterpreterBuilder.create_masked_load

    def counted(self, ptrs, mask, *rest):
        read.append(int((mask.data & (ptrs.data >= low) & (ptrs.data < high)).sum()))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    settings = dict(head_reduce=head, similarity=similarity, top_k=1, num_documents=3)
    route_documents(q, k, document, **settings, backend="triton")
    assert sum(read) == 2 * k.numel()


@pytest.mark.parametrize("running", [False, True])
def test_of_equal_scores_the_lowest_number(running):
    """Products of small integers are exact: all documents except the first two have equal scores."""
    q, k, document = bank([1, 2] + [1] * 70, heads=4, dim=4)
    q, k = q.round(), k.round()
    k[:, 3:] = k[:, 3:4]
    settings = dict(similarity="dot", running=running, top_k=6, num_documents=72)
    agree(q, k, document, **settings)


@torch.no_grad()
def test_routing_without_tokens_chunks_or_documents():
    q, k, document = (x.to(DEVICE) for x in bank([2, 1]))
    q, k = q.float(), k.float()
    spans = (torch.zeros(2, 7, device=DEVICE).long(), torch.tensor([[0, 1, 1, 2, 2, 2, 2]] * 2, device=DEVICE))
    scored = route_documents(q, k, document, top_k=1, num_documents=2).scored
    for changed in (
        dict(q=None, spans=spans, scored=scored),
        dict(q=None, scored=scored),
        dict(q=q[:, :0], running=True),
        dict(k=k[:, :0], document=document[:, :0], num_documents=0),
        dict(asks=torch.zeros(2, 7, device=DEVICE).bool(), running=True),
    ):
        call = dict(q=q, k=k, document=document, top_k=5, num_documents=2) | changed
        expected, got = (route_documents(**call, backend=backend) for backend in ("reference", "triton"))
        assert torch.equal(expected.document, got.document), changed
        assert torch.equal(expected.score, got.score) and torch.equal(expected.scored.asked, got.scored.asked)


@torch.no_grad()
def test_merged_lists():
    """A number in several lists, equal scores, and empty places."""
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(20, generator=g)[:9] for _ in range(10)]).view(5, 2, 9).to(DEVICE)
    score = torch.randint(4, (5, 2, 9), generator=g).float().to(DEVICE)
    index[0, 0, 4:], score[0, 0, 4:] = -1, float("-inf")
    parts = [(x.squeeze(0), y.squeeze(0)) for x, y in zip(index.split(1), score.split(1), strict=True)]
    for top_k in (6, 50):
        expected, got = (merge_topk(parts, top_k=top_k, backend=backend) for backend in ("reference", "triton"))
        assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])
        assert expected[0].dtype == got[0].dtype and expected[0].shape == (2, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("features", [(), (5,), (2, 150)], ids=str)
@pytest.mark.parametrize("cu", [[[0, 7, 8, 8, 15], [3, 4, 11, 18, 20]], [[0, 20], [20, 20]]], ids=str)
def test_means_of_segments(cu, features, dtype):
    cu = torch.tensor(cu, device=DEVICE)
    x = torch.randn(2, 20, *features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compare(lambda x, backend: [segment_mean_pool(x[0], cu, longest=20, backend=backend)], [x], dtype)


@torch.no_grad()
def test_views_of_other_tensors():
    q, k, document = (x.to(DEVICE) for x in bank([2, 1, 4], dim=10))
    q, k = q.float()[..., ::2], k.float().transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
    settings = dict(top_k=2, num_documents=3, running=True)
    expected, got = (route_documents(q, k, document, **settings, backend=x) for x in ("reference", "triton"))
    assert torch.equal(expected.document, got.document)
    cu = torch.tensor([[0, 3, 7]] * 4, device=DEVICE)[::2]
    expected, got = (segment_mean_pool(k, cu, longest=4, backend=x) for x in ("reference", "triton"))
    assert_close("means", expected, got, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="8 GB, which the interpreter would walk through")
@torch.no_grad()
def test_more_elements_than_32_bits_count():
    x = torch.ones(1, (1 << 21) + 128, 1024, device=DEVICE, dtype=torch.float16)
    x[:, -64:] = 3
    cu = torch.arange(0, x.shape[1] + 1, 64, device=DEVICE)[None]
    means = segment_mean_pool(x, cu, longest=64, backend="triton")
    assert (means[:, -1] == 3).all() and (means[:, :-1] == 1).all()
    k, document = x[..., :1024].unflatten(2, (8, 128)), torch.arange(x.shape[1], device=DEVICE)[None] // 64
    q = torch.ones(1, 3, 8, 128, device=DEVICE, dtype=torch.float16)
    for running in (False, True):
        settings = dict(similarity="dot", running=running, top_k=1, num_documents=cu.shape[1] - 1)
        assert (route_documents(q, k, document, **settings, backend="triton").document == cu.shape[1] - 2).all()


@torch.no_grad()
def test_no_tokens_and_no_segments():
    for shape, ends in (((2, 0, 3), 4), ((2, 5, 3), 1)):
        x, cu = torch.zeros(shape, device=DEVICE), torch.zeros(2, ends, dtype=torch.long, device=DEVICE)
        assert segment_mean_pool(x, cu, longest=8, backend="triton").shape == (2, ends - 1, 3)


def test_ops_keep_the_rules_of_torch():
    """Schema, fake tensors, registration of gradients; and a compiled call is one graph."""
    import memlm_kernels.segment_mean_pool.triton  # noqa: F401

    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, cu = (
        torch.randn(2, 9, 3, device=DEVICE, requires_grad=True),
        torch.tensor([[0, 4, 9], [1, 2, 6]], device=DEVICE),
    )
    torch.library.opcheck(torch.ops.memlm.segment_mean_pool, (x, cu, 5), test_utils=tests)
    q, k, document = (x.to(DEVICE) for x in bank([2, 1, 2]))
    q, k, before = q.float()[:, :, :, None], k.float(), torch.zeros(2, 5, device=DEVICE)
    arguments = (
        q[:, :, :2],
        k,
        document.int(),
        None,
        None,
        None,
        before,
        before.long(),
        7,
        2,
        3,
        True,
        True,
        False,
        True,
    )
    torch.library.opcheck(torch.ops.memlm.route_documents, arguments, test_utils=tests)
    lists = torch.rand(3, 6, device=DEVICE)
    torch.library.opcheck(torch.ops.memlm.merge_topk, (lists.argsort(1), lists, 2), test_utils=tests)

    def call(q, k, backend):
        k = segment_mean_pool(k, torch.tensor([[0, 2, 3, 5]] * 2, device=DEVICE), longest=2, backend=backend)
        settings = dict(top_k=2, num_documents=3, return_scores=True, running=True)
        return route_documents(q, k, torch.arange(3, device=DEVICE).expand(2, -1), **settings, backend=backend).scores

    compiled = torch.compile(lambda *x: call(*x, "triton"), fullgraph=True, backend="aot_eager")
    assert_close("scores", call(q[:, :, :, 0], k, "reference"), compiled(q[:, :, :, 0], k), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunk_reduce="mean"), "take chunk_reduce='max', not 'mean'"),
        (dict(top_k=129), "keep at most 128 documents, not top_k=129"),
        (dict.fromkeys("qk", torch.zeros(2, 3, 2, 5, dtype=torch.float64, device=DEVICE)), "float64"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(change, message):
    q, k, document = (x.to(DEVICE) for x in bank([2, 1]))
    call = dict(q=q.float(), k=k.float(), document=document, top_k=1, num_documents=2) | change
    with pytest.raises(ValueError, match=f"backend='triton' cannot run here: .*{message}"):
        route_documents(**call, backend="triton")
