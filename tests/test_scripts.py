"""Scripts, run as their users run them; benchmarks on memories too small for useful figures."""

import importlib
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import memlm_kernels
from tests import processes
from tests.conftest import ROOT, convert, run_script


def started(*arguments: str, script: str, **environment: str) -> str:
    """The output of a script in a process of its own: for figures of a process, and other settings."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(*arguments: str, script: str = "benchmark_memory.py") -> str:
    code, said = run_script(script, *arguments)
    assert not code, said
    return said


def test_benchmark_writes_a_line_for_each_measurement(tmp_path, monkeypatch):
    out = tmp_path / "memory.jsonl"
    with processes.command(tmp_path) as python:
        monkeypatch.setattr(sys, "executable", str(python))
        run("--suite", "smoke", "--repeats", "3", "--out", str(out))
    training, decoding = map(json.loads, out.read_text().splitlines())
    assert (training["what"], training["tokens"], training["chunk_size"], training["repeats"]) == ("memlm", 64, 8, 3)
    assert decoding["seen"] == 64
    for record in (training, decoding):
        for clock in ("cpu", "user", "wall"):
            rate = record[f"tokens_per_{clock}_second"]
            assert rate["best"] == max(rate["passes"]) >= rate["median"] > 0 and len(rate["passes"]) == 3
        assert record["peak_rss_mb"] >= record["base_rss_mb"] > 0
        assert all(record[name] for name in ("hardware", "torch", "commit", "date", "command", "version", "dtype"))
    assert training["version"] == decoding["version"] == training["commit"] == decoding["commit"]
    assert len(run("--table", "--out", str(out)).strip().splitlines()) == 6


@pytest.mark.slow
def test_benchmark_of_training_steps(tmp_path):
    out = tmp_path / "memory.jsonl"
    run("--suite", "train_smoke", "--repeats", "1", "--out", str(out))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["memory"] for r in records] == ["attention", "titans_mag"]
    assert all(r["tokens_per_wall_second"]["best"] > 0 and r["version"] == r["commit"] for r in records)
    assert "| 64 | " in run("--table", "--out", str(out))


@pytest.mark.slow
def test_benchmark_of_two_checkouts():
    rows = started(str(ROOT), "--memories", "none", "--rounds", "2", script="benchmark_checkouts.py").splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| none", "training step, ms"],
        ["| none", "50 tokens, ms"],
        ["| none", "a token, calls"],
    ]
    assert all(float(row.split(" | ")[i]) > 0 for row in rows for i in (2, 3)) and rows[-1].endswith("1.00 |")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("callgrind_control") is None, reason="needs valgrind")
def test_instructions_of_two_checkouts():
    options = (str(ROOT), "--memories", "none", "--instructions")
    (row,) = started(*options, script="benchmark_checkouts.py").splitlines()[2:]
    there, here = (int(cell.replace(",", "")) for cell in row.split(" | ")[1:3])
    # Addresses differ, and with them the places in hash tables.
    assert here == pytest.approx(there, rel=0.01) and there > 1e6


@pytest.mark.slow
def test_benchmark_of_the_bank(tmp_path):
    out = tmp_path / "bank.jsonl"
    started("--tokens", "4e4", "--repeats", "2", "--changes", "60", "--out", str(out), script="benchmark_bank.py")
    (record,) = map(json.loads, out.read_text().splitlines())
    # Two were added and two deleted.
    assert (record["documents"], record["chunks"], record["bank_mb"]) == (78, 624, 1)
    for name in ("load", "route", "route_query", "ask", "decode", "add", "delete", "save"):
        assert record[f"{name}_s"]["median"] >= record[f"{name}_s"]["best"] >= 0
    assert record["peak_rss_mb"] >= record["base_rss_mb"] > 0 and record["tidied"] > 0
    assert all(record[name] > 0 for name in ("add_most_s", "delete_most_s"))
    assert all(record[name] for name in ("hardware", "torch", "commit", "date", "command"))


@pytest.mark.slow
def test_benchmark_of_reading(tmp_path):
    out = tmp_path / "bank.jsonl"
    started("--encode", "64", "--repeats", "1", "--out", str(out), script="benchmark_bank.py")
    (record,) = map(json.loads, out.read_text().splitlines())
    rates, ratios = record["tokens_per_cpu_second"], record["ratio"]
    assert record["encode"] == 64 and all(rate["best"] == rate["median"] > 0 for rate in rates.values())
    for name in ("512", "128-896", "16-128"):
        assert abs(ratios[name] - rates[name]["best"] / rates["plain"]["best"]) < 0.01
    assert all(record[name] for name in ("hardware", "torch", "commit", "date", "command"))


def test_conversion_there_and_back_as_a_command(tmp_path):
    source = ROOT / "tests" / "reference" / "mom_tiny" / "shared"
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert("--from-format", "fla-mom", "--source", source, "--target", ours)[0] == 0
    assert convert("--to-format", "fla-mom", "--source", ours, "--target", back)[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], w) for name, w in after.items())
    refused = convert("--from-format", "fla-mom", "--source", tmp_path, "--target", back)
    assert refused == (1, f"{tmp_path}: no *.safetensors there\n")


def test_the_doctor_knows_every_op():
    """It also prints the reasons of ``auto`` and the limits of Triton's kernels, which it reads from the ops."""
    said = dict(line.split(maxsplit=1) for line in run(script="doctor.py").splitlines())
    ops = {name for name in memlm_kernels.__all__ if name.islower() and name not in ("choose", "set_backend")}
    assert ops | {"torch", "triton", "device"} <= said.keys()
    for op in ("delta_rule", "chunk_topk", "prefix_window_attention", "merge_topk", "neural_memory"):
        if not torch.cuda.is_available():
            assert ", because Triton's interpreter is for tests; triton can run on request;" in said[op]
        assert "triton's kernels " in said[op]
    assert "take keys of at most 256 channels" in said["delta_rule"]
    assert "take heads of at most 256; triton's kernels take at most 32 heads" in said["chunk_sparse_attention"]
    assert said["neural_memory"].count("triton's kernels ") == 4


