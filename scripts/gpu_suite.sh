#!/usr/bin/env bash
# Test and time the kernels on a GPU, in nine minutes at most: ./scripts/gpu_suite.sh [OUT_DIRECTORY]
# Needs torch with its Triton and pytest, no network and no other dependency.
# flash-linear-attention is timed too if PYTHONPATH has it; otherwise the records say that it is missing.
# COMMIT=<name> names the commit of a checkout without history; PYTHON=<command> selects the Python.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
# The first minutes mostly compile, one process per core. Before the export, because nproc obeys it.
cores=$(nproc)
processes=$((cores < 16 ? cores : 16))
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
unset TRITON_INTERPRET
# Asked once, because files written below change the tree.
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}
export COMMIT
# Seconds that remain, less $1 reserved for later commands.
left() { echo $((525 - SECONDS - $1)); }
timeout 60 "$python" scripts/doctor.py 2>&1 | tee "$out/doctor.txt"
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n "$processes" --dist worksteal); fi
# Without the conftest, which imports all of memlm. Neither failed nor interrupted tests stop the timings.
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
# Users run the first tiles. The best tiles are timed in half of the remaining time.
if [ "$(left 0)" -ge 60 ]; then
    MEMLM_AUTOTUNE=1 bench "$(($(left 0) / 2))" goals
    bench "$(left 0)" rest
fi
# 124: out of time; the lines so far are written.
if [ "$status" -eq 0 ] && [ "$timed" -ne 124 ]; then status=$timed; fi
exit "$status"
