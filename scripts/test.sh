#!/usr/bin/env bash
# The whole test suite, with linting and types. Arguments go to pytest: ./scripts/test.sh -k contract
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[dev]"
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
fi
python -m pytest "$@"
