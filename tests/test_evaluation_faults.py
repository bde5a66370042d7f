"""No wrong number without a line: stale results, damaged files, logits that are not finite, no questions."""

import copy
import json
import shutil

import pytest
import torch

from memlm import files
from memlm.evaluation import run as evaluate
from memlm.evaluation import storage
from memlm.evaluation.parts import Parts
from memlm.evaluation.runs import grouped
from memlm.hub import load_model
from memlm.reader import bytes_after
from memlm.training import run as train
from tests.conftest import build, composed
from tests.runs import SMALLEST, config

QUICK = ("control=null", "eval.factors=[1]", "eval.recall_rows=2", "eval.depths=[]")
ORDER = "eval.ask={order: {segment: 4, distances: [4], paths: [words.txt]}}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    train(config(folder, "train.steps=2", "train.save_every=1", "train.keep=2", small=SMALLEST))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    return tmp_path / "run"


def evaluated(run, *overrides):
    """Whether all was measured, and the results."""
    complete = evaluate(composed(f"checkpoint={run}", *QUICK, *overrides, config="evaluate"))
    folder = run.parent.parent if run.parent.name == "checkpoints" else run
    return complete, json.loads((folder / "evaluation" / "latest" / "results.json").read_text())


def changed(folder, name, **settings):
    """Change settings in a JSON file of a checkpoint."""
    path = folder / "checkpoints" / "step_000002" / name
    path.write_text(json.dumps(files.read_json(path) | settings))
    files.seal(path.parent)


def test_logits_that_are_not_finite_are_no_wrong_answers(run):
    step = run / "checkpoints" / "step_000002"
    model = load_model(step)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    model.save_pretrained(step)
    files.seal(step)
    with pytest.raises(ValueError, match=r"measured; run: recall is missing: the model's logits are not finite$"):
        evaluated(run)


@pytest.mark.parametrize(
    "file", [("generation_config.json", {"eos_token_id": 7}), ("tokenizer_config.json", {"bos_token": "<pad>"})]
)
def test_files_that_change_results_are_in_the_keys(run, file, capsys):
    name, settings = file
    evaluated(run)
    evaluated(run)
    assert "measured before: recall" in capsys.readouterr().out
    changed(run, name, **settings)
    evaluated(run)
    assert "measured before" not in capsys.readouterr().out


def test_results_of_other_files_have_a_folder_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for text in ("one two three four five six seven", "seven six five four three two one"):
        (tmp_path / "words.txt").write_text(text)
        complete, results = evaluated(run, ORDER, "eval.lengths=[12]", "eval.rows=2")
        assert complete
        found.append(results["of"])
    assert found[0] != found[1] and len([*(run / "evaluation").glob("*/results.json")]) == 3
    # A folder in the present one has a plain word for its name.
    (tmp_path / "words").mkdir()
    keys = []
    for text in ("x", "y"):
        (tmp_path / "words" / "a.txt").write_text(text)
        keys.append(storage.digest(storage.content({"haystack": "words"})))
    assert keys[0] != keys[1]


def test_the_bytes_of_a_state_are_no_question():
    """They are those after an artificial text, whose logits need not be finite."""
    model = build("none")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    parts, ids = Parts(model=model), torch.ones(1, 5, dtype=torch.long)
    assert parts.measure("bytes", {}, lambda _: bytes_after(model, 5)) > 0 and not parts.missing
    assert parts.measure("logits", {}, lambda _: len(model(ids).logits)) is None and "logits" in parts.missing


def test_texts_that_cannot_be_asked_are_lines_and_the_others_go_on(run, capsys):
    """Also where the others were measured before."""
    ask = ("eval.factors=[]", "eval.ask={babilong: {tasks: [1]}}", "eval.lengths=[16, 1500]", "eval.rows=1")
    for _ in range(2):
        complete, results = evaluated(run, *ask)
        model = results["models"]["run"]
        assert not complete and {cell["across"] for cell in model["asked"]["babilong"]} >= {1500}
        (line,) = (note for note in results["notes"] if "is missing" in note)
        assert line.startswith("run: babilong, task 1, 16 tokens is missing: eval.ask.babilong: lengths=16 is too")
        assert line in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused_also_by_its_own_name(run, trained, capsys):
    step = run / "checkpoints" / "step_000002"
    weights = bytearray((step / "model.safetensors").read_bytes())
    weights[-2] ^= 0x40
    (step / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"step_000002: .*model\.safetensors: damaged; .* put it back from a copy"):
        evaluated(step)
    shutil.rmtree(run / "checkpoints" / "step_000001")
    capsys.readouterr()
    complete, results = evaluated(trained, f"control={run}")
    (line,) = (note for note in results["notes"] if note.startswith(f"control={run} is left out: "))
    assert not complete and line in capsys.readouterr().out and [*results["models"]] == ["run"]


