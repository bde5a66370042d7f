# Sourced by the other scripts: makes .venv (or reuses it) and installs this checkout with the extras in $1.
# Versions are those of constraints.txt. With $2 = lowest or newest, .venv-$2 gets the lowest or the newest versions that
# pyproject.toml allows, beside the same torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=.venv${2:+-$2}
if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $("$python" --version) is too old; memlm needs Python 3.11 or newer (PYTHON=python3.12 $0)" >&2; exit 2; }
    "$python" -m venv "$venv"
fi

constraints=constraints.txt
if [ $# -gt 1 ]; then
    constraints=$venv/constraints.txt
    grep ^torch= constraints.txt >"$constraints"
    if [ "$2" = lowest ]; then
        sed -n 's/^ *"\([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml | grep -v '^torch=' >>"$constraints"
    fi
fi

# A stamp file skips minutes of dependency resolution when nothing has changed.
stamp="$venv/.installed$1"
wanted=$(cat pyproject.toml "$constraints" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing memlm into $venv (minutes, the first time)"
    # torch first, pinned and alone, so that the next install keeps this build.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" torch
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".$1"
    echo "$wanted" >"$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH"
