"""Which part knows: patched parts give another run's output, silenced ones zeros, and the measure's odds follow."""

import numpy as np
import pytest
import torch

from memlm.evaluation.ablation import long_term, memory_off, patched, recorded
from memlm.evaluation.measures.conflict import NONE, Conflict, answers
from memlm.reader import Reader
from tests.conftest import build

KEYS, TOLD, HELD, VALUES = np.arange(97, 103), np.arange(65, 71), np.arange(73, 79), np.arange(65, 97)


@pytest.fixture
def model():
    return build("titans_mag", dtype=torch.float64)


def logits(reader, ids):
    return reader.fork(torch.zeros(len(ids), dtype=torch.long))(torch.from_numpy(ids)[:, None])[:, -1]


def test_odds_are_those_of_runs_whose_parts_are_replaced_by_hand(model):
    """``forward`` itself is replaced, by the output of the run in which that part saw no conflict."""
    found = answers(model, KEYS, TOLD, HELD, VALUES, 0.05)
    layer = "model.layers.1.mlp"
    assert {*found} == {NONE, layer, *long_term(model)} and len(found) == 4
    edited, plain = Reader(model), Reader(model)
    edited.edit(torch.from_numpy(np.stack([KEYS, HELD], 1)), 1, 0.05)
    empty = edited.fork()
    for reader in (edited, plain):
        reader(torch.from_numpy(np.stack([KEYS, TOLD], 1).reshape(1, -1)))
    for name, scores in found.items():
        expected = logits(edited, KEYS)
        if name != NONE:
            source, kept = (plain if name == layer else empty), []
            part = source.model.get_submodule(name)
            own = part.forward
            part.forward = lambda *x, own=own, kept=kept, **w: kept.append(own(*x, **w)) or kept[-1]
            logits(source, KEYS)
            part.forward = own
            part = edited.model.get_submodule(name)
            own, part.forward = part.forward, lambda *x, kept=kept, **w: kept[-1]
            expected = logits(edited, KEYS)
            part.forward = own
        rows = np.arange(len(KEYS))
        odds = expected.numpy()[rows, TOLD] - expected.numpy()[rows, HELD]
        # Odds are taken in fp32.
        np.testing.assert_allclose(scores[2], odds, rtol=1e-5, atol=1e-5)
        best = VALUES[expected.numpy()[:, VALUES].argmax(1)]
        np.testing.assert_array_equal(scores[0], best == TOLD)
        np.testing.assert_array_equal(scores[1], best == HELD)
    assert len({round(float(scores[2].sum()), 4) for scores in found.values()}) == len(found)


def test_parts_are_silenced_by_their_names(model):
    ids = torch.randint(259, (2, 40))
    first, second = long_term(model)
    with torch.no_grad():
        whole = model(ids).logits
        with memory_off(model, ["*.layers.0.*"]):
            one = model(ids).logits
        with patched(long_term(model)[first], torch.zeros(2, 40, 64, dtype=torch.float64)):
            assert torch.equal(one, model(ids).logits)
        with memory_off(model, [first, second]), recorded(long_term(model)):
            both = model(ids).logits
        with memory_off(model):
            assert torch.equal(both, model(ids).logits)
        assert torch.equal(whole, model(ids).logits) and not torch.equal(one, both) and not torch.equal(one, whole)
    with (
        pytest.raises(ValueError, match=r"memory_off: '\*.layers.7.\*' fits no part"),
        memory_off(model, ["*.layers.7.*"]),
    ):
        pass


def test_mistakes_are_one_line():
    for settings, line in (
        ({"conflict_facts": 40}, "conflict_facts=40 must be at most 32 keys"),
        ({"conflict_rate": 0.0}, "conflict_rate=0.0 must be above 0"),
        ({"conflict_values": 1}, "conflict_values=1"),
    ):
        with pytest.raises(ValueError, match=line):
            Conflict(**settings)
