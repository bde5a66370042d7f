#!/usr/bin/env bash
# What a GPU has to say about the kernels, in nine minutes at most: their tests, then their times.
# Needs torch with its Triton and pytest, no network and no other dependency: ./scripts/gpu_suite.sh [OUT_DIRECTORY]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels" OMP_NUM_THREADS=1
unset TRITON_INTERPRET
python scripts/doctor.py | tee "$out/doctor.txt"
workers=()
if python -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
# Without the conftest, which imports all of memlm. A failed test does not keep the others from being timed.
timeout 300 python -m pytest tests/kernels/test_triton*.py --noconftest -W default "${workers[@]}" | tee "$out/tests.txt"
status=$?
timeout 230 python scripts/benchmark_kernels.py --out "$out/kernels.jsonl"
exit "$status"
