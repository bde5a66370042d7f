"""Model cards: valid, true to the checkpoint, and never over a user's page; pushes to a hub that is a folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import hub
from transformers.utils.hub import EntryNotFoundError, ModelCard

import memlm
from memlm import card, files
from memlm.data import byte_tokenizer
from memlm.evaluation import plots
from memlm.evaluation.report import Report
from memlm.hub import load_model
from memlm.hub.export import export
from memlm.memory.base import kinds
from memlm.training import checkpoint
from memlm.training.resume import Record
from tests.conftest import build


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes))


def page(folder):
    return (folder / "README.md").read_text()


def metadata(folder):
    return ModelCard(page(folder)).data.to_dict()


def ran(folder):
    """The variables of the card's example."""
    code = re.search(r"```python\n(.*?)```", page(folder), re.S)[1].replace("path/of/this/folder", str(folder))
    found = {}
    exec(code, found)
    return found


@pytest.fixture
def model():
    return build(dtype=torch.float32)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_card_describes_its_checkpoint(model, saved):
    assert metadata(saved) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["memlm", "titans_mag"],
    }
    assert f"{model.num_parameters():,} parameters" in page(saved)
    assert "| 0, 1 | memory: `titans_mag` | Titans, memory as a gate (MAG): sliding-window" in page(saved)
    settings = re.search(r"```json\n(.*?)```", page(saved), re.S)[1]
    assert json.loads(settings) == json.loads((saved / "config.json").read_text())
    assert "Training" not in page(saved) and "Results" not in page(saved)
    assert type(ran(saved)["model"]) is memlm.MemLMForCausalLM


@pytest.mark.parametrize("kind", kinds())
def test_a_card_can_describe_every_memory(kind):
    described = card._described(kind)
    assert 20 < len(described) < 400 and described[-1] in ".:" and "\n" not in described


def test_layers_of_several_mixers(tmp_path):
    mixers = {"unused": {"kind": "gla"}, "full": {"kind": "attention"}, "memory": {"kind": "delta_net"}}
    config = memlm.MemLMConfig(num_hidden_layers=3, mixers=mixers, mixer_pattern=["memory", "full"])
    memlm.MemLMForCausalLM(config).save_pretrained(tmp_path)
    assert metadata(tmp_path)["tags"] == ["memlm", "delta_net", "attention"]
    assert "| 0, 2 | memory: `delta_net` |" in page(tmp_path) and "| 1 | full: `attention` |" in page(tmp_path)


@pytest.mark.parametrize("place", ["whole", "alone"])
def test_a_card_of_an_attached_memory_names_the_backbone(place, tmp_path):
    backbone = llama()
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    backbone.save_pretrained(tmp_path / "llama")
    backbone.config.name_or_path = "someone/tiny-llama"
    before = backbone.num_parameters()
    model = memlm.attach(backbone, {"kind": "titans_lmm"}, layers=[1])
    save = model.save_pretrained if place == "whole" else lambda folder: memlm.save_memory(model, folder)
    save(tmp_path)
    assert metadata(tmp_path) == {
        "base_model": "someone/tiny-llama",
        "library_name": "memlm",
        "pipeline_tag": "text-generation",
        "tags": ["memlm", "titans_lmm"],
    }
    own = model.num_parameters() - before
    assert f"attention of someone/tiny-llama: {before * (place == 'whole') + own:,} parameters" in page(tmp_path)
    assert "without attention of its own" in page(tmp_path) and "whole mixer" not in page(tmp_path)
    told = f"of which {own:,} are the memory's" if place == "whole" else "the backbone is not in this folder"
    assert told in page(tmp_path) and "| 1 | memory: `titans_lmm` |" in page(tmp_path)
    if place == "whole":
        byte_tokenizer().save_pretrained(tmp_path)
    else:
        model.config.name_or_path = str(tmp_path / "llama")
        save(tmp_path)
        assert "beside the attention of LlamaForCausalLM" in page(tmp_path)
    loaded = ran(tmp_path)["model"]
    assert type(loaded) is LlamaForCausalLM and memlm.attached.of(loaded) == memlm.attached.of(model)


