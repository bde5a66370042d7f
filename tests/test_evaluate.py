"""Measures on models with a known behaviour, and a self-contained report."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PreTrainedConfig

import memlm.evaluation.measures
from memlm import Interleave
from memlm.data import (
    MQAR,
    TEMPLATES,
    Batch,
    Chains,
    Facts,
    Library,
    Passkey,
    Questions,
    QuestionSource,
    Row,
    byte_tokenizer,
    token_bytes,
)
from memlm.evaluation import run as evaluate
from memlm.evaluation.ablation import memory_off
from memlm.evaluation.data import read_on
from memlm.evaluation.measures.bank import bank
from memlm.evaluation.measures.interleaved import interleaved
from memlm.evaluation.measures.needles import needles
from memlm.evaluation.measures.recall import recall
from memlm.evaluation.statistics import wilson
from memlm.roles import Roles
from memlm.training import run as train
from memlm.training.objective import score
from tests.conftest import build, composed, same_state, step
from tests.data.test_questions import records
from tests.test_interleave import Script

SIZES = torch.from_numpy(token_bytes(byte_tokenizer()))


class Oracle(nn.Module):
    """Predicts every next token with certainty, except that it is wrong wherever ``wrong`` says."""

    def __init__(self, wrong=lambda ids: torch.zeros_like(ids, dtype=torch.bool)):
        super().__init__()
        self.wrong, self.config, self.device = wrong, PreTrainedConfig(vocab_size=259), torch.device("cpu")

    def forward(self, input_ids, logits_to_keep=0, **_):
        target = input_ids.roll(-1, 1)
        target = torch.where(self.wrong(target), (target + 1) % 259, target)
        target = target if isinstance(logits_to_keep, int) else target[:, logits_to_keep]
        return SimpleNamespace(logits=nn.functional.one_hot(target, 259).float() * 50)


def test_scores_count_tokens_rows_and_bytes():
    task = MQAR(length=64, num_pairs=4, gap=10)
    rows = [task.sample(0, "test", i, 1.0) for i in range(6)]
    batch = Batch.from_rows(rows, [0, 0, 1, 1, 1, 1])
    perfect = score(Oracle(), [batch], ["a", "b"], SIZES, torch.device("cpu"))
    assert perfect["a"].accuracy == perfect["b"].row_accuracy == 1.0
    assert (perfect["a"].tokens, perfect["a"].rows, perfect["a"].bytes) == (8, 2, 8)
    value = int(rows[0].labels[rows[0].labels >= 0][0])
    one_wrong = score(Oracle(lambda ids: ids == value), [batch], ["a", "b"], SIZES, torch.device("cpu"))
    assert one_wrong["a"].accuracy < 1 and one_wrong["a"].row_accuracy <= 0.5


def test_recall_and_needles_on_an_oracle():
    results = recall(Oracle(), "mqar", MQAR(), 0, [1, 2], 8)
    assert [(r.length, r.accuracy, r.row_accuracy) for r in results] == [(128, 1.0, 1.0), (256, 1.0, 1.0)]
    cells = needles(Oracle(), Passkey(), 0, [128, 256], [0.0, 1.0], 4)
    assert [(c.length, c.depth, c.accuracy) for c in cells] == [
        *((128, 0.0, 1.0), (128, 1.0, 1.0), (256, 0.0, 1.0), (256, 1.0, 1.0))
    ]
    guessing = recall(build(dtype=torch.float32), "passkey", Passkey(), 0, [1], 64)
    assert guessing[0].accuracy < 0.15


def chosen_one_by_one(model, layer, top_k, x_TD, documents_T, asks_T):
    """Documents by score, in loops: the maximum over tokens of the mean over heads of the cosine."""
    mixer = model.model.layers[layer].mixer
    x_TD = model.model.layers[layer].input_layernorm(x_TD)
    q_THK, r_TGK = (p(x_TD).unflatten(-1, (2, -1)) for p in (mixer.router_q_proj, mixer.router_k_proj))
    scores = {}
    for n in range(1, int(documents_T.max()) + 1):
        for chunk in r_TGK[documents_T == n].split(mixer.msa.chunk_size):
            for q in q_THK[asks_T]:
                score = torch.cosine_similarity(q, chunk.mean(0), dim=-1).mean().item()
                scores[n] = max(score, scores.get(n, -2.0))
    return sorted(scores, key=lambda n: -scores[n])[:top_k]


@torch.no_grad()
def test_a_bank_is_asked_as_documents_in_the_context_are():
    """Hits equal a loop; answers equal a forward over all documents, with and without the queried document."""
    model, top_k = build("msa", chunk_size=4, top_k=2), 2
    plain = Facts(key_length=2, digits=2, length=64, num_documents=5).library(3, "test", 17, 11)
    assert len(plain.documents) == 17 and len(plain.inquiries) == 11 and plain.chance == 1 / 1024

    def forward(inquiry, gone=frozenset()):
        kept = [(n, ids) for n, ids in enumerate(plain.documents) if n not in gone]
        parts = [(-2, plain.template), *((i + 1, ids) for i, (_, ids) in enumerate(kept))]
        parts += [(0, inquiry.question), (-1, inquiry.answer)]
        ids = torch.from_numpy(np.concatenate([part for _, part in parts]))[None]
        roles = torch.cat([torch.full((len(part),), role) for role, part in parts])[None]
        out = model(ids, roles=Roles(roles), output_hidden_states=True)
        return out, roles[0], [n for n, _ in kept]

    inquiries = []
    for i, inquiry in enumerate(plain.inquiries):
        # Answers of different lengths; every other one is the model's own.
        inquiry = inquiry._replace(question=np.append(inquiry.question, np.full(i % 3, 7)))
        for place in range(2 if i % 2 else 0):
            said = forward(inquiry)[0].logits[0, -3 + place].argmax().item()
            inquiry.answer[place] = said
        # Every third question has two documents.
        inquiries.append(inquiry._replace(found=inquiry.found | ({0} if i % 3 == 0 else set())))
    library = Library(plain.template, plain.documents, inquiries, plain.chance)
    gone = frozenset().union(*(inquiry.found for inquiry in inquiries))
    figures = {0: [], 1: []}
    exact, deleted = [], []
    for inquiry in inquiries:
        out, roles, _ = forward(inquiry)
        for layer, of in figures.items():
            best = chosen_one_by_one(model, layer, top_k, out.hidden_states[layer][0], roles, roles == 0)
            right = [n - 1 in inquiry.found for n in best]
            of.append((right[0], any(right), sum(right) / len(inquiry.found), sum(right) / len(best)))
        for results, logits in ((exact, out.logits), (deleted, forward(inquiry, gone)[0].logits)):
            results.append(logits[0, -3:-1].argmax(-1).tolist() == inquiry.answer.tolist())
    got = bank(model, "facts", library, rows=4)
    assert (got.documents, got.questions, got.tokens) == (17, 11, sum(map(len, plain.documents)))
    assert got.exact == pytest.approx(np.mean(exact)) and got.exact_deleted == pytest.approx(np.mean(deleted))
    assert 0.4 < got.exact < 0.6 and got.exact_deleted < got.exact
    for routed in got.layers:
        expected = np.mean(figures[routed.layer], 0)
        got_of_layer = (routed.hit_1, routed.hit, routed.recall, routed.precision)
        assert got_of_layer == pytest.approx(tuple(expected)) and routed.top_k == 2
    assert any(0 < routed.hit < 1 for routed in got.layers)


def test_reading_on_is_measured_by_what_is_read_and_said(monkeypatch):
    model, task, written = build("msa", chunk_size=4, top_k=2), Chains(length=105, num_documents=6), {}
    # Libraries of six chains; four of the second are asked.
    for chains in (task.linked(3, "test", index, 12).chains for index in (0, 1)):
        for i, (question, answer, ((first,), (second,))) in enumerate(chains):
            other = chains[i - 1].rounds[0][0]
            says = f"[{first}]|[{second}]|={answer}~", f"[{first}]|[{other}]|={answer}~", f"[{second}]|=-~"
            written[question] = says[i % 3]
    assert len(written) == 12
    Script(monkeypatch, written)
    way = Interleave(**TEMPLATES, max_rounds=2, max_new_tokens=105)
    libraries = (task.linked(3, "test", index, 12) for index in range(9))
    got = interleaved(model, byte_tokenizer(), "chains", way, libraries, 10, rows=4)
    assert (got.documents, got.questions, got.chance) == (12, 10, 1 / 32)
    assert got.hops == pytest.approx([0.7, 0.4])
    # An answer that is right without the last document is right after its deletion too.
    assert got.exact == pytest.approx(0.7) and got.exact_deleted == pytest.approx(0.3)


def test_questions_are_read_on_too(tmp_path, monkeypatch):
    """Four questions: one reads another document, one gets another answer, one is answered at once."""
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, records(80))))
    questions = Questions(str(tmp_path / "questions.jsonl"), tmp_path)
    source = QuestionSource(questions, byte_tokenizer(), 900, 0, templates="interleave")
    library, (way, (linked,)) = source.library("test", 9, 4), read_on(source, 9, 4)
    assert [ids for _, ids in way.documents(linked.texts, byte_tokenizer())] == [d.tolist() for d in library.documents]
    names, said = [], {}
    for i, (question, answer, ((name,),)) in enumerate(linked.chains):
        names.append(bytes(library.inquiries[i].answer.tolist()).decode())
        assert names[-1] == f"[{name}]<|object_ref_end|>" and library.inquiries[i].found == {int(name)}
        read = f"[{(int(name) + (i == 1)) % 9}]<|object_ref_end|><End-of-Retrieve>" if i < 3 else ""
        said[question] = f"{read}The answer to the question is: {answer if i != 2 else 'no'}~"
    Script(monkeypatch, said)
    model = build("msa", chunk_size=4, top_k=2)
    got = interleaved(model, byte_tokenizer(), "questions", way, [linked], 4)
    assert (got.documents, got.questions, got.hops, got.exact) == (9, 4, [0.5], 0.75)
    assert read_on(QuestionSource(questions, byte_tokenizer(), 900, 0), 9, 4) is None


def test_memory_off_leaves_the_attention_branch_and_every_state_as_they_are():
    """The layer becomes (1 - g) * norm(attention), to the last bit, and only as long as it is asked to."""
    mixer = build(memory_depth=2).model.layers[1].mixer
    x = torch.randn(2, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = step(mixer, x)
        with memory_off(mixer):
            silent = step(mixer, x)
        after = step(mixer, x)
        seen = mixer.gate.attention_norm(step(mixer.attention, x).y_BTD)
        share = torch.sigmoid(mixer.gate.gate(x))
    assert torch.equal(silent.y_BTD, torch.lerp(seen, torch.zeros_like(seen), share))
    assert torch.allclose(silent.y_BTD, (1 - share) * seen, rtol=0, atol=1e-14)
    assert same_state(before.state, silent.state)
    assert torch.equal(before.y_BTD, after.y_BTD) and not torch.equal(before.y_BTD, silent.y_BTD)


def test_memory_off_cleans_up_after_errors_and_refuses_models_without_memory():
    model = build(dtype=torch.float32)
    with pytest.raises(KeyError), memory_off(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="the model has no long-term memory"), memory_off(build("none")):
        pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"document {i} " * 40)
    for memory in ("titans_mag", "none"):
        train(
            composed(
                f"memory={memory}",
                f"run_dir={folder}/{memory}-seed0",
                f"data.cache_dir={folder}/cache",
                f"data.sources.text.paths=[{corpus}]",
                "train.steps=3",
                "train.batch_size=4",
                "train.log_every=1",
                "model.hidden_size=32",
            )
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def evaluated(folder, *overrides):
    return composed(
        f"checkpoint={folder}/titans_mag-seed0",
        f"control={folder}/none-seed0",
        "eval.factors=[1,2]",
        "eval.recall_rows=8",
        "eval.needle_rows=2",
        "eval.depths=[0.0,1.0]",
        *overrides,
        config="evaluate",
    )


@pytest.mark.pictures
def test_an_evaluation_leaves_a_table_results_and_a_report_that_stands_alone(trained, capsys):
    evaluate(evaluated(trained))
    screen = capsys.readouterr().out
    assert "titans_mag, mqar" in screen and "control (none)" in screen and "memory carried" in screen
    # Floors of one who reads nothing, and of one who has the values without their keys.
    # At two lengths, beside or below each other.
    for floor, value in (("chance, mqar", 0.031), ("set guesser, mqar", 0.387), ("set guesser, passkey", 0.544)):
        told = re.findall(rf"{floor}((?: +{value})+)", screen)
        assert len("".join(told).split()) == 2
    out = trained / "titans_mag-seed0" / "evaluation"
    results = json.loads((out / "latest" / "results.json").read_text())
    assert set(results["models"]) == {"titans_mag", "control (none)"}
    assert len(results["models"]["control (none)"]["needles"]["passkey"]) == 4
    found = results["models"]["titans_mag"]
    for cell in [*found["recall"], *found["needles"]["passkey"]]:
        assert (cell["low"], cell["high"]) == wilson(cell["accuracy"], cell["rows"])
        assert cell["chance"] < cell["set_guesser"] < 1
    assert {"commit", "torch", "device"} <= set(results["environment"])
    manifest = json.loads((trained / "none-seed0" / "manifest-text.json").read_text())
    assert len(manifest["files"]) == 40 and len(results["corpora"]["text"]) == 32
    page = (out / "latest" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 7
    for text in (
        "2 texts never trained on; chance is 0.031",
        "order give 0.544",
        "8 test rows a point",
        "Same tokens scored",
    ):
        assert text in page
    pictures = {"needles", "recall", "text", "surprise", "loss", "validation", "gates"}
    assert {p.stem for p in (out / "latest" / "plots").iterdir()} == pictures
    markdown = (out / "latest" / "report.md").read_text()
    assert set(re.findall(r"!\[.*\]\(plots/(\w+)\.png\)", markdown)) == pictures
    headings = re.findall(r"^##? (.*)$", markdown, re.MULTILINE)
    assert headings == re.findall(r"<h[12]>(.*?)</h", page)
    assert len(re.findall(r"^\| --- ", markdown, re.MULTILINE)) == page.count("<table>")


NEW_MEASURE = '''
"""How many parameters a model has for each character of a word."""

from dataclasses import dataclass

from memlm.evaluation.measures import Measure
from memlm.roles import Roles


@dataclass(frozen=True)
class Letters(Measure):
    name = "letters"
    word: str = ""

    def measures(self, source):
        return bool(self.word)

    def run(self, one, examined):
        return [one.subject.model.num_parameters() // len(self.word)]

    def table(self, models):
        return ["letters", "parameters"], [[name, str(m["letters"][0])] for name, m in models.items()]

    def section(self, report, models, first):
        report.heading(f"Letters of {first.name}")
        report.table(*self.table(models))
'''


def test_a_new_measure_is_one_file(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "letters.py").write_text(NEW_MEASURE)
    monkeypatch.setattr(memlm.evaluation.measures, "__path__", [*memlm.evaluation.measures.__path__, str(tmp_path)])
    nothing = ("eval.factors=[]", "eval.depths=[]", "eval.text_documents=0")
    evaluate(evaluated(trained, *nothing, "+eval.word=abc", f"out={tmp_path}/out"))
    models = json.loads((tmp_path / "out" / "latest" / "results.json").read_text())["models"]
    assert models["titans_mag"]["letters"] == [models["titans_mag"]["parameters"] // 3]
    assert models["titans_mag"]["recall"] == [] and models["titans_mag"]["text"] == {}
    assert (
        "letters" in capsys.readouterr().out
        and "Letters of titans_mag" in (tmp_path / "out/latest/report.html").read_text()
    )
    with pytest.raises(ValueError, match=r"eval\.words='x' is not a setting; did you mean 'word'"):
        evaluate(evaluated(trained, "+eval.words=x"))


@pytest.mark.pictures
def test_an_evaluation_of_banks(tmp_path, capsys):
    for memory in ("msa", "none"):
        train(
            composed(
                "experiment=facts",
                f"memory={memory}",
                f"run_dir={tmp_path}/{memory}-seed0",
                "train.steps=1",
                "train.batch_size=2",
                "model.hidden_size=32",
            )
        )
        AcceleratorState._reset_state(reset_partial_state=True)
    options = ("eval=bank", "eval.bank_documents=[3,20]", "eval.bank_questions=5")
    paths = (f"checkpoint={tmp_path}/msa-seed0", f"control={tmp_path}/none-seed0")
    capsys.readouterr()
    evaluate(composed(*options, *paths, config="evaluate"))
    screen = capsys.readouterr().out
    assert "control (none) is left out: it has no bank: model.mixers.*.kind='attention'" in screen
    assert "hit@1" in screen and "deleted" in screen
    out = tmp_path / "msa-seed0" / "evaluation"
    models = json.loads((out / "latest" / "results.json").read_text())["models"]
    assert [b["documents"] for b in models["msa"]["bank"]] == [3, 20] and [*models] == ["msa"]
    assert {"hit_1", "hit", "recall", "precision"} <= set(models["msa"]["bank"][0]["layers"][0])
    assert models["msa"]["recall"] == [] and models["msa"]["text"] == {}
    assert (
        "A bank of documents" in (out / "latest" / "report.html").read_text()
        and (out / "latest" / "plots" / "bank.png").exists()
    )
    with pytest.raises(ValueError, match="step_000001 has no bank: model"):
        evaluate(composed(*options, f"checkpoint={tmp_path}/none-seed0", "control=null", config="evaluate"))
    with pytest.raises(ValueError, match="data has no documents"):
        evaluate(composed(*options, *paths, "data=recall", "data.seq_len=128", config="evaluate"))


def test_an_evaluation_of_reading_on(tmp_path, capsys):
    path = f"{tmp_path}/msa-seed0"
    small = ("train.steps=1", "train.batch_size=2", "model.hidden_size=32")
    train(composed("experiment=chains", f"run_dir={path}", *small))
    capsys.readouterr()
    options = ("eval=bank", "eval.bank_documents=[4,9]", "eval.bank_questions=3", "control=null")
    evaluate(composed(*options, f"checkpoint={path}", config="evaluate"))
    assert "hop 2" in capsys.readouterr().out
    measured = json.loads((tmp_path / "msa-seed0/evaluation/latest/results.json").read_text())["models"]["msa"]
    assert [(i["documents"], i["questions"]) for i in measured["interleaved"]] == [(4, 3), (8, 3)]
    assert measured["bank"] == [] and len(measured["interleaved"][0]["hops"]) == 2
    assert "Questions answered by reading on" in (tmp_path / "msa-seed0/evaluation/latest/report.html").read_text()


def test_an_evaluation_without_control_says_how_to_get_one(trained, tmp_path, capsys):
    few = ("eval.factors=[1]", "eval.depths=[]", "eval.text_documents=0")
    evaluate(evaluated(trained, f"control={tmp_path}/nothing", f"out={tmp_path}/out", *few))
    assert "python train.py memory=none" in capsys.readouterr().out
    assert (tmp_path / "out" / "latest" / "report.html").exists()


def test_an_evaluation_with_memory_off_stands_beside_the_other(trained, tmp_path, capsys):
    options = ("eval.factors=[1]", "eval.depths=[]", "eval.text_documents=2", "eval.text_length=256")
    evaluate(evaluated(trained, f"out={tmp_path}/on", *options))
    evaluate(evaluated(trained, "memory_off=true", *options))
    assert "titans_mag (memory off), mqar" in capsys.readouterr().out
    folder = trained / "titans_mag-seed0" / "evaluation-memory_off"
    on, off = (json.loads((f / "latest" / "results.json").read_text())["models"] for f in (tmp_path / "on", folder))
    assert list(off) == ["titans_mag (memory off)", "control (none)"]
    del off["control (none)"]["seconds"], on["control (none)"]["seconds"]
    assert off["control (none)"] == on["control (none)"]
    bits = [m["text"]["text"]["carried"]["bits_per_byte"] for m in (on["titans_mag"], off["titans_mag (memory off)"])]
    assert bits[0] != bits[1]
    assert "<h1>memlm: titans_mag (memory off), control (none)</h1>" in (folder / "latest" / "report.html").read_text()


def test_memory_off_needs_a_memory(trained, tmp_path):
    options = ("control=null", f"out={tmp_path}/out")
    with pytest.raises(ValueError, match="memory_off=true, but the model has no long-term memory"):
        evaluate(evaluated(trained, f"checkpoint={trained}/none-seed0", "memory_off=true", *options))
    with pytest.raises(ValueError, match="memory_off='maybe' must be bool"):
        evaluate(evaluated(trained, "memory_off=maybe", *options))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_run_needs_data(trained, tmp_path):
    folder = next((trained / "titans_mag-seed0" / "checkpoints").glob("step_*"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    few = ("control=null", "eval.factors=[1]", "eval.depths=[]", "eval.text_documents=0")
    evaluate(evaluated(trained, f"checkpoint={bare}", f"out={tmp_path}/own", *few))
    assert json.loads((tmp_path / "own" / "latest" / "results.json").read_text())["models"]["bare"]["step"] == 3
    for name in ("config.yaml", "run.json", "digests.json"):
        (bare / name).unlink()
    with pytest.raises(ValueError, match=r"add data=\.\.\."):
        evaluate(evaluated(trained, f"checkpoint={bare}", f"out={tmp_path}/out"))
    other = ("data=recall", "data.seq_len=128")
    evaluate(evaluated(trained, f"checkpoint={bare}", f"out={tmp_path}/out", *other, *few))
    assert (tmp_path / "out" / "latest" / "results.json").exists()


def test_what_rows_tell_is_summed_by_source():
    """Over batches and ranks; a row without a figure does not count."""
    rows = [Row(np.arange(8), np.arange(8), np.arange(8)) for _ in range(3)]
    batches = [Batch.from_rows(rows, [0, 1, 1]), Batch.from_rows(rows, [1, 0, 1])]
    told = iter([torch.tensor([0.5, torch.nan, 1.0]), torch.tensor([0.0, torch.nan, 0.25])])

    class Telling(Oracle):
        def forward(self, **inputs):
            figures = {
                "layer0/hit@1": next(told),
                "layer0/surprise": torch.ones(3, 8),
                "layer0/gate": torch.tensor(1.0),
            }
            return SimpleNamespace(logits=super().forward(**inputs).logits, metrics=figures)

    scores = score(Telling(), batches, ["a", "b", "c"], torch.ones(259), torch.device("cpu"))
    assert scores["a"].metrics == {"layer0/hit@1": 0.5} and scores["c"].metrics == {}
    assert scores["b"].metrics["layer0/hit@1"] == pytest.approx((1.0 + 0.0 + 0.25) / 3)
    both = scores["a"] + scores["b"]
    assert both.metrics["layer0/hit@1"] == pytest.approx((0.5 + 1.0 + 0.0 + 0.25) / 4) and both.rows == 6
