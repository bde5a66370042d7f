#!/usr/bin/env bash
# Prove and time the kernels on a GPU, in nine minutes at most: ./scripts/gpu_suite.sh [--dry-run] [OUT_DIRECTORY]
# Needs torch with its Triton, transformers and pytest; no network, no Hydra. Each part is a process with a limit of
# seconds, and writes to OUT_DIRECTORY/results.jsonl as it goes. flash-linear-attention is timed too if it is installed,
# if PYTHONPATH has it, or if wheels/ has its wheel. COMMIT=<name> names the commit of a copy without history,
# PYTHON=<command> the Python. --dry-run: every part on a CPU, with tiny sizes and Triton's interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry=()
# A dry run compiles nothing, and may share its CPU with others.
patience=1
if [ "${1:-}" = --dry-run ]; then
    dry=(--dry-run)
    patience=20
    shift
fi
out=${1:-benchmarks/gpu}
results=$out/results.jsonl
python=${PYTHON:-python3}
mkdir -p "$out"
# Before the export, because nproc obeys it. The first minutes mostly compile, one process per core.
cores=$(nproc)
processes=$((cores < 16 ? cores : 16))
# Unpacked, because Triton reads the source of its functions.
for wheel in wheels/*.whl; do
    [ ! -e "$wheel" ] || "$python" -m zipfile -e "$wheel" "$out/wheels"
done
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/scripts:$(realpath "$out")/wheels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 GPU_RECORDS=$results
# Asked once, because files written below change the tree.
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}
export COMMIT
unset TRITON_INTERPRET
sizes=(--dtypes bfloat16)
tests=(tests/kernels/test_{triton*,short_convolution,rms_norm,fla,outside,inputs}.py)
if [ ${#dry[@]} -gt 0 ]; then
    export TRITON_INTERPRET=1 GPU_DRY=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    sizes=(--dtypes float32 --rows 1 --tokens 16 --heads 1 --chunks 16 --op route_documents --inline)
    tests=(tests/kernels/test_triton_routed.py)
fi
status=0
# part NAME SECONDS COMMAND...: one line of the suite
part() {
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    timeout -s INT -k 10 "$((limit * patience))" env --default-signal=INT "$@" >"$out/$name.txt" 2>&1
    local code=$?
    echo "$name: $((SECONDS - begin)) of $limit s, exit $code ($out/$name.txt)"
    tail -n 3 "$out/$name.txt"
    # 124: out of time, and 5: no test to run; the results so far are written.
    case $code in 0 | 124 | 5) ;; *) status=1 ;; esac
}
# Without the conftest, which imports all of memlm.
pytest=("$python" -m pytest -p gpu_tests --noconftest -W default -p no:cacheprovider -q --tb short)
if [ ${#dry[@]} -eq 0 ] && "$python" -c "import xdist" 2>/dev/null; then pytest+=(-n "$processes" --dist worksteal); fi
part ceilings 20 "$python" scripts/gpu_ceilings.py --out "$results" "${dry[@]}"
part tests 170 "${pytest[@]}" "${tests[@]}"
# Triton brings two versions of ptxas and takes one by the architecture; here it gets the other.
bin=$("$python" -c 'import importlib.util as u; print(u.find_spec("triton").submodule_search_locations[0])')/backends/nvidia/bin
part again_mma 25 env GPU_AGAIN=1 DISABLE_MMA_V3=1 "${pytest[@]}" "${tests[@]}"
if [ ${#dry[@]} -eq 0 ]; then
    part again_ptxas 20 env GPU_AGAIN=1 TRITON_PTXAS_PATH="$bin/ptxas-blackwell" \
        TRITON_PTXAS_BLACKWELL_PATH="$bin/ptxas" "${pytest[@]}" "${tests[@]}"
fi
part accuracy 40 "$python" scripts/gpu_accuracy.py --out "$results" "${dry[@]}"
bench=("$python" scripts/benchmark_kernels.py --out "$results" --part goals --processes "$processes" "${sizes[@]}")
part goals 125 "${bench[@]}"
part step 80 "$python" scripts/gpu_step.py --out "$results" "${dry[@]}"
part tuned 60 env MEMLM_AUTOTUNE=1 "${bench[@]}" --backend triton
exit $status