def test_a_card_of_a_model_that_was_not_trained_does_not_tell_of_training(tmp_path):
    llama().save_pretrained(tmp_path / "fresh")
    export(tmp_path / "fresh", tmp_path / "export")
    assert "without a memory" in page(tmp_path / "export") and "trained with" not in page(tmp_path / "export")


def test_a_card_of_a_model_without_a_memory(run):
    """``train.py`` trains such models too."""
    folder = run / "checkpoints" / "step_000200"
    (folder / "modeling_memlm.py").unlink()
    llama().save_pretrained(folder)
    card.write(folder, run=folder)
    assert "without a memory" in page(folder) and "Step 200 of 1,000" in page(folder)
    assert "titans_mag" not in page(folder) and "trust_remote_code" not in page(folder)
    assert type(ran(folder)["model"]) is LlamaForCausalLM


USERS = [
    "# My model",
    "---\nlicense: mit\n---\n# My model",
    "---\n- a list\n---\n",
    "---\na: b: c\n---\n",
    "\udce9",
    "",
]


@pytest.mark.parametrize("text", USERS)
def test_a_page_of_the_user_stays(model, tmp_path, text):
    written = text.encode(errors="surrogateescape")
    (tmp_path / "README.md").write_bytes(written)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == written


@pytest.mark.parametrize("edit", [lambda text: text.replace("20", "30"), lambda text: text + "Mine.\n"])
def test_an_edited_card_stays(model, saved, edit):
    (saved / "README.md").write_text(edit(page(saved)))
    before = page(saved)
    model.save_pretrained(saved)
    assert page(saved) == before


def test_an_unedited_card_follows_the_checkpoint_and_keeps_metadata(saved):
    text = page(saved).replace("library_name", "license: mit\nlanguage: [en, de]\nlibrary_name").replace("\n", "\r\n")
    (saved / "README.md").write_bytes(text.replace("\n- memlm", "\n- mine\r\n- memlm").encode())
    build("gla", dtype=torch.float32).save_pretrained(saved)
    assert "`gla`" in page(saved) and "`titans_mag`" not in page(saved)
    found = metadata(saved)
    assert found["license"] == "mit" and found["language"] == ["en", "de"]
    assert found["tags"] == ["mine", "memlm", "gla"]


def test_no_card_without_a_checkpoint(tmp_path):
    card.write(tmp_path)
    assert not list(tmp_path.iterdir())


CONFIG = {
    "seed": 3,
    "data": {
        "seq_len": 64,
        "cache_dir": "/home/someone/cache",
        "sources": {
            "text": {"kind": "text", "weight": 0.75, "paths": ["/home/someone/books"]},
            "mqar": {"kind": "mqar", "weight": 0.25},
        },
    },
    "optim": {"lr": 0.003},
    "train": {"steps": 1000, "batch_size": 8},
}
MANIFEST = {
    "files": [{"path": "a.txt", "sha256": "0", "bytes": 1500}],
    "splits": {"train": {"documents": 9, "tokens": 1400}},
}


@pytest.fixture
def run(model, tmp_path):
    record = Record(CONFIG, {"text": MANIFEST}, {"step": 200, "torch": "2.13.0"})
    trainer = {"step": 200, "optimizers": []}
    beside = checkpoint.Beside(byte_tokenizer(), trainer, record.texts())
    checkpoint.save(tmp_path / "run", 200, model, beside, keep=2)
    return tmp_path / "run"


def evaluated(run, step=200, folder="evaluation"):
    report = Report("memlm: mine, control")
    report.heading("Recall")
    report.note("a|b <i> *")
    report.note(f"{run}/x.txt, 1 / 2, a/b, https://x.org/y, ~/z")
    report.table(["model", "recalled"], [["mine | on", "0.97"]])
    report.picture("loss", plots.curves({"mine": [{"step": 1, "loss": 2.0}]}, "loss", "nats"), "the loss")
    report.write(run / folder / "latest")
    results = {"models": {"mine": {"checkpoint": str(run / "checkpoints" / f"step_{step:06d}")}}}
    files.write(run / folder / "latest" / "results.json", json.dumps(results))


