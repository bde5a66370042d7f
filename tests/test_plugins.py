"""The package of CONTRIBUTING.md adds memories, data, a task, a measure and an op from outside the repository."""

import json
import os
import re
import sys
import tomllib

import pytest
import torch
from omegaconf import OmegaConf

import memlm
from memlm.data import build_data
from memlm.evaluation.measures import measures
from memlm.training.settings import RunSettings
from tests import processes
from tests.conftest import ROOT, composed, variants
from tests.memory import test_contract as contract

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def package_of_the_page() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Its files by their path, and its entry points: every block follows the name of its file."""
    files, points = {"foo/__init__.py": "", "foo/configs/__init__.py": ""}, {}
    for before, language, code in re.findall(r"(.*?)```(\w*)\n(.*?)```", TEXT, re.S):
        if language == "toml":
            points = tomllib.loads(code)["project"]["entry-points"]
        elif language in ("python", "yaml"):
            *_, name = re.findall(r"`([\w/]+\.(?:py|yaml))`", before)
            files[re.sub("^memlm/memory/|^configs/", lambda m: f"foo/{m[0].removeprefix('memlm/memory/')}", name)] = (
                code
            )
    return files, points


def install(folder, name, files, points):
    """Install as pip does: the files, and a folder of metadata beside them."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    facts = folder / f"{name}-0.1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [line for group, of in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in of.items()))]
    (facts / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    install(folder, "foo", *package_of_the_page())
    return folder


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.setenv("MEMLM_CACHE", str(site / "cache"))
    yield monkeypatch.syspath_prepend(site)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("foo", "bar")]:
        del sys.modules[name]


@pytest.fixture
def bar(tmp_path, monkeypatch):
    """A second package with these entry points: one module is broken, and one is empty."""

    def bar(**points):
        files = {"bar/__init__.py": "", "bar/broken.py": "import nowhere", "bar/empty.py": ""}
        install(tmp_path, "bar", files, {group.replace("_", "."): of for group, of in points.items()})
        monkeypatch.syspath_prepend(tmp_path)

    yield bar
    for name in [name for name in sys.modules if name.partition(".")[0] == "bar"]:
        del sys.modules[name]


