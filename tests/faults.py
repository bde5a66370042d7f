"""Faults at every file operation of a save: kills, torn writes, a power loss, a full disk, a disk error.

A scenario is a class of a test module:

    class Saving:
        def __init__(self, folder): ...    # writes the content before the save (folder is a Path; it is copied)
        def save(self, folder): ...        # the save itself, in its own process; it may raise OSError, ValueError
        def check(self, folder, done): ... # asserts that the old or the new content is complete; done: save returned

    def test_a_save_survives_any_fault(tmp_path):
        every_fault("tests.test_foo:Saving", tmp_path, at_most=40)

``every_fault`` starts a process of processes.py, where ``faults.c`` is loaded before the C library, so that operations
of Rust and C++ count too. Each fault happens in a fork. ``lost`` is a power loss: half of the content that no fsync
covers is cut off.
"""

import ctypes
import importlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest

from tests import processes

FAULTS = {"kill": 1, "torn": 2, "lost": 3, "full": 4, "error": 5}


def every_fault(scenario: str, folder: Path, at_most: int | None = None) -> dict[str, int]:
    """Run a scenario with each fault at each operation, or with about ``at_most`` of these pairs, spread evenly.

    Returns the number of operations and the number of faults that were tried. Fails the test if some faults left the
    folder in a state that ``check`` does not accept, and names them.
    """
    if (library := processes.faults()) is None:
        pytest.skip("faults are injected through a C library, which needs Linux and a C compiler")
    environment = {**os.environ, "FAULTS": str(library), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = processes.run("-m", "tests.faults", scenario, folder, at_most or 0, cwd=processes.ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["operations"] > 0, "the scenario's save touches no file below its folder"
    return {name: report[name] for name in ("operations", "tried")}


def _main(scenario: str, folder: str, at_most: str) -> None:
    module, name = scenario.split(":")
    before, work = Path(folder, "before"), Path(folder, "work")
    before.mkdir()
    case = getattr(importlib.import_module(module), name)(before)
    wrong: list[str] = []
    operations, done, _ = _fork(case, before, work, -1, 0)
    assert done, "the save fails without a fault"
    case.check(work, True)
    # The last one: the power fails after the save has returned.
    pairs = [*((at, name) for at in range(operations) for name in FAULTS), (operations, "lost")]
    if limit := int(at_most):
        pairs = pairs[:: -max(1, len(pairs) // limit)][::-1]
    for at, fault in pairs:
        _, done, unexpected = _fork(case, before, work, at, FAULTS[fault])
        try:
            assert not unexpected, unexpected
            case.check(work, done)
        except Exception:
            reason = traceback.format_exc().strip().splitlines()
            wrong.append(f"{fault} at operation {at} of {operations}: {' | '.join(reason[-3:])}")
    print(json.dumps({"operations": operations, "tried": len(pairs), "wrong": wrong}))


def _fork(case, before: Path, work: Path, at: int, fault: int) -> tuple[int, bool, str]:
    """The operations of a save with a fault, whether it returned, and an exception that is not a user's error."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(before, work, symlinks=True)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        library, done, unexpected = ctypes.CDLL(os.environ["FAULTS"]), False, ""
        library.faults_arm(str(work).encode(), ctypes.c_long(at), fault)
        try:
            case.save(work)
            done = True
        except (OSError, ValueError):
            pass
        except BaseException as error:
            unexpected = f"{type(error).__name__}: {error}"[:500]
        seen = library.faults_seen()
        if fault == FAULTS["lost"]:
            library.faults_lose()
        os.write(writer, json.dumps([seen, done, unexpected]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as told:
        text = told.read()
    os.waitpid(child, 0)
    operations, done, unexpected = json.loads(text) if text else (0, False, "")
    return operations, done, unexpected


if __name__ == "__main__":
    _main(*sys.argv[1:])
