"""Documents longer than a row: streams of text whose memories go on from step to step."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from memlm import MemoryCache
from memlm.data.mixture import Mixture
from memlm.data.text import TextSource
from memlm.memory.base import kinds
from memlm.memory.state import leaves
from memlm.training import run
from memlm.training.objective import Objective
from tests import ranks
from tests.conftest import build
from tests.runs import SMALLEST, config, figures, stopped, trainer

CARRY = ("data=text", "data.tokenizer=byte", "data.seq_len=16", "memory=titans_lmm", "train.carry=true")


def small(folder, *overrides):
    kept = (s for s in SMALLEST if not s.startswith(("data", "memory")))
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for i in range(60):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps. " * (i % 7 + 1))
    return config(folder, *CARRY, f"data.sources.text.paths=[{folder}/corpus]", *overrides, small=tuple(kept))


class Corpus:
    """Token files of documents; each token names its document and its place there."""

    def __init__(self, *files):
        lengths = [length for file in files for length in file]
        self.places = [(d, t) for d, length in enumerate(lengths) for t in range(length)]
        ends = np.cumsum(lengths)
        self.of_documents, sizes = np.stack([ends - lengths, ends], 1), [sum(file) for file in files]
        counts = np.cumsum([0, *map(len, files)])
        self.of_files = {i: self.of_documents[counts[i] : counts[i + 1]] for i in range(len(files))}
        self.sizes = [*enumerate(sizes)]
        self.manifest = {"splits": {split: {"tokens": sum(sizes)} for split in ("train", "validation", "test")}}

    def token_files(self, split):
        return self.sizes

    def spans(self, split, numbers):
        return np.concatenate([self.of_files[i] for i in numbers])

    def tokens(self, start, end):
        return np.arange(start, end)


@pytest.mark.parametrize("files", [[[50, 3, 21, 1, 120, 30, 7]], [[50, 3, 30]] * 40])
@pytest.mark.parametrize("streams", [1, 3, 5])
def test_rows_of_a_stream_are_one_text(files, streams):
    """Tokens go on from row to row where positions do; each document starts at its first token or with the stream."""
    corpus = Corpus(*files)
    source = TextSource(corpus, 8, seed=1)
    source.streams = streams
    turns = source.epoch_rows["train"] // streams
    seen = []
    for stream in range(streams):
        token, expected = None, 0
        for turn in range(2 * turns):
            ids, labels, positions = source.row(turn * streams + stream, "train", turn)
            anew = positions[0] == 0
            for i, (own, position) in enumerate(zip(ids.tolist(), positions.tolist(), strict=True)):
                _, place = corpus.places[own]
                if position:
                    assert (own, position) == (token + 1, expected)
                elif i:
                    assert place == 0
                assert labels[i] == (own if position else -100)
                token, expected = own, position + 1
            # A row goes on, but where a document or an epoch starts.
            assert not anew or turn in (0, turns) or corpus.places[ids[0]][1] == 0 or len(files) > 16
            if turn < turns:
                seen += ids.tolist()
    counts = np.unique(seen, return_counts=True)[1]
    assert len(seen) == 8 * turns * streams
    if len(files) == 1:
        assert counts.max() == 1
    # Each group is filled up with its beginning, at most a row for each stream.
    assert (counts - 1).sum() <= 8 * streams * -(-len(files) // 16)


def test_kinds_whose_state_grows_are_marked():
    for kind in kinds():
        model, memory, sizes = build(kind).eval(), MemoryCache(), []
        for _ in range(2):
            with torch.no_grad():
                model(torch.full((1, 40), 5), past_key_values=memory)
            sizes.append(memory.nbytes())
        assert model.model.layers[0].mixer.grows == (sizes[1] > sizes[0]), kind


@pytest.mark.parametrize("truncate", ["null", "8"])
def test_the_memory_goes_on_from_step_to_step(tmp_path, truncate):
    """With weights that stay, the losses of three steps are those of three times as long rows."""
    made = trainer(small(tmp_path, f"train.truncate={truncate}", "train.micro_batch_size=2"))
    made.optimizers = []
    batches = [[*made.feed.batches(step, "train")] for step in range(3)]
    assert any((batch.position_ids[:, 0] > 0).any() for step in batches for batch in step)
    found = [made._one_step(False)["loss"].item() for _ in range(3)]
    expected = np.zeros(3)
    for parts in zip(*batches, strict=True):
        ids, positions = (torch.cat([getattr(b, name) for b in parts], 1) for name in ("input_ids", "position_ids"))
        labels = torch.cat([b.labels for b in parts], 1)
        with torch.no_grad():
            logits = made.model(ids, position_ids=positions).logits
        # The first token of a row is not scored.
        nats = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        counted = (labels[:, 1:] != -100).clone()
        counted[:, 15::16] = False
        for step in range(3):
            own = slice(16 * step, 16 * step + 15)
            expected[step] += ((nats * counted)[:, own].sum(1) / counted[:, own].sum(1)).mean().item() / 2
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_stopped_run_goes_on_exactly_and_in_other_forwards(tmp_path):
    steps = ("train.steps=4", "train.ema=0.9")
    run(small(tmp_path / "straight", *steps))
    run(small(tmp_path / "empty", *steps, "train.carry=false"))
    stopped(small(tmp_path / "stopped", *steps), 2)
    shutil.copytree(tmp_path / "stopped", tmp_path / "divided")
    run(small(tmp_path / "stopped", *steps))
    assert figures(tmp_path / "stopped") == figures(tmp_path / "straight")
    run(small(tmp_path / "divided", *steps, "train.micro_batch_size=1"))
    assert figures(tmp_path / "divided") == pytest.approx(figures(tmp_path / "straight"), rel=1e-5)
    assert figures(tmp_path / "empty") != pytest.approx(figures(tmp_path / "straight"), rel=1e-4)


def train(rank, size, *cfgs):
    for cfg in cfgs:
        run(cfg)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_two_processes_go_on_with_the_memories_of_one_and_the_other_way_round(tmp_path):
    steps = ("train.steps=6",)
    run(small(tmp_path / "one", *steps))
    for shard in ("null", "all"):
        folder = tmp_path / shard
        stopped(small(folder, *steps), 2)
        two = small(folder, "train.steps=4", "optim.schedule_steps=6", f"hardware.shard={shard}")
        ranks.run(train, 2, folder, two)
        run(small(folder, *steps, "optim.schedule_steps=6"))
        assert figures(folder) == pytest.approx(figures(tmp_path / "one"), rel=1e-5)


def test_a_run_whose_first_step_is_skipped_is_saved_and_goes_on(tmp_path, monkeypatch):
    real, count = Objective.forward, [0]

    def broken(self, *args, **inputs):
        loss, *rest = real(self, *args, **inputs)
        count[0] += 1
        return loss * (float("nan") if count[0] == 1 else 1.0), *rest

    monkeypatch.setattr(Objective, "forward", broken)
    settings = ("train.on_nan=skip", "train.save_every=1", "train.keep=9")
    run(small(tmp_path, *settings, "train.steps=1", "optim.schedule_steps=3"))
    run(small(tmp_path, *settings, "train.steps=3", "optim.schedule_steps=3"))
    assert np.isfinite([*figures(tmp_path).values()]).all() and len(figures(tmp_path)) == 2


def test_a_skipped_step_leaves_the_memories_as_they_were(tmp_path, monkeypatch):
    made, real = trainer(small(tmp_path, "train.on_nan=skip")), Objective.forward
    made._one_step(False)

    def states():
        return [x for memory in made.feed.carried.memories for state in memory.states for x in leaves(state)]

    before = states()

    def broken(self, *args, **inputs):
        loss, *rest = real(self, *args, **inputs)
        return loss * float("nan"), *rest

    monkeypatch.setattr(Objective, "forward", broken)
    made._one_step(False)
    assert made.step == 2 and all(a is b for a, b in zip(before, states(), strict=True))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["memory=attention"], r"\['attention'\] keeps every token, so leave it out"),
        (["train.lengths=[[8,128]]"], r"leave train\.lengths out"),
        (["train.batch_size=1000"], r"text has \d+ rows for the 1000 of a batch; lower data\.seq_len"),
        (
            ["+data.sources.mqar={kind: mqar, weight: 0.1, num_pairs: 2, gap: 4}", "+data.noise_ramp=[0,0]"],
            "a source has no row in some batches; raise its weight",
        ),
    ],
)
def test_runs_that_cannot_carry_are_told_so(tmp_path, overrides, told):
    with pytest.raises(ValueError, match=f"train.carry.*{told}"):
        trainer(small(tmp_path, *overrides))


def test_data_without_a_text_cannot_go_on():
    with pytest.raises(ValueError, match=r"train\.carry: no source of data is a text; leave it out"):
        Mixture({"rows": object()}, {"rows": 1.0}, 4).carry()
