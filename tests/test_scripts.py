"""The benchmark script, run as its users run it, on a memory too small to say anything."""

import json
import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "benchmark_memory.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_benchmark_writes_a_line_for_each_measurement(tmp_path):
    out = tmp_path / "memory.jsonl"
    run("--suite", "smoke", "--repeats", "3", "--out", str(out))
    training, decoding = map(json.loads, out.read_text().splitlines())
    assert (training["what"], training["tokens"], training["chunk_size"], training["repeats"]) == ("memlm", 64, 8, 3)
    assert decoding["seen"] == 64
    for record in (training, decoding):
        for clock in ("cpu", "user", "wall"):
            rate = record[f"tokens_per_{clock}_second"]
            assert rate["best"] >= rate["median"] > 0
        assert record["peak_rss_mb"] >= record["base_rss_mb"] > 0
        assert all(record[name] for name in ("hardware", "torch", "commit", "date", "command", "version", "dtype"))
    assert len(run("--table", "--out", str(out)).strip().splitlines()) == 6
