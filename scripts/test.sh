#!/usr/bin/env bash
# The whole test suite, with linting and types. Arguments go to pytest: ./scripts/test.sh -k contract
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[dev,cpu-kernels]"
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    python scripts/compile_kernels.py --sample
fi
# One thread a worker: threads of several processes on the same cores wait for each other.
OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 "$@"
