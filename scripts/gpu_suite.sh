#!/usr/bin/env bash
# What a GPU has to say about the kernels, in nine minutes at most: their tests, then their times.
# Needs torch with its Triton and pytest, no network and no other dependency: ./scripts/gpu_suite.sh [OUT_DIRECTORY]
# flash-linear-attention is timed beside ours where PYTHONPATH finds it; where not, the records say so.
# COMMIT=<name> tells what is measured where the checkout came without its history; PYTHON=<command> which Python.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
unset TRITON_INTERPRET
"$python" scripts/doctor.py 2>&1 | tee "$out/doctor.txt"
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
# Without the conftest, which imports all of memlm. A failed test does not keep the others from being timed.
timeout 290 "$python" -m pytest tests/kernels/test_triton*.py tests/kernels/test_peer.py --noconftest -W default \
    -p no:cacheprovider "${workers[@]}" 2>&1 | tee "$out/tests.txt"
status=$?
began=$SECONDS
bench() { timeout "$1" "$python" scripts/benchmark_kernels.py --out "$out/kernels.jsonl" --part "$2"; }
bench 225 goals
timed=$?
# The first tiles are what users run. What the best of them would give is timed in half of what is left.
left() { echo $(((225 + began - SECONDS) / $1)); }
if [ "$(left 1)" -ge 40 ]; then
    MEMLM_AUTOTUNE=1 bench "$(left 2)" goals
    bench "$(left 1)" rest
fi
# 124: out of time, with the lines so far written.
if [ "$status" -eq 0 ] && [ "$timed" -ne 124 ]; then status=$timed; fi
exit "$status"
