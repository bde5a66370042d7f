"""A curriculum of lengths: the same text in the same steps, in shorter rows."""

import pytest
import torch

from memlm.data import IGNORE_INDEX, Batch, Row
from memlm.flops import count_flops
from memlm.training import run
from memlm.training.plan import plan
from memlm.training.settings import RunSettings
from tests.runs import SMALLEST, config, figures, stopped, trainer

TEXT = ("data=text", "train.batch_size=2", "data.seq_len=32", "memory=linear_attention", "data.tokenizer=byte")
# Steps have 64 tokens: two of pieces of 8, one of 16, then whole rows.
STAGED = "train.lengths=[[8,128],[16,64]]"


def small(folder, *overrides):
    kept = (s for s in SMALLEST if not s.startswith(("data", "memory", "train.batch_size")))
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps. " * (i % 5 + 1))
    return config(folder, *TEXT, f"data.sources.text.paths=[{folder}/corpus]", *overrides, small=tuple(kept))


def test_a_piece_begins_as_a_document_does():
    ids = torch.arange(1, 13)
    #           the document from position 5 on | another           | a third
    positions = torch.tensor([5, 6, 7, 8, 9, 10, 0, 1, 2, 0, 1, 2])
    row = Row(ids.numpy(), ids.masked_fill(positions == 0, IGNORE_INDEX).numpy(), positions.numpy())
    cut = Batch.from_rows([row, row], [0, 3]).cut(4)
    assert cut.input_ids.tolist() == 2 * [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert cut.position_ids.tolist() == 2 * [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2]]
    no = IGNORE_INDEX
    assert cut.labels.tolist() == 2 * [[no, 2, 3, 4], [no, 6, no, 8], [no, no, 11, 12]]
    assert cut.source_ids.tolist() == [0, 0, 0, 3, 3, 3] and cut.max_documents == 2


def test_the_steps_have_the_same_text_and_a_stopped_run_goes_on_exactly(tmp_path):
    plain, staged = trainer(small(tmp_path / "plain")), trainer(small(tmp_path / "staged", STAGED))
    for step, length in enumerate([8, 8, 16, 32, 32]):
        (whole,), (cut,) = plain.feed.batches(step, "train"), staged.feed.batches(step, "train")
        assert cut.input_ids.shape == (64 // length, length)
        assert torch.equal(cut.input_ids.flatten(), whole.input_ids.flatten())
        (validated,) = staged.feed.batches(step, "validation")
        assert validated.input_ids.shape == (2, 32)
    run(small(tmp_path / "straight", STAGED, "train.steps=5", "train.micro_batch_size=1"))
    stopped(small(tmp_path, STAGED, "train.steps=5"), 1)
    run(small(tmp_path, STAGED, "train.steps=5"))
    assert figures(tmp_path) == pytest.approx(figures(tmp_path / "straight"), rel=1e-6)


def test_flops_are_those_of_the_lengths(tmp_path):
    """Those of a run and of its plan; attention costs less in short rows."""
    cfg = small(tmp_path, STAGED, "memory=attention", "train.steps=6")
    made = trainer(cfg)
    counts = {length: count_flops(made.model.config, length) for length in (8, 16, 32)}
    assert counts[8] < counts[16] < counts[32]
    assert plan(RunSettings.of(cfg), 1, "no").flops == pytest.approx((2 * counts[8] + counts[16] + 3 * counts[32]) / 6)
    run(cfg)
    told, rates = figures(tmp_path, "tflops"), figures(tmp_path, "tokens_per_second")
    for step, length in enumerate([8, 8, 16, 32, 32, 32]):
        assert told[step] == pytest.approx(3 * counts[length] * rates[step] / 1e12, rel=1e-4)
    with pytest.raises(ValueError, match=r"train\.lengths: 7 is not a part of data\.seq_len=32"):
        plan(RunSettings.of(small(tmp_path, "train.lengths=[[7,10]]")), 1, "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.lengths=[[7,10]]", r"train\.lengths: 7 is not a part of data\.seq_len=32; choose a divisor of it"),
        ("train.lengths=[[8]]", r"train\.lengths: \[8\] must be \[length, tokens\], such as \[512, 1e9\]"),
        (
            "+data.sources.mqar={kind: mqar, weight: 1, num_pairs: 2, gap: 4}",
            "and data.sources.mqar has whole tasks; leave",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(small(tmp_path, STAGED, "+data.noise_ramp=[0,0]", change))
