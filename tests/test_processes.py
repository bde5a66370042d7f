"""The forks of processes.py are Pythons of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests import processes

TOLD = """
import json, os, sys
json.dump([sys.argv, os.getcwd(), dict(os.environ), hash("a"), os.getppid(), "marked" in sys.modules], sys.stdout)
sys.exit("the end")
"""


@pytest.mark.parametrize("form", ["script", "-c", "-m"])
def test_a_fork_has_what_it_is_given_and_nothing_of_the_test(tmp_path, monkeypatch, form):
    (tmp_path / "telling.py").write_text(TOLD)
    monkeypatch.setitem(sys.modules, "marked", sys)
    environment = {**os.environ, "GIVEN": "yes", "PYTHONPATH": str(tmp_path)}
    start = {"script": ["telling.py"], "-c": ["-c", TOLD], "-m": ["-m", "telling"]}[form]
    done = processes.run(*start, "a b", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (1, "the end\n")
    (first, *rest), folder, variables, hashed, parent, marked = json.loads(done.stdout)
    assert (first, rest) == ({"script": "telling.py", "-c": "-c", "-m": f"{tmp_path}/telling.py"}[form], ["a b"])
    assert (folder, variables) == (str(tmp_path), environment)
    # Strings are in other places of its sets.
    assert hashed != hash("a") and parent != os.getpid() and not marked


def test_a_fork_gets_signals():
    code = "import signal as s, time; s.signal(15, lambda n, _: exit(n)); print(1, flush=True); time.sleep(60)"
    for number, expected in ((signal.SIGTERM, 15), (signal.SIGKILL, -9)):
        process = processes.Python("-c", code)
        process.until(lambda process=process: process.said()[0])
        process.send_signal(number)
        assert process.wait(20) == expected


def test_variables_that_are_read_on_import_need_a_real_python(monkeypatch):
    with pytest.raises(AssertionError, match="HF_HOME needs a real Python"):
        processes.run("-c", "", env={**os.environ, "HF_HOME": "elsewhere"})


def test_a_shell_script_starts_forks_and_one_real_python(tmp_path):
    code = "import sys; print(sys.stdin.read(), 'torch' in sys.modules); print('err', file=sys.stderr); sys.exit(3)"
    with processes.command(tmp_path, "real") as python:
        for argument, told in (("other", "read True\n"), ("real", "read False\n")):
            done = subprocess.run([python, "-c", code, argument], input="read", capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr) == (3, told, "err\n")
