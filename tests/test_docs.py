"""The documents, checked: their examples and commands run, their maps name every file, their links lead somewhere."""

import ast
import os
import re
import shlex
import shutil

import pytest
import torch
import transformers
from omegaconf import OmegaConf

import memlm_kernels
from memlm import MemLMConfig
from memlm.cli import completed, help_text
from memlm.data import byte_tokenizer
from memlm.training.model import BackboneSettings
from tests import processes
from tests.conftest import ROOT, build, composed

# All but the log, whose commands are those of its commits.
PAGES = [
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "configs/*.md", "memlm/**/*.md", "benchmarks/**/*.md", "kernels/README.md", "scripts/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "LOG.md"
]

# A line of a shell block, without its comment, begins with one of these.
PROGRAM = (
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:python|torchrun|pip|git|pytest|accelerate|sbatch|\./scripts/[\w/]+\.sh|for \w+ in|done)(?= |$)"
)


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.S)


# As in a repository with the three files: only their rooms are looked up in two places.
IN_A_COPY = """
import sys, pytest, memlm.memory, tests
memlm.memory.__path__.append("memlm/memory")
tests.__path__ = ["tests"]
sys.exit(pytest.main(["-o", "addopts=", "tests/memory/test_contract.py", "-k", "ema and not finite"]))
"""


