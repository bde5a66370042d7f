"""How the router of Memory Sparse Attention is taught and measured."""

import itertools
import math

import pytest
import torch

from memlm.memory.msa import router
from memlm.roles import Roles
from memlm_kernels.testing import assert_close
from tests.conftest import step
from tests.memory.test_msa import EXACT, SAMPLES, context, ids_like, inputs, mixer_of, model_of, packed, roles_of


def naive_loss(kind, scores, found, temperature, bias):
    s = [x / temperature for x in scores]
    wanted, others = ([x for x, f in zip(s, found, strict=True) if f == which] for which in (True, False))
    if kind == "bce":
        signs = [1 if f else -1 for f in found]
        return sum(math.log1p(math.exp(-(x + bias) * sign)) for x, sign in zip(scores, signs, strict=True)) / len(s)
    nats = 0.0
    for x in wanted:
        below = [x, *others] if "decouple" in kind else s
        p = math.exp(x) / sum(map(math.exp, below))
        nats -= math.log(p) * ((1 - p) ** 2 if "focal" in kind else 1)
    return nats / max(1, len(wanted))


@pytest.mark.parametrize("kind", router.LOSSES)
def test_losses_are_the_formulas(kind):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64)
    known = torch.rand(3, 2, 7, generator=generator) < 0.7
    found = (torch.rand(3, 2, 7, generator=generator) < 0.4) & known
    known[2, 0], found[2, 0], found[1, 1] = True, True, False
    known[2, 1] = found[2, 1] = False
    scores = scores.masked_fill(~known, -math.inf).requires_grad_()
    bias = torch.tensor(-1.5, dtype=torch.float64)
    got = router.router_loss(kind, scores, found, known, 0.7, bias)
    got.sum().backward()
    assert torch.isfinite(scores.grad).all() and not scores.grad[~known].any()
    for b, s in itertools.product(range(3), range(2)):
        row = scores[b, s][known[b, s]].tolist()
        if row:
            expected = naive_loss(kind, row, found[b, s][known[b, s]].tolist(), 0.7, -1.5)
            assert got[b, s].item() == pytest.approx(expected, abs=1e-12)
        else:
            assert got[b, s] == 0
    huge = router.router_loss(kind, 1e4 * scores.detach(), found, known, 0.01, bias)
    assert torch.isfinite(huge).all()


@pytest.mark.parametrize("kind", router.LOSSES)
def test_only_the_routers_loss_reaches_the_router(kind):
    model, doc_ids = model_of(router_loss=kind, loss_weight=0.5).train(), roles_of(SAMPLES["usual"])
    ids, positives = ids_like(doc_ids), (doc_ids == 4) | (doc_ids == 2)
    routers = {name: p for name, p in model.named_parameters() if "router" in name}
    assert len(routers) == (6 if kind == "bce" else 4)
    model(ids, roles=Roles(doc_ids), labels=ids).loss.backward()
    assert all(p.grad is None for p in routers.values())
    out = model(ids, roles=Roles(doc_ids, positives), labels=ids)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in routers.values())
    assert set(out.aux_losses) == {"layer0/router", "layer1/router"}


def test_loss_and_metrics_of_packed_samples_are_means_over_samples():
    mixer = mixer_of(loss_weight=0.3)
    alone, doc_ids, positions = packed(["usual", "no documents", "no template", "no query"])
    found = torch.cat([r == number for r, number in zip(alone, (3, 1, 2, 1), strict=True)], 1)
    x = inputs(doc_ids.shape[1])
    got = step(mixer, x, **context(doc_ids, positions, found=found, samples=4))
    pieces = zip(x.split([r.shape[1] for r in alone], 1), alone, (3, 1, 2, 1), strict=True)
    each = [step(mixer, piece, **context(r, found=r == number)) for piece, r, number in pieces]
    taught = [each[0], each[2]]
    expected = sum(out.aux_losses["router"] for out in taught) / 2
    assert_close("loss", expected, got.aux_losses["router"], EXACT)
    for name in got.metrics:
        assert_close(name, sum(out.metrics[name] for out in taught) / 2, got.metrics[name], EXACT)
    assert each[3].aux_losses["router"] == 0


@pytest.mark.parametrize("top_k", [1, 3, 9])
def test_metrics_equal_a_naive_count(top_k):
    """Ties, documents outside a sample, samples with nothing to find, fewer documents than top_k."""
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randint(4, (5, 3, 7), generator=generator) / 4
    known = torch.rand(5, 3, 7, generator=generator) < 0.6
    found = (torch.rand(5, 3, 7, generator=generator) < 0.4) & known
    found[:2, 0] = found[4] = False
    counts = [[] for _ in range(5)]
    for b, s in itertools.product(range(5), range(3)):
        wanted = {n for n in range(7) if found[b, s, n]}
        best = sorted((n for n in range(7) if known[b, s, n]), key=lambda n: (-scores[b, s, n].item(), n))[:top_k]
        right = len(wanted.intersection(best))
        if wanted:
            counts[b].append((right > 0, right / len(wanted), right / len(best)))
    assert 5 < sum(map(len, counts)) <= 13 and counts[4] == []
    got = router.router_metrics(scores, found, known, top_k)
    assert list(got) == [f"hit@{top_k}", f"recall@{top_k}", "precision"]
    for b, of_row in enumerate(counts):
        expected = [sum(column) / len(of_row) for column in zip(*of_row, strict=True)] or [math.nan] * 3
        assert [x[b].item() for x in got.values()] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_metrics_count():
    scores = torch.tensor([[[0.9, 0.1, 0.5, 0.4]], [[0.1, 0.2, 0.3, 0.9]], [[0.4, 0.1, 0.2, 0.3]]])
    found = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]]).bool()
    metrics = router.router_metrics(scores, found, torch.ones_like(found), 2)
    assert {name: x[:2].tolist() for name, x in metrics.items()} == {
        "hit@2": [1, 0],
        "recall@2": [0.5, 0],
        "precision": [0.5, 0],
    }
    assert all(x[2].isnan() for x in metrics.values())
