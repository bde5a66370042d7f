"""A run whose rows are cut over processes equals the run of one process: losses, gradients, validation."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from memlm import MemoryCache
from memlm.data import Batch, Row
from memlm.training import run
from memlm.training.objective import Objective, model_inputs
from memlm.training.sequence import cut_rows, pieces_of
from memlm.training.tracking import read_metrics
from memlm_kernels.testing import assert_close, relative_error
from tests import ranks
from tests.conftest import build
from tests.runs import SMALLEST, config, trainer

RUN = ("train.steps=4", "memory=titans_lmm", "model.num_hidden_layers=2", "data.seq_len=16", "train.z_loss=0.1")
CUT = "hardware.sequence_parallel=2"


def train(rank, size, *cases):
    for folder, *overrides in cases:
        run(config(folder, *RUN, *overrides, small=SMALLEST))
        AcceleratorState._reset_state(reset_partial_state=True)


def losses(folder):
    """Figures of all steps that do not depend on time or on the machine."""
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    return {
        (line["step"], name): value
        for line in metrics
        for name, value in line.items()
        if "loss" in name or "accuracy" in name or name == "grad_norm"
    }


def test_a_run_of_two_processes_that_share_rows_equals_a_run_of_one(tmp_path):
    train(0, 1, (tmp_path / "one",))
    ranks.run(train, 2, tmp_path, (tmp_path / "two", CUT), (tmp_path / "sharded", CUT, "hardware.shard=all"))
    one = losses(tmp_path / "one")
    assert len(one) > 12
    for name in ("two", "sharded"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_two_pairs_of_processes_share_the_rows_of_a_step(tmp_path):
    train(0, 1, (tmp_path / "one", "memory=mom"))
    ranks.run(
        train,
        4,
        tmp_path,
        (tmp_path / "pairs", CUT, "memory=mom"),
        (tmp_path / "all", "hardware.sequence_parallel=4", "memory=mom"),
    )
    for name in ("pairs", "all"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_the_mean_of_the_stretches_losses_is_the_rows_loss():
    """Also where scored tokens are at the ends of stretches, in one stretch alone, or nowhere."""
    model = Objective(build("none").double())
    labels = torch.full((4, 40), -100)
    labels[0, [5, 10, 11, 39]], labels[1, 20], labels[2, 0] = torch.tensor([3, 4, 1, 2]), 0, 7
    everywhere = torch.arange(40).numpy()
    for given in (labels, torch.arange(160).view(4, 40)):
        rows = [Row(torch.arange(40).numpy(), row.numpy(), everywhere) for row in given]
        batch = Batch.from_rows(rows, [0, 0, 0, 0])
        loss, of_rows, _ = model(**model_inputs(batch, "cpu"))
        # The model sees whole rows here: only the labels, the places and the divisors are those of the stretches.
        nats, targets = torch.zeros(4, dtype=torch.float64), F.pad(given, (0, 1), value=-100)
        for rank in range(4):
            part, first = batch.stretch(rank, 4), 10 * rank
            assert torch.equal(part.input_ids, batch.input_ids[:, first : first + 10])
            assert torch.equal(part.labels, targets[:, first : first + 11])
            own = {"labels": targets, "places": part.places + first, "counts": part.counts}
            nats += model(**model_inputs(batch, "cpu") | own)[1] / 4
        # Losses of tokens are fp32.
        assert_close("rows", of_rows, nats, 2e-7)
        assert_close("loss", loss, nats.mean(), 2e-7)


@pytest.mark.parametrize("memory", ["titans_lmm", "none"])
def test_gradients_are_truncated_and_the_memory_goes_on(tmp_path, memory):
    """The loss is that of whole rows; the gradient that of a stream whose memory is detached between the pieces."""
    found, trainers = [], []
    for truncate in ("4", "null"):
        overrides = (f"memory={memory}", f"train.truncate={truncate}", "optim.clip=1e9")
        trainers.append(trainer(config(tmp_path / truncate, *RUN, *overrides, small=SMALLEST)))
        # The gradients stay.
        trainers[-1].optimizers = []
        found.append(trainers[-1]._one_step(False))
    cut, whole = trainers
    batch = cut.mixture.batch(0)
    assert found[0]["loss"].item() == pytest.approx(found[1]["loss"].item(), rel=1e-6)
    assert found[0]["rows"].tolist()[0][0] / 4 == pytest.approx(found[1]["rows"].tolist()[0][0], rel=1e-6)
    grads = {name: p.grad.clone() for name, p in cut.model.named_parameters()}
    assert any(relative_error(p.grad, grads[name]) > 1e-3 for name, p in whole.model.named_parameters())

    model, memory = cut.model, MemoryCache()
    model.zero_grad()
    scored = (batch.labels[:, 1:] != -100).sum(1)
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    for ids, of_piece in zip(batch.input_ids.split(4, 1), targets.split(4, 1), strict=True):
        logits = model(ids, past_key_values=memory).logits
        nats = F.cross_entropy(logits.mT, of_piece, reduction="none")
        z = 0.1 * logits.logsumexp(-1).square() * (of_piece != -100)
        ((nats + z).sum(1) / scored).mean().backward()
        memory = memory.detach()
    for name, p in model.named_parameters():
        assert_close(name, p.grad, grads[name], 1e-5)


@pytest.mark.slow
def test_a_run_of_pieces_goes_on_exactly(tmp_path):
    options = ("train.truncate=8", "optim.schedule_steps=9", "train.validate_every=9")
    train(0, 1, (tmp_path / "one", *options), (tmp_path / "two", *options, "train.steps=2"))
    train(0, 1, (tmp_path / "two", *options))
    assert {k: x for k, x in losses(tmp_path / "two").items() if k[0] != 2 or "validation" not in k[1]} == losses(
        tmp_path / "one"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((5, [16], False), "does not divide data.seq_len=16"),
        ((4, [16, 8], False), "leave train.lengths out"),
        ((4, [16], True), "hardware.sequence_parallel"),
    ],
)
def test_rows_that_cannot_be_read_in_pieces(given, told):
    with pytest.raises(ValueError, match=f"train.truncate={given[0]} .*{told}"):
        pieces_of(given[0], build("none"), *given[1:])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("hardware.sequence_parallel=0",), "hardware.sequence_parallel=0 must be at least 1"),
        (("hardware.sequence_parallel=2",), "hardware.sequence_parallel=2 does not divide the 1 processes"),
    ],
)
def test_mistakes_of_a_run(tmp_path, overrides, told):
    with pytest.raises(ValueError, match=told):
        train(0, 1, (tmp_path, *overrides))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((2, [16, 15], False, False), "does not divide rows of 15 tokens"),
        ((2, [16], True, False), "set hardware.compile=false"),
    ],
)
def test_rows_that_cannot_be_cut(given, told):
    with pytest.raises(ValueError, match=f"hardware.sequence_parallel=2 .*{told}"):
        cut_rows(build("none"), *given)


def test_states_are_handed_on_between_processes_with_whole_parameters():
    with pytest.raises(ValueError, match=r"hands on states of \['lact'\], .* set hardware\.shard=null"):
        cut_rows(build("lact"), 2, [16], False, True)


def test_a_backbone_takes_whole_rows():
    with pytest.raises(ValueError, match=r"hardware\.sequence_parallel=2 is for models of memlm"):
        cut_rows(torch.nn.Linear(1, 1), 2, [16], False, False)