def test_roofline_counts_what_kernels_move():
    forward = run("--op", "segment_mean_pool", script="roofline.py").splitlines()[2]
    # It reads tokens of 8 x 128 in bf16 and the segments' ends, and writes an fp32 mean of each 64 tokens.
    gb = (8 * 4096 * 1024 * 2 + 8 * 64 * 1024 * 4 + 8 * 65 * 8) / 1e9
    assert forward.startswith(f"| `segment_mean_pool`, forward | {gb:.3g} | 0 | {1e3 * gb / 4.8:.0f}, 0 us |")


def test_recorded_launches_leave_no_arbitrary_integers(monkeypatch):
    """Attention reads the chunks of a choice that no kernel made."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    roofline, ops = (importlib.import_module(name) for name in ("roofline", "benchmark_kernels"))
    name = "chunk_sparse_attention, with selection"
    # New memory then holds the largest integer.
    torch.use_deterministic_algorithms(True)
    try:
        case = ops.OPS[name][0](name, "triton", torch.bfloat16, ops.Size(rows=1, tokens=1024, heads=4))
        found = roofline.parts(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(moved > 0 for moved, _ in found.values()) and {*found} == {"forward", "backward"}


def test_benchmark_times_what_the_goals_compare_first():
    planned = run("--plan", "--dtypes", "bfloat16", "float32", script="benchmark_kernels.py").splitlines()
    goals = run("--plan", "--part", "goals", script="benchmark_kernels.py").splitlines()
    assert planned[: len(goals)] == goals and len(set(planned)) == len(planned)
    long = (
        "chunk_sparse_attention, with selection: triton, torch.bfloat16, 131072 tokens, 16 heads, forward and backward"
    )
    assert long in goals and goals[2] == "route_documents: triton, torch.bfloat16, 4096 tokens, 16 heads, forward"
    assert goals[-1] == "neural_memory: triton, torch.bfloat16, 131072 tokens, 1 heads, forward and backward"
    assert "linear_attention, channels: fla, torch.bfloat16, 4096 tokens, 16 heads, forward and backward" in goals
    assert "delta_rule, decay: triton, torch.float32, 1 tokens, 16 heads, forward" in planned[len(goals) :]


# gpu_accuracy.py measures in another process too, in test_gpu_suite.py.
@pytest.mark.parametrize("where", [("--inline",), pytest.param((), marks=pytest.mark.slow)], ids=["here", "elsewhere"])
def test_benchmark_of_the_kernels(tmp_path, where):
    """Every op and every backend that runs without a GPU; for the others it prints the reason."""
    out = tmp_path / "kernels.jsonl"
    sizes = ("--rows", "1", "--tokens", "32", "--heads", "1", "--chunks", "20", "--dtypes", "float32")
    # FlexAttention compiled for a CPU takes longer than all others together.
    eager = {"TRITON_INTERPRET": "0", "TORCH_COMPILE_DISABLE": "1"}
    started(*sizes, *where, "--out", str(out), script="benchmark_kernels.py", **eager)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    records = [line for line in lines if "op" in line]
    goals = [line for line in lines if "goal" in line]
    # No kernel runs here, so no goal is met, and each goal is reported as such.
    # FlexAttention has no backward on a CPU, so one is not judged.
    assert len(goals) == 10 and not any(line["met"] or line["ratio"] for line in goals)
    assert {line["tokens"] for line in goals if "with selection" in line["goal"]} == {64, 256, 1024}
    for backend in ("triton", "fla"):
        missing = [line["error"] for line in records if line["backend"] == backend]
        assert missing and all(f"backend='{backend}' cannot run here" in error for error in missing)
    errors = {
        record["error"] for record in records if "error" in record and record["backend"] in ("reference", "flash")
    }
    assert not errors and all(record["ms"] > 0 for record in records if "error" not in record)
    assert {record["op"] for record in records if record["backend"] == "reference" and "ms" in record} >= {
        "neural_memory",
        "route_documents, running",
        "merge_topk",
        "segment_mean_pool",
        "routed delta_rule",
        "routed delta_rule, its scans alone",
        "chunk_sparse_attention, with selection",
        "segmented_neural_memory",
    }
    assert all(record[name] for record in records for name in ("hardware", "torch", "triton", "commit", "date"))


def test_plain_attention_takes_no_more_operations_than_llama(monkeypatch):
    """And computes the same, which the script checks."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    operations = importlib.import_module("benchmark_peer").operations
    for case, (ours, llama) in operations("2x64x2", 24).items():
        assert ours <= 1.05 * llama, case


