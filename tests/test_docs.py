"""What the documents say, run: the worked example of a new memory, the map of files."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from memlm.data import byte_tokenizer
from tests.conftest import ROOT, build


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.S)


def test_a_new_memory_is_three_files_and_passes_the_contract(tmp_path):
    for part in ("memlm", "kernels", "configs", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    code, variants = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "memlm/memory/ema.py").write_text(code)
    (tmp_path / "configs/memory/ema.yaml").write_text(blocks("CONTRIBUTING.md", "yaml")[0])
    (tmp_path / "tests/memory/test_ema.py").write_text(variants)
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / "kernels")])
    # The loop over tokens of the example is too slow for thousands of them.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "tests/memory/test_contract.py",
        "-k",
        "ema and not finite",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40


@pytest.mark.parametrize(
    "example, memory, said, written",
    [
        (0, "titans_mag", "It was the ", "memories/book/memory.safetensors"),
        (2, "msa", "xy ", "runs/chains/msa-seed0/checkpoints/step_001200/config.json"),
    ],
)
def test_the_readme_examples_run(tmp_path, monkeypatch, capsys, example, memory, said, written):
    """To the letter, on a model that has learnt nothing."""
    code = blocks("README.md", "python")[example]
    monkeypatch.chdir(tmp_path)
    checkpoint = re.search(r'checkpoint = "(.*)"', code)[1]
    build(memory, dtype=torch.float32).save_pretrained(checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    exec(code, {})
    assert said in capsys.readouterr().out
    assert (tmp_path / written).exists()


def test_the_readme_keeps_a_library_in_ten_lines(tmp_path, monkeypatch, capsys):
    """On the model that it names: what is asked is answered, and no more once its document is deleted."""
    code = blocks("README.md", "python")[1]
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


def test_the_readme_maps_every_file():
    text = (ROOT / "README.md").read_text()
    tracked = [*ROOT.glob("memlm/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("scripts/*"), ROOT / "train.py"]
    for path in tracked:
        if path.is_file() and path.name != "__init__.py" and "egg-info" not in str(path):
            name = re.escape(path.stem)
            assert re.search(rf"[/`{{,\s]{name}[`.,}}\s]", text), f"README.md does not map {path.relative_to(ROOT)}"


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_links_of_the_documents_lead_somewhere():
    for document in ("README.md", "CONTRIBUTING.md", "LOG.md"):
        for link, place in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", (ROOT / document).read_text()):
            target = ROOT / (link or document)
            assert target.exists(), f"{document} -> {link}"
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if place else []
            assert not place or place in map(anchor, titles), f"{document} -> {link}#{place}"


def test_the_index_of_the_log_lists_every_entry():
    text = (ROOT / "LOG.md").read_text()
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d: .*)$", text, re.M)
    rows = re.findall(r"^\| \[(\d{4}-\d\d-\d\d)\]\(#(.*?)\) \| .+ \| .+ \|$", text, re.M)
    assert [place for _, place in rows] == [anchor(entry) for entry in entries], "a row of the index for each entry"
    assert all(place.startswith(date) for date, place in rows)
