"""route_documents against loops over tokens, heads, chunks and documents in fp64."""

import itertools

import pytest
import torch

from memlm_kernels import merge_topk, route_documents
from memlm_kernels.route_documents import naive
from memlm_kernels.testing import Watch, assert_close, grads_of

NEVER = float("-inf")
# The number of chunks of each document; tiles of 4 chunks cut the documents at different places.
SIZES = [[3, 1, 5, 1, 2], [1] * 9, [12], [4, 4, 4]]


def inputs(sizes, batch=2, tokens=7, heads=6, groups=2, dim=5, dtype=torch.float64, shared=False):
    torch.manual_seed(0)
    document = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    q = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    k = torch.randn(1 if shared else batch, len(document), groups, dim, dtype=dtype)
    return q, k, document.expand(len(k), -1).contiguous()


def oracle(q, k, document, n, *rule, asks=None, spans=None, upto=None):
    """The scores of documents after the last of the tokens ``upto``, [B, N]."""
    first, end = spans or (torch.zeros(q.shape[:2]), torch.full(q.shape[:2], n))
    knows = (torch.arange(n) >= first[..., None]) & (torch.arange(n) < end[..., None])
    if asks is not None:
        knows = knows & asks[..., None]
    if upto is not None:
        knows[:, upto:] = False
    k, document = k.expand(len(q), -1, -1, -1), document.expand(len(q), -1)
    rows = zip(q, k, document, knows, strict=True)
    return torch.stack([naive.document_scores(*row[:3], n, rule, row[3]) for row in rows])


def best(scores, top_k):
    return torch.tensor([naive.best(row, top_k) for row in scores])


RULES = list(itertools.product(["cosine", "dot"], *[["mean", "max"]] * 3))


@pytest.mark.parametrize(
    ("sizes", "rule"),
    # All rules with documents of many sizes; with others, some in which every choice comes once.
    [
        pytest.param(sizes, rule, id=f"{sizes}-{'-'.join(rule)}", marks=pytest.mark.slow if i and j % 5 else ())
        for i, sizes in enumerate(SIZES)
        for j, rule in enumerate(RULES)
    ],
)
def test_scores_choices_and_gradients(sizes, rule):
    q, k, document = inputs(sizes)
    similarity_kind, head, query, chunk = rule
    settings = dict(similarity=similarity_kind, head_reduce=head, query_reduce=query, chunk_reduce=chunk)
    asks = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]]).bool()

    def expected(q, k):
        return oracle(q, k, document, len(sizes), *rule, asks=asks)

    def got(q, k):
        return route_documents(
            q, k, document, top_k=3, num_documents=len(sizes), asks=asks, return_scores=True, tile=4, **settings
        ).scores

    scores = expected(q, k)
    assert_close("scores", scores, got(q, k), 1e-12)
    for name, a, b in zip("qk", grads_of(expected, [q, k]), grads_of(got, [q, k]), strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-11)
    for tile in (1, 4, 5, 4096):
        routes = route_documents(q, k, document, top_k=3, num_documents=len(sizes), asks=asks, tile=tile, **settings)
        assert torch.equal(routes.document[:, 0], best(scores, 3)), tile
        found = scores.gather(1, routes.document[:, 0].clamp(min=0))
        present = routes.document[:, 0] >= 0
        assert_close("score", found[present], routes.score[:, 0][present], 1e-12)


@pytest.mark.parametrize("query", ["max", "mean"])
@pytest.mark.parametrize("chunk", ["max", "mean"])
@pytest.mark.parametrize("running", [False, True])
def test_each_token_by_what_it_knows_and_across_calls(running, query, chunk):
    """Two samples of a packed row, with documents among the tokens; the second call continues the first."""
    q, k, document = inputs([2, 1, 3, 1, 2])
    first = torch.tensor([[0, 0, 0, 0, 3, 3, 3], [0] * 7])
    end = torch.tensor([[1, 1, 3, 3, 3, 5, 5], [0, 2, 2, 2, 5, 5, 5]])
    asks = torch.tensor([[1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1, 0]]).bool()
    settings = dict(top_k=2, num_documents=5, running=running, query_reduce=query, chunk_reduce=chunk, tile=4)

    def decided(upto):
        return oracle(q, k, document, 5, "cosine", "mean", query, chunk, asks=asks, spans=(first, end), upto=upto)

    routes = route_documents(q, k, document, asks=asks, spans=(first, end), **settings)
    for t in range(7):
        scores = decided(t + 1 if running else 7)
        known = (torch.arange(5) >= first[:, t, None]) & (torch.arange(5) < end[:, t, None])
        assert torch.equal(routes.document[:, t], best(scores.masked_fill(~known, NEVER), 2)), t
    if running:
        scored, parts = None, []
        for cut in (slice(0, 3), slice(3, 4), slice(4, 7)):
            part = route_documents(
                q[:, cut],
                k,
                document,
                asks=asks[:, cut],
                spans=(first[:, cut], end[:, cut]),
                scored=scored,
                **settings,
            )
            scored = part.scored
            parts.append(part.document)
        assert torch.equal(torch.cat(parts, 1), routes.document)
        assert torch.equal(scored.asked, routes.scored.asked)
        later = route_documents(None, k, document, spans=(first[:, -1:], end[:, -1:]), scored=scored, **settings)
        assert torch.equal(later.document, routes.document[:, -1:])
        assert_close("chunks", routes.scored.score, scored.score, 1e-12)


