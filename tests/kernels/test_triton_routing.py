"""Triton's kernels for documents against the references; see ``test_triton``."""

import itertools

import pytest
import torch

from memlm_kernels import merge_topk, route_documents, segment_mean_pool
from memlm_kernels.testing import assert_close
from tests.kernels.test_triton import BFLOAT16, DEVICE, TOLERANCES, compare, poisoned  # noqa: F401

NEVER = float("-inf")


def bank(sizes, rows=2, tokens=7, heads=4, groups=2, dim=5, shared=False):
    g = torch.Generator().manual_seed(0)
    document = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    q = torch.randn(rows, tokens, heads, dim, generator=g, dtype=torch.float64)
    k = torch.randn(1 if shared else rows, len(document), groups, dim, generator=g, dtype=torch.float64)
    return q, k, document.expand(len(k), -1).contiguous().to(DEVICE)


def agree(q, k, document, dtype=torch.float32, ties=False, **settings):
    """Choices, scores, what goes on to the next call, and gradients."""
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
    """Two samples of a packed row, a row that knows little; tokens that do not ask; scores of an earlier call."""
    q, k, document = bank([2, 1, 3, 1, 2])
    document[1, 7:] = 9
    first = torch.tensor([[0, 0, 0, 0, 3, 3, 3], [0] * 7], device=DEVICE)
    end = torch.tensor([[1, 1, 3, 3, 3, 5, 5], [0, 2, 2, 2, 5, 5, 5]], device=DEVICE)
    asks = torch.tensor([[1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1, 0]], device=DEVICE).bool()
    similarity, head, query = rule
    settings = dict(top_k=2, num_documents=5, running=running, similarity=similarity, head_reduce=head)
    agree(q, k, document, query_reduce=query, asks=asks, spans=(first, end), **settings)
