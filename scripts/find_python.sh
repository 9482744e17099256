#!/usr/bin/env bash
# Prints the python to run flowspec with: $FLOWSPEC_PYTHON, else that of .venv, which may have been
# made by hand (on a Jetson, with NVIDIA's torch); where that lacks what is needed, setup.sh's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
has='import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, ("torch", "typer", "zmq"))))'
if [ -n "${FLOWSPEC_PYTHON:-}" ]; then
    echo "$FLOWSPEC_PYTHON"
elif .venv/bin/python -c "$has" 2>/dev/null; then
    echo .venv/bin/python
else
    exec bash scripts/setup.sh requirements.txt
fi
