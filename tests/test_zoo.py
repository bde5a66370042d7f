"""scripts/zoo.py starts each run once and goes on after failures; its commands compose."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.conftest import MEMORIES, ROOT, composed


def script():
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "scripts" / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    module = script()
    monkeypatch.chdir(tmp_path)
    commands = []

    def started(command, **_):
        commands.append(command[1:])
        return SimpleNamespace(returncode=int("memory=lact" in command), stdout="", stderr="error: broken\n")

    monkeypatch.setattr(subprocess, "run", started)

    def run(*arguments):
        commands.clear()
        monkeypatch.setattr(sys, "argv", ["zoo.py", *arguments])
        with pytest.raises(SystemExit) as end:
            module.main()
        return end.value.code, list(commands)

    return run


def test_all_memories_run_with_both_sizes_and_a_failure_ends_nothing(zoo, tmp_path):
    code, commands = zoo("--seeds", "0", "1")
    trained = [command for command in commands if command[0] == "train.py"]
    # Four memories have no width that gives their state titans_mag's bytes.
    assert len(trained) == 2 * (2 * len(MEMORIES) - 4) == len({str(command) for command in trained})
    assert code == 1 and [command[0] for command in commands[-2:]] == ["evaluate.py"] * 2
    assert len([c for c in commands if "eval=zoo" in c]) == len(trained) - 2
    assert "error: broken" in (tmp_path / "runs/zoo/failed/parameters-lact-seed1.txt").read_text()


def test_an_interrupt_starts_no_further_job_and_blames_none(zoo, monkeypatch, tmp_path, capsys):
    started = []

    def interrupted(command, **_):
        started.append(command)
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return SimpleNamespace(returncode=130, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", interrupted)
    code, _ = zoo("--seeds", "0", "1")
    # Those that ran end; a terminal interrupts them too.
    assert code == 130 and 1 <= len(started) <= 4
    assert "the same command goes on" in capsys.readouterr().out and not (tmp_path / "runs/zoo/failed").exists()


@pytest.mark.parametrize(
    "memory", [pytest.param(m, marks=() if m == "omeganet" else pytest.mark.slow) for m in MEMORIES]
)
def test_its_commands_compose(zoo, memory):
    code, commands = zoo("--seeds", "0", "--memories", memory)
    # The fixture lets it fail.
    assert code == int(memory == "lact")
    for script, *overrides in commands:
        if script == "train.py":
            assert composed(*overrides).name.startswith("zoo/")
        elif "eval=zoo" in overrides:
            assert composed(*overrides, config="evaluate").eval.ask


def test_the_tables_of_the_page_are_those_of_the_results():
    page, module = (ROOT / "benchmarks" / "zoo" / "README.md").read_text(), script()
    for size in module.SIZES:
        results = json.loads((module.RESULTS / f"{size}.json").read_text())
        assert all(row["seeds"] == [0, 1, 2] for row in results["rows"])
        assert module.table(results) in page


def test_memories_without_a_run_here_keep_their_rows():
    def row(name, value):
        sizes = {"seeds": [0], "parameters": 1, "flops": 1.0, "state_bytes": value}
        return {"name": name, **sizes, "cells": []}

    module = script()
    first = module.figures({"command": "c", "rows": [row("mom", 1), row("none", 1)]}, "a")
    both = module.figures({"command": "c", "rows": [row("none", 2), row("kda", 2)]}, "b", first["rows"])
    assert [(r["name"], r["state_bytes"], r["commit"]) for r in both["rows"]] == [
        ("kda", 2, "b"),
        ("mom", 1, "a"),
        ("none", 2, "b"),
    ]


@pytest.mark.pictures
def test_its_pictures_are_of_the_results(tmp_path):
    module = script()
    module.draw(tmp_path)
    assert {p.stem for p in tmp_path.iterdir()} == set(module.PICTURES)
    for picture in tmp_path.iterdir():
        assert (module.RESULTS / picture.name).stat().st_size > 10_000 < picture.stat().st_size
