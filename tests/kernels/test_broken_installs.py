"""A Triton or flash-linear-attention that is installed but does not import counts as absent."""

import os
import subprocess
import sys

from tests.conftest import ROOT

OPS_AND_DOCTOR = """
import runpy
import torch
from memlm_kernels import delta_rule, linear_attention

q = torch.rand(1, 4, 1, 16)
for backend in ("auto", "triton", "fla"):
    for gate in ((), (q[..., 0],)):
        try:
            (delta_rule if gate else linear_attention)(q, q, q, *gate, backend=backend)
        except ValueError as error:
            print(error)
runpy.run_path("scripts/doctor.py", run_name="__main__")
"""


def test_what_does_not_import_is_told_where_it_is_asked_for(tmp_path):
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)

    def broken(package, error):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text(f"raise {error}")

    broken("triton", r"ImportError('libtriton.so: undefined\nsymbol')")
    broken("fla", "RuntimeError('built for another torch')")
    reasons = {
        "triton": "Triton is installed and does not import: ImportError: libtriton.so: undefined symbol; install it",
        "fla": "flash-linear-attention is installed and does not import: RuntimeError: built for another torch; ",
    }
    done = run("-c", OPS_AND_DOCTOR)
    assert done.returncode == 0, done.stderr
    for package, reason in reasons.items():
        for op in ("linear_attention", "delta_rule"):
            lines = [line for line in done.stdout.splitlines() if line.startswith(op) and reason in line]
            assert len(lines) == 2, done.stdout
            assert lines[0].startswith(f"{op}: backend='{package}' cannot run here: ")
            assert f"{package} cannot: {reason}" in lines[1]
    # For torch, an ImportError means that there is no Triton; after another error torch itself does not import.
    broken("triton", "OSError('no such file')")
    doctor = run("scripts/doctor.py")
    assert doctor.returncode == 1 and doctor.stderr.startswith("triton is installed and does not import: OSError: no")
    assert len(doctor.stderr.splitlines()) == 1 and "pip uninstall triton" in doctor.stderr
