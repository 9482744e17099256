#!/usr/bin/env bash
# Makes the virtual environment (.venv, or $FLOWSPEC_VENV) with the given requirement files, once.
# Prints its python; says on stderr what it does: pip's own progress on a terminal, else its steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FLOWSPEC_VENV:-.venv}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    echo "error: FlowSpec needs Python 3.10 to 3.13, $python is $("$python" -V); set PYTHON" >&2
    exit 2
fi
stamp="$venv/flowspec-$(cat "$@" pyproject.toml | cksum | cut -d' ' -f1).ok"
step() { echo "setup $1/3, ${SECONDS} s: $2" >&2; }
if [ ! -e "$stamp" ]; then
    progress=--quiet
    [ ! -t 2 ] || progress=--progress-bar=on
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install)
    files=()
    for file in "$@"; do files+=(-r "$file"); done
    step 1 "virtual environment $venv"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    step 2 "packages of $* (some minutes, torch is most of it)"
    "${pip[@]}" "$progress" "${files[@]}" >&2
    step 3 "flowspec itself"
    "${pip[@]}" --quiet --no-deps -e . >&2
    touch "$stamp"
    echo "setup done after $SECONDS s" >&2
fi
echo "$venv/bin/python"