def test_equal_scores_take_the_lowest_index():
    """Products and sums of small integers are exact in any order."""
    _, k, document = inputs([1] * 9, dim=4)
    k = (8 * k).round()
    k[:, 3:] = k[:, :1]
    k[:, 1:3] = -k[:, :1]
    q = k[:, :1].repeat_interleave(2, 2).expand(-1, 7, -1, -1)
    for tile in (1, 2, 4096):
        routes = route_documents(q, k, document, top_k=4, num_documents=9, similarity="dot", tile=tile)
        assert torch.equal(routes.document[:, 0], torch.tensor([[0, 3, 4, 5]]).expand(2, -1))


def test_a_bank_that_all_rows_share():
    q, k, document = inputs([3, 1, 2], shared=True)
    routes = route_documents(q, k, document, top_k=2, num_documents=3, return_scores=True)
    expected = oracle(q, k, document, 3, "cosine", "mean", "max", "max")
    assert_close("scores", expected, routes.scores, 1e-12)
    assert torch.equal(routes.document[:, 0], best(expected, 2))


def test_shards_merged_are_the_whole():
    """Products and sums of small integers are exact in any order; one document lies in two shards."""
    q, k, document = inputs([3, 1, 5, 1, 2, 4, 1], heads=4, dim=4)
    q, k = q.round(), k.round()
    k[:, 10] = k[:, 4]
    settings = dict(top_k=3, num_documents=7, similarity="dot")
    whole = route_documents(q, k, document, **settings)
    parts = []
    for shard in (slice(7, 17), slice(0, 4), slice(4, 7)):
        part = route_documents(q, k[:, shard], document[:, shard], **settings)
        parts.append((part.document, part.score))
    index, score = merge_topk(parts, top_k=3)
    assert torch.equal(index, whole.document) and torch.equal(score, whole.score)
    few, _ = merge_topk(parts[:1], top_k=5)
    assert (few[..., 3:] == -1).all()


def test_fewer_documents_than_asked_for_none_and_nobody_who_asks():
    q, k, document = inputs([2, 1])
    routes = route_documents(q, k, document, top_k=5, num_documents=2)
    assert (routes.document[..., :2] >= 0).all() and (routes.document[..., 2:] == -1).all()
    empty = route_documents(q, k[:, :0], document[:, :0], top_k=5, num_documents=0, return_scores=True)
    assert (empty.document == -1).all() and empty.scores.shape == (2, 0)
    silent = route_documents(
        q, k, document, top_k=5, num_documents=2, asks=torch.zeros(2, 7, dtype=torch.bool), return_scores=True
    )
    assert (silent.document == -1).all() and (silent.scores == NEVER).all()
    without = route_documents(None, k, document, top_k=5, num_documents=2)
    assert (without.document == -1).all() and (without.scored.asked == 0).all()


def test_chunks_of_no_document_are_passed_over():
    q, k, document = inputs([2, 1, 1])
    document[0, 3:] = 7
    routes = route_documents(q, k, document, top_k=3, num_documents=3, return_scores=True)
    assert 2 not in routes.document[0] and 2 in routes.document[1]
    assert routes.scores[0, 2] == NEVER


def test_zeros_have_finite_gradients():
    q, k, document = inputs([2, 1])
    leaves = [torch.zeros_like(x).requires_grad_() for x in (q, k)]
    route_documents(*leaves, document, top_k=1, num_documents=2, return_scores=True).scores.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_single_precision():
    q, k, document = inputs([2, 3, 1, 6], dtype=torch.float32, dim=64)
    exact = oracle(q.double(), k.double(), document, 4, "dot", "mean", "max", "max")
    got = route_documents(q, k, document, top_k=2, num_documents=4, similarity="dot", return_scores=True).scores
    assert_close("scores", exact, got, 1e-6)
    low = route_documents(
        q.bfloat16(), k.bfloat16(), document, top_k=2, num_documents=4, similarity="dot", return_scores=True
    ).scores
    rounded = oracle(q.bfloat16().double(), k.bfloat16().double(), document, 4, "dot", "mean", "max", "max")
    assert low.dtype == torch.float32
    assert_close("scores of bf16", rounded, low, 1e-6)


@pytest.mark.parametrize("query", ["max", "mean"])
def test_no_tensor_holds_more_scores_than_a_tile(query):
    q, k, document = (x.requires_grad_(x.is_floating_point()) for x in inputs([1] * 64, 1, 16, 2, dim=2))
    settings = dict(top_k=2, num_documents=64, query_reduce=query, return_scores=True, tile=8)
    with Watch() as watch:
        route_documents(q, k, document, running=True, **settings).scores.sum().backward()
    assert watch.largest < 16 * 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(similarity="angle"), "similarity='angle' must be one of cosine, dot"),
        (dict(head_reduce="sum"), "head_reduce='sum' must be one of mean, max"),
        (dict(top_k=0), "top_k=0"),
        (dict(backend="triton"), "cannot run here"),
    ],
)
def test_bad_settings_are_named(settings, message):
    q, k, document = inputs([2, 1])
    with pytest.raises(ValueError, match=message):
        route_documents(q, k, document, **{"top_k": 1, "num_documents": 2, **settings})
    with pytest.raises(ValueError, match="7 heads, not a multiple"):
        route_documents(torch.zeros(2, 3, 7, 5), k.float(), document, top_k=1, num_documents=2)