def test_random_numbers_do_not_depend_on_the_tests_before():
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(0)))
    assert (random.random(), np.random.rand()) == (random.Random(0).random(), np.random.RandomState(0).rand())


def test_a_layer_starts_few_kernels():
    """The 340M layers at 8 x 4,096 tokens: launches and bytes are counted without a GPU."""
    module = importlib.import_module("scripts.count_launches")
    memlm_kernels.testing.import_triton_ops()
    with memlm_kernels.set_backend("triton"):
        (mag, mag_back), (plain, plain_back) = (
            [count.total() for count in module.of_layer(overrides, lambda config: module.of_model(config, 8, 4096))]
            for overrides in module.SHIPPED
        )
    assert mag.launches <= 90 and mag_back.launches <= 160
    assert plain.launches <= 40 and plain_back.launches <= 50
    assert mag.bytes <= 7.0e9 and mag_back.bytes <= 14.67e9
    assert plain.ms > plain.bytes / module.BYTES and mag.ms + mag_back.ms <= 1.05 * (plain.ms + plain_back.ms)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_decoded_token_starts_few_kernels(fixed):
    """In an ordinary and in a fixed memory."""
    module = importlib.import_module("scripts.count_launches")
    memlm_kernels.testing.import_triton_ops()
    mag, plain = (
        module.of_layer(overrides, lambda config: module.of_token(config, 1, 20, fixed))[0].total()
        for overrides in module.SHIPPED
    )
    assert mag.launches <= 30 and plain.launches <= 15
