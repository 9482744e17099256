#!/usr/bin/env bash
# Makes the virtual environment (.venv, or $FLOWSPEC_VENV) with the given requirement files, once.
# Prints its python; says on stderr what it does: pip's own progress on a terminal, else its steps.
# What an interrupted set-up or a moved folder left is mended; see scripts/make_venv.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; install Python 3.10 to 3.13 (Debian, Ubuntu: sudo apt install python3 python3-venv), or set PYTHON" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    echo "error: FlowSpec needs Python 3.10 to 3.13, $python is $("$python" -V); set PYTHON" >&2
    exit 2
fi
exec "$python" scripts/make_venv.py "$@"