def test_a_link_that_was_copied_as_a_folder_is_kept_beside(run, tmp_path):
    evaluated(run)
    shutil.copytree(run, tmp_path / "copy" / "run")
    _, results = evaluated(tmp_path / "copy" / "run", "seed=1")
    assert results["evaluation"]["seed"] == 1
    (before,) = (tmp_path / "copy" / "run" / "evaluation").glob("latest-copied-*")
    assert json.loads((before / "results.json").read_text())["evaluation"]["seed"] == 0


def test_a_measure_that_is_left_out_is_told_by_the_exit_code(run):
    complete, results = evaluated(run, "data=facts", "data.seq_len=80", "eval.bank_documents=[2]")
    (found,) = results["models"].values()
    assert not complete and found["recall"] and found["bank"] == []
    assert any(note.startswith("bank is left out: run has no bank") for note in results["notes"])


def test_a_task_without_a_question_is_no_result(run):
    with pytest.raises(ValueError, match=r"measured; run: mqar is missing: eval\.ask\.mqar asks no question"):
        evaluated(run, "eval.factors=[]", "eval.ask={mqar: {forms: []}}")
    with pytest.raises(ValueError, match=r"ask\.mqar\.lengths=\[\] is empty"):
        evaluated(run, "eval.factors=[]", "eval.ask={mqar: {}}", "eval.lengths=[]")


def test_an_earlier_checkpoint_that_was_evaluated_last_does_not_count(run):
    evaluated(run)
    paths = [*(run / "evaluation").glob("*-*/results.json")]
    evaluated(run / "checkpoints" / "step_000001")
    paths = [*(path for path in (run / "evaluation").glob("*-*/results.json") if path not in paths), *paths]
    (row,), lines, notes = grouped(paths)
    assert row.facts[0]["step"] == 2 and row.files[0] == [str(paths[1])] and not lines
    assert notes == [f"{paths[0]}: run, seed 0: step 1 does not count beside step 2"]


def test_runs_of_one_configuration_share_a_row_and_those_of_other_weights_do_not_mix(run, tmp_path):
    _, results = evaluated(run)
    (facts,) = results["models"].values()
    assert facts["seed"] == 0

    def rows(*changes, **others):
        paths = []
        for i, change in enumerate(changes):
            one = copy.deepcopy(results) | others
            settings = one["models"]["run"]["settings"] | {"train.init_from": change.pop("base")}
            without = change.pop("without", ())
            settings = {key: x for key, x in settings.items() if key not in without}
            one["models"]["run"] |= {"weights": str(i), "settings": settings, **change}
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(json.dumps(one))
        found, lines, notes = grouped(paths)
        return [[*row.files] for row in found], lines, notes

    # In results, the seed is removed from names: all from one run, then each from that of its seed.
    one = [{"seed": 0, "base": "base-seed*"}, {"seed": 1, "base": "base-seed0"}, {"seed": 2, "base": "base-seed0"}]
    own = [{"seed": seed, "base": "base-seed*"} for seed in range(3)]
    other = [{"seed": 0, "base": "base-seed*"}, {"seed": 1, "base": "other-seed0"}]
    assert rows(*one) == rows(*own) == ([[0, 1, 2]], [], []) and rows(*other)[0] == [[0], [1]]
    # An earlier version has no such settings.
    earlier = {"seed": 1, "base": "a", "without": ["optim.schedule", "train.ema", "train.z_loss"]}
    assert rows({"seed": 0, "base": "a"}, earlier) == ([[0, 1]], [], [])
    _, _, (note,) = rows({"seed": 0, "base": "a"}, {"seed": 0, "base": "a"})
    assert note == f"{tmp_path}/1.json: run, seed 0: other weights than in {tmp_path}/0.json, which counts"
    _, _, (note,) = rows({"seed": 0, "base": "a", "missing": {"text": "no text"}})
    assert note == f"{tmp_path}/0.json: run, seed 0: text is missing: no text"
    _, (line,), _ = rows({"seed": 0, "base": "a"}, schema=3)
    assert line == f"{tmp_path}/0.json: its schema is 3, this version reads 1 to 2; evaluate the run again"
