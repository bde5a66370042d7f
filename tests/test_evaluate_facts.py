"""Facts of a checkpoint come from the checkpoint; differences are shown; results are kept; a table of several runs."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from memlm.data import QuestionSource, build_data, token_bytes
from memlm.evaluation import run as evaluate
from memlm.evaluation.data import Examined, examine, texts
from memlm.evaluation.measures import measures
from memlm.evaluation.run import _check_measurable
from memlm.evaluation.runs import grouped
from memlm.hub import load_model
from memlm.training import run as train
from tests.conftest import composed

TEXT = ("eval.factors=[]", "eval.depths=[]", "eval.text_documents=3", "eval.text_length=200")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with a BPE, and its control in bytes; another seed; other steps and another optimiser."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus"
    corpus.mkdir()
    words = [
        "one",
        "sentence",
        "after",
        "another",
        "tells",
        "of",
        "rivers,",
        "mountains",
        "and",
        "the",
        "weather",
        "of",
        "the",
        "day",
    ]
    rng = np.random.default_rng(0)
    for i in range(40):
        (corpus / f"{i}.txt").write_text(" ".join(rng.choice(words, 120)))
    for name, *options in (
        ("bpe", "data.tokenizer={bpe: 300}"),
        ("bytes", "train.steps=2"),
        ("bytes1", "train.steps=2", "seed=1"),
        ("long", "train.steps=3", "train.save_every=1", "optim.lr=0.005"),
    ):
        train(
            composed(
                "data=text",
                "memory=none",
                f"run_dir={folder}/{name}-seed0",
                f"data.cache_dir={folder}/cache",
                f"data.sources.text.paths=[{corpus}]",
                "data.seq_len=64",
                "train.batch_size=4",
                "model.hidden_size=32",
                "train.steps=1",
                *options,
            )
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def evaluated(folder, *overrides, run="bpe", control="null"):
    """The results of an evaluation, and their path."""
    control = control if control == "null" else f"{folder}/{control}-seed0"
    evaluate(composed(f"checkpoint={folder}/{run}-seed0", f"control={control}", *TEXT, *overrides, config="evaluate"))
    out = folder / f"{run}-seed0" / "evaluation"
    return json.loads((out / "latest" / "results.json").read_text()), out


def bits(results, model):
    return results["models"][model]["text"]["text"]["carried"]["bits_per_byte"]


def test_tokens_and_length_are_the_checkpoints_whatever_data_is_named(runs, capsys):
    own, _ = evaluated(runs)
    named, _ = evaluated(runs, "data=text", f"data.sources.text.paths=[{runs}/corpus]")
    assert own["models"]["bpe"]["tokenizer"].startswith("300 entries")
    assert named["data"]["seq_len"] == 64 and "was trained on other data" not in capsys.readouterr().out
    assert bits(named, "bpe") == bits(own, "bpe")
    other, _ = evaluated(runs, "data.tokenizer=byte", "data.seq_len=32")
    assert other["models"]["bpe"]["text"]["text"]["carried"]["segment"] == 32
    assert bits(other, "bpe") != bits(own, "bpe")
    assert "bpe was trained on other data: data.seq_len: 32 here, 64 in training" in capsys.readouterr().out


def test_a_control_of_other_tokens_reads_the_same_bytes_and_differences_are_told(runs, capsys):
    results, out = evaluated(runs, control="bytes")
    screen = capsys.readouterr().out
    assert re.search(r"control \(bytes\) differs: tokens: 300 entries \(\w{8}\) bpe, byte control \(bytes\); ", screen)
    assert "train.steps: 1 bpe, 2 control (bytes)" in screen
    alone, _ = evaluated(runs, run="bytes", control="null")
    # Not the tokens of the first model, which equal bytes only by chance.
    assert bits(results, "control (bytes)") == pytest.approx(bits(alone, "bytes"), rel=0.2)
    page = (out / "latest" / "report.html").read_text()
    assert "each was given the same bytes" in page and "<td>data.tokenizer</td>" in page


def test_texts_of_other_tokens_are_cut_at_the_same_byte(runs):
    data = {"seq_len": 64, "cache_dir": str(runs / "cache")}
    data["sources"] = {"text": {"kind": "text", "weight": 1, "paths": str(runs / "corpus")}}
    specs = [str(next((runs / f"{name}-seed0" / "checkpoints").glob("step_*"))) for name in ("bpe", "bytes")]
    built = [build_data({**data, "tokenizer": spec}, seed=0, batch_size=1) for spec in specs]
    models = [Examined(None, tokenizer, mixture.sources, 0) for tokenizer, mixture in built]
    bpe, plain = texts(models, 3, 100)
    sizes = token_bytes(models[0].tokenizer)
    assert len(bpe["text"]) == 2
    for tokens, in_bytes in zip(bpe["text"], plain["text"], strict=True):
        assert len(in_bytes) == 100 and 0 <= 100 - sizes[tokens].sum() < sizes.max()
    (alone,) = texts(models[:1], 3, 100)
    assert [len(t) for t in alone["text"]] == [100] * 2


def test_documents_are_joined_with_their_ends_to_a_length(runs):
    data = {"seq_len": 64, "cache_dir": str(runs / "cache")}
    data["sources"] = {"text": {"kind": "text", "weight": 1, "paths": str(runs / "corpus")}}
    specs = [str(next((runs / f"{name}-seed0" / "checkpoints").glob("step_*"))) for name in ("bpe", "bytes")]
    built = [build_data({**data, "tokenizer": spec}, seed=0, batch_size=1) for spec in specs]
    models = [Examined(None, tokenizer, mixture.sources, 0) for tokenizer, mixture in built]
    whole = [ids for _, ids in models[1].sources["text"].corpus.documents("test")]
    least, end = sum(map(len, whole)) // 2 - 1, models[1].tokenizer.eos_token_id
    (alone,) = texts(models[1:], 9, least, joined=True)
    assert [len(ids) for ids in alone["text"]] == [least] * len(alone["text"]) and end in alone["text"][0]
    assert alone["text"][0].tolist() == np.concatenate(whole)[:least].tolist()
    # Less than one text: all that there is.
    (short,) = texts(models[1:], 9, 10**6, joined=True)
    assert [ids.tolist() for ids in short["text"]] == [np.concatenate(whole).tolist()]
    bpe, plain = texts(models, 9, 50, joined=True)
    told = [[one.tokenizer.decode(ids) for ids in of["text"]] for one, of in zip(models, (bpe, plain), strict=True)]
    assert told[1] and all(a and b.startswith(a) and len(b) - len(a) < 9 for a, b in zip(*told, strict=True))


def test_a_model_that_has_not_ended_its_training_is_told(runs, capsys):
    results, out = evaluated(runs, f"checkpoint={runs}/long-seed0/checkpoints/step_000002", run="long")
    line = "long is at step 2 of 3: its training has not ended"
    assert line in capsys.readouterr().out and line in (out / "latest" / "report.html").read_text()
    model = results["models"]["long"]
    assert (model["step"], model["steps"], model["tokens_seen"]) == (2, 3, 2 * 4 * 64)


def test_a_corpus_that_has_changed_is_named(runs):
    file = runs / "corpus" / "7.txt"
    before = file.read_text()
    file.write_text(before + " and rain")
    try:
        results, _ = evaluated(runs, run="long")
    finally:
        file.write_text(before)
    (note,) = results["notes"]
    assert note.startswith("long: data.sources.text: its files are not those of the run: ") and "7.txt changed" in note
    assert evaluated(runs, run="long")[0]["notes"] == []


def test_an_evaluation_that_would_measure_nothing_is_refused(runs):
    with pytest.raises(ValueError, match=r"eval measures nothing of data\.sources\.text; use eval=demo"):
        evaluated(runs, "eval.text_documents=0")
    demo = measures(OmegaConf.to_container(composed(config="evaluate").eval))
    source = QuestionSource.__new__(QuestionSource)
    with pytest.raises(ValueError, match=r"data\.sources\.questions; use eval=bank, which asks banks"):
        _check_measurable(demo, {"questions": source})


def test_weights_of_sources_need_not_fit_a_batch_and_every_source_of_text_is_measured(runs):
    (folder,) = (runs / "bytes-seed0" / "checkpoints").glob("step_*")
    data = composed("data=recall").data
    subject = SimpleNamespace(folder=folder, model=load_model(folder))
    weights = {"mqar": 0.9, "passkey": 0.1}
    data = {**data, "sources": {name: {**o, "weight": weights[name]} for name, o in data.sources.items()}}
    assert [*examine(subject, data, 0).sources] == ["mqar", "passkey"]
    two = [f"++data.sources.{name}={{kind: text, weight: 1, paths: {runs}/corpus}}" for name in ("text", "more")]
    results, _ = evaluated(runs, "data=text", *two, run="bytes")
    assert [*results["models"]["bytes"]["text"]] == ["text", "more"]


def test_runs_of_several_seeds_and_tokenizers_are_compared(runs, tmp_path, capsys):
    """Seeds share a row; settings that differ are named; documents of equal bytes pair runs of one tokenizer."""
    found = {}
    for run in ("bytes", "bytes1", "long", "bpe"):
        results, _ = evaluated(runs, run=run)
        # They have one name, as repeated runs have.
        found[run] = results["models"] = {"none": results["models"][run]}
        (tmp_path / f"{run}.json").write_text(json.dumps(results))
    (tmp_path / "broken.json").write_text("{")
    given = f"compare=[{tmp_path}/b*s*.json,{tmp_path}/long.json,{tmp_path}/bpe.json,{tmp_path}/broken.json,{runs}/no]"
    complete = evaluate(composed(given, f"out={tmp_path}/out", config="evaluate"))
    said = capsys.readouterr().out
    assert not complete and f"{runs}/no: no such run; name a run" in said and f"{tmp_path}/broken.json: cannot" in said
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    both, long, bpe = results["rows"]
    assert both["seeds"] == [0, 1] and long["seeds"] == bpe["seeds"] == [0] and len(results["left_out"]) == 2
    assert "train.steps=3" in long["name"] and long["tokens_seen"] == 3 * 4 * 64
    carried = [m["none"]["text"]["text"]["carried"]["bits_per_byte"] for m in found.values()]
    cells = [row["cells"][0] for row in results["rows"]]
    assert [cell["value"] for cell in cells] == pytest.approx([sum(carried[:2]) / 2, *carried[2:]])
    assert cells[1]["difference"]["paired"] and cells[1]["difference"]["value"] == pytest.approx(
        carried[2] - sum(carried[:2]) / 2, abs=1e-9
    )
    assert both["state_bytes"] == cells[0]["bytes"] > 0 and both["flops"] > 0
    # An earlier version, whose FLOPs are counted again where the checkpoint is, and unknown elsewhere.
    for name, model in (("bytes", found["bytes"]["none"]), ("long", found["long"]["none"] | {"checkpoint": "gone"})):
        old = json.loads((tmp_path / f"{name}.json").read_text())
        old |= {"schema": 1, "models": {"none": model | {"flops": 1.0}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(old))
    rows, *_ = grouped([tmp_path / f"{name}.json" for name in ("bytes", "long")])
    assert [next(iter(row.facts.values()))["flops"] for row in rows] == [both["flops"], None]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bits per byte" in page and (tmp_path / "out" / "plots" / "text-text.png").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"models": 3}', '{"models": {"a": {}}}', "[" * 100_000])
def test_a_file_without_results_is_one_line(tmp_path, content, capsys):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"^compare=\[.*\]: there are no results; evaluate the runs first"):
        evaluate(composed(f"compare=[{tmp_path}/results.json]", config="evaluate"))
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith(f"{tmp_path}/results.json: ") and told.endswith("; evaluate the run again")