def run(site, folder, script, *arguments):
    paths = os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "MEMLM_CACHE": str(folder / "cache")}
    searched = "hydra.searchpath=[pkg://foo.configs]"
    done = processes.run(ROOT / script, searched, *arguments, cwd=folder, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_a_package_trains_and_is_evaluated(site, tmp_path):
    """Its memory on its source and its task; the project's recall measures its task, and its measure both."""
    sizes = ("train.steps=2", "train.batch_size=2", "train.validation_batches=1", "model.num_hidden_layers=1")
    task = "+data.sources.copying={kind: copying, weight: 1.0}"
    data = ("data=counting", task, "+data.noise_ramp=[0,0]", f"data.cache_dir={tmp_path}/cache")
    code, told = run(site, tmp_path, "train.py", "memory=ema", *data, *sizes, "run_dir=run")
    assert code == 0, told
    small = ("eval.factors=[1]", "eval.recall_rows=2", "eval.surprise.rows=2", "control=null")
    code, told = run(site, tmp_path, "evaluate.py", "checkpoint=run", "eval=surprise", *small)
    assert code == 0, told
    results = json.loads((tmp_path / "run" / "evaluation" / "latest" / "results.json").read_text())
    assert results["evaluation"]["surprise"] == {"rows": 2}
    (found,) = results["models"].values()
    assert found["surprise"].keys() == {"counting", "copying"}
    assert all(4 < nats < 8 for nats in found["surprise"].values())
    assert [r["task"] for r in found["recall"]] == ["copying"]
    assert "<h2>Surprise</h2>" in (tmp_path / "run" / "evaluation" / "latest" / "report.html").read_text()


def test_the_contract_runs_on_memories_of_a_package(installed):
    found = [variant.values[0] for variant in variants()]
    for memory in (("ema", {}), ("fast_ema", {})):
        assert found.count(memory) == 1
        contract.test_streaming_any_division_of_the_stream_is_the_same(memory, [5, 1, 1, 44, 24])
        contract.test_packed_documents_equal_documents_alone(memory)
        contract.test_padding_leaves_no_trace(memory)


def test_a_memory_of_a_package_is_a_layer_and_a_checkpoint(installed, tmp_path):
    layer = memlm.layer("ema", hidden_size=16, decay=0.5)
    x = torch.randn(2, 5, 16)
    y, state = layer(x[:, :3])
    torch.testing.assert_close(torch.cat([y, layer(x[:, 3:], state)[0]], 1), layer(x)[0])
    config = memlm.MemLMConfig(mixers={"memory": {"kind": "ema"}})
    memlm.MemLMForCausalLM(config).save_pretrained(tmp_path)
    assert memlm.MemLMForCausalLM.from_pretrained(tmp_path).config.mixers == {"memory": {"kind": "ema", "decay": 0.9}}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_op_of_a_package_has_backends(installed, backend):
    """The memory with the op equals the memory with the loop, gradients included."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")
    from memlm_kernels import set_backend

    slow, fast = (memlm.layer(kind, hidden_size=70) for kind in ("ema", "fast_ema"))
    fast.load_state_dict(slow.state_dict())
    places = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 0]])
    given = {"position_ids": places, "lengths": torch.tensor([5, 3]), "max_documents": 2}
    found = []
    for layer in (slow, fast):
        torch.manual_seed(0)
        x = torch.randn(2, 5, 70, requires_grad=True)
        with set_backend(backend):
            y, state = layer(x, layer(torch.randn(2, 3, 70))[1], **given)
            y[:, :3].square().sum().backward()
        found.append((y[:, :3], state["mean"], x.grad, layer.mixer.v_proj.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with set_backend("fla"), pytest.raises(ValueError, match="leaky_sum: backend='fla' cannot run here"):
        from foo.leaky_sum import leaky_sum

        leaky_sum(torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1), backend="fla")


def source(**options):
    data = {"tokenizer": "byte", "seq_len": 64, "cache_dir": os.environ["MEMLM_CACHE"], "noise_ramp": [0, 0]}
    return build_data({**data, "sources": {"a": {"weight": 1, **options}}}, seed=0, batch_size=1)


def memory(**settings):
    return memlm.MemLMConfig(mixers={"m": settings})


EVAL = {"factors": [1], "recall_rows": 1, "depths": [], "needle_rows": 1, "text_documents": 0, "text_length": 2}
EVAL |= {"bank_documents": [], "bank_questions": 1}


def measure(**settings):
    return measures({**EVAL, **settings})


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (memory, dict(kind="fast_em"), "model.mixers.m.kind='fast_em' is unknown; did you mean 'fast_ema'?"),
        (memory, dict(kind="ema", decoy=1), "model.mixers.m.decoy=1 is not a setting; did you mean 'decay'?"),
        (source, dict(kind="countin"), "data.sources.a.kind='countin' is unknown; did you mean 'counting'?"),
        (source, dict(kind="counting", highst=3), "data.sources.a.highst is unknown; did you mean 'highest'?"),
        (source, dict(kind="counting", highest=0), "data.sources.a.highest=0 must be at least 1"),
        (source, dict(kind="counting", highest=0.5), "data.sources.a.highest=0.5 must be int"),
        (source, dict(kind="counting", weight=-1), "data.sources.a.weight=-1 is not a number"),
        (source, dict(kind="copying", length=3), "data.sources.a.length is unknown"),
        (source, dict(kind="copying", gap=60), "data.sources.a.length=64 is too short; make it at least 69"),
        (measure, dict(surprize={}), "eval.surprize={} is not a setting; did you mean 'surprise'?"),
        (measure, dict(surprise=3), "eval.surprise=3 must be its settings, {key: value}"),
        (measure, dict(surprise={}), "eval.surprise.rows is missing; set it"),
        (measure, dict(surprise={"rows": 0}), "eval.surprise.rows=0 must lie in 1.."),
    ],
)
def test_mistakes_with_parts_of_a_package(installed, call, given, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(**given)


BROKEN = "does not import (ModuleNotFoundError: No module named 'nowhere')"


@pytest.mark.parametrize(
    ("points", "call", "given", "message"),
    [
        (
            dict(memlm_memory={"ema": "bar.empty"}),
            memory,
            dict(kind="ema"),
            "model.mixers.m.kind='ema' is in bar 0.1 and in foo 0.1; keep one of them, or rename it in a package",
        ),
        (dict(memlm_memory={"mom": "bar.empty"}), memory, dict(kind="mom"), "kind='mom' is in memlm and in bar 0.1;"),
        (dict(memlm_memory={"x": "bar.broken"}), memory, dict(kind="x"), f"kind='x': bar.broken of bar 0.1 {BROKEN}"),
        (dict(memlm_memory={"x": "bar.empty"}), memory, dict(kind="x"), "bar.empty must have Config and Mixer"),
        (dict(memlm_data={"text": "bar.empty"}), source, dict(kind="text"), "kind='text' is in memlm and in bar 0.1;"),
        (dict(memlm_data={"x": "bar.broken"}), source, dict(kind="x"), f"bar.broken of bar 0.1 {BROKEN}"),
        (dict(memlm_data={"x": "bar.empty"}), source, dict(kind="x"), "must have Task, or Config and Source"),
        (dict(memlm_measure={"factors": "bar.empty"}), measure, {}, "eval.factors=[1] is in memlm and in bar 0.1;"),
        (dict(memlm_measure={"x": "bar.broken"}), measure, dict(x={}), f"eval.x={{}}: bar.broken of bar 0.1 {BROKEN}"),
        (dict(memlm_measure={"x": "foo.surprise"}), measure, dict(x={}), "eval.x: foo.surprise must have one Measure"),
        (
            dict(memlm_measure={"recall": "bar.empty"}),
            measure,
            dict(recall={}),
            "eval.recall: bar.empty must have one Measure, and its name='recall' must be new",
        ),
    ],
)
def test_packages_that_collide_or_are_broken(installed, bar, points, call, given, message):
    bar(**points)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(**given)
    assert "\n" not in str(caught.value)
    # Other names are not affected.
    assert memory(kind="gla") and source(kind="mqar", gap=10, num_pairs=2)


def test_without_the_package_a_checkpoint_names_what_is_missing(installed, tmp_path, monkeypatch, site):
    memory(kind="ema").save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    with pytest.raises(ValueError, match=r"kind='ema' is unknown; .* \(or install the package that brings it\)"):
        memlm.MemLMConfig.from_pretrained(tmp_path)


def test_the_configurations_of_the_page_compose(installed):
    for overrides in (["memory=ema", "data=counting"], ["memory=ema", "data=copying"]):
        cfg = composed("hydra.searchpath=[pkg://foo.configs]", *overrides, "run_dir=run")
        settings = RunSettings.of(cfg)
        memlm.MemLMConfig.from_hydra(OmegaConf.to_container(cfg.model, resolve=True))
        build_data(settings.config["data"], seed=0, batch_size=2)[1].batch(0)
