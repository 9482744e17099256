#!/usr/bin/env bash
# One command: evaluate the strategies of config/run_config.py on real processes of this machine, or,
# with --emulate first, on an emulated cluster. All options of `flowspec bench` work and win:
#     run_pipe_eval.sh [--emulate] --datasets gsm8k --data-dir QUESTIONS --limit 5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
real=(--real)
if [ "${1:-}" = --emulate ]; then real=() && shift; fi
python="${FLOWSPEC_PYTHON:-$(bash scripts/setup.sh requirements.txt)}"
exec "$python" -m flowspec bench "${real[@]}" --run-config config/run_config.py "$@"
