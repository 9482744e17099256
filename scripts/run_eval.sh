#!/usr/bin/env bash
# The experiments of docs/schedule.md on emulated clusters; --help says which there are:
#     bash scripts/run_eval.sh table --data-dir QUESTIONS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${FLOWSPEC_PYTHON:-$(bash scripts/setup.sh requirements.txt)}"
exec "$python" scripts/eval_protocol.py "$@"