def test_a_new_memory_is_three_files_and_passes_the_contract(tmp_path):
    for part in ("configs", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    # To collect the contract of every memory takes longer than to run that of one.
    for path in (tmp_path / "tests/memory").glob("test_*.py"):
        if path.stem != "test_contract":
            path.unlink()
    code, variants = blocks("CONTRIBUTING.md", "python")[:2]
    (tmp_path / "memlm/memory").mkdir(parents=True)
    (tmp_path / "memlm/memory/ema.py").write_text(code)
    (tmp_path / "configs/memory/ema.yaml").write_text(blocks("CONTRIBUTING.md", "yaml")[0])
    (tmp_path / "tests/memory/test_ema.py").write_text(variants)
    # The example loops over tokens, which is too slow for thousands of them.
    done = processes.run("-c", IN_A_COPY, cwd=tmp_path, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40


# Each block of Python of a page: the memory of its model, the text it prints, the file it writes.
EXAMPLES = {
    ("README.md", 0): ("titans_mag", "It was the ", None),
    ("memlm/README.md", 0): ("titans_mag", "It was the ", "memories/book/memory.safetensors"),
    ("memlm/bank/README.md", 0): ("msa", "?dwp2", "banks/facts/index.json"),
    ("memlm/bank/README.md", 1): ("msa", "xy ", None),
    ("memlm/hub/README.md", 0): ("titans_mag", "", None),
}


# The same of blocks that begin with a model of transformers.
BACKBONES = {
    ("README.md", 1): ("", "memories/llama/memlm_memory.safetensors"),
    ("memlm/attached/README.md", 0): ("torch.Size([1, 618])", None),
    ("memlm/evaluation/README.md", 0): ("model.layers.1.mlp.gate_proj", None),
}


def test_every_example_of_a_page_is_run():
    """No test would run a block of Python elsewhere."""
    # Blocks of kernels/README.md run in a row; those of CONTRIBUTING.md as files, above and in test_plugins.py.
    pages = [page for page in PAGES if page not in ("kernels/README.md", "CONTRIBUTING.md")]
    found = {(page, i) for page in pages for i in range(len(blocks(page, "python")))}
    assert found - {("memlm/README.md", 1), *BACKBONES} == set(EXAMPLES)


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=lambda x: str(x))
def test_an_example_runs(tmp_path, monkeypatch, capsys, page, example):
    """As written, on an untrained model."""
    code, (memory, said, written) = blocks(page, "python")[example], EXAMPLES[page, example]
    monkeypatch.chdir(tmp_path)
    checkpoint = re.search(r'checkpoint = "(.*)"', code)[1]
    build(memory, dtype=torch.float32).save_pretrained(checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    exec(code, {})
    assert said in capsys.readouterr().out
    assert written is None or (tmp_path / written).exists()


# The loader of the Trainer would pin memory, without a GPU too.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize(("page", "example"), BACKBONES, ids=lambda x: str(x))
def test_an_example_with_a_backbone_runs(tmp_path, monkeypatch, capsys, page, example):
    """As written, on a random Llama."""
    code, (said, written) = blocks(page, "python")[example], BACKBONES[page, example]
    assert page != "README.md" or len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    monkeypatch.chdir(tmp_path)
    sizes = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    # A random model would end its answer anywhere.
    sizes |= {"eos_token_id": None}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained("models/llama")
    byte_tokenizer().save_pretrained("models/llama")
    names = {}
    exec(code, names)
    assert said in capsys.readouterr().out
    assert written is None or (tmp_path / written).exists()
    if page == "README.md":
        assert names["answer"].shape[1] > names["book"].shape[1] + names["question"].shape[1]
        gates = [p for name, p in names["model"].named_parameters() if name.endswith("memlm.gate")]
        assert len(gates) == 2 and all(gate.abs().min() > 0 for gate in gates)


def test_the_page_of_the_kernels_calls_every_op():
    """Each block continues the one before."""
    code = "".join(blocks("kernels/README.md", "python"))
    exec(code, {})
    called = set(re.findall(r"\w+", code))
    assert set(memlm_kernels.__all__) - called <= {"NeuralMemoryState", "LargeChunkMemoryState"}


def test_the_table_of_the_ops_lists_those_that_the_package_exports():
    """Each op has a place in a row, and every row's op can be called after ``from memlm_kernels import *``."""
    table = (ROOT / "kernels" / "README.md").read_text().partition("\n| op | equation ")[2].partition("\n\n")[0]
    listed = [op for row in table.splitlines()[2:] for op in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    exported = {name for name in memlm_kernels.__all__ if name.islower()} - {"choose", "set_backend"}
    assert set(listed) == exported | {"MemoryRoutes"} and len(set(listed)) == len(listed)


def test_a_layer_is_three_lines(capsys):
    exec(blocks("memlm/README.md", "python")[1], {})
    assert capsys.readouterr().out == "torch.Size([2, 1, 384])\n"


def test_a_library_is_ten_lines(tmp_path, monkeypatch, capsys):
    """On the model that the page names: the question is answered, but not after its document is deleted."""
    code = blocks("memlm/bank/README.md", "python")[0]
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    checkpoint = re.search(r'checkpoint = "(.*)"', code)[1]
    shutil.copytree(ROOT / "tests" / "reference" / "facts_alike", checkpoint)
    names = {}

    def said(code):
        exec(code, names)
        return capsys.readouterr().out.splitlines()[-1]

    assert said(code) == "?dwp2W"
    (ask,) = (line for line in lines if line.startswith("print"))
    assert said(ask) != "?dwp2W" and names["bank"].documents() == ["a", "b"]


@pytest.mark.parametrize("page", [*PAGES, "LOG.md"])
def test_a_line_of_a_shell_block_is_one_command(page):
    """Not the rest of the line before, and no command in its comment, as after a reflow of the page."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            command, _, comment = line.partition("#")
            assert re.match(rf" *{PROGRAM}", command), f"{page}: {line!r} begins with no command"
            assert not re.search(rf"{PROGRAM} +\S+\.py", comment), f"{page}: {line!r} has a command in its comment"


def commands():
    """The lines of the pages and of ``--help`` that start train.py or evaluate.py, as arguments."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    for name in ("train", "evaluate"):
        head = (ROOT / "configs" / f"{name}.yaml").read_text().partition("defaults:")[0]
        examples = re.findall(r"^#   (python .*)$", head, re.MULTILINE)
        assert len(examples) == {"train": 6, "evaluate": 7}[name]
        lines += examples
    for line in lines:
        words = shlex.split(line, comments=True)
        for script in {"train.py", "evaluate.py"} & set(words):
            yield pytest.param(script, words[words.index(script) + 1 :], id=line.partition("#")[0].strip())


@pytest.mark.parametrize(("script", "arguments"), list(commands()))
def test_a_command_of_a_page_composes(script, arguments):
    """Its experiment, choices and keys exist."""
    config = script.removesuffix(".py")
    if arguments[:1] == ["-m"]:
        # Only the first member of the sweep.
        arguments = [word.partition(",")[0] for word in arguments[1:]]
    overrides = completed(arguments)
    cfg = composed(*overrides, config=config)
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if "." in key and not override.endswith("=null"):
            assert OmegaConf.select(cfg, key) is not None, override
    if "backbone" in cfg.get("model", {}):
        BackboneSettings.of(OmegaConf.to_container(cfg.model, resolve=True))
    elif config == "train":
        MemLMConfig.from_hydra(OmegaConf.to_container(cfg.model, resolve=True))


@pytest.mark.parametrize("config", ["train", "evaluate"])
def test_help_has_a_line_for_every_group_and_choice(config):
    """The first line of its file explains a choice; the line that chooses explains a group."""
    text = help_text(ROOT / "configs", config)
    (defaults,) = re.findall(
        r"^defaults:\n((?: .*\n)+)", (ROOT / "configs" / f"{config}.yaml").read_text(), re.MULTILINE
    )
    groups = [group for group in re.findall(r"^  - (\w+): ", defaults, re.MULTILINE)]
    assert groups == re.findall(r"^(\w+)=  \S", text, re.MULTILINE)
    for group in groups:
        (lines,) = re.findall(rf"^{group}=  .*\n((?:  [ *] .*\n)+)", text, re.MULTILINE)
        told = dict(re.findall(r"^  [ *] (\S+) +(\S.*)$", lines, re.MULTILINE))
        assert sorted(told) == sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))
        assert all(len(meaning) <= 95 and meaning[-1] in ".?)" for meaning in told.values()), told
        assert lines.count("  * ") == (f"  - {group}: null" not in defaults)


@pytest.mark.parametrize(
    ("config", "key", "meaning"),
    [
        ("train", "of_memory", "Settings for single memories, "),
        ("train", "initialization", "An engineered initialisation "),
        ("train", "noise_ramp", "The steps between which "),
        ("train", "init_from", "A run directory or checkpoint folder "),
        ("evaluate", "bank_documents", "Sizes of banks in documents, "),
        ("evaluate", "control", "A second run for comparison, "),
    ],
)
def test_help_explains_a_key_by_the_comment_before_it(config, key, meaning):
    text = help_text(ROOT / "configs", config).partition("Keys of the default run:\n")[2]
    assert re.search(rf"^( *)# {meaning}.*\n(?:\1# .*\n)*\1{key}:", text, re.MULTILINE)
    assert all(len(line) <= 120 for line in text.splitlines())


def packages():
    return [path.parent for room in ("memlm", "kernels") for path in sorted((ROOT / room).rglob("__init__.py"))]


@pytest.mark.parametrize("package", packages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_maps_its_files(package):
    """Its docstring has a line for each of its modules and packages, and for no other."""
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    rows = re.findall(r"^ {4}(\w+(?:, \w+)*) {2,}\S", doc.partition("\nFiles:\n")[2], re.MULTILINE)
    mapped = [name for row in rows for name in row.split(", ")]
    found = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert sorted(mapped) == sorted(found - {"__init__"})


def test_the_readme_maps_the_top_level():
    rooms = [ROOT / name for name in ("benchmarks", "configs", "kernels", "memlm", "scripts", "tests")]
    scripts = [path for path in (*ROOT.glob("scripts/*.*"), *ROOT.glob("scripts/launch/*")) if path.suffix != ".md"]
    maps = {"README.md": [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *rooms], "scripts/README.md": scripts}
    for page, mapped in maps.items():
        text = (ROOT / page).read_text()
        for path in mapped:
            assert re.search(rf"[`/]{re.escape(path.name)}[`/]", text), f"{page} does not map {path.relative_to(ROOT)}"


def test_the_pages_can_be_read():
    """README is short; lines fit a screen; a figure has its leading zero."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    for page in PAGES:
        text, fenced = (ROOT / page).read_text(), False
        for number, line in enumerate(text.splitlines(), 1):
            fenced ^= line.startswith("```")
            assert fenced or line.startswith("|") or len(line) <= 120, f"{page}, line {number}: {len(line)} characters"
            assert not re.search(r"(?<![\w./*])\.\d", line), f"{page}, line {number}: a figure begins with a point"


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_links_of_the_documents_lead_somewhere():
    for document in (*PAGES, "LOG.md"):
        for link, place in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", (ROOT / document).read_text()):
            target = (ROOT / document).parent / link if link else ROOT / document
            assert target.exists(), f"{document} -> {link}"
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if place else []
            assert not place or place in map(anchor, titles), f"{document} -> {link}#{place}"


def test_the_index_of_the_log_lists_every_entry():
    text = (ROOT / "LOG.md").read_text()
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d: .*)$", text, re.M)
    rows = re.findall(r"^\| \[(\d{4}-\d\d-\d\d)\]\(#(.*?)\) \| .+ \| .+ \|$", text, re.M)
    assert [place for _, place in rows] == [anchor(entry) for entry in entries], "a row of the index for each entry"
    assert all(place.startswith(date) for date, place in rows)
