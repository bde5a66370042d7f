#!/usr/bin/env bash
# The whole test suite, with linting and types. Arguments go to pytest: ./scripts/test.sh -k contract
# --lowest or --newest: the tests of models, memories and generation, with the lowest or the newest versions of the
# dependencies, in .venv-lowest or .venv-newest.
case "${1:-}" in --lowest | --newest)
    versions=${1#--}
    shift
    source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[dev,cpu-kernels]" "$versions"
    python -m pip list --disable-pip-version-check 2>/dev/null |
        grep -E '^(torch|transformers|accelerate|huggingface_hub|safetensors|tokenizers|peft|trl) '
    export OMP_NUM_THREADS=1
    # Old packages warn of each other.
    if [ "$versions" = lowest ]; then set -- -W default "$@"; fi
    exec python -m pytest -n auto --maxprocesses 8 \
        tests/test_{modeling,cache,transformers,memory_layer,peft,trainers,attached*}.py \
        tests/memory/test_contract.py "$@"
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[dev,cpu-kernels]"
# One thread per process: threads of several processes on the same cores slow each other down.
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    # On one core beside the compiler: types, and the tests with the longest sums as on CPUs without AVX-512, whose
    # products differ (Triton's interpreter multiplies with numpy).
    {
        mypy
        [ "$(uname -m)" != x86_64 ] || OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 python -m pytest -n0 \
            tests/kernels/test_triton.py -k "any_size or two_layers or documents"
    } &
    python scripts/compile_kernels.py --sample
    wait $!
fi
exec python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
