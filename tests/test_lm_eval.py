"""lm-eval's numbers are those of the model, by its Python API and by its command line, for tasks on this disk."""

import copy
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import memlm
from memlm import evaluation
from memlm.data.tokenizer import byte_tokenizer
from memlm.evaluation.data import Examined
from memlm.evaluation.measures import lm_eval as module
from memlm.evaluation.measures.text import Text
from tests import processes
from tests.conftest import ROOT, composed
from tests.test_attached import opened
from tests.test_trainers import attached, made, own, text

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
WINDOW = 48
DOCUMENTS = [text(n, n).strip() for n in (2, 21, 9)]
PAIRS = [(text(n, n).strip(), " " + text(m, m + 20).strip()) for n, m in ((3, 2), (6, 1), (1, 4))]
TASKS = {
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{document}}"},
    "completion": {"output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "doc_to_target": "{{completion}}"},
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False},
    },
}
METRICS = {
    "rolling": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}, {"metric": "word_perplexity"}],
    "completion": [{"metric": "perplexity"}, {"metric": "acc"}],
    "generation": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks, and two models that differ from what their backbone alone would be."""
    path = tmp_path_factory.mktemp("lm_eval")
    rows = [{"document": d, "prompt": a, "completion": b} for d, (a, b) in zip(DOCUMENTS, PAIRS, strict=True)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / "rows.jsonl")}}}
    for name, task in TASKS.items():
        words = {"task": f"local_{name}", "test_split": "test", **data, **task, "target_delimiter": ""}
        # JSON is YAML.
        (path / f"{name}.yaml").write_text(json.dumps(words | {"metric_list": METRICS[name]}))
    for make in (own, attached):
        model = opened(made(make, "titans_lmm"))
        model.save_pretrained(path / make.__name__)
        byte_tokenizer().save_pretrained(path / make.__name__)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def score(model, ids: list[int], first: int) -> float:
    """The log-likelihood of the tokens from ``first`` on."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)
    return float(logits[range(first - 1, len(ids) - 1), ids[first:]].sum())


def rolling(model, tokenizer, document: str) -> float:
    """In windows, each with one token before it, or more where the last one has room."""
    ids, nats = tokenizer(document).input_ids, 0.0
    ids = [tokenizer.bos_token_id, *ids]
    for first in range(1, len(ids), WINDOW):
        end = min(first + WINDOW, len(ids))
        begin = max(0, end - WINDOW - 1)
        nats += score(model, ids[begin:end], first - begin)
    return nats


def expected(model) -> tuple[list[float], list[float], list[str]]:
    tokenizer = byte_tokenizer()
    completions = []
    for prompt, completion in PAIRS:
        ids = tokenizer(prompt).input_ids
        completions.append(score(model, ids + tokenizer(completion).input_ids, len(ids)))
    generated = []
    for prompt, _ in PAIRS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=256)
        generated.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).partition("e")[0])
    return [rolling(model, tokenizer, document) for document in DOCUMENTS], completions, generated


def check(results: dict, model) -> None:
    """The metrics of whole documents against the model's own numbers."""
    documents, _, _ = expected(model)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    words = sum(len(document.split()) for document in DOCUMENTS)
    found = results["local_rolling"]
    assert found["bits_per_byte,none"] == pytest.approx(-sum(documents) / size / math.log(2), rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-sum(documents) / size), rel=1e-5)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(-sum(documents) / words), rel=1e-4)


