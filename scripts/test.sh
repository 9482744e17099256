#!/usr/bin/env bash
# Sets up and runs every check: lint, format, types, tests. With --all as its first option it runs
# the slow tests too. Other options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
which=(-m "not slow")
if [ "${1:-}" = --all ]; then
    which=()
    shift
fi
python="$(bash scripts/setup.sh requirements.txt requirements_dev.txt)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest ${which[@]+"${which[@]}"} "$@"