def test_a_checkpoint_of_a_run_has_settings_and_data_and_may_be_edited(run):
    folder = run / "checkpoints" / "step_000200"
    for line in (
        "Step 200 of 1,000, each of 8 rows of 64 tokens; seed 3; torch 2.13.0.",
        "| text | text | 0.75 | 1 of 1,500 bytes; train: 9 documents, 1,400 tokens |",
        "| mqar | mqar | 0.25 | none: made by rule |",
        "- books",
    ):
        assert line in page(folder)
    assert "/home/someone" not in page(folder)
    (folder / "README.md").write_text("# Mine")
    assert checkpoint.newest_whole(run) == (folder, [])
    (folder / "README.md").unlink()
    checkpoint.check(folder)
    (folder / "modeling_memlm.py").write_text("")
    with pytest.raises(ValueError, match=r"modeling_memlm\.py: damaged"):
        checkpoint.check(folder)


def test_an_export_has_the_results_and_their_pictures_and_no_optimizer(model, run, tmp_path):
    target = tmp_path / "export"
    export(run, target)
    assert "Results" not in page(target) and f"{model.num_parameters():,} parameters" in page(target)
    evaluated(run)
    evaluated(run, folder="evaluation-memory_off")
    assert export(run, str(target), "me/mine") == target
    text = page(target)
    assert 'source = "me/mine"' in text and "Step 200 of 1,000" in text
    assert "## Results: mine, control\n\n### Recall\n\na\\|b \\<i> \\*\n\n" in text and "mine \\| on" in text
    assert "\n\nx.txt, 1 / 2, a/b, https://x.org/y, z\n\n" in text
    pictures = re.findall(r"!\[the loss\]\((.*)\)", text)
    assert pictures == ["evaluation/plots/loss.png", "evaluation-memory_off/plots/loss.png"]
    assert all((target / picture).is_file() for picture in pictures)
    assert not {"trainer.pt", "digests.json", "config.yaml", "run.json"} & {p.name for p in target.iterdir()}
    written = "".join(p.read_text() for p in target.rglob("*") if p.suffix in (".json", ".md"))
    assert "/home/someone" not in written and str(tmp_path) not in written
    loaded = load_model(target)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_an_export_of_an_earlier_version_gets_its_code_and_an_edited_card_stays(run, tmp_path):
    folder, target = run / "checkpoints" / "step_000200", tmp_path / "export"
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"], config["max_position_embeddings"]
    for name in ("digests.json", "run.json", "modeling_memlm.py", "README.md"):
        (folder / name).unlink()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "config.yaml", run)
    export(folder, target)
    assert (target / "modeling_memlm.py").is_file() and "auto_map" in (target / "config.json").read_text()
    assert "of 1,000, each of 8 rows" in page(target)
    (target / "README.md").write_text("# Mine")
    (target / "model-00001-of-00002.safetensors").write_text("old")
    export(folder, target)
    assert page(target) == "# Mine" and not (target / "model-00001-of-00002.safetensors").exists()


def test_an_export_of_an_attached_memory(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    model = memlm.attach(LlamaForCausalLM.from_pretrained(tmp_path / "llama"), {"kind": "titans_lmm"})
    model.save_pretrained(tmp_path / "whole")
    export(tmp_path / "whole", tmp_path / "export")
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "export").glob("*.json"))
    loaded = memlm.from_pretrained(tmp_path / "export")
    assert memlm.attached.of(loaded) == memlm.attached.of(model) and "beside the attention" in page(
        tmp_path / "export"
    )
    memlm.save_memory(model, tmp_path / "alone")
    with pytest.raises(ValueError, match="alone: neither a run with a checkpoint, nor a checkpoint"):
        export(tmp_path / "alone", tmp_path / "new")


