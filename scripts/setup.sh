#!/usr/bin/env bash
# Makes the virtual environment (.venv, or $FLOWSPEC_VENV) with the given requirement files, once.
# Prints its python; says on stderr what it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FLOWSPEC_VENV:-.venv}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    echo "error: FlowSpec needs Python 3.10 to 3.13, $python is $("$python" -V); set PYTHON" >&2
    exit 2
fi
stamp="$venv/flowspec-$(cat "$@" pyproject.toml | cksum | cut -d' ' -f1).ok"
if [ ! -e "$stamp" ]; then
    echo "setting up $venv (some minutes, once) ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    files=()
    for file in "$@"; do files+=(-r "$file"); done
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]}" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e . >&2
    touch "$stamp"
fi
echo "$venv/bin/python"
