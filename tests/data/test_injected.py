"""Facts in single steps of a run, and their probes: where they stand, when they are validated, and that they fit."""

import json

import numpy as np
import pytest
import torch

from memlm.data import Injection, Mixture, RetrievalRow, Row, byte_tokenizer, token_bytes
from memlm.data.injected import InjectedSource, invented, read_facts
from memlm.training import run
from memlm.training.objective import score
from memlm.training.tracking import read_metrics
from tests.conftest import build, composed
from tests.runs import SMALLEST, figures, stopped, trainer

TOKENIZER, LENGTH = byte_tokenizer(), 96
FACT = {
    "texts": ["Ada likes figs.", "Figs please Ada.", "Ada eats figs."],
    "probes": {"verbatim": [["Ada likes", " figs"]], "hard": [["Figs are liked by", " Ada"], ["Who? It is", " Ada"]]},
}
SETTINGS = "start: 4, period: 3, times: 3, probe_every: 2, probe_steps: 3"


class Numbered:
    """Rows of the letter of their index."""

    def row(self, index, split, step):
        ids = np.full(LENGTH, ord("a") + index % 26)
        return Row(ids, np.concatenate([[-100], ids[1:]]), np.arange(LENGTH))


def source(count=3, **settings):
    injection = Injection("base", **{"start": 4, "period": 60, "times": 2, **settings})
    return InjectedSource(Numbered(), invented(1, count), injection, TOKENIZER, LENGTH)


def mixture(weight=1, count=3, steps=1000, **settings):
    made = Mixture({"base": Numbered(), "facts": source(count, **settings)}, {"base": 1, "facts": weight}, 8)
    made.inject(steps)
    return made


def read(ids):
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize("paraphrased", [False, True])
def test_a_batch_of_its_steps_has_all_facts_and_others_have_none(paraphrased):
    made, facts = mixture(paraphrased=paraphrased), invented(1, 3)
    plain = Mixture({"base": Numbered(), "facts": Numbered()}, {"base": 1, "facts": 1}, 8)
    for step in range(130):
        batch, base = made.batch(step), plain.batch(step)
        changed = (batch.input_ids != base.input_ids).any(1).nonzero().flatten().tolist()
        assert changed == ([4, 5, 6] if step in (4, 64) else [])
        for fact, row in zip(facts, changed, strict=False):
            text = fact.texts[int(paraphrased and step == 64)]
            size = len(text) + 1
            assert read(batch.input_ids[row]).startswith(f"{text}<eos>")
            assert torch.equal(batch.input_ids[row, size:], base.input_ids[row, : LENGTH - size])
            assert batch.position_ids[row].tolist() == [*range(size), *range(LENGTH - size)]
            starts = torch.tensor([0, size])
            assert (batch.labels[row] == -100).nonzero().flatten().equal(starts)
    for split in ("validation", "test"):
        assert torch.equal(made.batch(4, split).input_ids, plain.batch(4, split).input_ids)


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_share_the_rows_of_facts_and_probes(parts):
    made, model = mixture(), build("none", torch.float32)
    names, sizes = [*made.sources, *made.probe_names], torch.from_numpy(token_bytes(TOKENIZER))
    for step, split in ((4, "train"), (0, "probes"), (made.num_probe_batches - 1, "probes")):
        whole = made.batch(step, split)
        for part in range(parts):
            own = made.batch(step, split, part, parts)
            assert torch.equal(own.input_ids, whole.input_ids[part::parts])
            assert torch.equal(own.labels, whole.labels[part::parts])

    def scored(part, of):
        batches = (made.batch(step, "probes", part, of) for step in range(made.num_probe_batches))
        return score(model, batches, names, sizes, torch.device("cpu"))

    every, divided = scored(0, 1), [scored(part, parts) for part in range(parts)]
    for name in names:
        assert sum(of[name].nats for of in divided) == pytest.approx(every[name].nats, rel=1e-5)
        # Three facts of two probes, whose answers have seven bytes.
        assert sum(of[name].tokens for of in divided) == every[name].tokens == 42 * ("/" in name)


def test_probes_are_asked_for_their_answers_alone():
    facts, found = invented(1, 3), source().probes
    assert [*found] == ["verbatim", "paraphrase", "composed", "swapped"]
    for kind, rows in found.items():
        asked = [pair for fact in facts for pair in fact.probes[kind]]
        for (prompt, answer), row in zip(asked, rows, strict=True):
            assert read(row.input_ids).startswith(f"{prompt}{answer}<eos>")
            assert read(row.labels[row.labels != -100]) == answer
    # Wordings of probes are in no text, and the answers of "swapped" are in no text of the same fact.
    for fact in facts:
        texts = " ".join(fact.texts)
        assert all(prompt + answer in texts for prompt, answer in fact.probes["verbatim"])
        for kind in ("paraphrase", "composed"):
            assert not any(prompt in texts for prompt, _ in fact.probes[kind])
        assert not any(answer in texts for _, answer in fact.probes["swapped"])
    again = invented(1, 3, again=True)
    assert all(a.texts[0].split()[0] == b.texts[0].split()[0] for a, b in zip(facts, again, strict=True))
    assert not {a for fact in facts for _, a in fact.probes["verbatim"]} & {
        a for fact in again for _, a in fact.probes["verbatim"]
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"period": 9}, "period=9 is shorter than the 50 steps in which a fact is probed; raise it, or lower probe_s"),
        ({"start": 0}, r"start=0 must be a whole number in \[1, "),
        ({"probe_every": 60}, "probe_every=60 must be at most probe_steps=50"),
        (
            {"paths": "x.jsonl", "contradicts": "facts"},
            "contradicts=facts is for invented facts, and paths gives othe",
        ),
        ({"count": 5}, "data.sources.facts: 5 facts are more than its 4 rows of a batch; raise its weight or train.b"),
        ({"steps": 64}, "data.sources.facts: facts are due in step 64, behind train.steps=64; lower start, period or"),
        ({"weight": 0.01}, "data.sources.facts: a source has no row in some batches; raise its weight or train.batch"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, told):
    with pytest.raises(ValueError, match=f"^{told}") as caught:
        mixture(**settings)
    assert "\n" not in str(caught.value)
    mixture(steps=65)


