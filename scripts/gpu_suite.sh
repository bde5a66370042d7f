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
# Most of the first minutes is compiling, each process on a core of its own. Before the export: nproc heeds it.
cores=$(nproc)
processes=$((cores < 16 ? cores : 16))
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
unset TRITON_INTERPRET
# Asked once, for what is written below makes the tree differ from it.
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}
export COMMIT
# Seconds until what runs now must have ended, $1 of them kept for what follows.
left() { echo $((525 - SECONDS - $1)); }
timeout 60 "$python" scripts/doctor.py 2>&1 | tee "$out/doctor.txt"
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n "$processes" --dist worksteal); fi
# Without the conftest, which imports all of memlm. A failed test does not keep the others from being timed, and one that
# is interrupted not from being told of.
timeout -s INT -k 15 "$(left 240)" env --default-signal=INT "$python" -m pytest \
    tests/kernels/test_{triton*,fla,outside,inputs}.py --noconftest -W default -p no:cacheprovider \
    -vv --tb short "${workers[@]}" 2>&1 | tee "$out/tests.txt"
status=$?
bench() {
    timeout -k 5 "$1" "$python" scripts/benchmark_kernels.py --out "$out/kernels.jsonl" --part "$2" \
        --processes "$processes"
}
bench "$(left 0)" goals
timed=$?
# The first tiles are what users run. What the best of them would give is timed in half of what is left.
if [ "$(left 0)" -ge 60 ]; then
    MEMLM_AUTOTUNE=1 bench "$(($(left 0) / 2))" goals
    bench "$(left 0)" rest
fi
# 124: out of time, with the lines so far written.
if [ "$status" -eq 0 ] && [ "$timed" -ne 124 ]; then status=$timed; fi
exit "$status"