def test_exports_that_are_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    evaluated(run, step=100)
    wrong = [
        (tmp_path / "none", "new", "none: neither a run with a checkpoint, nor a checkpoint"),
        (run, "new", r"results\.json: its results are of .*step_000100, not of step_000200; run evaluate.py again"),
        (run / "checkpoints" / "step_000200" / "config.json", "new", "neither a run"),
    ]
    for source, target, reason in wrong:
        with pytest.raises(ValueError, match=reason) as caught:
            export(source, tmp_path / target)
        assert "\n" not in str(caught.value) and not (tmp_path / target).exists()
    shutil.rmtree(run / "evaluation")
    folder = run / "checkpoints" / "step_000200"
    older = shutil.copytree(folder, folder.with_name("step_000100"))
    llama().save_pretrained(tmp_path / "llama")
    for source, target in ((run, folder), (run, older), (tmp_path / "llama", tmp_path / "llama")):
        before = {path.name: path.read_bytes() for path in target.iterdir()}
        with pytest.raises(ValueError, match="is a checkpoint itself, and an export would replace its weights"):
            export(source, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    for target in ("other", "other/thesis.tex"):
        with pytest.raises(ValueError, match="holds other files; name another folder"):
            export(run, tmp_path / target)
    (run / "checkpoints" / "step_000200" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        export(run, tmp_path / "new")


class Hub:
    """A hub whose repositories are folders."""

    def __init__(self, place: Path):
        self.place, self.commits = place, 0

    def create_repo(self, repo_id, **_):
        (self.place / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, repo_id, operations, **_):
        self.commits += 1
        for operation in operations:
            path = self.place / repo_id / operation.path_in_repo
            path.parent.mkdir(exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())

    def card(self, repo_id, **_):
        path = self.place / repo_id / "README.md"
        if not path.exists():
            raise EntryNotFoundError("none")
        return ModelCard(path.read_text())


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = Hub(tmp_path / "hub")
    api = type(hub.hf_api())
    monkeypatch.setattr(api, "create_repo", lambda _, *args, **kwargs: fake.create_repo(*args, **kwargs))
    monkeypatch.setattr(api, "create_commit", lambda _, *args, **kwargs: fake.create_commit(*args, **kwargs))
    monkeypatch.setattr(ModelCard, "load", fake.card)
    return fake


@pytest.mark.parametrize("first", ["model", "tokenizer"])
def test_a_push_brings_the_model_its_code_and_its_card(model, fake, first):
    pushed = {"model": model, "tokenizer": byte_tokenizer()}
    for name in sorted(pushed, key=lambda name: name != first):
        pushed[name].push_to_hub("me/mine", **({"tags": ["thesis"]} if name == "model" else {}))
    there = fake.place / "me/mine"
    assert fake.commits == 2 and {p.name for p in there.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_memlm.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert 'source = "me/mine"' in page(there) and {"memlm", "thesis"} <= set(metadata(there)["tags"])
    assert json.loads((there / "config.json").read_text())["auto_map"]["AutoConfig"] == "modeling_memlm.MemLMConfig"
    load_model(there)
    # The next push renews the card, and keeps the license that was added on the hub.
    (there / "README.md").write_text(page(there).replace("library_name", "license: mit\nlibrary_name", 1))
    build("gla", dtype=torch.float32).push_to_hub("me/mine")
    assert "`gla`" in page(there) and metadata(there)["license"] == "mit"


def test_a_push_keeps_the_card_of_the_hub(model, fake, tmp_path):
    there = fake.place / "me/mine"
    there.mkdir(parents=True)
    (there / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    model.push_to_hub("me/mine")
    model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="me/mine")
    model.config.save_pretrained(str(tmp_path / "config"), push_to_hub=True, repo_id="me/config")
    assert "# Mine" in page(there) and "memlm" not in page(there) and fake.commits == 3
    assert {p.name for p in (fake.place / "me/config").iterdir()} == {"config.json", "modeling_memlm.py"}


def test_a_push_of_an_attached_memory(fake, tmp_path):
    model = memlm.attach(llama(), {"kind": "titans_lmm"})
    model.push_to_hub("me/attached")
    model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="me/again")
    for name in ("me/attached", "me/again"):
        there = fake.place / name
        assert {"README.md", "memlm_memory.json", "config.json"} <= {p.name for p in there.iterdir()}
        assert "memlm.from_pretrained(source)" in page(there) and f'source = "{name}"' in page(there)
        assert "attention of LlamaForCausalLM" in page(there)
    model = memlm.detach(model)
    model.push_to_hub("me/plain")
    assert "memlm" not in page(fake.place / "me/plain")