@pytest.mark.parametrize("make", [own, attached])
def test_numbers_of_the_python_api_are_the_models(folder, make):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = memlm.from_pretrained(folder / make.__name__)
    lm = HFLM(pretrained=copy.deepcopy(model), tokenizer=byte_tokenizer(), batch_size=2, max_length=WINDOW)
    found = simple_evaluate(
        model=lm,
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    check(found["results"], model)
    documents, completions, generated = expected(model)
    of = {name: [x["resps"][0] for x in found["samples"][f"local_{name}"]] for name in TASKS}
    assert [x[0] for x in of["rolling"]] == pytest.approx(documents, rel=1e-5)
    assert [x[0][0] for x in of["completion"]] == pytest.approx(completions, rel=1e-5)
    assert [x[0] for x in of["generation"]] == generated
    perplexity = found["results"]["local_completion"]["perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-sum(completions) / len(PAIRS)), rel=1e-4)


def test_the_files_that_tasks_name_are_in_their_keys(folder):
    assert module._files(str(folder)) == [str(folder / "rows.jsonl")] and module._files(None) == []


def test_rolling_windows_of_evaluate_py_are_those_of_lm_eval(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.api.task import PerplexityTask
    from lm_eval.models.huggingface import HFLM

    model = memlm.from_pretrained(folder / "own")
    lm = HFLM(pretrained=copy.deepcopy(model), tokenizer=byte_tokenizer(), batch_size=2, max_length=WINDOW)
    requests = [Instance("loglikelihood_rolling", {}, (d,), 0) for d in DOCUMENTS]
    found = lm.loglikelihood_rolling(requests)
    source = SimpleNamespace(seq_len=WINDOW)
    one = Examined(SimpleNamespace(model=model, memory_off=False), byte_tokenizer(), {"text": source}, 0)
    # A document of evaluate.py ends in a token without text.
    documents = [np.array([*byte_tokenizer()(d).input_ids, byte_tokenizer().eos_token_id]) for d in DOCUMENTS]
    got = Text(3, 10**4, text_ways=["rolling"]).source(one, WINDOW, documents)
    assert [-x for x in got["rolling"]["all"]["nats"]] == pytest.approx(found, rel=1e-5)
    counts = got["documents"]
    assert counts["words"] == list(map(PerplexityTask.count_words, DOCUMENTS))
    assert counts["bytes"] == got["rolling"]["all"]["bytes"] == list(map(PerplexityTask.count_bytes, DOCUMENTS))
    of_words, of_bytes = (list(zip(found, counts[unit], strict=True)) for unit in ("words", "bytes"))
    told = [got["rolling"]["all"][key] for key in ("bits_per_byte", "byte_perplexity", "word_perplexity")]
    expected = [bits_per_byte(of_bytes), weighted_perplexity(of_bytes), weighted_perplexity(of_words)]
    assert told == pytest.approx(expected, rel=1e-4)


def test_a_model_is_loaded_with_its_memory(folder):
    from memlm.lm_eval import MemoryLM

    lm = MemoryLM(pretrained=str(folder / "attached"), device="cpu", max_length=WINDOW)
    model = memlm.from_pretrained(folder / "attached")
    ids = torch.arange(2, 40)[None]
    assert memlm.attached.of(lm.model) and torch.equal(lm.model(ids).logits, model(ids).logits)


@pytest.fixture
def own_tasks(monkeypatch):
    """The command line knows the tasks of ``--include_path`` alone: to find its own takes seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


def test_the_command_line_takes_a_memory(folder, monkeypatch, tmp_path, own_tasks):
    from memlm.lm_eval import cli_evaluate

    model = memlm.from_pretrained(folder / "attached")
    memlm.save_memory(model, tmp_path / "memory")
    memlm.detach(copy.deepcopy(model)).save_pretrained(tmp_path / "backbone")
    given = f"pretrained={tmp_path}/backbone,memory={tmp_path}/memory,tokenizer={folder}/attached,max_length={WINDOW}"
    command = f"lm_eval run --model memlm --model_args {given} --device cpu --tasks local_rolling"
    command += f" --include_path {folder} --output_path {tmp_path}/out"
    monkeypatch.setattr("sys.argv", command.split())
    cli_evaluate()
    (written,) = (tmp_path / "out").rglob("results*.json")
    check(json.loads(written.read_text())["results"], model)


def test_a_memory_alone_is_loaded_with_its_backbone(folder, tmp_path):
    from memlm.lm_eval import MemoryLM

    model = memlm.from_pretrained(folder / "attached")
    memlm.detach(copy.deepcopy(model)).save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    model.config.name_or_path = str(tmp_path / "backbone")
    memlm.save_memory(model, tmp_path / "alone")
    lm = MemoryLM(pretrained=str(tmp_path / "alone"), device="cpu", max_length=WINDOW)
    ids = torch.arange(2, 40)[None]
    assert memlm.attached.of(lm.model) and torch.equal(lm.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("pretrained={0}/none", "{0}/none"),
        ("pretrained={0}/own,memory={0}/none", "{0}/none/memlm_memory.json: no such file; a memory is written by"),
    ],
)
def test_a_wrong_folder_ends_in_a_line(folder, monkeypatch, own_tasks, given, told):
    from memlm.lm_eval import main

    command = f"lm_eval run --model memlm --model_args {given.format(folder)} --device cpu --tasks local_rolling"
    monkeypatch.setattr("sys.argv", [*command.split(), "--include_path", str(folder)])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value.code).startswith("error: ") and told.format(folder) in end.value.code
    assert "\n" not in end.value.code


def test_evaluate_of_hugging_face_is_found_beside_evaluate_py():
    """This folder is the first of sys.path here, as for python -m lm_eval."""
    evaluate = importlib.import_module("evaluate")
    assert callable(evaluate.load) and Path(evaluate.__file__) != ROOT / "evaluate.py"


def test_two_checkouts_on_the_path_do_not_ask_each_other(tmp_path):
    (tmp_path / "evaluate.py").write_bytes((ROOT / "evaluate.py").read_bytes())
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", tmp_path)))
    code = "import evaluate; print(callable(evaluate.load))"
    done = processes.run("-c", code, env=os.environ | {"PYTHONPATH": path})
    assert done.stdout == "True\n", done.stderr[-500:]


def evaluated(folder, tmp_path, *overrides):
    """Whether ``evaluate.py eval=lm_eval`` measured everything, and its results."""
    given = ["eval=lm_eval", "control=null", f"checkpoint={folder}/own", f"out={tmp_path}/out", *overrides]
    complete = evaluation.run(composed(*given, f"eval.include_path={folder}", config="evaluate"))
    return complete, json.loads((tmp_path / "out" / "latest" / "results.json").read_text())["models"]["own"]


def test_evaluate_py_measures_its_tasks(folder, tmp_path, capsys):
    """A task that does not exist and one whose data cannot be had are lines; the others go on."""
    reach = "ConnectionError: Couldn't reach 'EleutherAI/lambada_openai' on the Hub (LocalEntryNotFoundError)"
    from lm_eval.tasks import TaskManager

    real = lm_eval.simple_evaluate

    def offline(lm, tasks, **words):
        if tasks == ["lambada_openai"]:
            raise ConnectionError(reach.partition(": ")[2])
        return real(lm, tasks=tasks, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "simple_evaluate", offline)
        # lm-eval's own tasks take seconds to list.
        away = json.loads((folder / "rolling.yaml").read_text()) | {"task": "lambada_openai"}
        (tmp_path / "away.yaml").write_text(json.dumps(away))
        index = TaskManager(include_path=[str(folder), str(tmp_path)], include_defaults=False)
        patch.setattr(module, "_index", lambda include_path, defaults: index)
        names = "local_rolling,local_completion,local_generation,lambada_openai,local_rollin"
        complete, found = evaluated(folder, tmp_path, f"eval.tasks=[{names}]", f"eval.max_length={WINDOW}")
    said = capsys.readouterr().out
    assert not complete and [*found["missing"]] == ["lm_eval-lambada_openai", "lm_eval-local_rollin"]
    fix = "run it once with a network, or name tasks of local files with eval.include_path"
    assert f"lambada_openai: its data set is not here and cannot be downloaded ({reach}); {fix}" in said
    assert "eval.tasks: 'local_rollin' is unknown; did you mean 'local_rolling'?" in said
    model = memlm.from_pretrained(folder / "own")
    results = found["lm_eval"]
    metrics = {task: {name: of["value"] for name, of in results[task]["metrics"].items()} for task in results}
    check({task: {f"{name},none": value for name, value in of.items()} for task, of in metrics.items()}, model)
    _, completions, generated = expected(model)
    perplexity = results["local_completion"]["metrics"]["perplexity"]
    assert perplexity["value"] == pytest.approx(math.exp(-sum(completions) / len(PAIRS)), rel=1e-4)
    assert perplexity["stderr"] > 0 and results["local_completion"]["n"] == len(PAIRS)
    right = [made == completion.partition("e")[0] for made, (_, completion) in zip(generated, PAIRS, strict=True)]
    assert results["local_generation"]["metrics"]["exact_match"]["value"] == pytest.approx(sum(right) / len(right))
    assert {of["max_length"] for of in results.values()} == {WINDOW}
    (records,) = (tmp_path / "out" / "latest" / "records" / "own").glob("*completion.jsonl")
    assert [json.loads(line)["stream"] for line in records.read_text().splitlines()] == [0, 1, 2]
    # Documents pair two models.
    measure = module.LMEval(tasks=["local_completion"])
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    figures = {figure.across: figure for figure in measure.figures(results, {}, lambda name: lines)}
    assert len(figures["acc"].units) == 3 and not figures["perplexity"].units


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), "eval.tasks=null names no task; name some"),
        (("eval.tasks=[a]", "eval.limit=0"), "eval.limit=0 must be more than 0, or null"),
        (("eval.tasks=[a]", "eval.include_path=/none"), "eval.include_path=/none: there is no such folder"),
    ],
)
def test_wrong_settings_of_lm_eval_are_a_line(given, told):
    with pytest.raises(ValueError, match=told):
        evaluation.run(composed("eval=lm_eval", "checkpoint=x", *given, config="evaluate"))


def test_without_lm_eval_a_line_names_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"own needs lm-eval for eval\.tasks; pip install 'lm-eval"):
        evaluated(folder, tmp_path, "eval.tasks=[local_rolling]")


METRIC = """
import datasets
import evaluate


class Letters(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"letters": float(sum(map(len, predictions)))}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "-m lm_eval run --model hf --model_args trust_remote_code=True,pretrained={}/own",
        "-m memlm.lm_eval run --model memlm --model_args pretrained={}/attached",
    ],
)
def test_commands_run_from_this_folder(folder, tmp_path, command):
    """With a metric of Hugging Face's evaluate, and without the network."""
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letters.py").write_text(METRIC)
    words = json.loads((folder / "generation.yaml").read_text()) | {"task": "local_letters"}
    words["metric_list"] = [{"metric": f"{tmp_path}/letters", "hf_evaluate": True, "aggregation": "mean"}]
    (tmp_path / "letters.yaml").write_text(json.dumps(words))
    arguments = f"--device cpu --include_path {tmp_path} --tasks local_letters --output_path {tmp_path}/out"
    given = f"{command.format(folder)},max_length={WINDOW} {arguments}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, *given.split()], cwd=ROOT, env=os.environ | offline, check=True)
    (written,) = (tmp_path / "out").rglob("results*.json")
    model = memlm.from_pretrained(folder / given.partition(f"{folder}/")[2].partition(",")[0])
    mean = sum(map(len, expected(model)[2])) / len(PAIRS)
    assert json.loads(written.read_text())["results"]["local_letters"]["letters,none"] == mean
