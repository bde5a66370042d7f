"""Pythons of their own that start at once: forks of a server that has imported torch, transformers and memlm.

The server is a fresh interpreter, and knows nothing of the test that asks it. A start with another value of a variable
that is read on import, or with imports that are themselves tested, needs a real Python: subprocess.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.reduction import recv_handle
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

# The server's, in its forks.
PATH = [*sys.path]
ROOT = Path(__file__).parent.parent
# Not the hashes of the tests' process.
SEED = "123"
_READ_ON_IMPORT = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "HYDRA_FULL_ERROR", "TRITON_INTERPRET")


@functools.cache
def faults() -> Path | None:
    """The library of faults.c; None where it cannot be built."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / "faults.so", source, "-ldl"], check=True)
    return folder / "faults.so"


@functools.cache
def serve() -> None:
    """Start the server. It loads faults.c before the C library; nothing fails until faults.py asks for it."""
    multiprocessing.set_forkserver_preload(["tests.ranks", "tests.processes", "matplotlib.figure"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", SEED)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path]))
        if library := faults():
            patch.setenv("LD_PRELOAD", str(library))
        forkserver.ensure_running()


class Python(multiprocessing.get_context("forkserver").Process):
    """``python arguments...`` as subprocess.Popen starts it: a script, ``-m`` with a module or ``-c`` with code.

    env is the whole environment. streams: its stdin, stdout and stderr; without them, nothing is read from stdin, and
    what is said goes to files, which ``said`` reads.
    """

    def __init__(self, *arguments, cwd=None, env=None, streams=()):
        super().__init__()
        # torchrun asks for streams without a buffer, which nobody reads before the end.
        arguments = arguments[1:] if arguments[0] == "-u" else arguments
        self.arguments, self.folder = [str(x) for x in arguments], str(cwd or Path.cwd())
        self.environment = dict(os.environ if env is None else env)
        for name in _READ_ON_IMPORT:
            assert self.environment.get(name) == os.environ.get(name), f"{name} needs a real Python"
        self.given, folder = streams, mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.streams = [Path(folder, name) for name in ("out", "err")]
        for path in self.streams:
            path.touch()
        serve()
        self.start()

    def run(self):
        if self.given:
            for number, stream in enumerate(self.given):
                os.dup2(stream.fileno(), number)
            sys.stdin = os.fdopen(0, closefd=False)
        else:
            for number, path in enumerate(self.streams, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        first, *rest = self.arguments
        sys.path[:] = ["" if first.startswith("-") else str(Path(first).resolve().parent), *paths, *PATH]
        sys.argv[:] = [first, *rest[1:]] if first.startswith("-") else self.arguments
        try:
            if first == "-m":
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            else:
                sys.modules["__main__"] = module = types.ModuleType("__main__")
                code = rest[0]
                if first != "-c":
                    module.__file__ = str(Path(first).resolve())
                    code = compile(Path(first).read_bytes(), module.__file__, "exec")
                exec(code, vars(module))
        finally:
            atexit._run_exitfuncs()

    returncode = property(lambda self: self.exitcode)

    def said(self) -> tuple[str, str]:
        """Its stdout and stderr, so far."""
        out, err = (path.read_text() for path in self.streams)
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 600) -> int:
        self.join(timeout)
        if self.exitcode is None:
            self.kill()
            raise AssertionError(f"{self.arguments} takes more than {timeout} s: {self.said()}")
        return self.exitcode

    def until(self, happened, timeout: float = 120) -> None:
        """Wait for something that it does."""
        end = time.monotonic() + timeout
        while not happened():
            assert self.exitcode is None and time.monotonic() < end, self.said()
            time.sleep(0.01)


def run(*arguments, cwd=None, env=None) -> subprocess.CompletedProcess:
    """As subprocess.run."""
    process = Python(*arguments, cwd=cwd, env=env)
    code = process.wait()
    return subprocess.CompletedProcess(process.arguments, code, *process.said())


_CLIENT = """
import os, sys
from multiprocessing.connection import Client
from multiprocessing.reduction import send_handle
if {real!r} in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with Client({address!r}) as server:
    server.send((sys.argv[1:], os.getcwd(), dict(os.environ)))
    for number in range(3):
        send_handle(server, number, None)
    sys.exit(server.recv())
"""


@contextmanager
def command(folder: Path, real: str = "none"):
    """A file that others can start in the place of python, without signals. With the argument ``real`` it starts a
    real one.
    """
    (folder / "client.py").write_text(_CLIENT.format(real=real, python=sys.executable, address=f"{folder}/socket"))
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{folder}/client.py" "$@"\n')
    (folder / "python").chmod(0o755)
    with Listener(f"{folder}/socket") as listener:
        thread = threading.Thread(target=_answer, args=(listener,))
        thread.start()
        try:
            yield folder / "python"
        finally:
            with Client(listener.address) as end:
                end.send(None)
            thread.join()


def _answer(listener: Listener) -> None:
    with ThreadPoolExecutor() as pool:
        while asked := (client := listener.accept()).recv():
            pool.submit(_fork, client, *asked)
        client.close()


def _fork(client: Connection, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    with client:
        streams = [Connection(recv_handle(client)) for _ in range(3)]
        process = Python(*arguments, cwd=folder, env=environment, streams=streams)
        for stream in streams:
            stream.close()
        client.send(process.wait())