def test_texts_that_do_not_fit_are_refused():
    fact = invented(1, 2)[0]
    with pytest.raises(ValueError, match=r"^the fact '.*' has 57 tokens; shorten it, or raise data.seq_len=40"):
        InjectedSource(Numbered(), [fact], Injection("base"), TOKENIZER, 40)
    alone = fact._replace(texts=fact.texts[:1])
    with pytest.raises(ValueError, match=r"^paraphrased: .* is the one text of a fact"):
        InjectedSource(Numbered(), [alone], Injection("base", paraphrased=True), TOKENIZER, LENGTH)

    class Documents:
        def row(self, index, split, step):
            return RetrievalRow(*[np.zeros(LENGTH, np.int64)] * 5)

    with pytest.raises(ValueError, match=r"^of=base has rows of documents and questions; name a source of text"):
        InjectedSource(Documents(), [fact], Injection("base"), TOKENIZER, LENGTH)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ('{"texts": ["a"]}', "probes is missing; give texts, probes"),
        ('{"texts": [], "probes": {}}', r"texts=\[\] must be a list of texts"),
        ('{"texts": ["a"], "probes": {"hard": [["a"]]}}', "probes=.* must be an object of lists of"),
        ("", "paths=.* hold no fact; give texts, probes in each line"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, line, told):
    (tmp_path / "facts.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=told if not line else f"facts.jsonl:2: {told}"):
        read_facts(str(tmp_path / "facts.jsonl"), tmp_path / "cache")


def config(folder, *overrides, of="text", settings=SETTINGS, paths=None):
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps. " * 20)
    kept = (setting for setting in SMALLEST if not setting.startswith("data"))
    paths = folder / "facts.jsonl" if paths is None else paths
    paths.write_text("".join(json.dumps(FACT | {"texts": FACT["texts"][i:]}) + "\n" for i in range(2)))
    facts = f"{{kind: injected, weight: 1, of: {of}, paths: {paths}, {settings}}}"
    return composed(
        *(*kept, "data=text", "data.tokenizer=byte", f"data.sources.text.paths=[{folder}/corpus]", "train.steps=14"),
        *(f"run_dir={folder}/run", f"data.cache_dir={folder}/cache", "train.validate_every=7", "train.save_every=50"),
        *("data.seq_len=32", f"+data.sources.facts={facts}", *overrides),
    )


def test_a_run_probes_around_its_facts_and_goes_on_as_if_undisturbed(tmp_path, monkeypatch):
    run(config(tmp_path))
    # Before steps 4, 7 and 10 and two steps later, and with all sources after 7 and 14.
    assert set(figures(tmp_path, "validation/facts/hard/loss")) == {4, 6, 7, 9, 10, 12, 14}
    assert set(figures(tmp_path, "validation/text/loss")) == {7, 14}
    losses = {kind: figures(tmp_path, kind) for kind in ("loss", "loss/facts", "validation/facts/verbatim/loss")}
    stopped(config(tmp_path / "again", paths=tmp_path / "facts.jsonl"), after=8)
    run(config(tmp_path / "again", paths=tmp_path / "facts.jsonl"))
    assert {kind: figures(tmp_path / "again", kind) for kind in losses} == losses
    files = json.loads((tmp_path / "run" / "manifest-facts.json").read_text())["files"]
    assert [file["path"] for file in files] == ["facts.jsonl"] and len(files[0]["sha256"]) == 64
    monkeypatch.setitem(FACT, "probes", {"verbatim": [["Ada", " x"]]})
    with pytest.raises(ValueError, match=r"^data.sources.facts: its files are not those of the run: facts.jsonl chan"):
        run(config(tmp_path, "train.steps=20", "optim.schedule_steps=14"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            {"overrides": ["train.carry=true", "memory=titans_lmm"]},
            r"train.carry: data.sources.\['facts'\] puts facts",
        ),
        ({"settings": "times: 0, of: facts"}, "data.sources.facts.of=facts must name a source of another kind"),
        ({"settings": "perod: 7"}, "data.sources.facts.perod is unknown; did you mean 'period'"),
        ({"settings": "period: 7.5"}, "data.sources.facts.period=7.5 must be int"),
        ({"settings": "times: 10"}, "data.sources.facts: facts are due in step 1000, behind train.steps=14"),
        (
            {"settings": "paths: null, contradicts: facts"},
            "data.sources.facts.contradicts=facts has no invented facts of its own",
        ),
    ],
)
def test_a_run_that_does_not_fit_is_not_begun(tmp_path, overrides, told):
    cfg = config(tmp_path, *overrides.get("overrides", ()), settings=overrides.get("settings", SETTINGS))
    with pytest.raises(ValueError, match=f"^{told}"):
        trainer(cfg)
    assert not read_metrics(tmp_path / "run" / "metrics.jsonl")
